//! The report of one migration or save: made from what rxl and the save helper saw, written as
//! JSON or as a page ([`page`]), and as one line for the user.
//!
//! Times are milliseconds of the source host's monotonic clock. The *pause* is what the toolstack
//! can see of the time in which the guest does not run: from the moment the guest is known to be
//! suspended to the moment the target's report of success arrives, which is half a round trip
//! after the guest runs again. A save has a pause only if it lets the guest run on: until it is
//! resumed. The time the guest takes to follow the request to suspend is not pause, it runs
//! meanwhile; it is `suspend_wait_ms`, so `pause_ms + suspend_wait_ms` is an upper bound.
//!
//! The fields that need the save helper's events are absent where libxl ran another helper.

#[cfg(test)]
mod example;
mod page;
mod plot;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rxl_migrate::counters::{Counters, Saved};
use rxl_migrate::progress::Sample;
use rxl_migrate::report::{Event, PassPages, Stamped};
use rxl_migrate::xl::handshake::{SenderCause, SenderEnd};
use rxl_migrate::xl::saving::{SaveCause, SaveEnd};
use serde::{Deserialize, Serialize};

use crate::Exit;
use crate::output::Screen;
use crate::timeline::{Mark, Timeline};

#[cfg(test)]
pub(crate) use example::example;

/// How a migration ended, as in the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// The guest runs at the target.
    Moved,
    /// The file is complete, and what was to become of the guest has become of it, or it is
    /// suspended, to be destroyed.
    Saved,
    /// The user or a signal ended it; the guest is where it was.
    Cancelled,
    /// The guest is where it was.
    Failed,
    /// The guest is here, suspended: it could not be resumed.
    NotResumed,
    /// The guest is suspended here and may run at the target.
    Uncertain,
}

impl From<SenderEnd> for Outcome {
    fn from(end: SenderEnd) -> Outcome {
        match end {
            SenderEnd::Moved | SenderEnd::MovedWithRemains => Outcome::Moved,
            SenderEnd::Kept(SenderCause::Cancelled) => Outcome::Cancelled,
            SenderEnd::Kept(_) => Outcome::Failed,
            SenderEnd::NotResumed(_) => Outcome::NotResumed,
            SenderEnd::Uncertain(_) => Outcome::Uncertain,
        }
    }
}

impl From<SaveEnd> for Outcome {
    fn from(end: SaveEnd) -> Outcome {
        match end {
            SaveEnd::Saved | SaveEnd::SavedWithRemains => Outcome::Saved,
            SaveEnd::Kept(SaveCause::Cancelled) => Outcome::Cancelled,
            SaveEnd::Kept(_) => Outcome::Failed,
            SaveEnd::SavedNotResumed | SaveEnd::NotResumed(_) => Outcome::NotResumed,
        }
    }
}

impl Outcome {
    /// The exit code that says so.
    pub(crate) fn exit(self) -> Exit {
        match self {
            Outcome::Moved | Outcome::Saved => Exit::Success,
            Outcome::Cancelled => Exit::Cancelled,
            Outcome::Failed | Outcome::NotResumed | Outcome::Uncertain => Exit::Failed,
        }
    }

    fn is_success(self) -> bool {
        self.exit() == Exit::Success
    }
}

/// Where it went, as given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    Host(String),
    File(String),
}

/// One pass over memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Pass {
    /// 0-based.
    pub(crate) pass: u32,
    /// Whether the guest was suspended.
    pub(crate) last: bool,
    /// Pages by what became of them.
    pub(crate) pages: PassPages,
    /// Bytes of the stream written in it.
    pub(crate) bytes: u64,
    /// Its time.
    pub(crate) ms: f64,
}

/// Where the pause went; the parts add up to it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Pause {
    /// From the suspension until all memory was out.
    pub(crate) last_pass_ms: f64,
    /// Digests of all memory, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) verify_ms: Option<f64>,
    /// vCPU and platform state.
    pub(crate) state_ms: f64,
    /// From the end of the memory stream until the target had a complete domain: the rest of the
    /// stream, devices, device model.
    pub(crate) target_ms: f64,
    /// From there to the report: two messages each way, renaming, unpausing.
    pub(crate) handshake_ms: f64,
}

