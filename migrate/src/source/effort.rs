//! Whether it pays to leave something out of what is sent: a function of what has been measured,
//! without a clock of its own.
//!
//! Processor time is worth spending while the way to the receiver is what everybody waits for, and
//! only then. So what a byte costs there is learned from writes that had to wait: between two of
//! them the way was never idle. What a page costs here, and what it saves, is learned by doing it.
//! What does not pay is tried again now and then, and seldom what could not pay at all.
//!
//! What is done while the way is busy costs nothing, unless processors are scarce: then somebody
//! else waits for it, perhaps the guest. Whoever has to wait for a processor itself knows that.
//!
//! What it is not: what is done (`reduce`), or what a user wants (`stream::reduced`).

use std::time::Duration;

use crate::frame::PAGE_SIZE;

/// What a page may cost here, of what it takes on the way, whatever it saves: what a connection
/// holds (256 KiB, or 64 pages) is on its way meanwhile.
const HIDDEN_SHARE: f64 = 1.0 / 16.0;
/// Pages, or batches, until something that does not pay is tried again.
const PAGES_UNTRIED: u32 = 32;
/// The same for what would not pay if it left nothing of a page: that may have been measured wrong.
const PAGES_HOPELESS: u32 = 1024;
/// The weight of something new in a mean.
const NEW: f64 = 1.0 / 8.0;
/// Of what a byte costs, after a write that did not have to wait: the way may be faster than it
/// was, or what is left of the pages so little that it is not the limit any more.
const FADING: f64 = 0.98;
/// Processors are scarce if this thread waits for one for so much of its time.
const SCARCE_SHARE: f64 = 0.05;
/// Over such a time that is looked at.
const SCARCE_WINDOW: Duration = Duration::from_millis(20);
/// A pause between two writes in which the way may have been idle.
const IDLE: Duration = Duration::from_micros(200);

/// A moving mean.
#[derive(Clone, Copy, Debug, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + NEW * (value - mean)));
    }

    /// A time that something took. One that is far longer than most says little: something else was
    /// done on the processor meanwhile.
    fn add_cost(&mut self, value: f64) {
        self.add(self.0.map_or(value, |mean| value.min(2.0 * mean)));
    }
}

/// Something that can be done with a page, or with all pages of a batch.
#[derive(Clone, Copy, Debug, Default)]
struct Trial {
    /// Nanoseconds a page.
    cost: Mean,
    /// Bytes a page.
    saves: Mean,
    /// It was done once. What that took is not counted: memory and caches were not there yet.
    is_warm: bool,
    /// Pages, or batches, since it was tried.
    untried: u32,
}

impl Trial {
    /// Nanoseconds a page that doing it gains, where a byte costs so much, as far as it is worth
    /// doing: all of them where that has to be found out.
    fn gain(&mut self, byte_ns: f64) -> Option<f64> {
        self.untried += 1;
        let (Some(cost), Some(saves)) = (self.cost.0, self.saves.0) else {
            return Some(f64::INFINITY);
        };
        let could = page(byte_ns) >= cost;
        let is_due = self.untried >= if could { PAGES_UNTRIED } else { PAGES_HOPELESS };
        let gain = if is_due { f64::INFINITY } else { saves * byte_ns - cost };
        (gain >= 0.0).then_some(gain)
    }

    /// Whether to do it. That it is tried now is noted.
    fn wanted(&mut self, byte_ns: f64) -> bool {
        let wanted = self.gain(byte_ns).is_some();
        if wanted {
            self.untried = 0;
        }
        wanted
    }

    fn note(&mut self, cost_ns: f64, saved_bytes: f64) {
        if self.is_warm {
            self.cost.add_cost(cost_ns);
            self.saves.add(saved_bytes);
        }
        self.is_warm = true;
    }
}

/// What is done with the pages of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Nobody looks at them.
    Nothing,
    /// They are compared with zeros.
    Zeros,
    /// What they are is remembered as well, and compared with what they were.
    All,
}

/// What can be done with a page beside that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Try {
    /// Compressing it by LZ4.
    Pack,
    /// The same by Zstandard.
    Zstd,
    /// Compressing what has changed.
    Delta,
}

