//! Why a save or restore failed.

use std::io;

use crate::frame::Pfn;
use crate::hypervisor::{HvError, PolicyError};
use crate::stream::FormatError;

/// Result of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An end other than the wanted one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Xen or the kernel refused something.
    #[error(transparent)]
    Hv(#[from] HvError),
    /// The stream could not be written or read.
    #[error("{what}")]
    Stream {
        /// What was being written or read.
        what: &'static str,
        /// The descriptor's error.
        #[source]
        source: io::Error,
    },
    /// The toolstack did not do what it was asked.
    #[error("the toolstack failed to {what}")]
    Toolstack {
        /// What it was asked to do.
        what: &'static str,
        /// The channel's error.
        #[source]
        source: io::Error,
    },
    /// The stream holds something that it must not hold.
    #[error("the stream is not valid")]
    Format(#[from] FormatError),
    /// CPU policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The guest did not follow the request to suspend.
    #[error("the guest did not suspend")]
    NotSuspended,
    /// The user does not want a pause that long.
    #[error(
        "the guest writes its memory too fast: it would be suspended for about {} ms \
         (--max-pause allows a longer pause, --on-limit force any)",
        pause.as_millis()
    )]
    PauseTooLong {
        /// How long the guest would be suspended.
        pause: std::time::Duration,
    },
    /// The guest's own structures make no sense, or moved.
    #[error("guest")]
    Guest(#[from] GuestError),
    /// The hypervisor gives no memory for pages of the guest; `ENOMEM`.
    #[error(
        "no memory for more of the guest's pages: this host has too little (xl info, \
         free_memory), or the guest's memory was raised while it moved (xl mem-set); if so, try \
         again"
    )]
    NoMemory(#[source] io::Error),
    /// What has arrived is not what was sent.
    #[error(
        "{pages} pages or more differ from the source's (first: pfn {first}); look for memory \
         errors on both hosts (xl dmesg)"
    )]
    Differs {
        /// Pages that are known to differ.
        pages: usize,
        /// The first of them.
        first: Pfn,
    },
    /// The kind of guest is beyond this version.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A worker, or the way to it, broke.
    #[error("{what}")]
    Worker {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A worker could not send its batch.
    #[error("a worker failed: {0}")]
    Batch(String),
    /// Somebody asked for the end.
    #[error("cancelled")]
    Aborted,
    /// A bug in rxl: a state machine was fed an event that cannot happen in its state.
    #[error("bug in rxl: {event} while {state}")]
    Machine {
        /// The state's name.
        state: &'static str,
        /// The event's name.
        event: &'static str,
    },
}

impl Error {
    /// The error and its causes in one line.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What may be wrong with structures that a PV guest keeps in its own memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GuestError {
    /// A frame number that is not the guest's.
    #[error("{what}: mfn {mfn:#x} is not in its physical map")]
    ForeignFrame {
        /// Which field held it.
        what: &'static str,
        /// The frame.
        mfn: u64,
    },
    /// A page table that could not be normalised although the guest is suspended. Sending the
    /// guest without it would lose it, so this is fatal.
    #[error(
        "page table pfn {pfn} (level {level}) holds mfn {mfn:#x} at entry {entry}, which is not \
         in its physical map"
    )]
    Table {
        /// The table.
        pfn: Pfn,
        /// 1 to 4.
        level: u8,
        /// 0 to 511.
        entry: usize,
        /// The frame in the entry.
        mfn: u64,
    },
    /// A page that has to be ordinary memory, and is a page table or not there.
    #[error("the {what} (pfn {pfn}) is not ordinary memory")]
    NotOrdinary {
        /// What it should be.
        what: &'static str,
        /// Where the stream says it is.
        pfn: Pfn,
    },
    /// A control register that points to something else than a top-level page table.
    #[error("a vCPU runs on pfn {pfn}, which is not a top-level page table")]
    NotTopTable {
        /// Where the stream says it is.
        pfn: Pfn,
    },
    /// A superpage in a PV page table.
    #[error(
        "page table pfn {pfn} (level {level}) maps a superpage; such a guest cannot be migrated"
    )]
    Superpage {
        /// The table.
        pfn: Pfn,
        /// 2 to 4.
        level: u8,
    },
    /// The p2m was replaced while the guest moved.
    #[error("its p2m changed (generation {before} → {now}) during the migration")]
    P2mMoved {
        /// At the start.
        before: u64,
        /// Now.
        now: u64,
    },
    /// The p2m's description makes no sense.
    #[error("its p2m is not usable: {0}")]
    P2m(&'static str),
    /// A structure of the wrong size or content.
    #[error("{0}")]
    State(&'static str),
}
