//! libxl's context: loading the library, its logger, its children, and what a program must
//! settle with it once. The calls themselves are in [`super::ffi`].
//!
//! The logger is libxentoollog's own, on this process's `stderr`: a logger is a table of C
//! functions of which one takes a `va_list`, which Rust cannot implement.
//!
//! # Safety
//! Everything here rests on `libxl.h` and `libxl_event.h`, and on [`Context`] owning what it
//! points at: the library, the logger and the record of children outlive the `libxl_ctx`.
#![allow(unsafe_code)]

use std::ffi::{OsStr, c_void};
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libloading::Library;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use rxl_xen_sys::libxl as xl;
use rxl_xen_sys::stable::{self, xentoollog_logger};

use super::held::HeldStart;
use super::{LogOptions, OpenError, library};

/// Names the save helper that libxl is to run (read by libxl at each save and restore).
const SAVE_HELPER: &str = "LIBXL_SAVE_HELPER";

unsafe extern "C" {
    /// Of C's standard library; set before `main` (stdio.h).
    static stderr: *mut libc::FILE;
}

/// libxl's context, with all that it needs to live.
pub(super) struct Context {
    pub(super) api: xl::Libxl,
    ctx: NonNull<xl::libxl_ctx>,
    logger: NonNull<xentoollog_logger>,
    helper: Arc<HelperSlot>,
}

// SAFETY: "From the point of view of the application (ie, libxl's caller), struct libxl_ctx* is
// threadsafe" (libxl.h, "libxl memory management"). The logger writes whole lines through stdio,
// which locks, and is otherwise used by libxl under the context's lock.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("helper", &self.helper).finish_non_exhaustive()
    }
}

impl Context {
    /// Loads this host's libxl and connects to Xen.
    pub(super) fn open(options: LogOptions) -> Result<Context, OpenError> {
        let (api, library) = load()?;
        let logger = create_logger(options)?;
        let mut ctx = ptr::null_mut();
        // SAFETY: `ctx` is written only on success; the logger is not null (libxl would crash)
        // and is destroyed after the context.
        let rc = unsafe {
            api.libxl_ctx_alloc(&raw mut ctx, xl::LIBXL_VERSION.cast_signed(), 0, logger.as_ptr())
        };
        let Some(ctx) = NonNull::new(ctx).filter(|_| rc == 0) else {
            // SAFETY: made above, and nothing uses it: there is no context.
            unsafe { stable::xtl_logger_destroy(logger.as_ptr()) };
            return Err(OpenError::NoXen { library, rc });
        };
        let helper = Arc::new(HelperSlot::default());
        // SAFETY: the context is new, so it has no children; the hooks are static, and the record
        // behind `user` is owned by the value made below, which frees the context first.
        unsafe {
            api.libxl_childproc_setmode(
                ctx.as_ptr(),
                &raw const CHILD_HOOKS,
                Arc::as_ptr(&helper).cast::<c_void>().cast_mut(),
            );
        }
        Ok(Context { api, ctx, logger, helper })
    }

    /// The pointer that calls take. It is valid as long as `self` is.
    pub(super) fn raw(&self) -> *mut xl::libxl_ctx {
        self.ctx.as_ptr()
    }

    /// Where the save helper of the running operation is noted.
    pub(super) fn helper(&self) -> &HelperSlot {
        &self.helper
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: this is the only owner and no call is under way, because calls borrow `self`.
        unsafe { self.api.libxl_ctx_free(self.raw()) };
        // SAFETY: the context, its only user, is gone.
        unsafe { stable::xtl_logger_destroy(self.logger.as_ptr()) };
    }
}

/// The first library that loads and has all functions, with its name.
fn load() -> Result<(xl::Libxl, PathBuf), OpenError> {
    let mut refused = Vec::new();
    for path in library::candidates() {
        // SAFETY: libxenlight's and its dependencies' initialisers set up nothing but their own
        // data. (Whoever can replace it can replace this program.)
        let found = unsafe { Library::new(&path) };
        // SAFETY: the types of the functions are those of the headers of 4.17, and equal in all
        // releases of `library` (see the module documentation of `libxl`).
        let api = found.and_then(|found| unsafe { xl::Libxl::from_library(found) });
        match api {
            Ok(api) => return Ok((api, path)),
            Err(e) => refused.push(format!("{}: {e}", path.display())),
        }
    }
    Err(OpenError::NoLibrary { advice: library::advice(), refused })
}

