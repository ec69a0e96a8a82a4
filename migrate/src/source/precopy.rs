//! When to stop copying the memory of a running guest and suspend it: a function of what has been
//! seen, without a clock of its own.
//!
//! [`Policy::ByTime`] suspends the guest once the pause is expected to be short enough: what is
//! left to send at the rate of the passes before, and what a pause takes besides. Where that does
//! not come, because the guest writes faster than its memory can be sent, it says so early: more
//! passes would cost time and gain nothing. [`Policy::Stock`] is the rule of stock Xen.

use std::time::Duration;

/// Stock's rule: this many live passes at most.
pub const STOCK_PASSES_MAX: u32 = 5;
/// Stock's rule: fewer dirty pages than this are not worth another live pass.
pub const STOCK_DIRTY_PAGES_MIN: u64 = 50;

/// A pass that leaves less than this share of the least so far is a gain.
const GAIN: f64 = 0.9;
/// So many passes in a row without a gain are enough: what is left has the size of what the guest
/// writes again and again.
const PASSES_WITHOUT_GAIN_MAX: u32 = 2;
/// Where sending what is left takes less than one part in so many of all else, more passes gain
/// nothing either, even if the pause is too long.
const NEGLIGIBLE: u32 = 4;
/// Bytes that a pass has to send for its rate to be believed. Smaller ones measure how long a pass
/// takes to begin and to end.
const BELIEVED_BYTES_MIN: u64 = 4 << 20;

/// How much of its processors a guest is left, in percent, one step after the other, where it
/// writes too fast and may be slowed. Slower than the last it would hardly run.
const THROTTLE_STEPS: [u8; 4] = [60, 35, 20, 10];

/// What to do when the pause will be too long however many passes there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtLimit {
    /// Suspend the guest nevertheless, as stock does.
    #[default]
    Force,
    /// Give up; the guest stays where it is.
    Cancel,
}

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the guest may be suspended.
    pub pause: Duration,
    /// How much of it is not memory: state, devices, the receiver's part.
    pub fixed: Duration,
    /// From the beginning to the suspension; `None`: as long as it takes.
    pub time: Option<Duration>,
    /// Live passes.
    pub passes: u32,
    /// If the pause is too long when one of the other two is reached.
    pub at_limit: AtLimit,
    /// Whether a guest that writes too fast may be slowed before that.
    pub throttle: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            pause: Duration::from_millis(300),
            fixed: Duration::from_millis(100),
            time: None,
            passes: 30,
            at_limit: AtLimit::Force,
            throttle: false,
        }
    }
}

/// The rule to go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// That of stock Xen, but for one thing: a remainder below [`STOCK_DIRTY_PAGES_MIN`] is sent
    /// in the pause, where stock sends it live and then pays for one more pass.
    Stock,
    /// By the pause that is to be expected.
    ByTime(Limits),
}

impl Default for Policy {
    fn default() -> Policy {
        Policy::ByTime(Limits::default())
    }
}

/// What a live pass has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Bytes of page data that are left to send: what the guest wrote since the pass began.
    pub left: u64,
    /// Bytes that the pass sent.
    pub sent: u64,
    /// How long it took.
    pub took: Duration,
    /// How long reading the dirty bits took, which the pause contains too.
    pub reading: Duration,
    /// Since the beginning.
    pub elapsed: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send the dirty pages while the guest runs.
    Continue,
    /// The same, but leave the guest so many percent of its processors from now on.
    Throttle(u8),
    /// Suspend the guest and send them then; how long the pause is expected to be, where the
    /// policy goes by it.
    Stop(Option<Duration>),
    /// Give up: the pause would be so long.
    Cancel(Duration),
}

/// A policy at work.
#[derive(Clone, Copy, Debug)]
pub struct Precopy {
    policy: Policy,
    /// Bytes a second; `None`: nothing is known.
    rate: Option<f64>,
    /// The least that any pass has left.
    least: u64,
    /// Passes in a row that left no less.
    without_gain: u32,
    /// The pause if the guest were suspended after the latest pass; `None`: the policy does not go
    /// by it, or there was none.
    expected: Option<Duration>,
    /// Steps of [`THROTTLE_STEPS`] that have been taken.
    throttled: usize,
}

impl Precopy {
    /// Nothing has been seen.
    #[must_use]
    pub fn new(policy: Policy) -> Precopy {
        let (rate, least, expected) = (None, u64::MAX, None);
        Precopy { policy, rate, least, without_gain: 0, throttled: 0, expected }
    }

