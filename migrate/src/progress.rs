//! How far a save is, made from its events as they come: figures for whoever looks on, and samples
//! over time for the report.
//!
//! What it is not: it decides nothing, and nothing of the engine depends on it. It reads no clock;
//! events bring their time with them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::report::{Event, Stamped};

/// Rates are over this time.
const RATE_WINDOW_NS: u64 = 2_000_000_000;
/// Time between samples at first; it doubles whenever there would be too many.
const SAMPLE_NS: u64 = 250_000_000;
/// Most samples that are kept.
pub const SAMPLES_MAX: usize = 400;
/// The guest is taken to write at most this share of what a pass sends in its time: where it
/// writes more, passes do not shrink, and the policy ends them soon.
const SHRINK_MAX: f64 = 0.8;

/// How far a save is. Rates are per second, over the last two; what is not known yet is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// The pass that is sent now, 0-based.
    pub pass: Option<u32>,
    /// Whether the guest is suspended in it.
    pub last: bool,
    /// Pages of it that are done.
    pub done: u64,
    /// Pages of it.
    pub pages: u64,
    /// Bytes of the stream and of all links, all passes.
    pub bytes: u64,
    /// Those per second.
    pub bytes_per_s: Option<f64>,
    /// Pages that the guest had written since the reading before, at the last reading.
    pub dirty_pages: Option<u64>,
    /// Different pages that it wrote per second between the two.
    pub dirty_pages_per_s: Option<f64>,
    /// How long the pause would be if the guest were suspended at the end of this pass.
    pub pause_expected_ms: Option<u64>,
    /// An estimate of the time until all memory is sent.
    pub time_left_ms: Option<u64>,
    /// Links, by their numbers.
    pub links: Vec<LinkFigures>,
}

/// What one link has done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkFigures {
    /// Its number.
    pub link: u8,
    /// Bytes that it has carried.
    pub bytes: u64,
    /// Those per second.
    pub bytes_per_s: Option<f64>,
    /// Whether it is lost.
    pub lost: bool,
}

/// What had been sent at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds since the engine started.
    pub ms: f64,
    /// Bytes of the stream and of all links.
    pub bytes: u64,
    /// Those of each link, by its number.
    pub links: Vec<(u8, u64)>,
}

/// A moment, as rates need it.
#[derive(Clone, Debug)]
struct Point {
    t_ns: u64,
    bytes: u64,
    pass: Option<u32>,
    done: u64,
    links: Vec<(u8, u64)>,
}

/// Makes [`Figures`] and [`Sample`]s from events.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    figures: Figures,
    links: BTreeMap<u8, LinkFigures>,
    /// The latest moments, the newest last.
    points: VecDeque<Point>,
    /// Since when what the guest writes has been noted.
    noted_since: Option<u64>,
    /// Pages that are done per second, the last time that it could be said.
    pages_per_s: Option<f64>,
    began: Option<u64>,
    samples: Vec<Sample>,
    /// How many times samples have been thinned out.
    thinned: u32,
}

impl Progress {
    /// Takes note of an event.
    pub fn see(&mut self, stamped: &Stamped) {
        let t_ns = stamped.t_ns;
        match &stamped.event {
            Event::Started { .. } => self.began = Some(t_ns),
            Event::PassStarted { pass, last, pages } => {
                self.figures.pass = Some(*pass);
                self.figures.last = *last;
                (self.figures.done, self.figures.pages) = (0, *pages);
                self.noted_since.get_or_insert(t_ns);
            }
            Event::PassProgress { done, pages, bytes, links, .. } => {
                (self.figures.done, self.figures.pages) = (*done, *pages);
                self.moment(t_ns, *bytes, links);
            }
            Event::PassEnded { bytes, .. } => {
                self.figures.done = self.figures.pages;
                let links: Vec<(u8, u64)> =
                    self.links.values().map(|link| (link.link, link.bytes)).collect();
                self.moment(t_ns, *bytes, &links);
            }
            Event::Dirty { pages } => {
                let since = self.noted_since.replace(t_ns);
                self.figures.dirty_pages = Some(*pages);
                self.figures.dirty_pages_per_s = per_second(*pages, since, t_ns);
            }
            Event::PauseExpected { ms } => self.figures.pause_expected_ms = Some(*ms),
            Event::LinkJoined { link } => self.link(*link).lost = false,
            Event::LinkLost { link, .. } => self.link(*link).lost = true,
            Event::Finished { bytes } => self.figures.bytes = *bytes,
            _ => {}
        }
        self.figures.time_left_ms = self.time_left_ms();
    }

