//! `rxl restore`: makes a domain from a file that `rxl save` or `xl save` has written.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rxl_migrate::frame::DomId;
use rxl_migrate::xl::header::HeaderError;
use rxl_migrate::xl::restoring::RestoreEnd;
use rxl_toolstack::libxl::monitor;
use rxl_toolstack::lifecycle::Lifecycle;

use crate::Exit;
use crate::channel::Channel;
use crate::cli::{Globals, RestoreArgs, STDIO};
use crate::gate::{Gate, SignalWatch};
use crate::host::{self, Progress};
use crate::output::{self, Screen};
use crate::passthrough;
use crate::receive::{Arrival, Helpers, Saved};
use crate::status::Runs;
use crate::stdio;
use crate::words;

/// Restores the domain.
pub(crate) fn run(globals: &Globals, args: &RestoreArgs) -> anyhow::Result<Exit> {
    let screen = Screen::stderr();
    let (config, file) = args.files();
    let input = open(file)?;
    host::become_save_helper()?;
    let host = host::open(globals, Progress::Lines)?;
    let gate = Arc::new(Gate::new()?);
    let too_late = "rxl: too late to cancel: the domain is being started".to_owned();
    let signals = SignalWatch::start(gate.clone(), host.canceller(), screen.clone(), too_late)?;
    let channel = Channel::from_file(input, gate.clone())?;
    let helpers = Helpers { guard: true, monitor: !(args.foreground || args.no_monitor) };
    let mut arrival = Arrival::new(&host, channel, &gate, &screen, helpers);
    arrival.paused = args.paused;
    arrival.print_config = args.debug;
    arrival.saved = Some(Saved { name: file, config });
    arrival.runs = Some(Runs::of_this_host());
    let end = arrival.restore_from_file();
    let exit = tell(&screen, file, &end);
    arrival.board.end(exit);
    let made = arrival.made().map(|(domid, config)| (domid, config.to_owned()));
    // From here on Ctrl-C ends this process, and the domain stays.
    drop((arrival, signals));
    let Some((domid, config)) = made.filter(|_| exit == Exit::Success) else { return Ok(exit) };
    let Afterwards { clients, last } = Afterwards::of(args);
    for words in clients {
        start_xl(words, domid, &screen);
    }
    match last {
        Last::Leave => {}
        Last::Console => {
            let words = ["console".to_owned(), domid.to_string()].map(OsString::from);
            return Err(passthrough::exec_xl(&words));
        }
        Last::Watch => monitor::run(&host, domid, &config)?,
    }
    Ok(exit)
}

/// What is done once the domain is there.
#[derive(Debug, PartialEq, Eq)]
struct Afterwards {
    /// Words of the real `xl`, each list a process beside this one; the number comes after them.
    clients: Vec<&'static [&'static str]>,
    last: Last,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Leave,
    /// This process becomes the console's client.
    Console,
    /// It stays as the monitor.
    Watch,
}

impl Afterwards {
    fn of(args: &RestoreArgs) -> Afterwards {
        let stays = args.foreground && !args.no_monitor;
        let mut clients: Vec<&[&str]> = Vec::new();
        if args.autopass {
            clients.push(&["vncviewer", "--vncviewer-autopass"]);
        } else if args.vncviewer {
            clients.push(&["vncviewer"]);
        }
        if args.console && stays {
            clients.push(&["console"]);
        }
        let last = match (stays, args.console) {
            (true, _) => Last::Watch,
            (false, true) => Last::Console,
            (false, false) => Last::Leave,
        };
        Afterwards { clients, last }
    }
}

/// The file, or standard input.
fn open(file: &str) -> anyhow::Result<OwnedFd> {
    if file == STDIO {
        ensure!(
            !output::stdin_is_terminal(),
            "standard input is a terminal; {STDIO} needs a file or a program there"
        );
        return Ok(stdio::take().context("taking standard input")?.0);
    }
    let opened = File::open(file);
    let file = opened.map_err(|e| anyhow::Error::msg(words::fill(words::CANNOT_OPEN, &[&e])))?;
    Ok(file.into())
}

/// What the user is told, and the exit code.
pub(crate) fn tell(screen: &Screen, file: &str, end: &RestoreEnd<anyhow::Error>) -> Exit {
    let why = match end {
        RestoreEnd::Restored => return Exit::Success,
        RestoreEnd::Cancelled => "cancelled".to_owned(),
        RestoreEnd::NotMade(error) => explain(error),
        RestoreEnd::NotStarted => "it could not be started".to_owned(),
        RestoreEnd::Remains => {
            screen.line(&format!(
                "rxl: {file} was not restored, and a copy that must not run could not be \
                 destroyed: find it with xl list and destroy it"
            ));
            return Exit::Failed;
        }
    };
    screen.line(&format!("rxl: {file} was not restored, and nothing of it is here: {why}"));
    if matches!(end, RestoreEnd::Cancelled) { Exit::Cancelled } else { Exit::Failed }
}

fn explain(error: &anyhow::Error) -> String {
    match error.downcast_ref() {
        Some(HeaderError::Read(cause)) if cause.kind() == io::ErrorKind::UnexpectedEof => {
            "it ends within its header; it is not a saved domain, or was cut off".to_owned()
        }
        _ => format!("{error:#}"),
    }
}

/// Starts a client of the domain by the real `xl`. The domain is there without it, too.
fn start_xl(words: &[&str], domid: DomId, screen: &Screen) {
    let started = passthrough::find_xl().and_then(|xl| {
        let mut command = Command::new(&xl);
        command
            .args(words)
            .arg(domid.to_string())
            .spawn()
            .with_context(|| format!("running {}", xl.display()))
    });
    if let Err(error) = started {
        screen.line(&format!("rxl: {error:#}"));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Verb};

    fn afterwards(options: &[&str]) -> (Vec<String>, Last) {
        let line = [&["rxl", "restore"], options, &["file"]].concat();
        let Verb::Restore(args) = Cli::try_parse_from(line).unwrap().verb else { panic!() };
        let Afterwards { clients, last } = Afterwards::of(&args);
        (clients.into_iter().map(|words| words.join(" ")).collect(), last)
    }

    #[test]
    fn console_viewer_and_monitor_are_as_with_xl() {
        let vnc = "vncviewer".to_owned();
        let auto = "vncviewer --vncviewer-autopass".to_owned();
        let console = "console".to_owned();
        assert_eq!(afterwards(&[]), (vec![], Last::Leave));
        assert_eq!(afterwards(&["-c"]), (vec![], Last::Console));
        assert_eq!(afterwards(&["-V", "-c"]), (vec![vnc.clone()], Last::Console));
        assert_eq!(afterwards(&["--vncviewer"]), (vec![vnc], Last::Leave));
        assert_eq!(afterwards(&["-V", "-A"]), (vec![auto.clone()], Last::Leave));
        assert_eq!(afterwards(&["--vncviewer-autopass"]), (vec![auto], Last::Leave));
        assert_eq!(afterwards(&["-F"]), (vec![], Last::Watch));
        assert_eq!(afterwards(&["-F", "-c"]), (vec![console], Last::Watch));
        assert_eq!(afterwards(&["-F", "-e", "-c"]), (vec![], Last::Console));
    }
}