/// The report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Report {
    /// Version of this format.
    pub(crate) version: u32,
    /// The domain's name.
    pub(crate) domain: String,
    /// The target: `host` or `file`.
    #[serde(flatten)]
    pub(crate) target: Target,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// Why, if not well: the outermost reason first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) cause: Vec<String>,
    /// From rxl's start until the end, or the target's report of success.
    pub(crate) total_ms: f64,
    /// See the module's text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pause_ms: Option<f64>,
    /// From the request to suspend until the guest was suspended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) suspend_wait_ms: Option<f64>,
    /// What the policy expected the pause to be when it suspended the guest; its time to follow
    /// the request is not in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pause_expected_ms: Option<u64>,
    /// What the guest was left of its processors at last, in percent, if it was slowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) throttled_percent: Option<u8>,
    /// The pause by cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pause: Option<Pause>,
    /// Bytes of the memory stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes: Option<u64>,
    /// Bytes over the time from the first to the last of them, in MiB/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate_mib_s: Option<f64>,
    /// Pages whose digests were compared at the target, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) verified_pages: Option<u64>,
    /// The passes that ended.
    pub(crate) passes: Vec<Pass>,
    /// Connections beside the stream.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) links: Vec<Link>,
    /// What mapped the guest's memory at this side: `privcmd`, `module`, or `both`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mapper: Option<&'static str>,
    /// What all processes of this side have done in all.
    pub(crate) counters: Counters,
    /// What had been sent when, some hundred moments at most.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) samples: Vec<Sample>,
}

/// One connection beside the stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Link {
    /// Its number.
    pub(crate) link: u8,
    /// Bytes of page data sent over it.
    pub(crate) bytes: u64,
    /// Batches sent over it.
    pub(crate) batches: u64,
    /// How full the queue of batches before it was, from 0 to 1: below 1 it had to wait for some.
    pub(crate) queue: f64,
    /// Time in which it took no more.
    pub(crate) stalled_ms: f64,
    /// Why it was given up, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lost: Option<String>,
}

/// What the report is made from.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) domain: &'a str,
    pub(crate) target: Target,
    pub(crate) outcome: Outcome,
    pub(crate) cause: &'a [String],
    pub(crate) timeline: &'a Timeline,
    pub(crate) events: &'a [Stamped],
}

const MIB: f64 = 1_048_576.0;

impl Report {
    pub(crate) fn new(facts: &Facts<'_>) -> Report {
        let at = |mark| facts.timeline.at(mark);
        let outcome = facts.outcome;
        let runs_again = at(Mark::Reported).or(at(Mark::Resumed)).filter(|_| outcome.is_success());
        let reported = at(Mark::Reported).filter(|_| outcome.is_success());
        let ended = reported.or(at(Mark::Ended));
        let first = |wanted: fn(&Event) -> bool| {
            facts.events.iter().find(|s| wanted(&s.event)).map(|s| s.t_ns)
        };
        let asked = first(|e| matches!(e, Event::SuspendAsked));
        let suspended = first(|e| matches!(e, Event::Suspended));
        let began = first(|e| matches!(e, Event::Started { .. }));
        let last_event = facts.events.last().map(|s| s.t_ns);
        let bytes = facts.events.iter().rev().find_map(|s| bytes_so_far(&s.event));
        let seconds = span(began, last_event).map(|ms| ms / 1000.0).filter(|s| *s > 0.0);
        let counters = counters(facts.events);
        Report {
            version: 1,
            domain: facts.domain.to_owned(),
            target: facts.target.clone(),
            outcome,
            cause: facts.cause.to_vec(),
            total_ms: span(at(Mark::Started), ended).unwrap_or(0.0),
            pause_ms: span(suspended, runs_again),
            suspend_wait_ms: span(asked, suspended),
            pause_expected_ms: facts.events.iter().rev().find_map(|s| match s.event {
                Event::PauseExpected { ms } => Some(ms),
                _ => None,
            }),
            throttled_percent: facts.events.iter().rev().find_map(|s| match s.event {
                Event::Throttled { percent } => Some(percent),
                _ => None,
            }),
            pause: pause(facts, suspended, reported),
            bytes,
            rate_mib_s: bytes.zip(seconds).map(|(b, s)| as_f64(b) / MIB / s),
            verified_pages: facts.events.iter().find_map(|s| match s.event {
                Event::Verified { pages } => Some(pages),
                _ => None,
            }),
            passes: passes(facts.events),
            links: links(facts.events),
            mapper: mapper(&counters),
            counters,
            samples: facts.timeline.board().samples(),
        }
    }