    /// The figures of now.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures { links: self.links.values().cloned().collect(), ..self.figures.clone() }
    }

    /// Samples of all the time, at most [`SAMPLES_MAX`].
    #[must_use]
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    fn link(&mut self, link: u8) -> &mut LinkFigures {
        self.links.entry(link).or_insert(LinkFigures { link, ..LinkFigures::default() })
    }

    fn moment(&mut self, t_ns: u64, bytes: u64, links: &[(u8, u64)]) {
        self.figures.bytes = bytes;
        for (link, bytes) in links {
            self.link(*link).bytes = *bytes;
        }
        let (pass, done) = (self.figures.pass, self.figures.done);
        self.points.push_back(Point { t_ns, bytes, pass, done, links: links.to_vec() });
        let old = |point: &Point| t_ns.saturating_sub(point.t_ns) >= RATE_WINDOW_NS;
        // One that is older stays, so that slow news have a rate as well.
        while self.points.get(1).is_some_and(old) {
            self.points.pop_front();
        }
        self.rates();
        self.sample(t_ns, bytes, links);
    }

    fn rates(&mut self) {
        let Some([first, last]) = self.points.front().zip(self.points.back()).map(<[_; 2]>::from)
        else {
            return;
        };
        let rate = |from, to: u64| per_second(to.saturating_sub(from), Some(first.t_ns), last.t_ns);
        let Some(all) = rate(first.bytes, last.bytes) else { return };
        self.figures.bytes_per_s = Some(all);
        if let Some(start) = self.points.iter().find(|point| point.pass == last.pass) {
            let done = last.done.saturating_sub(start.done);
            let rate = per_second(done, Some(start.t_ns), last.t_ns).filter(|rate| *rate > 0.0);
            self.pages_per_s = rate.or(self.pages_per_s);
        }
        for (number, bytes) in &last.links {
            let before = first.links.iter().find(|(link, _)| link == number);
            let before = before.map_or(0, |(_, bytes)| *bytes);
            if let Some(link) = self.links.get_mut(number) {
                link.bytes_per_s = rate(before, *bytes);
            }
        }
    }

    fn sample(&mut self, t_ns: u64, bytes: u64, links: &[(u8, u64)]) {
        let since_start = t_ns.saturating_sub(*self.began.get_or_insert(t_ns));
        let ms = since_start as f64 / 1e6;
        let interval_ms = SAMPLE_NS as f64 / 1e6 * f64::from(self.thinned).exp2();
        if self.samples.last().is_some_and(|last| ms - last.ms < interval_ms) {
            return;
        }
        self.samples.push(Sample { ms, bytes, links: links.to_vec() });
        if self.samples.len() >= SAMPLES_MAX {
            let mut even = false;
            self.samples.retain(|_| {
                even = !even;
                even
            });
            self.thinned += 1;
        }
    }

    /// What is left of this pass, and of those that follow if each has what the guest writes in
    /// the time of the one before.
    fn time_left_ms(&self) -> Option<u64> {
        let figures = &self.figures;
        let rate = self.pages_per_s?;
        let left = figures.pages.saturating_sub(figures.done) as f64 / rate;
        let again = match figures.dirty_pages_per_s {
            _ if figures.last => 0.0,
            Some(dirty) => (dirty / rate).min(SHRINK_MAX),
            None => 0.0,
        };
        let time = Duration::try_from_secs_f64(left / (1.0 - again)).ok()?;
        u64::try_from(time.as_millis()).ok()
    }
}