/// What has been measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Effort {
    /// Everything is tried, whatever it costs.
    always: bool,
    /// Nanoseconds that a byte takes on the way, while it is what everybody waits for.
    link: Mean,
    /// What of that still holds.
    fading: f64,
    /// The same where nothing has ever waited.
    free: Mean,
    /// When a write that had to wait ended, and what has been written since.
    full_at: Option<Duration>,
    bytes_since: usize,
    written_at: Duration,
    /// Nanoseconds a page for [`Level::Zeros`] and [`Level::All`].
    zeros: Mean,
    all: Mean,
    /// The share of pages of zeros.
    zero_share: Mean,
    /// All that is done with a page at [`Level::All`].
    whole: Trial,
    pack: Trial,
    zstd: Trial,
    delta: Trial,
    /// The share of time for which this thread waited for a processor, and what was known when.
    scarce: Mean,
    queued_at: Option<(Duration, Duration)>,
}

impl Effort {
    /// Nothing has been measured. `always`: everything is tried.
    pub(super) fn new(always: bool) -> Effort {
        Effort { always, fading: 1.0, ..Effort::default() }
    }

    /// A record of `bytes` was written from `from` to `to`, and `waited` meanwhile.
    pub(super) fn note_written(
        &mut self,
        (from, to): (Duration, Duration),
        waited: bool,
        bytes: usize,
    ) {
        if from.saturating_sub(self.written_at) > IDLE {
            self.full_at = None;
        }
        self.written_at = to;
        self.bytes_since += bytes;
        let began = self.full_at.unwrap_or(from);
        let since = if self.full_at.is_some() { self.bytes_since } else { bytes };
        let byte_ns = ns(to.saturating_sub(began)) / float(since.max(1));
        if waited {
            self.link.add(byte_ns);
            (self.full_at, self.bytes_since, self.fading) = (Some(to), 0, 1.0);
        } else {
            self.free.add(ns(to.saturating_sub(from)) / float(bytes.max(1)));
            self.fading *= FADING;
        }
    }

    /// Nanoseconds that a byte takes; `None`: nothing has been written.
    fn byte_ns(&self) -> Option<f64> {
        self.link.0.map(|link| link * self.fading).or(self.free.0)
    }

    /// Until `now` this thread has waited for a processor for `queued`.
    pub(super) fn note_queued(&mut self, now: Duration, queued: Duration) {
        let (then, before) = *self.queued_at.get_or_insert((now, queued));
        let passed = now.saturating_sub(then);
        if passed >= SCARCE_WINDOW {
            self.scarce.add(ns(queued.saturating_sub(before)) / ns(passed));
            self.queued_at = Some((now, queued));
        }
    }

    fn is_scarce(&self) -> bool {
        self.scarce.0.is_some_and(|share| share > SCARCE_SHARE)
    }

    /// What to do with the pages of a batch.
    pub(super) fn level(&mut self) -> Level {
        let Some(byte_ns) = self.byte_ns() else {
            return if self.always { Level::All } else { Level::Zeros };
        };
        if self.always || self.all_pays(byte_ns) {
            Level::All
        } else if self.zeros_pay() {
            Level::Zeros
        } else {
            Level::Nothing
        }
    }

    fn all_pays(&mut self, byte_ns: f64) -> bool {
        // Digests and copies cost no more than so many times a look.
        let all = self.all.0.unwrap_or(4.0 * self.zeros.0.unwrap_or(0.0));
        page(byte_ns) * HIDDEN_SHARE >= all && (!self.is_scarce() || self.whole.wanted(byte_ns))
    }

    /// Whether to compare pages with zeros.
    pub(super) fn zeros_pay(&self) -> bool {
        let page = page(self.byte_ns().unwrap_or(0.0));
        let zeros = self.zeros.0.unwrap_or(0.0);
        let gain = self.zero_share.0.unwrap_or(0.0) * page;
        (!self.is_scarce() && page * HIDDEN_SHARE >= zeros) || gain >= 1.25 * zeros
    }

    /// All was done with `pages` pages, in this time, and saved so many bytes.
    pub(super) fn note_all(&mut self, cost: Duration, pages: usize, saved_bytes: usize) {
        let pages = float(pages.max(1));
        self.whole.note(ns(cost) / pages, float(saved_bytes) / pages);
    }

    /// `pages` pages were looked at, so many of them zeros, in this time.
    pub(super) fn note_looked(&mut self, level: Level, cost: Duration, pages: usize, zero: usize) {
        let each = ns(cost) / float(pages.max(1));
        match level {
            Level::All => self.all.add_cost(each),
            Level::Nothing | Level::Zeros => self.zeros.add_cost(each),
        }
        self.zero_share.add(float(zero) / float(pages.max(1)));
    }

    /// Whether to try `what` on the next page.
    pub(super) fn wants(&mut self, what: Try) -> bool {
        let Some(byte_ns) = self.byte_ns().filter(|_| !self.always) else { return self.always };
        self.trial(what).wanted(byte_ns)
    }

