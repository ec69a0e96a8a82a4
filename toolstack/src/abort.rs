//! How the save helper is told to stop.
//!
//! libxl ends a helper by SIGTERM. The sender has to clean up then (log-dirty off), so the signal
//! must not kill it, but it must also not stay in a `write` to a peer that reads no more. The
//! handler therefore takes the stream away: it puts a descriptor in its place that cannot be
//! written, so that a write in progress ends with `EINTR`, as it does without `SA_RESTART`, and
//! every later one with `EBADF`. A flag alone would leave a gap between its test and the write.
//! Other calls that may wait for long (for a turn, a message) have no descriptor that could be
//! taken away. For them the signal comes again, as SIGALRM, every second from then on.
//!
//! `EINTR` reaches only the thread that took the signal, so other threads leave it to the main one
//! ([`Stop::heed`]). Whoever started them ends what they wait for, by a signal of their own, again
//! and again until they are gone ([`Stop::end`]).
//!
//! What it is not: the decision to stop. Ctrl-C on a terminal signals all processes of the group;
//! only libxl, or `rxl`, decides, and the helper ignores the terminal's signals.
//!
//! # Safety
//! A signal handler may only do what is async-signal-safe: here atomics, `dup2` and `alarm`, and
//! `errno` is put back.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

static REQUESTED: AtomicBool = AtomicBool::new(false);
thread_local! {
    /// What stops this thread.
    static STOP: RefCell<Option<Stop>> = const { RefCell::new(None) };
}
/// The stream and what takes its place; -1: none.
static STREAM: AtomicI32 = AtomicI32::new(-1);
static NULL: AtomicI32 = AtomicI32::new(-1);
/// After how many seconds the signal comes again.
const AGAIN_SECONDS: libc::c_uint = 1;
/// What ends a wait of another thread, and how often it is sent: it may come before the wait.
const INTERRUPT: libc::c_int = libc::SIGUSR1;
const INTERRUPT_EVERY: Duration = Duration::from_millis(10);

/// Whether SIGTERM came, or this thread is to stop.
#[must_use]
pub fn requested() -> bool {
    let stopped = |stop: &Stop| stop.0.load(Ordering::SeqCst);
    REQUESTED.load(Ordering::SeqCst) || STOP.with_borrow(|stop| stop.as_ref().is_some_and(stopped))
}

/// From now on SIGTERM makes [`requested`] true and `stream` useless, and the terminal's signals
/// are ignored ([`ignore_terminal`]). `stream` must stay open for the rest of the process.
///
/// # Errors
/// `/dev/null` cannot be opened, or a signal not be handled.
pub fn install(stream: BorrowedFd<'_>) -> io::Result<()> {
    ignore_terminal()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // For the rest of the process: the handler may run at any time.
    NULL.store(null.into_raw_fd(), Ordering::SeqCst);
    STREAM.store(stream.as_raw_fd(), Ordering::SeqCst);
    let handler: extern "C" fn(libc::c_int) = on_term;
    [libc::SIGTERM, libc::SIGALRM]
        .into_iter()
        .try_for_each(|signal| set_action(signal, handler as libc::sighandler_t))
}

/// Ignores SIGINT and SIGHUP, which a terminal sends to all that runs on it, and SIGPIPE, so that
/// a peer that went away is an error of the write. For the receiver that is all there is to do:
/// SIGTERM may kill it, because libxl destroys the domain that it was making.
///
/// # Errors
/// The system's.
pub fn ignore_terminal() -> io::Result<()> {
    [libc::SIGINT, libc::SIGHUP, libc::SIGPIPE]
        .into_iter()
        .try_for_each(|signal| set_action(signal, libc::SIG_IGN))
}

/// From now on SIGTERM is not for this thread.
pub(crate) fn leave_to_main_thread() {
    // SAFETY: a set of signals, for which zeros are memory like any other.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: makes it the empty set.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in [libc::SIGTERM, libc::SIGALRM] {
        // SAFETY: a set and a signal that exists.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: a complete set; where the old one goes is not wanted.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// How one thread stops another, whatever that waits for.
#[derive(Clone, Debug)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// For a thread that is to be started.
    ///
    /// # Errors
    /// A signal cannot be handled.
    pub(crate) fn new() -> io::Result<Stop> {
        let handler: extern "C" fn(libc::c_int) = on_interrupt;
        set_action(INTERRUPT, handler as libc::sighandler_t)?;
        Ok(Stop(Arc::default()))
    }

    /// From now on this is what stops this thread, and SIGTERM is for others.
    pub(crate) fn heed(self) {
        STOP.set(Some(self));
        leave_to_main_thread();
    }

    /// Waits until `thread`, which heeds this, has come to its end.
    pub(crate) fn end(&self, thread: JoinHandle<()>) {
        self.0.store(true, Ordering::SeqCst);
        while !thread.is_finished() {
            // SAFETY: a thread that has not been joined, and a signal that is handled.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), INTERRUPT) };
            thread::sleep(INTERRUPT_EVERY);
        }
        // If it panicked, it has said so.
        let _ = thread.join();
    }
}

/// That it is handled is all: a call that waits returns.
extern "C" fn on_interrupt(_signal: libc::c_int) {}

