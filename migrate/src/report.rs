//! What happens during a migration, as events that a report is made from.
//!
//! The engine emits them through [`crate::hypervisor::Toolstack::event`]. The helper process
//! stamps each with the host's monotonic clock and writes it as a line of JSON ([`Stamped`]) to
//! the program that started it, which adds what it sees itself. No clock is read here.

use serde::{Deserialize, Serialize};

/// Pages of one pass, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassPages {
    /// Pages that the pass had to look at.
    pub wanted: u64,
    /// Sent as they are.
    pub plain: u64,
    /// Page tables, sent normalised.
    pub tables: u64,
    /// Without data: no memory there, or broken.
    pub empty: u64,
    /// Put off to the last pass (ballooned out, or a table in motion).
    pub deferred: u64,
}

impl PassPages {
    /// Pages whose content went over the wire.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.plain + self.tables
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The engine started; `pid` is the process to signal to stop it.
    Started {
        /// Its process number.
        pid: u32,
        /// PV (false) or translated (true).
        hvm: bool,
        /// Pages that the domain owns.
        total_pages: u64,
        /// Size of the p2m in pages, holes included.
        p2m_pages: u64,
    },
    /// A pass begins.
    PassStarted {
        /// 0-based.
        pass: u32,
        /// Whether the guest is suspended.
        last: bool,
        /// Pages to look at.
        pages: u64,
    },
    /// Part of a pass is done (a few times a second at most).
    PassProgress {
        /// 0-based.
        pass: u32,
        /// Pages looked at so far in this pass.
        done: u64,
        /// Pages to look at in this pass.
        pages: u64,
        /// Bytes of the stream so far, all passes.
        bytes: u64,
    },
    /// A pass is over.
    PassEnded {
        /// 0-based.
        pass: u32,
        /// Whether the guest was suspended.
        last: bool,
        /// What became of its pages.
        pages: PassPages,
        /// Bytes of the stream so far, all passes.
        bytes: u64,
    },
    /// The log-dirty bitmap has been read.
    Dirty {
        /// Pages that the guest wrote since the last reading.
        pages: u64,
    },
    /// The guest is asked to suspend: the pause begins at some moment after this.
    SuspendAsked,
    /// The guest is suspended.
    Suspended,
    /// All memory is out; vCPU and platform state follow.
    MemorySent,
    /// The last record is written.
    Finished {
        /// Bytes of the whole libxc stream.
        bytes: u64,
    },
    /// The engine gave up; what it had switched on is off again.
    Failed {
        /// Why, the whole chain in one line.
        why: String,
    },
}

/// An event and when it happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamped {
    /// Nanoseconds of the host's monotonic clock.
    pub t_ns: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}