/// `None`: no time has passed.
fn per_second(count: u64, from_ns: Option<u64>, to_ns: u64) -> Option<f64> {
    let ns = to_ns.checked_sub(from_ns?).filter(|ns| *ns > 0)?;
    Some(count as f64 * 1e9 / ns as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::PassPages;

    const MS: u64 = 1_000_000;

    fn see(progress: &mut Progress, ms: u64, event: Event) {
        progress.see(&Stamped { t_ns: ms * MS, event });
    }

    fn part(progress: &mut Progress, ms: u64, done: u64, bytes: u64, links: &[(u8, u64)]) {
        let links = links.to_vec();
        see(progress, ms, Event::PassProgress { pass: 0, done, pages: 4000, bytes, links });
    }

    fn started() -> Progress {
        let mut progress = Progress::default();
        let started = Event::Started { pid: 1, hvm: false, total_pages: 4000, p2m_pages: 4000 };
        see(&mut progress, 1000, started);
        see(&mut progress, 1000, Event::PassStarted { pass: 0, last: false, pages: 4000 });
        progress
    }

    #[test]
    fn rates_are_those_of_the_last_two_seconds_for_each_link_too() {
        let mut progress = started();
        part(&mut progress, 1000, 0, 0, &[]);
        assert_eq!(progress.figures().bytes_per_s, None);
        for second in 1..=4 {
            let links = [(0, second * 100), (7, second * 300)];
            part(&mut progress, 1000 + second * 1000, second * 100, second * 400, &links);
        }
        // Faster at the end: what was long ago does not count.
        part(&mut progress, 6000, 600, 3600, &[(0, 400), (7, 3200)]);
        let figures = progress.figures();
        assert_eq!((figures.bytes, figures.bytes_per_s), (3600, Some(1200.0)));
        let rates: Vec<_> = figures.links.iter().map(|l| (l.link, l.bytes_per_s)).collect();
        assert_eq!(rates, [(0, Some(50.0)), (7, Some(1150.0))]);
    }

    #[test]
    fn the_time_left_has_what_the_guest_will_write_in_it() {
        let mut progress = started();
        part(&mut progress, 1000, 0, 0, &[]);
        assert_eq!(progress.figures().time_left_ms, None);
        part(&mut progress, 3000, 2000, 2 << 20, &[]);
        assert_eq!(progress.figures().time_left_ms, Some(2000));
        let pages = PassPages::default();
        see(&mut progress, 5000, Event::PassEnded { pass: 0, last: false, pages, bytes: 4 << 20 });
        see(&mut progress, 5000, Event::Dirty { pages: 2000 });
        assert_eq!(progress.figures().dirty_pages_per_s, Some(500.0));
        see(&mut progress, 5000, Event::PauseExpected { ms: 2100 });
        see(&mut progress, 5000, Event::PassStarted { pass: 1, last: false, pages: 2000 });
        // 1000 pages a second, of which the guest writes half anew: 2 s, then 1 s, and so on.
        let figures = progress.figures();
        assert_eq!((figures.pass, figures.pause_expected_ms), (Some(1), Some(2100)));
        assert_eq!(figures.time_left_ms, Some(4000));
        see(&mut progress, 5000, Event::PassStarted { pass: 2, last: true, pages: 2000 });
        assert_eq!(progress.figures().time_left_ms, Some(2000));
    }

    #[test]
    fn samples_are_thinned_out_and_span_all_the_time() {
        let mut progress = started();
        for step in 0..10_000 {
            part(&mut progress, 1000 + step * 100, 0, step, &[(0, step)]);
        }
        let samples = progress.samples();
        assert!((SAMPLES_MAX / 4..SAMPLES_MAX).contains(&samples.len()), "{}", samples.len());
        assert_eq!(samples.first(), Some(&Sample { ms: 0.0, bytes: 0, links: vec![(0, 0)] }));
        assert!(samples.last().is_some_and(|last| last.ms > 990_000.0), "{:?}", samples.last());
    }

    #[test]
    fn a_lost_link_is_told() {
        let mut progress = started();
        see(&mut progress, 1000, Event::LinkJoined { link: 3 });
        assert!(!progress.figures().links[0].lost);
        see(&mut progress, 1000, Event::LinkLost { link: 3, why: "cut".into() });
        let lost = LinkFigures { link: 3, lost: true, ..LinkFigures::default() };
        assert_eq!(progress.figures().links, [lost]);
    }
}
