//! Whether the pause is what the user allows: rxl's policy and stock's rule on the same guests, for
//! several pauses and several rates at which the guest writes.
//!
//! Where the arithmetic allows no such pause, what the user chose has to come of it: every other of
//! those runs is to be cancelled, the others forced. Whether it does is told by the figures of the
//! run itself, or, where the guest stayed, of the one before: `feasible`.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use rxl_lab::{GuestKind, GuestReport, GuestSpec, REPORT_PATH, Shape};
use serde::Serialize;
use serde_json::Value;

use super::{hundredths, print, start};
use crate::lab::{Session, describe};

/// How long a migration may take.
const TIMEOUT: Duration = Duration::from_secs(600);
/// A guest that writes more than this share of what goes out does not converge.
const CONVERGES: f64 = 0.9;
/// A pause may be longer than what was allowed by this part of it.
const SLACK: f64 = 0.2;

const PAGE_BYTES: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;

/// What is asked for.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Print a line of JSON for each run
    #[arg(long)]
    json: bool,
    /// How often each pause is tried at each rate
    #[arg(long, default_value_t = 1)]
    runs: u32,
    /// Pauses that are allowed, in ms
    #[arg(long, value_delimiter = ',', default_values_t = [100, 300, 1000])]
    targets: Vec<u64>,
    /// Pages that the guest writes in a second
    #[arg(long, value_delimiter = ',', default_values_t = [200, 1000, 20_000])]
    dirty: Vec<u64>,
    /// Memory that it rewrites, in MiB
    #[arg(long, default_value_t = 32)]
    working_set: u32,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 128)]
    mem: u32,
    /// pv or pvh
    #[arg(long = "type", default_value = "pv")]
    kind: GuestKind,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
struct Figure {
    bench: &'static str,
    /// `time` or `stock`.
    policy: &'static str,
    /// What was to be done if the pause would be too long.
    on_limit: &'static str,
    /// 0: stock's rule knows none.
    target_ms: u64,
    /// What the guest was asked to write.
    dirty_pages_s: u64,
    /// What it wrote, from before the migration to after it.
    written_pages_s: u64,
    /// Whether the figures allow such a pause; `None`: nothing has been moved yet.
    feasible: Option<bool>,
    pause_ms: Option<u64>,
    /// What rxl expected when it suspended the guest.
    expected_ms: Option<u64>,
    total_ms: u64,
    passes: usize,
    /// As in rxl's report.
    outcome: String,
}

/// How many of the feasible runs kept to the pause that was allowed, and of the others to what the
/// user chose.
#[derive(Debug, Default, Serialize)]
struct Summary {
    bench: &'static str,
    feasible: u32,
    within_target: u32,
    share: f64,
    infeasible: u32,
    as_chosen: u32,
}

/// What a migration shows of the link: what pauses contain beside memory, and how fast it goes.
#[derive(Clone, Copy, Debug)]
struct Link {
    fixed_ms: f64,
    bytes_a_second: f64,
}

/// Measures guests at each rate.
///
/// # Errors
/// Whatever keeps the lab or a migration from its end.
pub fn run(options: &Options) -> Result<()> {
    let session = Session::open_shaped(Shape::default())?;
    session.lab().push_rxl()?;
    let mut summary = Summary { bench: "policy-summary", ..Summary::default() };
    let mut link = None;
    for &dirty in &options.dirty {
        let mut spec = GuestSpec::new("bench-policy", options.kind, options.mem);
        spec.dirty_pages_per_s = dirty;
        spec.working_set_mib = Some(options.working_set);
        start(&session, &spec)?;
        let mut bench = Bench { session: &session, options, dirty, link };
        // There and back: these also teach rxl on both hosts what the pause contains beside memory.
        for _ in 0..2 {
            print(&bench.migrate(None, "force")?, options.json)?;
        }
        for run in 0..options.runs {
            for &target in &options.targets {
                let on_limit = if run % 2 == 0 { "cancel" } else { "force" };
                let figure = bench.migrate(Some(target), on_limit)?;
                print(&figure, options.json)?;
                summary.note(&figure);
            }
        }
        link = bench.link;
        session.remove(&spec.name)?;
    }
    summary.share = hundredths(f64::from(summary.within_target) / f64::from(summary.feasible));
    print(&summary, options.json)
}

struct Bench<'a> {
    session: &'a Session,
    options: &'a Options,
    dirty: u64,
    link: Option<Link>,
}

