//! Moves bytes between two descriptors of this host and an encrypted connection, both ways, until
//! either end is done: what ssh is for a migration.

use std::io::{self, ErrorKind};
use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use crate::tls::Tls;

/// Bytes that are moved at a time: what a pipe of `rxl migrate` holds is four of these.
const PIECE_BYTES: usize = 256 << 10;
/// How long an address may take to answer, and the other end to show who it is.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// A connection on which nothing has been heard for so long is asked whether it is still there, so
/// often, this much apart: a peer whose host has died is noticed after a minute.
const KEEPALIVE: (Duration, u32, Duration) = (Duration::from_secs(30), 3, Duration::from_secs(10));

/// Connects to `host` at `port`, and sees that it has the certificate for that name.
///
/// # Errors
/// None of its addresses answers, it is somebody else, or it is silent.
pub fn connect(host: &str, port: u16, config: Arc<ClientConfig>) -> io::Result<Tls> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let mut failure = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, HANDSHAKE_TIME) {
            Ok(socket) => {
                let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
                let mut tls = Tls::over(prepared(socket.into())?, connection.into())?;
                shake_hands(&mut tls)?;
                return Ok(tls);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Sets what both ends want of a socket.
pub(super) fn prepared(socket: OwnedFd) -> io::Result<OwnedFd> {
    let (idle, count, interval) = KEEPALIVE;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, idle)?;
    sockopt::set_tcp_keepcnt(&socket, count)?;
    sockopt::set_tcp_keepintvl(&socket, interval)?;
    Ok(socket)
}

fn shake_hands(tls: &mut Tls) -> io::Result<()> {
    let until = Instant::now() + HANDSHAKE_TIME;
    while tls.is_handshaking() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        tls.flush_now()?;
        let flags = wanted(tls, true);
        wait(&[(tls.as_fd(), flags)], Some(left))?;
        match tls.advance() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
    // The last word of a client is still to be sent.
    tls.flush_now()
}

/// What to wait for on an encrypted connection.
fn wanted(tls: &Tls, reads: bool) -> PollFlags {
    let write = if tls.wants_write() { PollFlags::OUT } else { PollFlags::empty() };
    let read = if reads { PollFlags::IN } else { PollFlags::empty() };
    write | read
}

/// Waits until one of these can go on; those that have.
fn wait(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    timeout: Option<Duration>,
) -> io::Result<Vec<PollFlags>> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(polled.iter().map(PollFd::revents).collect()),
        Err(error) => Err(error.into()),
    }
}

/// When a relay is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// When the peer says goodbye, as ssh when the program at the other end has ended. The end of
    /// the input is told to the peer.
    Goodbye,
    /// At the end of the input, which the peer is told: that of the program that was started for
    /// it. A goodbye of the peer ends the output.
    EndOfInput,
}

/// Both directions.
struct Relay {
    tls: Tls,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    until: Until,
    /// What has arrived, and where of it is what is not written yet.
    arrived: Vec<u8>,
    unwritten: Range<usize>,
    /// Room for what is sent.
    sending: Vec<u8>,
}

/// Sends what comes from `input` and writes what arrives to `output`, until what `until` says, or
/// until a peer that is to say goodbye is not heard any more.
///
/// # Errors
/// The connection's; `input` or `output` cannot be used.
pub fn relay(tls: Tls, input: OwnedFd, output: OwnedFd, until: Until) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&output, true)?;
    let mut relay = Relay {
        tls,
        input: Some(input),
        output: Some(output),
        until,
        arrived: vec![0; PIECE_BYTES],
        unwritten: 0..0,
        sending: vec![0; PIECE_BYTES],
    };
    while relay.go_on()? {}
    Ok(())
}

impl Relay {
    /// Does what can be done, after waiting for something. `false`: it is done.
    fn go_on(&mut self) -> io::Result<bool> {
        self.tls.flush_now()?;
        if self.input.is_none() && self.until == Until::EndOfInput && !self.tls.wants_write() {
            return Ok(false);
        }
        while self.unwritten.is_empty() && self.output.is_some() {
            match self.tls.receive(&mut self.arrived) {
                Ok(0) if self.until == Until::Goodbye => return Ok(false),
                Ok(0) => self.output = None,
                Ok(count) => self.unwritten = 0..count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            if !self.write()? {
                return self.give_up();
            }
        }
        let socket = (self.tls.as_fd(), wanted(&self.tls, self.is_reading()));
        let output = self.output.as_ref().map(|output| {
            // That nobody reads it is seen without being asked for.
            let full = !self.unwritten.is_empty();
            (output.as_fd(), if full { PollFlags::OUT } else { PollFlags::empty() })
        });
        // What cannot be sent is not read either.
        let input = self.input.as_ref().filter(|_| !self.tls.wants_write());
        let input = input.map(|input| (input.as_fd(), PollFlags::IN));
        let fds: Vec<_> = [Some(socket), output, input].into_iter().flatten().collect();
        let (has_output, has_input) = (output.is_some(), input.is_some());
        let mut ready = wait(&fds, None)?.into_iter();
        let gone = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
        if ready.next().is_some_and(|ready| ready.intersects(gone)) && !self.is_reading() {
            return Err(ErrorKind::ConnectionReset.into());
        }
        if has_output && ready.next().is_some_and(|ready| ready.intersects(gone)) {
            return self.give_up();
        }
        if has_input && ready.next().is_some_and(|ready| !ready.is_empty()) {
            self.read()?;
        }
        if !self.unwritten.is_empty() && !self.write()? {
            return self.give_up();
        }
        Ok(true)
    }

    /// Whether what the peer sends is wanted now.
    fn is_reading(&self) -> bool {
        self.unwritten.is_empty() && self.output.is_some()
    }

    /// Takes what there is of the input.
    fn read(&mut self) -> io::Result<()> {
        let Some(input) = &self.input else { return Ok(()) };
        match rustix::io::read(input, &mut self.sending) {
            Ok(0) => {
                self.input = None;
                self.tls.say_goodbye();
            }
            Ok(count) => self.tls.put(self.sending.get(..count).unwrap_or_default())?,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Writes what the output takes now. `false`: nobody reads it.
    fn write(&mut self) -> io::Result<bool> {
        let Some(output) = &self.output else { return Ok(true) };
        let piece = self.arrived.get(self.unwritten.clone()).unwrap_or_default();
        match rustix::io::write(output, piece) {
            Ok(count) => self.unwritten.start += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::PIPE) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Nobody here wants to hear more. The peer sees the end, if it is not to hear more either.
    fn give_up(&mut self) -> io::Result<bool> {
        if self.until == Until::EndOfInput {
            (self.output, self.unwritten) = (None, 0..0);
            return Ok(true);
        }
        self.tls.say_goodbye();
        self.tls.flush_now()?;
        Ok(false)
    }
}