    /// Tells it the user: one line of what succeeded, with `verbose` more; and writes it to
    /// `files`.
    pub(crate) fn publish(
        &self,
        screen: &Screen,
        verbose: u8,
        files: &[PathBuf],
    ) -> anyhow::Result<()> {
        if self.outcome.is_success() {
            screen.line(&self.summary());
        }
        if verbose > 0 {
            self.details().iter().for_each(|line| screen.line(line));
        }
        files.iter().try_for_each(|path| self.write(path))
    }

    fn summary(&self) -> String {
        let (domain, seconds) = (&self.domain, self.total_ms / 1000.0);
        let mut line = match &self.target {
            Target::Host(host) => format!("rxl: {domain} moved to {host} in {seconds:.1} s"),
            Target::File(file) => format!("rxl: {domain} saved to {file} in {seconds:.1} s"),
        };
        if let Some(pause) = self.pause_ms {
            line += &format!(": pause {pause:.0} ms");
            if let Some(expected) = self.pause_expected_ms {
                line += &format!(" ({expected} expected)");
            }
        }
        if let (Some(bytes), Some(rate)) = (self.bytes, self.rate_mib_s) {
            let passes = self.passes.len();
            let es = if passes == 1 { "" } else { "es" };
            let mib = as_f64(bytes) / MIB;
            line += &format!(", {mib:.0} MiB in {passes} pass{es}, {rate:.0} MiB/s");
        }
        if let Some(percent) = self.throttled_percent {
            line += &format!(", slowed to {percent} %");
        }
        let saved = self.counters.left_out.by_kind().iter().map(|(_, saved)| saved.bytes).sum();
        if saved > 0 {
            line += &format!(", {:.0} MiB left out", as_f64(saved) / MIB);
        }
        match self.links.len() {
            0 => {}
            1 => line += ", 1 connection",
            links => line += &format!(", {links} connections"),
        }
        line
    }

    /// What `-v` tells beside: connections and counters.
    fn details(&self) -> Vec<String> {
        let link = |link: &Link| {
            let Link { link: number, bytes, batches, queue, stalled_ms, lost } = link;
            let lost = lost.as_ref().map_or(String::new(), |why| format!("; lost: {why}"));
            let mib = as_f64(*bytes) / MIB;
            format!(
                "rxl: connection {number}: {mib:.1} MiB in {batches} batches, queue {:.0} % full, \
                 waited for {stalled_ms:.0} ms{lost}",
                queue * 100.0
            )
        };
        let Counters { hypercalls, mappings, mapped_pages, kept_pages, .. } = &self.counters;
        let Counters { map_ns, unmap_ns, stalled_ns, .. } = &self.counters;
        let ms = |ns: &u64| as_f64(*ns) / 1e6;
        let (map, unmap, stalled) = (ms(map_ns), ms(unmap_ns), ms(stalled_ns));
        let mapper = self.mapper.unwrap_or("nobody");
        let calls: Vec<String> = hypercalls.iter().map(|(op, n)| format!("{op} {n}")).collect();
        let mapped = format!(
            "rxl: {mapped_pages} pages in {mappings} mappings by {mapper}, {map:.0} ms to map and \
             {unmap:.0} ms to unmap them, {kept_pages} pages sent from those of earlier batches"
        );
        let calls = format!("rxl: hypercalls: {}", calls.join(", "));
        let left_out = self.left_out();
        let stalled = format!("rxl: {stalled:.0} ms in which a way to the target took no more");
        self.links.iter().map(link).chain(left_out).chain([mapped, calls, stalled]).collect()
    }

