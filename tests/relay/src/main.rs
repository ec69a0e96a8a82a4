//! `rxl-relay POINT DIRECTORY COMMAND…`, in the place of ssh: `-s "rxl-relay go /run/x ssh"`.
//!
//! It runs COMMAND, the transport proper, and passes everything on between it and rxl until the
//! migration comes to POINT ([`rxl_relay`]). Then it writes the word `held` to the fifo
//! DIRECTORY/held, and passes nothing on in that direction until there is a word in DIRECTORY/go:
//! `go`, or `cut`, which ends COMMAND and itself at once, as when a connection breaks. If the
//! migration ends without coming to POINT, the word is `missed`.
//!
//! Like ssh, it ends when the other end has ended, with the exit code of COMMAND.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio, exit};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rxl_relay::{Point, backward, forward};

/// Exit code where there is no connection any more, as ssh's.
const NO_CONNECTION: u8 = 255;

/// Who holds the migration, once.
struct Holder {
    point: Point,
    directory: PathBuf,
    transport: Pid,
    is_over: AtomicBool,
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("rxl-relay: {error:#}");
            ExitCode::from(NO_CONNECTION)
        }
    }
}

fn run() -> Result<u8> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: rxl-relay POINT DIRECTORY COMMAND...";
    let (point, directory) = (arguments.next().context(usage)?, arguments.next().context(usage)?);
    let program = arguments.next().context(usage)?;
    let (_, point) =
        Point::ALL.into_iter().find(|(name, _)| *name == point).context("no such point")?;
    let mut transport = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the transport")?;
    let pid = i32::try_from(transport.id()).ok().and_then(Pid::from_raw).context("no pid")?;
    let is_over = AtomicBool::new(false);
    let holder = Holder { point, directory: directory.into(), transport: pid, is_over };
    let to_target = transport.stdin.take().context("no input")?;
    let from_target = transport.stdout.take().context("no output")?;
    let (from_us, to_us) = (unbuffered(io::stdin())?, unbuffered(io::stdout())?);
    let holder: &'static Holder = Box::leak(Box::new(holder));
    // Ends with the process: nothing waits for a sender that has no more to say.
    thread::spawn(move || forward(from_us, to_target, &mut |point| holder.hold_at(point)));
    // A sender that is gone is no error of the transport.
    let _ = backward(from_target, to_us, &mut |point| holder.hold_at(point));
    let status = transport.wait().context("waiting for the transport")?;
    holder.missed();
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(NO_CONNECTION))
}

impl Holder {
    fn hold_at(&self, point: Point) {
        if point != self.point || self.is_over.swap(true, Ordering::SeqCst) {
            return;
        }
        match self.hold() {
            Ok(word) if word == "cut" => {
                let _ = kill_process(self.transport, Signal::KILL);
                exit(NO_CONNECTION.into());
            }
            Ok(_) => {}
            Err(error) => eprintln!("rxl-relay: {error}"),
        }
    }

    fn hold(&self) -> io::Result<String> {
        // Either waits for the one who opens the other end.
        fs::write(self.directory.join("held"), "held\n")?;
        let mut word = String::new();
        File::open(self.directory.join("go"))?.read_to_string(&mut word)?;
        Ok(word.trim().to_owned())
    }

    /// Says so if somebody waits.
    fn missed(&self) {
        if self.is_over.swap(true, Ordering::SeqCst) {
            return;
        }
        let flags = OFlags::WRONLY | OFlags::NONBLOCK;
        if let Ok(fifo) = rustix::fs::open(self.directory.join("held"), flags, Mode::empty()) {
            let _ = File::from(fifo).write_all(b"missed\n");
        }
    }
}

fn unbuffered(stream: impl AsFd) -> io::Result<File> {
    let descriptor: OwnedFd = stream.as_fd().try_clone_to_owned()?;
    Ok(File::from(descriptor))
}