    /// What to do after the live pass number `passes` (the first is 1), which has shown `seen`.
    pub fn decide(&mut self, passes: u32, seen: &Seen) -> Decision {
        match self.policy {
            Policy::Stock => {
                let few = seen.left < STOCK_DIRTY_PAGES_MIN * crate::frame::PAGE_SIZE as u64;
                match passes >= STOCK_PASSES_MAX || few {
                    true => Decision::Stop(None),
                    false => Decision::Continue,
                }
            }
            Policy::ByTime(limits) => self.by_time(&limits, passes, seen),
        }
    }

    /// How long the pause would be if the guest were suspended after the latest pass, where the
    /// policy goes by it.
    #[must_use]
    pub fn expected(&self) -> Option<Duration> {
        self.expected
    }

    fn by_time(&mut self, limits: &Limits, passes: u32, seen: &Seen) -> Decision {
        self.learn(seen);
        let (besides, sending) = (limits.fixed.saturating_add(seen.reading), self.sending(seen));
        let pause = besides.saturating_add(sending);
        self.expected = Some(pause);
        if pause <= limits.pause {
            return Decision::Stop(Some(pause));
        }
        let late = limits.time.is_some_and(|time| seen.elapsed >= time) || passes >= limits.passes;
        let negligible = sending.saturating_mul(NEGLIGIBLE) <= besides;
        let stuck = self.without_gain >= PASSES_WITHOUT_GAIN_MAX;
        if stuck
            && limits.throttle
            && !(late || negligible)
            && let Some(percent) = THROTTLE_STEPS.get(self.throttled)
        {
            self.throttled += 1;
            self.without_gain = 0;
            return Decision::Throttle(*percent);
        }
        match (late || negligible || stuck, limits.at_limit) {
            (false, _) => Decision::Continue,
            (true, AtLimit::Force) => Decision::Stop(Some(pause)),
            (true, AtLimit::Cancel) => Decision::Cancel(pause),
        }
    }

    fn learn(&mut self, seen: &Seen) {
        if self.rate.is_none() || seen.sent >= BELIEVED_BYTES_MIN {
            let seconds = seen.took.as_secs_f64();
            self.rate = (seconds > 0.0).then(|| seen.sent as f64 / seconds).or(self.rate);
        }
        if (seen.left as f64) < self.least as f64 * GAIN {
            self.without_gain = 0;
        } else {
            self.without_gain += 1;
        }
        self.least = self.least.min(seen.left);
    }

