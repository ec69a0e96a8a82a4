//! The longest time for which the guest did not run, and how long its kernel says it slept.
//!
//! Linux keeps two clocks that differ by the time spent suspended: `CLOCK_MONOTONIC` stops, and
//! `CLOCK_BOOTTIME` goes on. On resume the kernel reads Xen's wall clock on the *new* host and
//! adds the difference, so both figures are as good as the two hosts' wall clocks agree.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Pairs of clock readings of which the closest counts.
const READINGS: usize = 5;

/// Looks at the clock again and again.
#[derive(Debug)]
pub(crate) struct Ticker {
    period: Duration,
    seen: Mutex<Ticks>,
    /// Time asleep since boot, at the last [`Self::take`].
    asleep_before: Mutex<Duration>,
}

/// What the ticker saw since the last [`Ticker::take`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ticks {
    /// Times that the thread woke, since the start.
    pub(crate) count: u64,
    /// Longest time between two of them by `CLOCK_BOOTTIME`: sleep, suspension and scheduling.
    pub(crate) longest_gap: Duration,
    /// Time suspended, by the kernel's own account: 0 if the wall clock went back.
    pub(crate) suspended: Duration,
}

impl Ticker {
    pub(crate) fn new(period: Duration) -> Self {
        Self { period, seen: Mutex::default(), asleep_before: Mutex::new(time_asleep()) }
    }

    /// Ticks for ever.
    pub(crate) fn run(&self) {
        let mut before = now(ClockId::Boottime);
        loop {
            sleep_to_next(self.period);
            let after = now(ClockId::Boottime);
            let mut seen = lock(&self.seen);
            seen.count += 1;
            seen.longest_gap = seen.longest_gap.max(after.saturating_sub(before));
            drop(seen);
            before = after;
        }
    }

    /// What was seen since the last call; begins anew.
    pub(crate) fn take(&self) -> Ticks {
        let mut taken = self.look();
        let mut seen = lock(&self.seen);
        taken.longest_gap = seen.longest_gap;
        seen.longest_gap = Duration::ZERO;
        drop(seen);
        *lock(&self.asleep_before) += taken.suspended;
        taken
    }

    /// What was seen since the last [`Self::take`].
    pub(crate) fn look(&self) -> Ticks {
        let asleep_before = *lock(&self.asleep_before);
        let suspended = time_asleep().saturating_sub(asleep_before);
        Ticks { suspended, ..*lock(&self.seen) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sleeps to the next multiple of `period`. Threads with the same period so wake together, which
/// costs an emulated machine one wake-up instead of several.
pub(crate) fn sleep_to_next(period: Duration) {
    let period = period.as_nanos().max(1);
    let rest = period - now(ClockId::Monotonic).as_nanos() % period;
    thread::sleep(Duration::from_nanos(u64::try_from(rest).unwrap_or(u64::MAX)));
}

/// How much further the clock that never stops is than the one that does. The thread may be
/// interrupted between the readings, so the closest pair of several counts.
fn time_asleep() -> Duration {
    let readings = (0..READINGS).map(|_| {
        let before = now(ClockId::Monotonic);
        let boot = now(ClockId::Boottime);
        let bracket = now(ClockId::Monotonic).saturating_sub(before);
        (bracket, boot.saturating_sub(before))
    });
    readings.min_by_key(|(bracket, _)| *bracket).map_or(Duration::ZERO, |(_, asleep)| asleep)
}

/// A clock's reading.
pub(crate) fn now(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
