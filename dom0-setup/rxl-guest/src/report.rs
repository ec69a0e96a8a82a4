//! What the guest says about itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::time::ClockId;
use serde::Serialize;

use crate::devices::Disk;
use crate::memory::GuestMemory;
use crate::ticker::{Ticker, Ticks, now};
use crate::writer::Writer;

/// Bad pages that a report names.
const NAMED_BAD_PAGES: usize = 8;

/// Makes reports.
pub(crate) struct Reporter {
    memory: Arc<GuestMemory>,
    writer: Arc<Writer>,
    ticker: Arc<Ticker>,
    disk: Arc<Disk>,
}

#[derive(Debug, Serialize)]
struct Report {
    uptime_s: f64,
    /// Pages verified for this report; 0 in a status line.
    pages_checked: usize,
    check_ms: u128,
    bad_pages: usize,
    first_bad_pages: Vec<usize>,
    dirty_pages_per_s: u64,
    working_set_pages: usize,
    pages_written: u64,
    ticks: u64,
    longest_gap_ms: f64,
    suspended_ms: f64,
    disk_blocks: u64,
    disk_errors: u64,
    first_disk_error: Option<String>,
}

impl Reporter {
    pub(crate) fn new(
        memory: Arc<GuestMemory>,
        writer: Arc<Writer>,
        ticker: Arc<Ticker>,
        disk: Arc<Disk>,
    ) -> Self {
        Self { memory, writer, ticker, disk }
    }

    /// Verifies all memory and begins a new measurement of the longest gap.
    pub(crate) fn check(&self) -> String {
        // Taken first: the check itself keeps the vCPU busy and would count as a gap.
        let ticks = self.ticker.take();
        let start = Instant::now();
        self.memory.check_all();
        let report = self.report(ticks, self.memory.pages(), start.elapsed());
        self.ticker.take();
        report
    }

    /// The figures at hand, with nothing verified for it.
    pub(crate) fn status(&self) -> String {
        self.report(self.ticker.look(), 0, Duration::ZERO)
    }

    fn report(&self, ticks: Ticks, pages_checked: usize, check: Duration) -> String {
        let bad = self.memory.bad_pages();
        let report = Report {
            uptime_s: rounded(now(ClockId::Boottime).as_secs_f64()),
            pages_checked,
            check_ms: check.as_millis(),
            bad_pages: bad.len(),
            first_bad_pages: bad.iter().copied().take(NAMED_BAD_PAGES).collect(),
            dirty_pages_per_s: self.writer.pages_per_s(),
            working_set_pages: self.writer.working_set(),
            pages_written: self.writer.written(),
            ticks: ticks.count,
            longest_gap_ms: rounded(ticks.longest_gap.as_secs_f64() * 1e3),
            suspended_ms: rounded(ticks.suspended.as_secs_f64() * 1e3),
            disk_blocks: self.disk.blocks.load(Ordering::Relaxed),
            disk_errors: self.disk.errors.load(Ordering::Relaxed),
            first_disk_error: self.disk.first_error.get().cloned(),
        };
        serde_json::to_string(&report).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    }
}

fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