    /// How long sending what is left would take.
    fn sending(&self, seen: &Seen) -> Duration {
        let seconds = match self.rate {
            Some(rate) if rate > 0.0 => seen.left as f64 / rate,
            _ if seen.left == 0 => 0.0,
            _ => seen.took.as_secs_f64(),
        };
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn limits(at_limit: AtLimit) -> Limits {
        Limits { at_limit, ..Limits::default() }
    }

    /// Moves a guest of 1 GiB that writes `write` MiB/s to `set` MiB over a link of `rate` MiB/s:
    /// the number of live passes, and what came of them.
    fn moved(policy: Policy, rate: u64, write: u64, set: u64) -> (u32, Decision) {
        let mut precopy = Precopy::new(policy);
        let (mut sent, mut elapsed) = (1024 * MIB, Duration::ZERO);
        for passes in 1.. {
            let took = Duration::from_secs_f64(sent as f64 / (rate * MIB) as f64);
            elapsed += took;
            let left = (sent * write / rate).min(set * MIB);
            let seen = Seen { left, sent, took, elapsed, ..Seen::default() };
            match precopy.decide(passes, &seen) {
                Decision::Continue | Decision::Throttle(_) => sent = left,
                end => return (passes, end),
            }
        }
        unreachable!("there is a limit to the passes")
    }

    fn expected(decision: Decision) -> u128 {
        match decision {
            Decision::Stop(Some(pause)) | Decision::Cancel(pause) => pause.as_millis(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn stocks_rule_stops_at_the_fifth_pass_or_below_fifty_pages() {
        let pages = |left: u64| Seen { left: left * 4096, ..Seen::default() };
        let decide = |passes, left| Precopy::new(Policy::Stock).decide(passes, &pages(left));
        assert_eq!(decide(1, 50), Decision::Continue);
        assert_eq!(decide(1, 49), Decision::Stop(None));
        assert_eq!(decide(4, 1 << 30), Decision::Continue);
        assert_eq!(decide(5, 1 << 30), Decision::Stop(None));
    }

    #[test]
    fn a_guest_that_writes_little_takes_one_pass_and_one_that_writes_more_as_many_as_it_needs() {
        let policy = Policy::default();
        let (passes, end) = moved(policy, 1000, 5, 512);
        assert_eq!(passes, 1, "{end:?}");
        let (passes, end) = moved(policy, 100, 75, 512);
        assert!((10..20).contains(&passes), "{passes}");
        assert!(expected(end) <= 300, "{end:?}");
    }

    #[test]
    fn passes_that_gain_nothing_end_soon_and_the_user_decides_how() {
        for (at_limit, pause) in [(AtLimit::Force, 2660), (AtLimit::Cancel, 2660)] {
            let (passes, end) = moved(Policy::ByTime(limits(at_limit)), 100, 300, 256);
            assert_eq!((passes, expected(end)), (3, pause));
            assert_eq!(matches!(end, Decision::Cancel(_)), at_limit == AtLimit::Cancel);
        }
    }

    #[test]
    fn a_guest_that_may_be_slowed_is_in_steps_and_only_if_that_helps() {
        let limits = Limits { throttle: true, ..limits(AtLimit::Cancel) };
        let mut precopy = Precopy::new(Policy::ByTime(limits));
        // It rewrites 256 MiB as fast as they go out, until it has a fifth of its processors.
        let (mut percent, mut steps) = (100, Vec::new());
        let end = (1..).find_map(|passes| {
            let left = if percent > 20 { 256 * MIB } else { MIB };
            let took = Duration::from_secs(1);
            let seen = Seen { left, sent: 256 * MIB, took, ..Seen::default() };
            match precopy.decide(passes, &seen) {
                Decision::Continue => None,
                Decision::Throttle(next) => {
                    percent = next;
                    steps.push(next);
                    None
                }
                end => Some(end),
            }
        });
        assert_eq!(steps, [60, 35, 20]);
        assert!(matches!(end, Some(Decision::Stop(Some(_)))), "{end:?}");
        // The fixed part alone is too long: a slower guest would not change that.
        let limits = Limits { fixed: Duration::from_secs(9), ..limits };
        let (passes, end) = moved(Policy::ByTime(limits), 1000, 30, 512);
        assert!(passes == 1 && matches!(end, Decision::Cancel(_)), "{end:?}");
    }

    #[test]
    fn where_the_fixed_part_is_too_long_already_memory_is_not_sent_in_vain() {
        for at_limit in [AtLimit::Force, AtLimit::Cancel] {
            let limits = Limits { fixed: Duration::from_millis(400), ..limits(at_limit) };
            let (passes, end) = moved(Policy::ByTime(limits), 1000, 30, 512);
            assert_eq!((passes, expected(end)), (1, 430));
            assert_eq!(matches!(end, Decision::Cancel(_)), at_limit == AtLimit::Cancel);
        }
    }

    #[test]
    fn limits_of_passes_and_time_hold() {
        let few = Limits { passes: 2, ..limits(AtLimit::Cancel) };
        assert_eq!(moved(Policy::ByTime(few), 100, 75, 512).0, 2);
        let soon = Limits { time: Some(Duration::from_secs(20)), ..limits(AtLimit::Cancel) };
        // 10.24 s for the first pass, then three quarters of the one before.
        assert_eq!(moved(Policy::ByTime(soon), 100, 75, 1024).0, 3);
    }

    #[test]
    fn a_small_pass_says_nothing_of_the_rate() {
        let mut precopy = Precopy::new(Policy::default());
        let seconds = Duration::from_secs;
        let first = Seen { left: 90 * MIB, sent: 1000 * MIB, took: seconds(10), ..Seen::default() };
        assert_eq!(precopy.decide(1, &first), Decision::Continue);
        let small = Seen { left: MIB, sent: MIB, took: seconds(1), ..Seen::default() };
        assert_eq!(expected(precopy.decide(2, &small)), 110);
    }

    proptest! {
        #[test]
        fn there_is_an_end_and_a_pause_that_was_promised_is_within_the_limit(
            rate in 1_u64..10_000, write in 0_u64..10_000, set in 0_u64..1024,
            cancel: bool, throttle: bool,
        ) {
            let at_limit = if cancel { AtLimit::Cancel } else { AtLimit::Force };
            let limits = Limits { throttle, ..limits(at_limit) };
            let (passes, end) = moved(Policy::ByTime(limits), rate, write, set);
            prop_assert!((1..=limits.passes).contains(&passes));
            if cancel && matches!(end, Decision::Stop(_)) {
                prop_assert!(expected(end) <= limits.pause.as_millis());
            }
        }
    }
}
