//! Rewrites pages at a steady rate.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::memory::{GuestMemory, PAGE_BYTES};
use crate::options::Options;
use crate::ticker::sleep_to_next;

/// After a longer delay the missed pages are dropped rather than written in one burst, so that a
/// guest that stood still does not come back with a flood.
const CATCH_UP_MAX: Duration = Duration::from_millis(500);

/// The writer's plan and its count.
pub(crate) struct Writer {
    memory: Arc<GuestMemory>,
    pages_per_s: u64,
    /// Time between two bursts, the same as between two ticks.
    interval: Duration,
    working_set: usize,
    written: AtomicU64,
}

impl Writer {
    pub(crate) fn new(memory: Arc<GuestMemory>, options: &Options) -> Self {
        let all = memory.pages();
        let asked = options.working_set_mib.saturating_mul((1 << 20) / PAGE_BYTES as u64);
        let working_set = match usize::try_from(asked) {
            Ok(0) | Err(_) => all,
            Ok(pages) => pages.min(all),
        };
        let pages_per_s = options.dirty_pages_per_s;
        Self {
            memory,
            pages_per_s,
            interval: options.tick,
            working_set,
            written: AtomicU64::new(0),
        }
    }

    /// Pages written since the start.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Pages that are rewritten in turn.
    pub(crate) fn working_set(&self) -> usize {
        self.working_set
    }

    /// Asked pages per second.
    pub(crate) fn pages_per_s(&self) -> u64 {
        self.pages_per_s
    }

    /// Writes for ever; returns at once if nothing is asked for.
    pub(crate) fn run(&self) {
        if self.pages_per_s == 0 {
            return;
        }
        let stride = coprime_stride(self.working_set);
        let mut page = 0;
        // Measured on a clock that stops while the guest is suspended.
        let mut begin = Instant::now();
        let mut written = 0;
        loop {
            sleep_to_next(self.interval);
            let due = pages_due(begin.elapsed(), self.pages_per_s);
            if due - written > pages_due(CATCH_UP_MAX, self.pages_per_s).max(1) {
                begin = Instant::now();
                written = 0;
                continue;
            }
            while written < due {
                self.memory.rewrite(page);
                page = (page + stride) % self.working_set;
                written += 1;
                self.written.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn pages_due(elapsed: Duration, pages_per_s: u64) -> u64 {
    let due = elapsed.as_micros() * u128::from(pages_per_s) / 1_000_000;
    u64::try_from(due).unwrap_or(u64::MAX)
}

/// A step that visits every one of `count` pages before it comes back, far from the last one: so
/// a rate of pages is a rate of *different* pages, and neighbours are not written together.
fn coprime_stride(count: usize) -> usize {
    let mut stride = (count * 5 / 8).max(1);
    while greatest_common_divisor(stride, count) != 1 {
        stride += 1;
    }
    stride
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_coprime_stride_visits_every_page() {
        for count in [1, 2, 3, 10, 4096, 5000] {
            let stride = coprime_stride(count);
            let mut seen = vec![false; count];
            (0..count).for_each(|i| seen[i * stride % count] = true);
            assert!(seen.into_iter().all(|seen| seen), "{count} pages, stride {stride}");
        }
    }

    #[test]
    fn test_pages_due_is_exact() {
        assert_eq!(pages_due(Duration::from_millis(2500), 200), 500);
        assert_eq!(pages_due(Duration::from_millis(4), 200), 0);
    }
}
