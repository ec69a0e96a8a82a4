//! `rxl migrate --dry-run`: says how long moving a domain would take and what the pause would be,
//! from a short look at what it writes. Nothing is moved, and nobody at the target is asked.
//!
//! What is looked at and how it is reckoned is [`rxl_migrate::source::estimate`]'s.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rxl_migrate::frame::PAGE_SIZE;
use rxl_migrate::source::estimate::{Estimate, Sample, estimate, sample};
use rxl_migrate::source::precopy::Policy;
use rxl_toolstack::lifecycle::Lifecycle;
use rxl_toolstack::xc::LiveDomain;
use serde::Serialize;

use crate::Exit;
use crate::cli::{Globals, MigrateArgs};
use crate::gate::{Gate, SignalWatch};
use crate::guard::{Guard, Ward};
use crate::history::History;
use crate::host::{self, Progress};
use crate::outgoing::Guest;
use crate::output::{self, Screen};
use crate::report;

const MIB: f64 = 1_048_576.0;
/// Bytes a second of one Mbit/s.
const MBIT: f64 = 1e6 / 8.0;
/// What is taken for the rate, in Mbit/s, where nothing has gone to the target yet.
const RATE_ASSUMED: u32 = 1000;

/// How fast memory goes out, and how that is known.
#[derive(Clone, Copy, Debug)]
struct Rate {
    bytes_a_second: f64,
    known: &'static str,
}

/// What is said, as JSON.
#[derive(Debug, Serialize)]
struct Told<'a> {
    /// Version of this format.
    version: u32,
    dry_run: bool,
    domain: &'a str,
    host: &'a str,
    memory_mib: f64,
    /// How many different pages it had written after so many milliseconds.
    written: Vec<(u64, u64)>,
    rate_mib_s: f64,
    passes: u32,
    bytes: u64,
    /// Until the domain would run at the target, or be given up.
    total_ms: u64,
    pause_ms: u64,
    gives_up: bool,
}

/// Looks at the domain and tells what it would take.
pub(crate) fn run(globals: &Globals, args: &MigrateArgs, screen: &Screen) -> anyhow::Result<Exit> {
    let history = History::of_this_host();
    let ways = args.ways(history.fixed_part(&args.domain, &args.host))?;
    let host = host::open(globals, Progress::Silent)?;
    let config = args.config.as_deref();
    let guest = Guest::find(&host, &args.domain, config, args.preserve_domid, true)?;
    let gate = Arc::new(Gate::new()?);
    // Nothing is ever committed.
    let _signals =
        SignalWatch::start(gate.clone(), host.canceller(), screen.clone(), String::new())?;
    let ward =
        Ward::Leaving { domid: guest.domid, name: &guest.name, draft: None, to: None, cap: None };
    let _guard = Guard::start(ward, &guest.lock, screen);
    let time = Duration::from_secs(args.sample);
    screen.line(&format!("rxl: looking at what {} writes, for {} s", guest.name, args.sample));
    let looked = LiveDomain::open(guest.domid).map_err(rxl_migrate::Error::from).and_then(|live| {
        sample(&live, time, crate::timeline::now, |time| wait(&gate, time).unwrap_or(false))
    });
    let looked = match looked {
        Ok(looked) => looked,
        Err(_) if gate.is_cancelled() => return Ok(Exit::Cancelled),
        Err(error) => {
            return Err(error).with_context(|| format!("{} could not be moved", guest.name));
        }
    };
    let rate = rate(args, &history);
    let estimate = estimate(&looked, rate.bytes_a_second, ways.policy.0);
    for line in lines(&guest.name, args, &looked, &rate, &estimate, ways.policy.0) {
        output::stdout(&(line + "\n"));
    }
    for path in &args.report {
        write(path, &told(&guest.name, &args.host, &looked, &rate, &estimate))?;
    }
    Ok(if estimate.gives_up { Exit::Failed } else { Exit::Success })
}

/// What the user says, or what it was the last time, or a guess.
fn rate(args: &MigrateArgs, history: &History) -> Rate {
    if let Some(mbit) = args.rate {
        return Rate { bytes_a_second: f64::from(mbit) * MBIT, known: "as you say" };
    }
    match history.rate(&args.host).filter(|mib| *mib > 0.0) {
        Some(mib) => Rate { bytes_a_second: mib * MIB, known: "as the last time" },
        None => Rate {
            bytes_a_second: f64::from(RATE_ASSUMED) * MBIT,
            known: "a guess: nothing has gone there yet, and there is no --rate",
        },
    }
}

/// `false`: somebody wants an end.
fn wait(gate: &Gate, time: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(gate.wake_fd(), PollFlags::IN)];
    let timeout = Timespec::try_from(time).map_err(io::Error::other)?;
    Ok(poll(&mut fds, Some(&timeout))? == 0)
}