    /// How to compress the next page: by none of those that may be, by the one that gains most, or
    /// by all of them, the best of which is taken.
    pub(super) fn compressions(&mut self, may_be: [Option<Try>; 2]) -> [Option<Try>; 2] {
        let Some(byte_ns) = self.byte_ns().filter(|_| !self.always) else {
            return if self.always { may_be } else { [None; 2] };
        };
        let mut best: Option<(Try, f64)> = None;
        for what in may_be.into_iter().flatten() {
            let gain = self.trial(what).gain(byte_ns);
            if let Some(gain) = gain.filter(|gain| best.is_none_or(|(_, most)| *gain > most)) {
                best = Some((what, gain));
            }
        }
        let best = best.map(|(what, _)| what);
        if let Some(what) = best {
            self.trial(what).untried = 0;
        }
        [best, None]
    }

    /// It was tried on a page.
    pub(super) fn note_tried(&mut self, what: Try, cost: Duration, saved_bytes: usize) {
        self.trial(what).note(ns(cost), float(saved_bytes));
    }

    fn trial(&mut self, what: Try) -> &mut Trial {
        match what {
            Try::Pack => &mut self.pack,
            Try::Zstd => &mut self.zstd,
            Try::Delta => &mut self.delta,
        }
    }
}

/// What a page costs, where a byte costs so much.
fn page(byte_ns: f64) -> f64 {
    byte_ns * float(PAGE_SIZE)
}

