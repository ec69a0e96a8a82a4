//! A worker of the save helper: a process, or a thread of this one, with a socket to talk over.
//!
//! A worker ends when its socket does, and its socket ends when it does. Processes are killed, and
//! die with the one that started them; a thread is woken from whatever it waits for.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};

use rustix::net::Shutdown;
use rustix::process::Signal;

use crate::abort::{self, Stop};
use crate::messages;

/// What workers are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Processes, each with an address space of its own, whose lock nobody else wants.
    #[default]
    Process,
    /// Threads of one process.
    Thread,
}

/// One worker, as whoever started it sees it. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Worker {
    socket: OwnedFd,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Process(Child),
    Thread {
        /// `None` once it has been waited for.
        thread: Option<JoinHandle<()>>,
        stop: Stop,
    },
}

impl Worker {
    /// Starts `program` with `args`. Its standard input is the socket, its standard output
    /// `output`.
    pub(crate) fn process(program: &OsStr, args: &[&str], output: Stdio) -> io::Result<Worker> {
        let (socket, theirs) = messages::pair()?;
        let mut command = Command::new(program);
        let child = command.args(args).stdin(theirs).stdout(output).spawn()?;
        Ok(Worker { socket, kind: Kind::Process(child) })
    }

    /// Starts a thread that does `work` with its end of the socket.
    pub(crate) fn thread(work: impl FnOnce(OwnedFd) + Send + 'static) -> io::Result<Worker> {
        let (socket, theirs) = messages::pair()?;
        let stop = Stop::new()?;
        let heeded = stop.clone();
        let start = move || {
            // The signal that ends the helper is for the thread that cleans up.
            heeded.heed();
            work(theirs);
        };
        let thread = Some(thread::Builder::new().name("worker".into()).spawn(start)?);
        Ok(Worker { socket, kind: Kind::Thread { thread, stop } })
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Lets it end. Dropping it waits for that, too.
    pub(crate) fn end(&mut self) {
        match &mut self.kind {
            Kind::Process(child) => {
                // It may have ended.
                let _ = child.kill();
            }
            Kind::Thread { .. } => {
                // One that waits for nothing notices where it looks for the next message.
                let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
            }
        }
    }

    /// How it ended, once its socket has.
    pub(crate) fn why_ended(&mut self) -> String {
        match &mut self.kind {
            Kind::Process(child) => match child.wait() {
                Ok(status) => format!("worker {} has ended ({status})", child.id()),
                Err(error) => error.to_string(),
            },
            Kind::Thread { .. } => "the worker has ended".to_owned(),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
        match &mut self.kind {
            Kind::Process(child) => {
                let _ = child.wait();
            }
            Kind::Thread { thread, stop } => {
                if let Some(thread) = thread.take() {
                    stop.end(thread);
                }
            }
        }
    }
}

/// Makes this process a worker's: it dies with its parent, and only its parent ends it.
///
/// # Errors
/// The system's.
pub fn become_worker() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    abort::ignore_terminal()
}
