//! One machine: the model, its memory in a file, and the socket on which programs reach it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::MemfdFlags;
use rxl_migrate::fake::{Host, HostSpec};
use tempfile::TempDir;

use crate::{client, wire};

/// How long the end of a program may take to be noticed.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// A machine to start.
#[derive(Clone, Copy, Debug)]
pub struct MachineSpec {
    /// Page frames.
    pub frames: u64,
    /// Determines in what order they are handed out.
    pub seed: u64,
    /// As after a boot: frames in order, and zero.
    pub fresh: bool,
}

/// What the threads of a machine share.
pub(crate) struct Shared {
    pub(crate) host: Host,
    /// A duplicate of the descriptor that the model has.
    memory: File,
    clients: Mutex<usize>,
    changed: Condvar,
    unknown: Mutex<Vec<String>>,
    /// Nanoseconds that every call takes at least.
    delay_ns: AtomicU64,
    /// Requests of clients so far.
    requests: AtomicU64,
    ended: AtomicBool,
}

impl Shared {
    /// Where clients find the memory: this process, and the descriptor's number.
    pub(crate) fn memory_place(&self) -> [u64; 2] {
        let fd = u64::try_from(self.memory.as_raw_fd()).unwrap_or(u64::MAX);
        [u64::from(std::process::id()), fd]
    }

    /// A hypercall that is not modelled.
    pub(crate) fn note_unknown(&self, what: String) {
        locked(&self.unknown).push(what);
    }

    pub(crate) fn note_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn delay(&self) -> Duration {
        Duration::from_nanos(self.delay_ns.load(Ordering::Relaxed))
    }

    fn clients_changed(&self, change: impl FnOnce(&mut usize)) {
        change(&mut locked(&self.clients));
        self.changed.notify_all();
    }
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine. Dropping it refuses new programs; those that it has keep it until they end.
pub struct Machine {
    shared: Arc<Shared>,
    socket: PathBuf,
    acceptor: Option<JoinHandle<()>>,
    /// Holds the socket.
    _directory: TempDir,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Machine {
    /// Starts a machine without domains.
    ///
    /// # Errors
    /// This host has no room for it, or allows no socket.
    pub fn start(spec: MachineSpec) -> Result<Machine> {
        let MachineSpec { frames, seed, fresh } = spec;
        let memory = rustix::fs::memfd_create("fake-xen", MemfdFlags::CLOEXEC)
            .context("Cannot make the machine's memory")?;
        let memory = File::from(memory);
        let file = Some(memory.try_clone().context("Cannot duplicate a descriptor")?);
        let directory = tempfile::tempdir().context("Cannot make a directory for the socket")?;
        let socket = directory.path().join("xen");
        let listener = UnixListener::bind(&socket).context("Cannot make the machine's socket")?;
        let shared = Arc::new(Shared {
            host: HostSpec { frames, seed, file, fresh }.build(),
            memory,
            clients: Mutex::default(),
            changed: Condvar::new(),
            unknown: Mutex::default(),
            delay_ns: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let acceptor = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || accept(&listener, &shared))
        };
        Ok(Machine { shared, socket, acceptor: Some(acceptor), _directory: directory })
    }

    /// The model.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.shared.host
    }

    /// The file that holds its memory: frame n is page n.
    #[must_use]
    pub fn memory_path(&self) -> PathBuf {
        let [pid, fd] = self.shared.memory_place();
        PathBuf::from(format!("/proc/{pid}/fd/{fd}"))
    }

    /// Lets `command` run on this machine, by way of the preloaded library `preload`.
    pub fn furnish(&self, command: &mut Command, preload: &std::path::Path) {
        command.env(wire::SOCKET_VARIABLE, &self.socket).env("LD_PRELOAD", preload);
    }

    /// Every call takes `time` at least.
    pub fn slow_down(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.shared.delay_ns.store(ns, Ordering::Relaxed);
    }

    /// How often programs have asked something of it: hypercalls, mappings, and their ends.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Hypercalls that were made and are not modelled, each by name or number.
    #[must_use]
    pub fn unknown_calls(&self) -> Vec<String> {
        locked(&self.shared.unknown).clone()
    }

    /// Waits until the machine has noticed that its programs are gone, and dropped what they had
    /// mapped.
    ///
    /// # Errors
    /// A program is still there after a while.
    pub fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut clients = locked(&self.shared.clients);
        while *clients > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{} programs still use the machine", *clients);
            let waited = self.shared.changed.wait_timeout(clients, left);
            clients = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Lets guests act on a thread of their own, besides what the model lets them do at every
    /// call: a few things every `pause`, until the result is dropped.
    #[must_use]
    pub fn run_guests(&self, pause: Duration) -> RunningGuests {
        let ended = Arc::new(AtomicBool::new(false));
        let thread = {
            let (ended, host) = (Arc::clone(&ended), self.host().clone());
            thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    host.let_guests_run();
                    thread::sleep(pause);
                }
            })
        };
        RunningGuests { ended, thread: Some(thread) }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the acceptor. If it cannot be woken, it is not waited for either.
        if UnixStream::connect(&self.socket).is_ok()
            && let Some(acceptor) = self.acceptor.take()
        {
            let _ = acceptor.join();
        }
    }
}

/// Guests at work, until it is dropped.
#[derive(Debug)]
pub struct RunningGuests {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for RunningGuests {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A guest that made a mistake has panicked, and said so.
            let failed = thread.join().is_err();
            assert!(!failed || thread::panicking(), "the guests' thread has panicked");
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for socket in listener.incoming() {
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let Ok(socket) = socket else { continue };
        shared.clients_changed(|clients| *clients += 1);
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            client::serve(socket, &shared);
            shared.clients_changed(|clients| *clients -= 1);
        });
    }
}
