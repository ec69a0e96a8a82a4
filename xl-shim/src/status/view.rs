//! What users read of a migration, save or restore that is under way, and of earlier ones.

use std::time::Duration;

use indicatif::HumanDuration;
use rxl_migrate::frame::PAGE_SIZE;
use rxl_migrate::progress::{Figures, LinkFigures};

use super::runs::Run;
use super::state::{Doing, Phase, State};
use crate::history::Entry;
use crate::report::{Outcome, Target};

/// Connections that are listed one by one; of more the extremes are told.
const LISTED_MAX: usize = 8;

/// A heading, and the figures that there are below it.
pub(crate) fn run(run: &Run, now_unix_ms: u64) -> Vec<String> {
    let state = &run.state;
    let number = state.domid.map_or(String::new(), |domid| format!(" (domain {domid})"));
    let since = Duration::from_millis(now_unix_ms.saturating_sub(state.started_unix_ms));
    let phase = if run.is_killed {
        "its rxl was killed; what is left of it is putting things right"
    } else {
        phase(state)
    };
    let mut lines = vec![format!(
        "{}{number} {}: {phase}, for {} s",
        state.domain,
        way(state.doing, state.target.as_ref()),
        since.as_secs()
    )];
    if let Some(pass) = pass(&state.memory).filter(|_| !run.is_killed) {
        lines.push(format!("    {pass}"));
    }
    lines.extend(figures(&state.memory).into_iter().map(|line| format!("    {line}")));
    lines
}

fn way(doing: Doing, target: Option<&Target>) -> String {
    let other = match target {
        Some(Target::Host(other) | Target::File(other)) => other.as_str(),
        None => "another host",
    };
    match doing {
        Doing::Migrate => format!("to {other}"),
        Doing::Save => format!("to the file {other}"),
        Doing::Receive => format!("from {other}"),
        Doing::Restore => format!("from the file {other}"),
    }
}

fn phase(state: &State) -> &'static str {
    match (state.phase, state.doing) {
        (Phase::Starting, Doing::Receive | Doing::Restore) => "the domain is being made",
        (Phase::Starting, _) => "starting",
        (Phase::Memory, _) => "memory",
        (Phase::Suspending, _) => "asked to suspend",
        (Phase::LastPass, Doing::Save) => "suspended, memory",
        (Phase::LastPass, _) => "suspended, last pass",
        (Phase::State, _) => "suspended, state",
        (Phase::Sent, Doing::Save) => "suspended, bringing the file to the disk",
        (Phase::Sent, _) => "suspended, waiting for the target",
        (Phase::Ready, Doing::Migrate) => "suspended, handing over",
        (Phase::Ready, _) => "complete, waiting for the permission to start",
        (Phase::Committed, _) => "ending, too late to cancel",
    }
}

fn pass(figures: &Figures) -> Option<String> {
    let (pass, done, pages) = (figures.pass?, figures.done, figures.pages);
    let percent = (done.min(pages) * 100).checked_div(pages).unwrap_or(100);
    Some(format!("pass {pass}: {done} of {pages} pages, {percent} %"))
}

/// Lines of what is known.
pub(crate) fn figures(figures: &Figures) -> Vec<String> {
    let mut lines = Vec::new();
    if figures.bytes > 0 {
        let rate = figures.bytes_per_s.map_or(String::new(), |rate| format!(", {}/s", size(rate)));
        lines.push(format!("{} sent{rate}{}", size(figures.bytes as f64), links(&figures.links)));
    }
    if let Some(rate) = figures.dirty_pages_per_s {
        let left = figures.dirty_pages.unwrap_or_default();
        let bytes = |pages: f64| size(pages * PAGE_SIZE as f64);
        lines.push(format!(
            "the guest writes {}/s; {} were left after the last pass",
            bytes(rate),
            bytes(left as f64)
        ));
    }
    let pause = figures.pause_expected_ms.map(|ms| format!("a pause of {ms} ms is expected"));
    let left = figures.time_left_ms.map(|ms| format!("about {} s left", ms.div_ceil(1000)));
    let both: Vec<String> = pause.into_iter().chain(left).collect();
    if !both.is_empty() {
        lines.push(both.join(", "));
    }
    lines
}

/// What a pass has sent.
pub(crate) fn sent(pages: u64, bytes: u64, took: Duration) -> String {
    let (bytes, seconds) = (bytes as f64, took.as_secs_f64());
    let rate = if seconds > 0.0 { bytes / seconds } else { 0.0 };
    format!("{pages} pages sent, {} in {seconds:.1} s, {}/s", size(bytes), size(rate))
}

