//! How rxl's helpers move memory: alone, by workers, over links of their own; and workers that are
//! killed while they do.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rxl_migrate::fake::Rng;

/// The longest time between two workers that are killed.
const LIFE_MICROS_MAX: u64 = 8_000;

/// How memory is moved. Stock's helper takes no notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ways {
    /// The helper does it.
    #[default]
    Alone,
    /// So many processes share the stream.
    Workers(u8),
    /// So many threads do.
    Threads(u8),
    /// So many processes share the stream, one of which is killed meanwhile.
    WorkerKilled(u8),
    /// Over so many links, by processes.
    Links(u8),
    /// The same, encrypted.
    Sealed(u8),
    /// Over so many links, or by one process, and compared by digests at the end.
    Verified(u8),
    /// Over links, and so many processes of either end are killed meanwhile.
    Killed(u8, u32),
}

impl std::fmt::Display for Ways {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ways::Alone => f.write_str("one process"),
            Ways::Workers(count) => write!(f, "{count} workers"),
            Ways::Threads(count) => write!(f, "{count} threads"),
            Ways::WorkerKilled(count) => write!(f, "{count} workers, one of them killed"),
            Ways::Links(count) => write!(f, "{count} links"),
            Ways::Sealed(count) => write!(f, "{count} encrypted links"),
            Ways::Verified(0) => f.write_str("one process, digests"),
            Ways::Verified(count) => write!(f, "{count} links, digests"),
            Ways::Killed(count, kills) => write!(f, "{count} links, {kills} workers killed"),
        }
    }
}

impl Ways {
    /// Tells the helper that `command` starts.
    pub(crate) fn tell(self, command: &mut Command) {
        let workers = match self {
            Ways::Workers(count) | Ways::WorkerKilled(count) => count.to_string(),
            Ways::Threads(count) => format!("{count}:thread"),
            _ => "1".to_owned(),
        };
        command.env("RXL_WORKERS", workers);
        command.env("RXL_VERIFY", if self.is_verified() { "1" } else { "" });
        if let Ways::Links(count)
        | Ways::Sealed(count)
        | Ways::Verified(count @ 1..)
        | Ways::Killed(count, _) = self
        {
            let no_encrypt = if matches!(self, Ways::Sealed(_)) { "" } else { "1" };
            command.env("RXL_NO_ENCRYPT", no_encrypt);
            command.env("RXL_ADDRESSES", "127.0.0.1,127.0.0.2,127.0.0.3,::1");
            command.env("RXL_STREAMS", count.to_string());
        }
    }

    /// Whether memory is compared by digests. Stock's verifier does not know such a stream.
    #[must_use]
    pub fn is_verified(self) -> bool {
        matches!(self, Ways::Verified(_))
    }

    /// Whether connections are lost, and the helper warns of it.
    pub(crate) fn may_lose(self) -> bool {
        matches!(self, Ways::Killed(..))
    }

    /// Kills workers of the helper with this pid, if some are to be killed.
    pub(crate) fn kill_workers(self, helper: u32, seed: u64) -> Option<Killer> {
        match self {
            Ways::WorkerKilled(_) => Some(Killer::start(helper, 1, seed)),
            Ways::Killed(_, kills) => Some(Killer::start(helper, kills, seed)),
            _ => None,
        }
    }
}

/// Kills children of a process at random times, until it is dropped.
#[derive(Debug)]
pub(crate) struct Killer {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Killer {
    fn start(helper: u32, mut kills: u32, seed: u64) -> Killer {
        let ended = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            let mut rng = Rng::new(seed ^ u64::from(helper));
            while kills > 0 && !over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(rng.next() % LIFE_MICROS_MAX));
                let workers = children(helper);
                let which = usize::try_from(rng.next() % 64).unwrap_or(0);
                let Some(worker) = workers.get(which % workers.len().max(1)) else { continue };
                if kill_process(*worker, Signal::KILL).is_ok() {
                    kills -= 1;
                }
            }
        });
        Killer { ended, thread: Some(thread) }
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The children of a process.
fn children(process: u32) -> Vec<Pid> {
    let list = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    let list = list.unwrap_or_default();
    list.split_ascii_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}