fn create_logger(options: LogOptions) -> Result<NonNull<xentoollog_logger>, OpenError> {
    // SAFETY: nobody in this process assigns `stderr`.
    let stream = unsafe { stderr };
    // SAFETY: the stream is open as long as the process is; destroying the logger leaves it so.
    let logger =
        unsafe { stable::xtl_createlogger_stdiostream(stream, options.level(), options.flags()) };
    NonNull::new(logger.cast()).ok_or(OpenError::Logger)
}

/// SIGCHLD is libxl's, but it reaps only its own children: this program waits for its own by
/// their pids. In libxl's other modes it would reap those too.
static CHILD_HOOKS: xl::libxl_childproc_hooks = xl::libxl_childproc_hooks {
    chldowner: xl::libxl_sigchld_owner_libxl_always_selective_reap,
    fork_replacement: Some(fork_and_note),
    reaped_callback: None,
};

/// What libxl calls for `fork`: it lets go of what was held back for the helper, forks, and notes
/// the child as the operation's save helper if it is the first one. `user` is the [`HelperSlot`].
///
/// The child gets SIGTERM's default action before it can get the signal: until it has become the
/// helper it would otherwise run this program's handler, which takes the signal away from it.
unsafe extern "C" fn fork_and_note(user: *mut c_void) -> libc::pid_t {
    // SAFETY: `user` is what `Context::open` gave, and outlives the context that calls this.
    let slot = unsafe { &*user.cast_const().cast::<HelperSlot>() };
    slot.release();
    let before = hold_back_sigterm();
    // SAFETY: the child returns to libxl, which only sets up descriptors and execs; of this
    // program nothing runs in it but the system calls below.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: async-signal-safe, and the handler is this process's alone now.
        unsafe { libc::signal(libc::SIGTERM, libc::SIG_DFL) };
    }
    // SAFETY: as `errno` of a fork that failed is libxl's, which this keeps: it cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    if let Some(child) = Pid::from_raw(pid).filter(|_| pid > 0) {
        slot.note(child);
    }
    pid
}

/// Blocks SIGTERM in this thread; the mask from before comes back.
fn hold_back_sigterm() -> libc::sigset_t {
    // SAFETY: a set of signals is plain bits.
    let (mut term, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
    // SAFETY: a set on this stack and a valid signal.
    unsafe { libc::sigaddset(&raw mut term, libc::SIGTERM) };
    // SAFETY: sets on this stack.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const term, &raw mut before) };
    before
}

/// Which process is the save helper of the operation that runs, and what is held for it.
#[derive(Debug, Default)]
pub(super) struct HelperSlot {
    helper: Mutex<Helper>,
    stream: Mutex<Option<HeldStart>>,
}

#[derive(Debug, Default)]
enum Helper {
    /// No operation runs, or the helper cannot be told.
    #[default]
    Unknown,
    /// The next child will be it: libxl forks nothing else before it in a save or restore.
    Awaited {
        /// Whether it gets its SIGTERM as soon as it exists.
        doomed: bool,
    },
    /// A pidfd of it, which never means another process.
    Runs(OwnedFd),
}

/// What became of a [`HelperSlot::terminate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// The helper has its SIGTERM.
    Now,
    /// It will have it when it starts.
    Later,
    /// There is no helper (any more).
    Nobody,
}

impl HelperSlot {
    /// The next child is the helper.
    pub(super) fn expect(&self) {
        *self.lock() = Helper::Awaited { doomed: false };
    }

    /// The operation is over.
    pub(super) fn forget(&self) {
        *self.lock() = Helper::Unknown;
    }

    /// Has the helper get a SIGTERM.
    pub(super) fn terminate(&self) -> Told {
        match &mut *self.lock() {
            Helper::Awaited { doomed } => {
                *doomed = true;
                Told::Later
            }
            Helper::Runs(pidfd) if pidfd_send_signal(&*pidfd, Signal::TERM).is_ok() => Told::Now,
            Helper::Runs(_) | Helper::Unknown => Told::Nobody,
        }
    }

    /// Libxl's child: the first one is the helper. It is not reaped before this returns, so its
    /// pid is still its own.
    fn note(&self, child: Pid) {
        let mut helper = self.lock();
        let Helper::Awaited { doomed } = *helper else { return };
        if doomed && let Err(e) = kill_process(child, Signal::TERM) {
            tracing::error!("libxl's save helper cannot be told to end: {e}");
        }
        // A kernel without pidfds (before 5.3) leaves cancelling to libxl_ao_abort.
        *helper = pidfd_open(child, PidfdFlags::empty()).map_or(Helper::Unknown, Helper::Runs);
    }

