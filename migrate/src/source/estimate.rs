//! What a migration would take, from a short look at what the guest writes. Nothing is sent, and
//! nothing is mapped but what says where a PV guest's memory is.
//!
//! [`sample`] looks at the guest, [`estimate`] lets [`Precopy`] decide over passes that are only
//! calculated: the rule is the one of a real migration.

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::error::{Error, Result};
use crate::frame::PAGE_SIZE;
use crate::hypervisor::SourceDomain;
use crate::source::batch::Space;
use crate::source::precopy::{Decision, Limits, Policy, Precopy, STOCK_PASSES_MAX, Seen};

/// How often a sample is looked at: after a part of its time, and at each doubling of that.
const LOOKS: u32 = 5;

/// What a guest has written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Pages that the domain owns.
    pub total_pages: u64,
    /// How many different pages it had written so long after the beginning; times ascend.
    pub written: Vec<(Duration, u64)>,
    /// How long reading the dirty bits took, at most.
    pub reading: Duration,
}

/// Has the writes of `domain` logged for `time`; they are not logged any more when it returns.
/// `now` is a clock that never goes back; `wait` waits, and says `false` if somebody wants an end.
///
/// # Errors
/// What would also keep the guest from being moved: Xen's refusal to log its writes, or a p2m that
/// makes no sense. [`Error::Aborted`].
pub fn sample<D: SourceDomain>(
    domain: &D,
    time: Duration,
    now: impl Fn() -> Duration,
    wait: impl FnMut(Duration) -> bool,
) -> Result<Sample> {
    let info = domain.info()?;
    let space = Space::open(domain, &info)?;
    let mut sample = Sample { total_pages: info.total_pages, ..Sample::default() };
    let bits = PageBitmap::new(space.pages());
    let looked = domain.log_dirty_on().map_err(Error::from);
    let looked = looked.and_then(|()| look(domain, bits, time, now, wait, &mut sample));
    // A failure half way may have left it on.
    let off = domain.log_dirty_off();
    looked?;
    off?;
    Ok(sample)
}

fn look<D: SourceDomain>(
    domain: &D,
    mut bits: PageBitmap,
    time: Duration,
    now: impl Fn() -> Duration,
    mut wait: impl FnMut(Duration) -> bool,
    sample: &mut Sample,
) -> Result<()> {
    let began = now();
    for look in (0..LOOKS).rev() {
        let due = began + time / (1 << look);
        if !wait(due.saturating_sub(now())) {
            return Err(Error::Aborted);
        }
        let before = now();
        // What was set before stays set.
        domain.log_dirty_clean(&mut bits, false)?;
        sample.written.push((before.saturating_sub(began), bits.count()));
        sample.reading = sample.reading.max(now().saturating_sub(before));
    }
    Ok(())
}

impl Sample {
    /// How many different pages the guest writes in `time`: between two looks in proportion, and
    /// after the last as it did between the last two.
    #[must_use]
    pub fn pages_in(&self, time: Duration) -> u64 {
        let (mut from, mut to) = ((Duration::ZERO, 0), (Duration::ZERO, 0));
        for look in &self.written {
            (from, to) = (to, *look);
            if look.0 >= time {
                break;
            }
        }
        let span = to.0.saturating_sub(from.0).as_nanos().max(1);
        let after = time.saturating_sub(from.0).as_nanos();
        let more = u128::from(to.1.saturating_sub(from.1)).saturating_mul(after) / span;
        let all = u64::try_from(more).unwrap_or(u64::MAX).saturating_add(from.1);
        all.min(self.total_pages)
    }
}

/// What a migration would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Passes while the guest runs.
    pub passes: u32,
    /// Bytes of page data, those of the pause included.
    pub bytes: u64,
    /// Until the guest would be suspended, or the migration given up.
    pub time: Duration,
    /// How long it would be suspended.
    pub pause: Duration,
    /// The policy would give up instead.
    pub gives_up: bool,
}

