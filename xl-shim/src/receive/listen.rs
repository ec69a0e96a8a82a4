//! `rxl migrate-receive --listen`: receives from `rxl migrate --tls`, without ssh.
//!
//! Who may send is who has a certificate that `--tls-peer-ca` has signed. For each migration there
//! is an `rxl migrate-receive` of its own, between two pipes, as ssh would start it; this process
//! moves bytes ([`rxl_toolstack::secure`]).

use std::env;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rxl_toolstack::secure::listener::Visitor;
use rxl_toolstack::secure::relay::Until;
use rxl_toolstack::secure::{Credentials, Listener, relay};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::Exit;
use crate::cli::{Globals, ReceiveArgs};
use crate::output::Screen;

/// Where to listen: `[ADDR:]PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// `None`: at all addresses.
    address: Option<SocketAddr>,
    port: u16,
}

impl std::str::FromStr for Place {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Place, Self::Err> {
        if let Ok(port) = text.parse() {
            return Ok(Place { address: None, port });
        }
        let address: SocketAddr =
            text.parse().map_err(|_| "PORT, ADDRESS:PORT or [IPV6-ADDRESS]:PORT is wanted")?;
        Ok(Place { address: Some(address), port: address.port() })
    }
}

impl Place {
    /// Those to try, in order: a host may have no IPv6.
    fn addresses(self) -> Vec<SocketAddr> {
        let any = || {
            let all = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
            all.map(|ip| SocketAddr::new(ip, self.port)).to_vec()
        };
        self.address.map_or_else(any, |address| vec![address])
    }
}

/// Receives one domain, or one after the other.
pub(crate) fn run(globals: &Globals, args: &ReceiveArgs, place: Place) -> anyhow::Result<Exit> {
    let screen = Screen::stderr();
    let mut listener = open(place, &Credentials::read(&args.tls.files())?)?;
    let (wake, waker) = UnixStream::pair().context("making a socket")?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        pipe::register(signal, waker.try_clone()?).context("waiting for signals")?;
    }
    screen.line(&format!("rxl: listening on {}", listener.address()?));
    let mut receivers: Vec<JoinHandle<io::Result<ExitStatus>>> = Vec::new();
    while !is_readable(&wake)? {
        for visitor in listener.wait(wake.as_fd())? {
            match visitor {
                Visitor::Refused(from, why) => {
                    screen.line(&format!("rxl: {from} is not let in: {why}"));
                }
                Visitor::Welcome(tls, from) => {
                    screen.line(&format!("rxl: {from} sends a domain"));
                    let started = start(globals, args);
                    let (child, input, output) = started.context("starting a receiver")?;
                    let receiver = thread::spawn(move || {
                        let relayed = relay::relay(*tls, output, input, Until::EndOfInput);
                        let mut child = child;
                        let ended = child.wait();
                        relayed.and(ended)
                    });
                    if !args.forever {
                        drop(listener);
                        return finish(receiver, &screen);
                    }
                    receivers.push(receiver);
                }
            }
        }
        receivers.retain(|receiver| !receiver.is_finished());
    }
    drop(listener);
    screen.line("rxl: nobody else is let in");
    for receiver in receivers {
        finish(receiver, &screen)?;
    }
    Ok(Exit::Success)
}

fn open(place: Place, credentials: &Credentials) -> anyhow::Result<Listener> {
    let mut failure = None;
    for address in place.addresses() {
        match Listener::open(address, credentials.server()?) {
            Ok(listener) => return Ok(listener),
            Err(error) => failure = Some((address, error)),
        }
    }
    let (address, error) = failure.context("no address to listen at")?;
    Err(error).with_context(|| format!("Cannot listen on {address}"))
}

/// An `rxl migrate-receive`, its standard input and its standard output.
fn start(globals: &Globals, args: &ReceiveArgs) -> io::Result<(Child, OwnedFd, OwnedFd)> {
    let mut command = Command::new(env::current_exe()?);
    let flags = [(globals.progress_cr, "-t"), (globals.timestamps, "-T")];
    command.args(flags.into_iter().filter(|(on, _)| *on).map(|(_, flag)| flag));
    command.args((0..globals.verbose).map(|_| "-v"));
    // What the file of defaults says has been taken into account, and it may say "listen".
    command.env("RXL_CONFIG", "");
    command.arg("migrate-receive");
    let options =
        [(args.no_monitor || args.foreground, "-e"), (args.debug, "-d"), (args.paused, "-p")];
    command.args(options.into_iter().filter(|(on, _)| *on).map(|(_, option)| option));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    match (child.stdin.take(), child.stdout.take()) {
        (Some(input), Some(output)) => Ok((child, input.into(), output.into())),
        _ => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

fn finish(receiver: JoinHandle<io::Result<ExitStatus>>, screen: &Screen) -> anyhow::Result<Exit> {
    match receiver.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())) {
        Ok(status) if status.success() => Ok(Exit::Success),
        Ok(_) => Ok(Exit::Failed),
        Err(error) => {
            screen.line(&format!("rxl: the connection to the sender: {error}"));
            Ok(Exit::Failed)
        }
    }
}

fn is_readable(wake: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(wake, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&Timespec::default()))? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_port_or_an_address_with_one() {
        let addresses = |text: &str| text.parse::<Place>().map(Place::addresses);
        let all = ["[::]:8002", "0.0.0.0:8002"].map(|text| text.parse().unwrap());
        assert_eq!(addresses("8002").unwrap(), all);
        assert_eq!(addresses("192.0.2.1:7").unwrap(), ["192.0.2.1:7".parse().unwrap()]);
        assert_eq!(addresses("[::1]:7").unwrap(), ["[::1]:7".parse().unwrap()]);
        for text in ["", "host2:8002", "65536", "192.0.2.1"] {
            assert!(addresses(text).is_err(), "{text}");
        }
    }
}