    /// What was left out of what was sent, if anything was.
    fn left_out(&self) -> Option<String> {
        let kinds =
            self.counters.left_out.by_kind().into_iter().filter(|(_, saved)| saved.pages > 0);
        let kinds = kinds.map(|(kind, Saved { pages, bytes })| {
            let mib = as_f64(bytes) / MIB;
            format!("{kind} {mib:.1} MiB of {pages} pages")
        });
        let kinds: Vec<String> = kinds.collect();
        (!kinds.is_empty()).then(|| format!("rxl: not sent: {}", kinds.join(", ")))
    }

    /// Writes it to `path`: a page if that is what its name says, else JSON.
    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let is_page = path.extension().is_some_and(|end| end == "html" || end == "htm");
        let text =
            if is_page { page::page(self)? } else { serde_json::to_string_pretty(self)? + "\n" };
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

fn mapper(counters: &Counters) -> Option<&'static str> {
    match (counters.mapped_pages, counters.module_pages) {
        (0, _) => None,
        (_, 0) => Some("privcmd"),
        (all, module) if all == module => Some("module"),
        _ => Some("both"),
    }
}

fn pause(facts: &Facts<'_>, suspended: Option<u64>, reported: Option<u64>) -> Option<Pause> {
    let first =
        |wanted: fn(&Event) -> bool| facts.events.iter().find(|s| wanted(&s.event)).map(|s| s.t_ns);
    let memory = first(|e| matches!(e, Event::MemorySent));
    let verified = first(|e| matches!(e, Event::Verified { .. }));
    let finished = first(|e| matches!(e, Event::Finished { .. }));
    let ready = facts.timeline.at(Mark::Ready);
    Some(Pause {
        last_pass_ms: span(suspended, memory)?,
        verify_ms: span(memory, verified),
        state_ms: span(verified.or(memory), finished)?,
        target_ms: span(finished, ready)?,
        handshake_ms: span(ready, reported)?,
    })
}

fn passes(events: &[Stamped]) -> Vec<Pass> {
    let mut passes = Vec::new();
    let (mut began, mut bytes_before) = (None, 0);
    for stamped in events {
        match &stamped.event {
            Event::PassStarted { .. } => began = Some(stamped.t_ns),
            Event::PassEnded { pass, last, pages, bytes } => {
                passes.push(Pass {
                    pass: *pass,
                    last: *last,
                    pages: *pages,
                    bytes: bytes.saturating_sub(bytes_before),
                    ms: span(began, Some(stamped.t_ns)).unwrap_or(0.0),
                });
                bytes_before = *bytes;
            }
            _ => {}
        }
    }
    passes
}

fn links(events: &[Stamped]) -> Vec<Link> {
    let mut links: BTreeMap<u8, Link> = BTreeMap::new();
    for stamped in events {
        match &stamped.event {
            Event::LinkJoined { link } => {
                links.insert(*link, Link { link: *link, ..Link::default() });
            }
            Event::LinkLost { link, why } => {
                links.entry(*link).or_default().lost = Some(why.clone());
            }
            Event::Counted { link: Some(number), bytes, batches, queued, counters } => {
                let link = links.entry(*number).or_default();
                (link.bytes, link.batches) = (*bytes, *batches);
                link.queue = as_f64(*queued) / as_f64((*batches).max(1));
                link.stalled_ms = as_f64(counters.stalled_ns) / 1e6;
            }
            _ => {}
        }
    }
    links.into_values().collect()
}

fn counters(events: &[Stamped]) -> Counters {
    let mut sum = Counters::default();
    for stamped in events {
        if let Event::Counted { counters, .. } = &stamped.event {
            sum += counters;
        }
    }
    sum
}