/// What moving a guest that writes as `sample` says would take at `rate` bytes a second, which is
/// not 0.
#[must_use]
pub fn estimate(sample: &Sample, rate: f64, policy: Policy) -> Estimate {
    let bytes_of = |pages: u64| pages.saturating_mul(PAGE_SIZE as u64);
    let sending =
        |bytes: u64| Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(Duration::MAX);
    let (mut precopy, mut elapsed) = (Precopy::new(policy), Duration::ZERO);
    let (mut sent, mut bytes) = (bytes_of(sample.total_pages), 0_u64);
    let passes_max = match policy {
        Policy::Stock => STOCK_PASSES_MAX,
        Policy::ByTime(limits) => limits.passes,
    };
    // What the guest is left of its processors, and so of what it writes, in percent.
    let mut left_to_it = 100;
    let mut passes = 0;
    loop {
        passes += 1;
        let took = sending(sent);
        (elapsed, bytes) = (elapsed.saturating_add(took), bytes.saturating_add(sent));
        let left = bytes_of(sample.pages_in(took).saturating_mul(left_to_it) / 100);
        let reading = sample.reading;
        let decision = precopy.decide(passes, &Seen { left, sent, took, reading, elapsed });
        let (pause, gives_up) = match decision {
            Decision::Continue if passes <= passes_max => {
                sent = left;
                continue;
            }
            Decision::Throttle(percent) => {
                (sent, left_to_it) = (left, percent.into());
                continue;
            }
            Decision::Stop(Some(pause)) => (pause, false),
            Decision::Cancel(pause) => (pause, true),
            Decision::Stop(None) | Decision::Continue => {
                let besides = Limits::default().fixed.saturating_add(reading);
                (besides.saturating_add(sending(left)), false)
            }
        };
        let bytes = bytes.saturating_add(if gives_up { 0 } else { left });
        return Estimate { passes, bytes, time: elapsed, pause, gives_up };
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;
    use crate::fake::{FakeDomain, Host, HvmSpec, P2mKind, PvSpec};
    use crate::hypervisor::Domain;
    use crate::source::precopy::AtLimit;

    /// A guest that writes `rate` pages a second, all different, of `set` pages.
    fn writes(rate: u64, set: u64) -> Sample {
        let looks = [250, 500, 1000, 2000, 4000];
        let pages = |ms: u64| (rate * ms / 1000).min(set);
        let written = looks.map(|ms| (Duration::from_millis(ms), pages(ms))).to_vec();
        Sample { total_pages: 262_144, written, reading: Duration::from_millis(2) }
    }

    /// 100 MiB/s.
    const RATE: f64 = 104_857_600.0;

    #[test]
    fn between_looks_pages_are_in_proportion_and_later_they_go_on_as_at_the_end() {
        let sample = writes(1000, 3000);
        let pages = |ms| sample.pages_in(Duration::from_millis(ms));
        assert_eq!([0, 100, 750, 3000, 4000].map(pages), [0, 100, 750, 2500, 3000]);
        assert_eq!(pages(6000), 4000);
        assert_eq!(writes(1_000_000, u64::MAX).pages_in(Duration::from_secs(60)), 262_144);
        assert_eq!(Sample::default().pages_in(Duration::from_secs(1)), 0);
    }

    #[test]
    fn a_guest_of_a_gigabyte_takes_ten_seconds_and_what_it_writes_in_them() {
        let quiet = estimate(&writes(0, 0), RATE, Policy::default());
        assert_eq!((quiet.passes, quiet.bytes, quiet.gives_up), (1, 1 << 30, false));
        assert_eq!((quiet.time.as_millis(), quiet.pause.as_millis()), (10_240, 102));
        // In 10.24 s 10,240 pages, in the 0.4 s for those 400.
        let busy = estimate(&writes(1000, u64::MAX), RATE, Policy::default());
        assert_eq!((busy.passes, busy.pause.as_millis()), (2, 117));
        assert_eq!(busy.bytes, (1 << 30) + 4096 * (10_240 + 400));
    }

    #[test]
    fn a_guest_that_writes_too_fast_is_given_up_or_paused_for_long_as_the_user_wants() {
        let sample = writes(100_000, u64::MAX);
        let forced = estimate(&sample, RATE, Policy::default());
        assert!(!forced.gives_up && forced.pause > Duration::from_secs(5), "{forced:?}");
        let limits = Limits { at_limit: AtLimit::Cancel, ..Limits::default() };
        let given_up = estimate(&sample, RATE, Policy::ByTime(limits));
        assert!(given_up.gives_up && given_up.pause == forced.pause, "{given_up:?}");
        let stock = estimate(&sample, RATE, Policy::Stock);
        assert_eq!((stock.passes, stock.gives_up), (5, false));
    }

    fn running(hvm: bool) -> FakeDomain {
        let host = Host::new(4096, 3);
        let guest = match hvm {
            true => HvmSpec { pages: 600, seed: 3 }.build(&host),
            false => PvSpec {
                pages: 800,
                one_hole_in: 20,
                p2m: P2mKind::Linear,
                long_tail: false,
                vcpus: 1,
                processes: 2,
                seed: 3,
            }
            .build(&host),
        };
        host.run_guests(2);
        guest
    }

    /// Looks at `guest` for 16 s of a clock that goes on only while somebody waits; it is ended
    /// after so many waits.
    fn looked(guest: &FakeDomain, ends_after: usize) -> Result<Sample> {
        let (clock, waits) = (Cell::new(Duration::ZERO), Cell::new(0));
        let wait = |time: Duration| {
            clock.set(clock.get() + time);
            waits.set(waits.get() + 1);
            (0..20).for_each(|_| guest.host().let_guests_run());
            waits.get() <= ends_after
        };
        sample(guest, Duration::from_secs(16), || clock.get(), wait)
    }

    #[test]
    fn a_look_at_a_guest_of_either_kind_finds_what_it_writes_and_leaves_nothing_on() {
        for hvm in [true, false] {
            let guest = running(hvm);
            let sample = looked(&guest, 99).unwrap();
            let times: Vec<u64> = sample.written.iter().map(|(after, _)| after.as_secs()).collect();
            assert_eq!(times, [1, 2, 4, 8, 16]);
            assert!(sample.written.is_sorted_by_key(|(_, pages)| *pages));
            assert!(sample.written[0].1 > 0, "{sample:?}");
            assert!(!guest.is_logging() && guest.is_running());
            assert_eq!(guest.host().mapped_pages(), 0);
        }
    }

    #[test]
    fn whatever_ends_a_look_log_dirty_is_off() {
        let guest = running(true);
        assert!(matches!(looked(&guest, 2), Err(Error::Aborted)));
        assert!(!guest.is_logging());
        for op in ["log_dirty_on", "log_dirty_clean", "maximum_gpfn"] {
            guest.host().fail(op, 0, 22);
            assert!(matches!(looked(&guest, 99), Err(Error::Hv(_))), "{op}");
            assert!(!guest.is_logging());
        }
        assert!(looked(&guest, 99).is_ok());
        assert_eq!(guest.info().unwrap().shutdown, None);
    }

    proptest! {
        #[test]
        fn an_estimate_has_an_end_and_a_pause_that_fits_is_one_that_is_wanted(
            writes_a_second in 0_u64..1_000_000, set in 0_u64..262_144,
            rate in 1e5..1e10, cancel: bool,
        ) {
            let at_limit = if cancel { AtLimit::Cancel } else { AtLimit::Force };
            let limits = Limits { at_limit, ..Limits::default() };
            let estimate = estimate(&writes(writes_a_second, set), rate, Policy::ByTime(limits));
            prop_assert!((1..=limits.passes).contains(&estimate.passes));
            prop_assert!(!cancel || estimate.gives_up || estimate.pause <= limits.pause);
        }
    }
}