/// For the user.
fn lines(
    name: &str,
    args: &MigrateArgs,
    looked: &Sample,
    rate: &Rate,
    estimate: &Estimate,
    policy: Policy,
) -> [String; 3] {
    let mib = |pages: u64| report::as_f64(pages) * PAGE_SIZE as f64 / MIB;
    let all = mib(looked.total_pages);
    let written = mib(looked.pages_in(Duration::from_secs(args.sample)));
    let (seconds, host, passes) = (args.sample, &args.host, estimate.passes);
    let es = if passes == 1 { "" } else { "es" };
    let (time, pause) = (estimate.time.as_secs_f64(), estimate.pause.as_millis());
    let allowed = match policy {
        Policy::ByTime(limits) => format!(" ({} allowed)", limits.pause.as_millis()),
        Policy::Stock => String::new(),
    };
    let end = match estimate.gives_up {
        false => format!("a pause of {pause} ms{allowed}"),
        true => format!("then it would be given up: the pause would be {pause} ms{allowed}"),
    };
    [
        format!("rxl: {name} has {all:.0} MiB, and wrote {written:.1} of them in {seconds} s"),
        format!(
            "rxl: to {host} at {:.0} MiB/s ({}): about {time:.1} s in {passes} pass{es}, {end}",
            rate.bytes_a_second / MIB,
            rate.known
        ),
        "rxl: nothing was moved".to_owned(),
    ]
}

fn told<'a>(
    domain: &'a str,
    host: &'a str,
    looked: &Sample,
    rate: &Rate,
    estimate: &Estimate,
) -> Told<'a> {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let paused = if estimate.gives_up { Duration::ZERO } else { estimate.pause };
    Told {
        version: 1,
        dry_run: true,
        domain,
        host,
        memory_mib: report::as_f64(looked.total_pages) * PAGE_SIZE as f64 / MIB,
        written: looked.written.iter().map(|(after, pages)| (ms(*after), *pages)).collect(),
        rate_mib_s: rate.bytes_a_second / MIB,
        passes: estimate.passes,
        bytes: estimate.bytes,
        total_ms: ms(estimate.time.saturating_add(paused)),
        pause_ms: ms(estimate.pause),
        gives_up: estimate.gives_up,
    }
}

fn write(path: &Path, told: &Told<'_>) -> anyhow::Result<()> {
    let mut json = serde_json::to_string_pretty(told)?;
    json.push('\n');
    std::fs::write(path, json).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use rxl_migrate::source::precopy::{AtLimit, Limits};

    use super::*;
    use crate::cli::{Cli, Verb};

    fn args(more: &[&str]) -> MigrateArgs {
        let words = ["rxl", "migrate", "--dry-run"].iter().chain(more).chain(&["web", "host2"]);
        match Cli::try_parse_from(words).unwrap().verb {
            Verb::Migrate(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn looked() -> Sample {
        let written = vec![(Duration::from_secs(5), 64_000)];
        Sample { total_pages: 262_144, written, ..Sample::default() }
    }

    #[test]
    fn the_user_is_told_time_and_pause_and_whether_it_would_be_given_up() {
        let (args, looked) = (args(&["--rate", "8000"]), looked());
        let directory = tempfile::tempdir().unwrap();
        let rate = rate(&args, &History::in_directory(directory.path()));
        let told = |at_limit| {
            let policy = Policy::ByTime(Limits { at_limit, ..Limits::default() });
            let estimate = estimate(&looked, rate.bytes_a_second, policy);
            lines("web", &args, &looked, &rate, &estimate, policy)
        };
        let lines = told(AtLimit::Force);
        assert_eq!(lines[0], "rxl: web has 1024 MiB, and wrote 250.0 of them in 5 s");
        let start = "rxl: to host2 at 954 MiB/s (as you say): about 1.1 s in 1 pass, a pause of ";
        assert!(
            lines[1].starts_with(start) && lines[1].ends_with(" ms (300 allowed)"),
            "{lines:?}"
        );
        let slow = Rate { bytes_a_second: 10.0 * MIB, ..rate };
        let limits = Limits { at_limit: AtLimit::Cancel, ..Limits::default() };
        let policy = Policy::ByTime(limits);
        let estimate = estimate(&looked, slow.bytes_a_second, policy);
        assert!(estimate.gives_up);
        let line = &super::lines("web", &args, &looked, &slow, &estimate, policy)[1];
        assert!(line.contains(", then it would be given up: the pause would be "), "{line}");
    }

    #[test]
    fn without_a_rate_it_is_that_of_the_last_time_or_a_guess_that_is_called_one() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::in_directory(directory.path());
        let guess = rate(&args(&[]), &history);
        assert!(guess.bytes_a_second == 125e6 && guess.known.starts_with("a guess"), "{guess:?}");
        let text = r#"{"domain":"a","host":"host2","outcome":"moved","rate_mib_s":64.0}"#;
        std::fs::write(directory.path().join("00000000000001.json"), text).unwrap();
        assert_eq!(rate(&args(&[]), &history).bytes_a_second, 64.0 * MIB);
    }

    #[test]
    fn who_wants_an_end_does_not_wait() {
        let gate = Gate::new().unwrap();
        assert!(wait(&gate, Duration::ZERO).unwrap());
        gate.cancel();
        assert!(!wait(&gate, Duration::from_secs(600)).unwrap());
    }
}
