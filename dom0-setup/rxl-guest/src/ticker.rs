//! The longest time for which the guest did not run, and how long its kernel says it slept.
//!
//! Linux keeps two clocks that differ by the time spent suspended: `CLOCK_MONOTONIC` stops, and
//! `CLOCK_BOOTTIME` goes on. On resume the kernel reads Xen's wall clock on the *new* host and
//! adds the difference, so both figures are as good as the two hosts' wall clocks agree.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Looks at the clock again and again.
#[derive(Debug)]
pub(crate) struct Ticker {
    sleep: Duration,
    seen: Mutex<Ticks>,
}

/// What the ticker saw since the last [`Ticker::take`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ticks {
    /// Times that the thread woke, since the start.
    pub(crate) count: u64,
    /// Longest time between two of them by `CLOCK_BOOTTIME`: sleep, suspension and scheduling.
    pub(crate) longest_gap: Duration,
    /// Time suspended, by the kernel's own account (negative if the wall clock went back: 0).
    pub(crate) suspended: Duration,
}

impl Ticker {
    pub(crate) fn new(sleep: Duration) -> Self {
        Self { sleep, seen: Mutex::default() }
    }

    /// Ticks for ever.
    pub(crate) fn run(&self) {
        let mut boot_before = now(ClockId::Boottime);
        let mut asleep_before = time_asleep();
        loop {
            thread::sleep(self.sleep);
            let boot = now(ClockId::Boottime);
            let asleep = time_asleep();
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.count += 1;
            seen.longest_gap = seen.longest_gap.max(boot.saturating_sub(boot_before));
            // Two clocks are read one after the other: less than this is no suspension.
            let slept = asleep.saturating_sub(asleep_before);
            if slept > Duration::from_millis(1) {
                seen.suspended += slept;
            }
            drop(seen);
            asleep_before = asleep;
            boot_before = boot;
        }
    }

    /// What was seen since the last call; begins anew.
    pub(crate) fn take(&self) -> Ticks {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = *seen;
        seen.longest_gap = Duration::ZERO;
        seen.suspended = Duration::ZERO;
        taken
    }

    /// What was seen since the last [`Self::take`].
    pub(crate) fn look(&self) -> Ticks {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much further the clock that never stops is than the one that does.
fn time_asleep() -> Duration {
    let monotonic = now(ClockId::Monotonic);
    now(ClockId::Boottime).saturating_sub(monotonic)
}

/// A clock's reading.
pub(crate) fn now(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