/// The connections and their rates.
fn links(links: &[LinkFigures]) -> String {
    let lost = links.iter().filter(|link| link.lost).count();
    let lost = if lost > 0 { format!(" ({lost} lost)") } else { String::new() };
    let live: Vec<f64> = links
        .iter()
        .filter(|link| !link.lost)
        .map(|link| link.bytes_per_s.unwrap_or_default())
        .collect();
    let count = match live.len() {
        0 => return lost,
        1 => "1 connection".to_owned(),
        count => format!("{count} connections"),
    };
    let mib = |rate: &f64| format!("{:.1}", rate / MIB);
    let rates = if live.len() <= LISTED_MAX {
        live.iter().map(mib).collect::<Vec<_>>().join(" + ")
    } else {
        let least = live.iter().copied().fold(f64::INFINITY, f64::min);
        let most = live.iter().copied().fold(0.0, f64::max);
        format!("{} to {}", mib(&least), mib(&most))
    };
    let each = if live.len() > LISTED_MAX { " each" } else { "" };
    format!(", {count}: {rates} MiB/s{each}{lost}")
}

const MIB: f64 = 1_048_576.0;

fn size(bytes: f64) -> String {
    if bytes < 1024.0 * MIB {
        format!("{:.1} MiB", bytes / MIB)
    } else {
        format!("{:.2} GiB", bytes / MIB / 1024.0)
    }
}

/// One that is over.
pub(crate) fn entry(entry: &Entry, now_unix_ms: u64) -> String {
    let ago = Duration::from_millis(now_unix_ms.saturating_sub(entry.ended_unix_ms));
    let doing = match &entry.target {
        Target::Host(_) => Doing::Migrate,
        Target::File(_) => Doing::Save,
    };
    let outcome = match entry.outcome {
        Outcome::Moved => "moved",
        Outcome::Saved => "saved",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed => "failed",
        Outcome::NotResumed => "failed, and not resumed here",
        Outcome::Uncertain => "failed, and not known where it runs",
    };
    let seconds = entry.total_ms / 1000.0;
    let mut line = format!(
        "{} {}: {outcome} in {seconds:.1} s, {} ago",
        entry.domain,
        way(doing, Some(&entry.target)),
        HumanDuration(ago)
    );
    if let Some(pause) = entry.pause_ms {
        line += &format!("; pause {pause:.0} ms");
    }
    if let Some(bytes) = entry.bytes {
        line += &format!(", {} in {} passes", size(bytes as f64), entry.passes);
    }
    if let Some(cause) = entry.cause.first() {
        line += &format!("; {cause}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::super::state::example;
    use super::*;

    fn link(link: u8, rate: f64) -> LinkFigures {
        LinkFigures { link, bytes: 1, bytes_per_s: Some(rate * MIB), lost: false }
    }

    #[test]
    fn a_migration_is_told_with_rates_and_estimates() {
        let memory = Figures {
            pass: Some(2),
            done: 50,
            pages: 200,
            bytes: 300 << 20,
            bytes_per_s: Some(98.0 * MIB),
            dirty_pages: Some(2560),
            dirty_pages_per_s: Some(512.0),
            pause_expected_ms: Some(180),
            time_left_ms: Some(2500),
            links: vec![link(0, 49.5), link(1, 48.5), LinkFigures { lost: true, ..link(2, 0.0) }],
            ..Figures::default()
        };
        let state = State { memory, ..example() };
        let text = run(&Run { state: state.clone(), is_killed: false }, 1_012_900).join("\n");
        expect_test::expect![[r"
            web (domain 5) to host2: memory, for 12 s
                pass 2: 50 of 200 pages, 25 %
                300.0 MiB sent, 98.0 MiB/s, 2 connections: 49.5 + 48.5 MiB/s (1 lost)
                the guest writes 2.0 MiB/s; 10.0 MiB were left after the last pass
                a pause of 180 ms is expected, about 3 s left"]]
        .assert_eq(&text);
        let killed = run(&Run { state, is_killed: true }, 1_000_000);
        assert!(killed[0].contains("its rxl was killed"), "{killed:?}");
        let many: Vec<_> = (0..20).map(|n| link(n, f64::from(n))).collect();
        assert_eq!(links(&many), ", 20 connections: 0.0 to 19.0 MiB/s each");
    }

    #[test]
    fn of_what_is_not_known_nothing_is_said() {
        let state = State { doing: Doing::Receive, domid: None, target: None, ..example() };
        let text = run(&Run { state, is_killed: false }, 0);
        assert_eq!(text, ["web from another host: memory, for 0 s"]);
    }
}
