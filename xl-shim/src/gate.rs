//! The signals that cancel a migration, and the gate that says up to when they do
//! ([`rxl_migrate::xl::gate`]). The transport does not see Ctrl-C at all ([`crate::transport`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::{io, thread};

use rustix::pipe::{PipeFlags, pipe_with};
use rxl_migrate::xl;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::output::Screen;

/// A gate that wakes whoever waits for something else.
#[derive(Debug)]
pub(crate) struct Gate {
    gate: xl::Gate,
    /// Readable from the cancellation on.
    wake: OwnedFd,
    waker: OwnedFd,
}

impl Gate {
    pub(crate) fn new() -> io::Result<Gate> {
        let (wake, waker) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Gate { gate: xl::Gate::new(), wake, waker })
    }

    /// Asks for the end. `false`: too late, or asked before.
    pub(crate) fn cancel(&self) -> bool {
        let first = self.gate.cancel();
        if first {
            // A byte in a pipe that nobody reads: every poll from now on sees it.
            let _ = rustix::io::write(&self.waker, &[0]);
        }
        first
    }

    /// The decision alone.
    pub(crate) fn gate(&self) -> &xl::Gate {
        &self.gate
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.gate.is_cancelled()
    }

    /// Becomes readable when it is cancelled.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// The thread that turns SIGINT, SIGTERM and SIGHUP into a cancellation, until it is dropped.
#[derive(Debug)]
pub(crate) struct SignalWatch {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalWatch {
    /// `canceller` ends a transfer, or the next one before it begins; called again, it does not
    /// wait for the guest. `too_late` is said of a signal after the commit.
    pub(crate) fn start(
        gate: Arc<Gate>,
        canceller: Box<dyn Fn() + Send + Sync>,
        screen: Screen,
        too_late: String,
    ) -> io::Result<SignalWatch> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let handle = signals.handle();
        let run = move || {
            for _ in signals.forever() {
                let first = gate.cancel();
                if !gate.is_cancelled() {
                    screen.line(&too_late);
                    continue;
                }
                screen.line(if first { "rxl: cancelling" } else { "rxl: cancelling at once" });
                canceller();
            }
        };
        let thread = thread::Builder::new().name("signals".into()).spawn(run)?;
        Ok(SignalWatch { handle, thread: Some(thread) })
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_cancels_and_a_second_one_hurries_and_after_the_commit_none_does() {
        use rustix::process::{Signal, getpid, kill_process};
        use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
        let calls = Arc::new(AtomicUsize::new(0));
        let watch = |gate: &Arc<Gate>, screen: &Screen| {
            let calls = calls.clone();
            let canceller = Box::new(move || {
                calls.fetch_add(1, SeqCst);
            });
            SignalWatch::start(gate.clone(), canceller, screen.clone(), "too late".into()).unwrap()
        };
        let wait_for = |screen: &Screen, text: &str| {
            while screen.text() != text {
                thread::yield_now();
            }
        };
        let (gate, screen) = (Arc::new(Gate::new().unwrap()), Screen::buffer());
        let watching = watch(&gate, &screen);
        kill_process(getpid(), Signal::INT).unwrap();
        wait_for(&screen, "rxl: cancelling");
        kill_process(getpid(), Signal::TERM).unwrap();
        wait_for(&screen, "rxl: cancelling\nrxl: cancelling at once");
        drop(watching);
        assert!(gate.is_cancelled());
        assert_eq!(calls.load(SeqCst), 2);

        let (gate, screen) = (Arc::new(Gate::new().unwrap()), Screen::buffer());
        assert!(gate.gate().commit());
        let watching = watch(&gate, &screen);
        kill_process(getpid(), Signal::HUP).unwrap();
        wait_for(&screen, "too late");
        drop(watching);
        assert!(!gate.is_cancelled());
        assert_eq!(calls.load(SeqCst), 2);
    }
}
