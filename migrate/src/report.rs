//! What happens during a migration, as events that a report is made from.
//!
//! The engine emits them through [`crate::hypervisor::Toolstack::event`]. The helper process
//! stamps each with the host's monotonic clock and writes it as a line of JSON ([`Stamped`]) to
//! the program that started it, which reads it ([`read_lines`]) and adds what it sees itself. No
//! clock is read here.

use std::io::{BufRead, BufReader, Read};

use serde::{Deserialize, Serialize};

use crate::counters::Counters;

/// Longest line; the helper's are below 1 KiB but for an error text.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Most events that are kept; a migration has a dozen for each pass.
pub const EVENTS_MAX: usize = 100_000;

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
        self.plain.saturating_add(self.tables)
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
    /// Part of a pass is done (ten times a second at most).
    PassProgress {
        /// 0-based.
        pass: u32,
        /// Pages looked at so far in this pass.
        done: u64,
        /// Pages to look at in this pass.
        pages: u64,
        /// Bytes of the stream and of all links so far, all passes.
        bytes: u64,
        /// Those of each link that there is, by its number.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        links: Vec<(u8, u64)>,
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
    /// A link has joined: a connection of its own for page data.
    LinkJoined {
        /// Its number.
        link: u8,
    },
    /// A link is lost; what it had not delivered is sent again.
    LinkLost {
        /// Its number.
        link: u8,
        /// Why.
        why: String,
    },
    /// What a process has done in all.
    Counted {
        /// The link that it had to itself; else it wrote the stream.
        link: Option<u8>,
        /// Bytes of page data that it sent; 0 for the process that makes the passes.
        bytes: u64,
        /// Batches that it sent; 0 for the process that makes the passes.
        batches: u64,
        /// For each of them, the batches that it had still to do then: it is never more than one,
        /// and less where it had to wait for the next.
        #[serde(default)]
        queued: u64,
        /// The rest.
        counters: Counters,
    },
    /// The guest is slowed, because it writes too fast.
    Throttled {
        /// What it is left of its processors, in percent.
        percent: u8,
    },
    /// The policy has looked at what is left, and expects a pause that long if it suspends the
    /// guest now; the last one is that of its decision to do so.
    PauseExpected {
        /// Milliseconds.
        ms: u64,
    },
    /// The guest is asked to suspend: the pause begins at some moment after this.
    SuspendAsked,
    /// The guest is suspended.
    Suspended,
    /// All memory is out; vCPU and platform state follow.
    MemorySent,
    /// The digests of all memory are out, and those that went over links are compared.
    Verified {
        /// Pages with a digest.
        pages: u64,
    },
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

/// Reads lines of JSON to the end of `input`, and shows each event to `seen`. What comes back is
/// every event but those of progress, which are many and of no use afterwards but the last, and
/// no more than [`EVENTS_MAX`]. A line that is no event is left out, with a warning to the log.
pub fn read_lines(input: impl Read, mut seen: impl FnMut(&Stamped)) -> Vec<Stamped> {
    let mut input = BufReader::new(input);
    let mut events: Vec<Stamped> = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        match input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return events,
            Ok(_) => {}
        }
        let event: Stamped = match serde_json::from_slice(&line) {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(%error, "the save helper wrote a line that is no event");
                continue;
            }
        };
        seen(&event);
        let is_progress = |s: &Stamped| matches!(s.event, Event::PassProgress { .. });
        if events.last().is_some_and(is_progress) {
            events.pop();
        }
        if events.len() < EVENTS_MAX {
            events.push(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_kept_but_for_progress_and_lines_that_are_none_are_skipped() {
        let progress =
            |done| Event::PassProgress { pass: 0, done, pages: 9, bytes: 1, links: vec![] };
        let all = [Event::SuspendAsked, progress(1), progress(2), Event::Suspended, progress(3)];
        let mut text = String::new();
        for (t_ns, event) in (0..).zip(all) {
            text += &serde_json::to_string(&Stamped { t_ns, event }).unwrap();
            text += "\nrubbish\n";
        }
        let mut drawn = 0;
        let events = read_lines(text.as_bytes(), |_| drawn += 1);
        assert_eq!(drawn, 5);
        let times: Vec<u64> = events.iter().map(|s| s.t_ns).collect();
        assert_eq!(times, [0, 3, 4], "a progress event is kept only as the last one");
    }
}