fn bytes_so_far(event: &Event) -> Option<u64> {
    match event {
        Event::PassProgress { bytes, .. }
        | Event::PassEnded { bytes, .. }
        | Event::Finished { bytes } => Some(*bytes),
        _ => None,
    }
}

/// Milliseconds between two times, if both are known.
fn span(from: Option<u64>, to: Option<u64>) -> Option<f64> {
    Some(as_f64(to?.saturating_sub(from?)) / 1e6)
}

/// Exact up to 2^53, which is 8 PiB or 104 days of nanoseconds.
#[allow(clippy::cast_precision_loss, reason = "see above")]
pub(crate) fn as_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn events() -> Vec<Stamped> {
        let pages = PassPages { wanted: 300, plain: 250, tables: 6, ..PassPages::default() };
        [
            (100, Event::Started { pid: 1, hvm: false, total_pages: 300, p2m_pages: 300 }),
            (110, Event::PassStarted { pass: 0, last: false, pages: 300 }),
            (1110, Event::PassEnded { pass: 0, last: false, pages, bytes: 1 << 20 }),
            (1120, Event::SuspendAsked),
            (1150, Event::Suspended),
            (1151, Event::PassStarted { pass: 1, last: true, pages: 10 }),
            (1171, Event::PassEnded { pass: 1, last: true, pages, bytes: 3 << 20 }),
            (1180, Event::MemorySent),
            (1100 + 500, Event::Finished { bytes: 3 << 20 }),
        ]
        .map(|(ms, event)| Stamped { t_ns: ms * MS, event })
        .to_vec()
    }

    fn timeline() -> Timeline {
        let marks = [
            (Mark::Started, 0),
            (Mark::Answered, 90),
            (Mark::Sent, 1610),
            (Mark::Ready, 1900),
            (Mark::Reported, 2000),
            (Mark::Ended, 2100),
        ];
        Timeline::from_marks(&marks.map(|(mark, ms)| (mark, ms * MS)))
    }

    fn report(end: SenderEnd, cause: &[String]) -> Report {
        Report::new(&Facts {
            domain: "web",
            target: Target::Host("host2".to_owned()),
            outcome: end.into(),
            cause,
            timeline: &timeline(),
            events: &events(),
        })
    }

    #[test]
    fn the_parts_of_the_pause_add_up_to_it() {
        let report = report(SenderEnd::Moved, &[]);
        assert_eq!(report.pause_ms, Some(850.0));
        assert_eq!(report.suspend_wait_ms, Some(30.0));
        let pause = report.pause.clone().unwrap();
        assert_eq!((pause.last_pass_ms, pause.state_ms), (30.0, 420.0));
        assert_eq!((pause.target_ms, pause.handshake_ms), (300.0, 100.0));
        assert_eq!(report.total_ms, 2000.0);
    }

    #[test]
    fn digests_are_a_part_of_the_pause_of_their_own() {
        let mut events = events();
        events.insert(8, Stamped { t_ns: 1500 * MS, event: Event::Verified { pages: 290 } });
        let report = Report::new(&Facts {
            domain: "web",
            target: Target::Host("host2".to_owned()),
            outcome: Outcome::Moved,
            cause: &[],
            timeline: &timeline(),
            events: &events,
        });
        let pause = report.pause.unwrap();
        assert_eq!((pause.verify_ms, pause.state_ms), (Some(320.0), 100.0));
        assert_eq!((report.pause_ms, report.verified_pages), (Some(850.0), Some(290)));
    }

    #[test]
    fn passes_have_their_own_bytes_and_times() {
        let report = report(SenderEnd::Moved, &[]);
        let passes: Vec<_> = report.passes.iter().map(|p| (p.last, p.bytes, p.ms)).collect();
        assert_eq!(passes, [(false, 1 << 20, 1000.0), (true, 2 << 20, 20.0)]);
        let line = "rxl: web moved to host2 in 2.0 s: pause 850 ms, 3 MiB in 2 passes, 2 MiB/s";
        assert_eq!(report.summary(), line);
    }

    #[test]
    fn connections_are_told_with_what_they_carried_and_what_became_of_them() {
        let counted = |link, mappings| Event::Counted {
            link,
            bytes: 3 << 20,
            batches: 2,
            queued: 1,
            counters: Counters {
                mappings,
                kept_pages: 4,
                stalled_ns: 5 * MS,
                ..Counters::default()
            },
        };
        let why = "nothing was heard of the receiver".to_owned();
        let more = [
            Event::LinkJoined { link: 0 },
            Event::LinkJoined { link: 7 },
            Event::LinkLost { link: 7, why },
            counted(Some(0), 10),
            counted(None, 1),
        ];
        let more = more.map(|event| Stamped { t_ns: 1600 * MS, event });
        let report = Report::new(&Facts {
            domain: "web",
            target: Target::Host("host2".to_owned()),
            outcome: Outcome::Moved,
            cause: &[],
            timeline: &timeline(),
            events: &[events(), more.to_vec()].concat(),
        });
        assert!(report.summary().ends_with(" MiB/s, 2 connections"), "{}", report.summary());
        assert_eq!(report.counters.mappings, 11);
        let details = report.details();
        assert_eq!(
            details[0],
            "rxl: connection 0: 3.0 MiB in 2 batches, queue 50 % full, waited for 5 ms"
        );
        assert!(
            details[1].ends_with("; lost: nothing was heard of the receiver"),
            "{}",
            details[1]
        );
        let kept = "unmap them, 8 pages sent from those of earlier batches";
        assert!(details[2].ends_with(kept), "{}", details[2]);
    }

    #[test]
    fn a_failure_is_reported_with_its_cause_and_without_a_pause() {
        let cause = ["the target did not take the domain".to_owned()];
        let report = report(SenderEnd::Kept(SenderCause::NoReady), &cause);
        assert_eq!((report.outcome, report.pause_ms), (Outcome::Failed, None));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["outcome"], "failed");
        assert_eq!(json["cause"][0], cause[0]);
        assert_eq!(json["total_ms"], 2100.0);
        assert_eq!(json["passes"][1]["pages"]["plain"], 250);
        assert!(json.get("pause_ms").is_none());
    }

    #[test]
    fn a_save_has_a_pause_if_the_guest_runs_on_and_none_if_it_ends() {
        let saved = |marks: &[(Mark, u64)]| {
            let timeline: Vec<_> = marks.iter().map(|(mark, ms)| (*mark, ms * MS)).collect();
            Report::new(&Facts {
                domain: "web",
                target: Target::File("web.save".to_owned()),
                outcome: SaveEnd::Saved.into(),
                cause: &[],
                timeline: &Timeline::from_marks(&timeline),
                events: &events(),
            })
        };
        let ended = saved(&[(Mark::Started, 0), (Mark::Sent, 1610), (Mark::Ended, 2100)]);
        let line = "rxl: web saved to web.save in 2.1 s, 3 MiB in 2 passes, 2 MiB/s";
        assert_eq!((ended.pause_ms, ended.summary().as_str()), (None, line));
        let json = serde_json::to_value(&ended).unwrap();
        assert_eq!((&json["file"], json.get("host")), (&"web.save".into(), None));
        let runs = saved(&[(Mark::Started, 0), (Mark::Resumed, 1850), (Mark::Ended, 2100)]);
        assert_eq!(runs.pause_ms, Some(700.0));
    }

    #[test]
    fn without_the_helpers_events_there_are_times_of_rxl_only() {
        let report = Report::new(&Facts {
            domain: "web",
            target: Target::Host("host2".to_owned()),
            outcome: Outcome::Moved,
            cause: &[],
            timeline: &timeline(),
            events: &[],
        });
        assert_eq!(report.summary(), "rxl: web moved to host2 in 2.0 s");
        assert_eq!((report.pause_ms, report.bytes), (None, None));
    }
}