    /// Holds back what is written to `stream` until the helper starts, and gives what libxl is to
    /// write to.
    pub(super) fn hold(&self, stream: BorrowedFd<'_>) -> io::Result<RawFd> {
        let held = HeldStart::new(stream)?;
        let descriptor = held.descriptor();
        *self.stream() = Some(held);
        Ok(descriptor)
    }

    /// The helper is about to start: the stream is its own, if anything is held back.
    fn release(&self) {
        if !matches!(*self.lock(), Helper::Awaited { .. }) {
            return;
        }
        let given_up = || matches!(*self.lock(), Helper::Awaited { doomed: true });
        let released = self.stream().as_mut().map(|held| held.release(given_up));
        if released.is_some_and(|released| released.is_err()) {
            self.terminate();
        }
    }

    /// Ends the holding back, and tells whether the stream has its start.
    pub(super) fn let_go(&self) -> io::Result<()> {
        self.stream().take().map_or(Ok(()), HeldStart::finish)
    }

    fn stream(&self) -> MutexGuard<'_, Option<HeldStart>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Helper> {
        self.helper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes libxl run `path` as its save helper, in this process and those that it starts.
///
/// # Errors
/// Other threads run already: the environment may change only while there is one.
pub(super) fn set_save_helper(path: &OsStr) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the save helper has to be chosen before threads start"));
    }
    // SAFETY: this is the only thread, so nobody reads or writes the environment meanwhile.
    unsafe { std::env::set_var(SAVE_HELPER, path) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fork_a_sleeper(slot: &HelperSlot) -> Pid {
        let user = ptr::from_ref(slot).cast::<c_void>().cast_mut();
        // SAFETY: `user` is a slot that lives on this stack.
        let pid = unsafe { fork_and_note(user) };
        if pid == 0 {
            // SAFETY: async-signal-safe; the child does nothing else.
            unsafe { libc::pause() };
            // SAFETY: likewise.
            unsafe { libc::_exit(0) };
        }
        Pid::from_raw(pid).unwrap()
    }

    fn wait(pid: Pid) -> Option<i32> {
        let options = rustix::process::WaitOptions::empty();
        let (_, status) = rustix::process::waitpid(Some(pid), options).unwrap().unwrap();
        status.terminating_signal()
    }

    fn kill(pid: Pid) -> Option<i32> {
        kill_process(pid, Signal::KILL).unwrap();
        wait(pid)
    }

    const TERM: Option<i32> = Some(libc::SIGTERM);
    const KILL: Option<i32> = Some(libc::SIGKILL);

    #[test]
    fn the_first_child_of_an_operation_gets_the_sigterm_and_later_ones_do_not() {
        let slot = HelperSlot::default();
        assert_eq!(slot.terminate(), Told::Nobody);
        slot.expect();
        let helper = fork_a_sleeper(&slot);
        let other = fork_a_sleeper(&slot);
        assert_eq!(slot.terminate(), Told::Now);
        assert_eq!(wait(helper), TERM);
        assert_eq!(slot.terminate(), Told::Nobody, "a reaped process cannot be signalled");
        assert_eq!(kill(other), KILL);
    }

    #[test]
    fn a_helper_that_is_yet_to_start_gets_its_sigterm_then() {
        let slot = HelperSlot::default();
        slot.expect();
        assert_eq!(slot.terminate(), Told::Later);
        assert_eq!(wait(fork_a_sleeper(&slot)), TERM);
    }

    #[test]
    fn a_child_outside_an_operation_is_never_signalled() {
        let slot = HelperSlot::default();
        slot.expect();
        slot.forget();
        let child = fork_a_sleeper(&slot);
        assert_eq!(slot.terminate(), Told::Nobody);
        assert_eq!(kill(child), KILL);
    }

    #[test]
    fn the_save_helper_is_not_changed_under_other_threads() {
        // The test harness itself runs threads.
        let before = std::env::var_os(SAVE_HELPER);
        let other = std::thread::spawn(std::thread::park);
        assert!(set_save_helper(OsStr::new("/bin/false")).is_err());
        assert_eq!(std::env::var_os(SAVE_HELPER), before);
        other.thread().unpark();
        other.join().unwrap();
    }
}