fn ns(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

#[allow(clippy::cast_precision_loss, reason = "numbers of bytes and pages far below 2^53")]
fn float(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn ns(ns: u64) -> Duration {
        Duration::from_nanos(ns)
    }

    /// Sends so many batches of 4 MiB over a way of `page_ns` a page where looking at a page costs
    /// `look_ns`, packing one `pack_ns`, which saves `saves`: the level at last, and the share of
    /// pages, in percent, that were packed in the second half.
    fn run(page_ns: u64, look_ns: u64, pack_ns: u64, saves: usize) -> (Level, u64) {
        let (mut effort, mut now, mut packed) = (Effort::new(false), ns(0), 0);
        let batches = 200;
        for batch in 0..batches {
            let level = effort.level();
            let looked = if level == Level::Nothing { 8 } else { 1024 };
            effort.note_looked(level, ns(look_ns * looked), usize::try_from(looked).unwrap(), 0);
            now += ns(look_ns * looked);
            let mut bytes = 4 * MIB;
            if level != Level::Nothing {
                for _ in 0..1024 {
                    if effort.wants(Try::Pack) {
                        effort.note_tried(Try::Pack, ns(pack_ns), saves);
                        now += ns(pack_ns);
                        bytes -= saves;
                        packed += u64::from(batch >= batches / 2);
                    }
                }
            }
            let end = now + ns(page_ns * (bytes / PAGE_SIZE) as u64);
            effort.note_written((now, end), page_ns > 500, bytes);
            now = end;
        }
        (effort.level(), packed * 100 / (batches / 2 * 1024))
    }

    #[test]
    fn a_fast_way_gets_pages_as_they_are_and_a_slow_one_what_is_left_of_them() {
        // 1.5 GiB/s; 1 Gbit/s; 100 Mbit/s.
        assert_eq!(run(2_600, 500, 7_000, 2000), (Level::Nothing, 0));
        assert_eq!(run(36_000, 500, 7_000, 2000), (Level::All, 100));
        assert_eq!(run(360_000, 500, 7_000, 1000), (Level::All, 100));
        // Where compressing takes longer than sending, it is not even tried.
        assert_eq!(run(20_000, 200, 40_000, 3000), (Level::All, 0));
    }

    #[test]
    fn what_cannot_be_compressed_is_tried_now_and_then() {
        let (level, packed) = run(36_000, 500, 7_000, 0);
        assert_eq!(level, Level::All);
        assert!((2..=4).contains(&packed), "{packed} %");
    }

    #[test]
    fn pages_of_zeros_pay_on_a_fast_way_too() {
        let mut effort = Effort::new(false);
        effort.note_written((ns(0), ns(2_600_000)), true, 4 * MIB);
        effort.note_looked(Level::Zeros, ns(4000), 8, 0);
        assert_eq!(effort.level(), Level::Nothing);
        effort.note_looked(Level::Zeros, ns(4000), 8, 8);
        effort.note_looked(Level::Zeros, ns(4000), 8, 8);
        effort.note_looked(Level::Zeros, ns(4000), 8, 8);
        assert_eq!(effort.level(), Level::Zeros);
    }

    /// Of the second half of pages that LZ4 makes 800 bytes shorter and Zstandard 3000, in a fifth
    /// of the time and not, how many go by each.
    fn packed_by(byte_ns: u64) -> [u64; 2] {
        let mut effort = Effort::new(false);
        effort.note_written((ns(0), ns(byte_ns * 1_000_000)), true, 1_000_000);
        let (may_be, mut by) = ([Some(Try::Pack), Some(Try::Zstd)], [0, 0]);
        for number in 0..2000 {
            let chosen = effort.compressions(may_be);
            for (count, (what, cost, saves)) in
                by.iter_mut().zip([(Try::Pack, 5_000, 800), (Try::Zstd, 25_000, 3000)])
            {
                if chosen.contains(&Some(what)) {
                    effort.note_tried(what, ns(cost), saves);
                    *count += u64::from(number >= 1000);
                }
            }
        }
        by
    }

    #[test]
    fn a_time_that_was_somebody_elses_does_not_count_for_long() {
        let mut effort = Effort::new(false);
        effort.note_written((ns(0), ns(40_000_000)), true, 1_000_000);
        let (only, mut packed) = ([None, Some(Try::Zstd)], 0);
        for number in 0..2000 {
            if effort.compressions(only).contains(&Some(Try::Zstd)) {
                packed += 1;
                // At first, and now and then, another process runs for a while.
                let cost = if number % 100 == 0 { 4_000_000 } else { 25_000 };
                effort.note_tried(Try::Zstd, ns(cost), 3000);
            }
        }
        assert!(packed > 1990, "{packed}");
    }

    #[test]
    fn the_slower_a_way_the_more_is_compressed() {
        // 1 Mbit/s takes 8000 ns a byte.
        let [lz4, zstd] = packed_by(8000 / 100);
        assert!(lz4 < 50 && zstd > 950, "100 Mbit/s: {lz4}, {zstd}");
        let [lz4, zstd] = packed_by(8);
        assert!(lz4 > 950 && zstd < 50, "1 Gbit/s: {lz4}, {zstd}");
        let [lz4, zstd] = packed_by(3);
        assert!(lz4 < 50 && zstd <= 1, "2.7 Gbit/s: {lz4}, {zstd}");
        assert!(packed_by(1).into_iter().all(|pages| pages <= 1), "8 Gbit/s");
    }

    #[test]
    fn where_processors_are_scarce_only_what_saves_something_is_done() {
        let level = |queued_percent: u64, saved: usize| {
            let (mut effort, mut levels) = (Effort::new(false), Vec::new());
            for batch in 1..=100 {
                let now = ns(batch * 40_000_000);
                effort.note_queued(now, now * u32::try_from(queued_percent).unwrap() / 100);
                let level = effort.level();
                levels.push(level);
                effort.note_looked(level, ns(500 * 1024), 1024, 0);
                if level == Level::All {
                    effort.note_all(ns(2000 * 1024), 1024, saved * 1024);
                }
                effort.note_written((now, now + ns(36_000_000)), true, 4 * MIB);
            }
            let seldom = levels[50..].iter().filter(|level| **level == Level::All).count();
            (levels[99], seldom)
        };
        assert_eq!(level(1, 0), (Level::All, 50));
        assert_eq!(level(30, 3000), (Level::All, 50));
        assert!(matches!(level(30, 0), (Level::Nothing, 1 | 2)), "{:?}", level(30, 0));
    }

    #[test]
    fn a_way_that_becomes_faster_is_noticed() {
        let mut effort = Effort::new(false);
        let mut now = ns(0);
        for _ in 0..5 {
            effort.note_written((now, now + ns(36_000 * 128)), true, MIB / 2);
            now += ns(36_000 * 128);
        }
        effort.note_looked(Level::All, ns(512_000), 1024, 0);
        (0..2).for_each(|_| effort.note_tried(Try::Pack, ns(7000), 3000));
        assert!(effort.wants(Try::Pack) && effort.level() == Level::All);
        let mut writes = 0;
        while writes < 1000 && effort.wants(Try::Pack) {
            effort.note_written((now, now + ns(20_000)), false, MIB / 2);
            writes += 1;
        }
        assert!((40..100).contains(&writes), "{writes}");
    }

    #[test]
    fn who_always_wants_it_gets_it() {
        let mut effort = Effort::new(true);
        effort.note_written((ns(0), ns(100)), false, 4 * MIB);
        effort.note_looked(Level::All, ns(1 << 30), 8, 0);
        effort.note_tried(Try::Delta, ns(1 << 30), 0);
        assert!(effort.level() == Level::All && effort.wants(Try::Delta));
    }
}
