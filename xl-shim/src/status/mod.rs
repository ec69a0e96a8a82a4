//! What rxls of this host are doing, for people and programs that look on: `rxl status` shows it,
//! `rxl cancel` ends it.
//!
//! Each rxl that moves, saves or restores a domain says what it is doing on its [`Board`]; what is
//! said is a [`state::State`], and where others find it is [`runs`]'s. [`view`] is what users read.
//!
//! What it is not: nothing depends on it. A migration that nobody can look at goes on.

mod board;
mod cancel;
mod runs;
mod state;
pub(crate) mod view;

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::Exit;
use crate::cli::StatusArgs;
use crate::history::{Entry, History};
use crate::output;

pub(crate) use board::Board;
pub(crate) use cancel::run as cancel;
pub(crate) use runs::{Run, Runs};
pub(crate) use state::{Doing, Phase, State};

/// Earlier ones that are listed for people.
const LISTED: usize = 10;
/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Clears a terminal, and begins at its top.
const CLEAR: &str = "\u{1b}[2J\u{1b}[H";

/// All that `--json` says.
#[derive(Debug, Serialize)]
struct Status {
    /// Version of this format.
    version: u32,
    /// What is under way.
    running: Vec<Running>,
    /// What is over, the newest first.
    history: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Running {
    #[serde(flatten)]
    state: State,
    /// Its rxl was killed, and what is left of it is putting things right.
    killed: bool,
    /// Whether `rxl cancel` can still end it.
    cancellable: bool,
}

/// Shows what is under way, and what was.
pub(crate) fn run(args: &StatusArgs) -> anyhow::Result<Exit> {
    let (runs, history) = (Runs::of_this_host(), History::of_this_host());
    loop {
        let (runs, history) = (runs.list(), history.entries());
        let text = if args.json {
            json(&runs, history)?
        } else {
            let clear = args.watch && output::stdout_is_terminal();
            format!("{}{}", if clear { CLEAR } else { "" }, text(&runs, &history, now_unix_ms()))
        };
        if !output::stdout(&text) || !args.watch {
            return Ok(Exit::Success);
        }
        thread::sleep(INTERVAL);
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// One line.
fn json(runs: &[Run], history: Vec<Entry>) -> anyhow::Result<String> {
    let running = runs.iter().map(|run| Running {
        state: run.state.clone(),
        killed: run.is_killed,
        cancellable: !run.is_killed && run.state.phase < Phase::Committed,
    });
    let status = Status { version: state::VERSION, running: running.collect(), history };
    Ok(serde_json::to_string(&status)? + "\n")
}

fn text(runs: &[Run], history: &[Entry], now_unix_ms: u64) -> String {
    let mut lines: Vec<String> = runs.iter().flat_map(|run| view::run(run, now_unix_ms)).collect();
    if runs.is_empty() {
        lines.push("Nothing is being migrated, saved or restored here.".to_owned());
    }
    if !history.is_empty() {
        lines.push("Earlier:".to_owned());
    }
    let listed = history.iter().take(LISTED);
    lines.extend(listed.map(|entry| format!("    {}", view::entry(entry, now_unix_ms))));
    if history.len() > LISTED {
        lines.push(format!("    and {} more (--json)", history.len() - LISTED));
    }
    lines.push(String::new());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_read_what_is_under_way_and_whether_it_can_be_cancelled() {
        let runs = [(Phase::Ready, false), (Phase::Committed, false), (Phase::Memory, true)];
        let runs = runs.map(|(phase, is_killed)| Run {
            state: State { phase, ..state::example() },
            is_killed,
        });
        let text = json(&runs, Vec::new()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let running = json["running"].as_array().unwrap();
        let cancellable: Vec<_> = running.iter().map(|run| &run["cancellable"]).collect();
        assert_eq!(cancellable, [true, false, false]);
        assert_eq!((&running[0]["host"], &running[0]["phase"]), (&"host2".into(), &"ready".into()));
        assert_eq!(json["version"], 1);
    }

    #[test]
    fn people_read_that_there_is_nothing_and_the_newest_of_what_was() {
        assert_eq!(text(&[], &[], 0), "Nothing is being migrated, saved or restored here.\n");
        let text = text(&[], &vec![crate::history::example(); 12], 61_000);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 13);
        assert_eq!(
            lines[2],
            "    web to host2: moved in 2.0 s, 60 seconds ago; pause 850 ms, 3.0 MiB in 2 passes"
        );
        assert_eq!(lines[12], "    and 2 more (--json)");
    }
}