impl Bench<'_> {
    /// Moves the guest to the other host, or tries to. `target`: for how long it may be suspended;
    /// without it by stock's rule.
    fn migrate(&mut self, target: Option<u64>, on_limit: &'static str) -> Result<Figure> {
        let (session, name) = (self.session, "bench-policy");
        let (from, to) = session.here_and_there(name)?;
        let before = session.check(name, from)?;
        let rule = match target {
            Some(ms) => format!("--max-pause {ms} --on-limit {on_limit}"),
            None => "--policy stock".to_owned(),
        };
        let to_name = to.name();
        let command = format!(
            "rm -f {REPORT_PATH}; rxl migrate -s lab-rsh --streams 0 {rule} --report {REPORT_PATH} \
             {name} {to_name}"
        );
        let began = Instant::now();
        let finished = from.finish(&command, TIMEOUT)?;
        let total = began.elapsed();
        let report: Value = serde_json::from_str(&from.run(&format!("cat {REPORT_PATH}"))?)?;
        let outcome = report.get("outcome").and_then(Value::as_str).unwrap_or("none").to_owned();
        let moved = finished.status.success();
        ensure!(moved || gave_up(&report), "rxl {}", describe(&finished));
        let after = session.check(name, if moved { to } else { from })?;
        if let Some(link) = Link::of(&report) {
            self.link = Some(link);
        }
        let feasible = target.zip(self.link).map(|(ms, link)| self.is_feasible(ms, link));
        let number = |name: &str| report.get(name).and_then(Value::as_f64).map(whole);
        Ok(Figure {
            bench: "policy",
            policy: if target.is_some() { "time" } else { "stock" },
            on_limit,
            target_ms: target.unwrap_or(0),
            dirty_pages_s: self.dirty,
            written_pages_s: written(&before, &after),
            feasible,
            pause_ms: number("pause_ms"),
            expected_ms: number("pause_expected_ms"),
            total_ms: u64::try_from(total.as_millis()).unwrap_or(u64::MAX),
            passes: report.get("passes").and_then(Value::as_array).map_or(0, Vec::len),
            outcome,
        })
    }

    /// Whether there is a pause that short: with nothing to send in it where the guest writes
    /// slower than its memory goes out, and with all that it rewrites where it does not.
    fn is_feasible(&self, target_ms: u64, link: Link) -> bool {
        let dirty = as_f64(self.dirty) * PAGE_BYTES;
        let left = match dirty < CONVERGES * link.bytes_a_second {
            true => 0.0,
            false => f64::from(self.options.working_set) * MIB,
        };
        link.fixed_ms + left / link.bytes_a_second * 1000.0 <= as_f64(target_ms)
    }
}

impl Link {
    /// `None`: nothing was moved.
    fn of(report: &Value) -> Option<Link> {
        let number = |path: &str| report.pointer(path).and_then(Value::as_f64);
        let fixed_ms = number("/pause_ms")? - number("/pause/last_pass_ms")?;
        Some(Link { fixed_ms, bytes_a_second: number("/rate_mib_s")? * MIB })
    }
}

/// Whether rxl left the guest where it was because the pause would have been too long.
fn gave_up(report: &Value) -> bool {
    let causes = report.get("cause").and_then(Value::as_array).into_iter().flatten();
    let mut causes = causes.filter_map(Value::as_str);
    causes.any(|cause| cause.contains("it would be suspended for about"))
}

impl Summary {
    fn note(&mut self, figure: &Figure) {
        let gave_up = figure.pause_ms.is_none();
        match figure.feasible {
            None => {}
            Some(true) => {
                self.feasible += 1;
                let within = |pause| as_f64(pause) <= as_f64(figure.target_ms) * (1.0 + SLACK);
                self.within_target += u32::from(figure.pause_ms.is_some_and(within));
            }
            Some(false) => {
                self.infeasible += 1;
                self.as_chosen += u32::from(gave_up == (figure.on_limit == "cancel"));
            }
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate to read")]
fn written(before: &GuestReport, after: &GuestReport) -> u64 {
    let pages = after.pages_written.saturating_sub(before.pages_written);
    (as_f64(pages) / (after.uptime_s - before.uptime_s).max(f64::EPSILON)) as u64
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast saturates")]
fn whole(ms: f64) -> u64 {
    ms.round() as u64
}

#[allow(clippy::cast_precision_loss, reason = "figures to read")]
fn as_f64(value: u64) -> f64 {
    value as f64
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |ms: Option<u64>| ms.map_or("none".to_owned(), |ms| format!("{ms} ms"));
        let feasible = match self.feasible {
            Some(true) => "feasible",
            Some(false) => "not feasible",
            None => "-",
        };
        write!(
            f,
            "{} ({}), {} pages/s: {} ms allowed ({feasible}), pause {} ({} expected), {} passes, \
             {:.1} s: {}",
            self.policy,
            self.on_limit,
            self.written_pages_s,
            self.target_ms,
            ms(self.pause_ms),
            ms(self.expected_ms),
            self.passes,
            as_f64(self.total_ms) / 1000.0,
            self.outcome
        )
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} feasible runs within the pause allowed and a fifth; {} of {} as chosen",
            self.within_target, self.feasible, self.as_chosen, self.infeasible
        )
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn figure(target_ms: u64, feasible: bool, pause_ms: Option<u64>) -> Figure {
        Figure {
            bench: "policy",
            policy: "time",
            on_limit: "cancel",
            target_ms,
            dirty_pages_s: 1,
            written_pages_s: 1,
            feasible: Some(feasible),
            pause_ms,
            expected_ms: None,
            total_ms: 1,
            passes: 1,
            outcome: "moved".to_owned(),
        }
    }

    #[test]
    fn a_run_counts_by_what_was_possible_and_what_was_chosen() {
        let mut summary = Summary::default();
        for (feasible, pause) in
            [(true, Some(120)), (true, Some(121)), (true, None), (false, None), (false, Some(9))]
        {
            summary.note(&figure(100, feasible, pause));
        }
        assert_eq!((summary.feasible, summary.within_target), (3, 1));
        assert_eq!((summary.infeasible, summary.as_chosen), (2, 1));
    }

    #[test]
    fn a_report_says_what_is_not_memory_and_why_a_guest_was_not_moved() {
        let moved = json!({"pause_ms": 500.0, "pause": {"last_pass_ms": 40.0}, "rate_mib_s": 20.0});
        let link = Link::of(&moved).unwrap();
        assert_eq!((link.fixed_ms, link.bytes_a_second), (460.0, 20.0 * MIB));
        let cause = "the guest writes its memory too fast: it would be suspended for about 9 ms (";
        assert!(gave_up(&json!({"cause": ["the domain could not be sent", cause]})));
        assert!(!gave_up(&json!({"cause": ["cancelled"]})) && Link::of(&json!({})).is_none());
    }
}
