//! A thread that maps the next batch while this one is sent, and unmaps those that have been sent
//! or received.
//!
//! The kernel holds the address space's lock while it maps, and neither sending nor receiving takes
//! it, so that both go on at once. Of a PV guest what can be written is not left to this thread: it
//! is removed before its user goes on.
//!
//! What it is not: a way to map ([`super::foreign`]), or the choice of what comes next
//! (`rxl_migrate::source`).

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread;

use rxl_migrate::hypervisor::{Access, HvResult};

use super::foreign::{Disused, ForeignHandle, Mapping};
use crate::abort;

/// What may wait for it: what it is to map, and what it is to unmap. What is more is done by who
/// wants it, so that it does not fall behind.
const JOBS_MAX: usize = 2;

/// What the thread is to do.
enum Job {
    Map {
        handle: Arc<ForeignHandle>,
        domain: u32,
        frames: Vec<u64>,
        result: Sender<HvResult<Mapping>>,
    },
    Unmap(Disused),
}

/// How to reach the thread, which ends when nobody can any more and all is done.
pub(super) struct Helper(SyncSender<Job>);

impl Helper {
    /// Starts it; `None`: it cannot be had, and all goes on without.
    pub(super) fn start() -> Option<Helper> {
        let (jobs, for_thread) = sync_channel(JOBS_MAX);
        let work = move || {
            abort::leave_to_main_thread();
            for_thread.into_iter().for_each(Job::run);
        };
        let started = thread::Builder::new().name("mapper".into()).spawn(work);
        started
            .inspect_err(|error| tracing::debug!(%error, "nothing is mapped ahead"))
            .is_ok()
            .then_some(Helper(jobs))
    }

    /// Begins to map `frames` of `domain`; `None`: it has enough to do.
    pub(super) fn map(
        &self,
        handle: &Arc<ForeignHandle>,
        domain: u32,
        frames: &[u64],
    ) -> Option<Coming> {
        let (result, mapped) = channel();
        let (handle, frames) = (Arc::clone(handle), frames.to_vec());
        let coming = Coming { frames: frames.clone(), mapped };
        self.0.try_send(Job::Map { handle, domain, frames, result }).ok().map(|()| coming)
    }

    /// Has a mapping removed.
    pub(super) fn unmap(&self, disused: Disused) {
        match self.0.try_send(Job::Unmap(disused)) {
            Ok(()) => {}
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job.run(),
        }
    }
}

impl Job {
    fn run(self) {
        match self {
            Job::Map { handle, domain, frames, result } => {
                // Who does not want it any more has it removed.
                let _ = result.send(handle.map(domain, &frames, Access::Read));
            }
            Job::Unmap(disused) => disused.unmap(),
        }
    }
}

/// A mapping that has been announced.
pub(super) struct Coming {
    frames: Vec<u64>,
    mapped: Receiver<HvResult<Mapping>>,
}

impl Coming {
    /// Whether it is of just these frames.
    pub(super) fn is_of(&self, frames: &[u64]) -> bool {
        self.frames == frames
    }

    /// Waits for it. `None`: it does not come.
    pub(super) fn wait(self) -> Option<HvResult<Mapping>> {
        self.mapped.recv().ok()
    }
}