extern "C" fn on_term(_signal: libc::c_int) {
    // SAFETY: the address of this thread's `errno`, which always exists.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { errno.read() };
    REQUESTED.store(true, Ordering::SeqCst);
    let (null, stream) = (NULL.load(Ordering::SeqCst), STREAM.load(Ordering::SeqCst));
    // SAFETY: async-signal-safe; both were open when the handler was installed, and stay so.
    unsafe { libc::dup2(null, stream) };
    // SAFETY: async-signal-safe.
    unsafe { libc::alarm(AGAIN_SECONDS) };
    // SAFETY: as above.
    unsafe { errno.write(before) };
}

/// Sets what `signal` does; without `SA_RESTART`.
fn set_action(signal: libc::c_int, action: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: integers, a set and a pointer, for all of which zeros mean "none".
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = action;
    // SAFETY: `new` is complete, and `on_term` is async-signal-safe.
    match unsafe { libc::sigaction(signal, &raw const new, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter, Read, pipe};
    use std::os::fd::AsFd;
    use std::time::Instant;

    use rxl_migrate::hypervisor::StreamOut;

    use super::*;
    use crate::xc::{FdOut, Mapping, PIPE_BYTES};

    /// Runs `child` in a process of its own, which ends with what it returns, and then `parent`.
    /// What is tested changes the process for good. Returns the child's wait status.
    fn fork(child: impl FnOnce() -> io::Result<()>, parent: impl FnOnce(libc::pid_t)) -> i32 {
        // SAFETY: the child only makes system calls and allocates, which glibc allows.
        match unsafe { libc::fork() } {
            0 => {
                let code = if child().is_ok() { 0 } else { 1 };
                // SAFETY: ends this process.
                unsafe { libc::_exit(code) }
            }
            pid => {
                assert!(pid > 0);
                parent(pid);
                let mut status = 0;
                // SAFETY: our child, which nobody else waits for.
                assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                status
            }
        }
    }

    fn signal(pid: libc::pid_t, signal: libc::c_int) {
        // SAFETY: our child, not waited for yet.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    fn write(stream: &PipeWriter, length: usize) -> io::Result<()> {
        StreamOut::<Mapping>::write_all(&mut FdOut::new(stream), &vec![7; length])
    }

    fn expect_cancelled(result: io::Result<()>) -> io::Result<()> {
        match result {
            Err(e) if e.raw_os_error() == Some(libc::ECANCELED) => Ok(()),
            _ => Err(io::ErrorKind::Other.into()),
        }
    }

    fn wait_until_full(pipe: &PipeReader) {
        let end = Instant::now() + Duration::from_secs(30);
        while rustix::io::ioctl_fionread(pipe).unwrap() < PIPE_BYTES as u64 {
            assert!(Instant::now() < end, "the child does not write");
            thread::sleep(Duration::from_millis(2));
        }
        // It may still be on its way from a full pipe to its sleep.
        thread::sleep(Duration::from_millis(20));
    }

    #[test]
    fn sigterm_ends_a_write_that_nobody_reads_and_every_later_one() {
        let (mut reader, writer) = pipe().unwrap();
        let status = fork(
            || {
                install(writer.as_fd())?;
                expect_cancelled(write(&writer, 2 * PIPE_BYTES))?;
                expect_cancelled(write(&writer, 1))
            },
            |pid| {
                wait_until_full(&reader);
                signal(pid, libc::SIGTERM);
            },
        );
        assert_eq!(status, 0);
        drop(writer);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), PIPE_BYTES, "something was written after the signal");
    }

    #[test]
    fn sigterm_just_before_a_write_is_not_missed() {
        let (mut reader, writer) = pipe().unwrap();
        let status = fork(
            || {
                install(writer.as_fd())?;
                // SAFETY: to this process, whose handler is async-signal-safe.
                unsafe { libc::raise(libc::SIGTERM) };
                expect_cancelled(write(&writer, 2 * PIPE_BYTES))
            },
            |_| {},
        );
        assert_eq!(status, 0);
        drop(writer);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert!(got.is_empty());
    }

    #[test]
    fn sigterm_just_before_any_other_wait_is_not_missed() {
        let (reader, writer) = pipe().unwrap();
        let status = fork(
            || {
                install(writer.as_fd())?;
                // SAFETY: to this process, whose handler is async-signal-safe.
                unsafe { libc::raise(libc::SIGTERM) };
                match rustix::io::read(&reader, &mut [0; 1]) {
                    Err(rustix::io::Errno::INTR) if requested() => Ok(()),
                    _ => Err(io::ErrorKind::Other.into()),
                }
            },
            |_| {},
        );
        assert_eq!(status, 0);
    }

    #[test]
    fn the_terminals_signals_end_neither_process_nor_write() {
        let (mut reader, writer) = pipe().unwrap();
        let mut got = vec![0; 2 * PIPE_BYTES];
        let status = fork(
            || {
                install(writer.as_fd())?;
                write(&writer, 2 * PIPE_BYTES)
            },
            |pid| {
                wait_until_full(&reader);
                signal(pid, libc::SIGINT);
                signal(pid, libc::SIGHUP);
                signal(pid, libc::SIGPIPE);
                reader.read_exact(&mut got).unwrap();
            },
        );
        assert_eq!(status, 0);
    }

    #[test]
    fn sigterm_kills_a_receiver() {
        let (mut reader, writer) = pipe().unwrap();
        let status = fork(
            || {
                ignore_terminal()?;
                write(&writer, 1)?;
                thread::sleep(Duration::from_secs(60));
                Ok(())
            },
            |pid| {
                reader.read_exact(&mut [0]).unwrap();
                signal(pid, libc::SIGTERM);
            },
        );
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGTERM);
    }
}
