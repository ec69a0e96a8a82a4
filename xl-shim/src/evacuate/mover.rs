//! One migration of an evacuation: `rxl migrate` as a process of its own, and what its report says
//! of the end. It is in a process group of its own, so that Ctrl-C reaches it once, through us.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::{env, fs};

use anyhow::Context;
use serde::Deserialize;
use tempfile::NamedTempFile;

use super::plan::End;
use crate::output::Screen;
use crate::report::Outcome;

/// Lines of a migration that failed that are shown.
const LINES_SHOWN: usize = 20;

/// A migration that runs.
pub(super) struct Mover {
    child: Child,
    report: NamedTempFile,
}

/// What became of it.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) end: End,
    pub(super) figures: Figures,
}

/// What is kept of a report.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Figures {
    #[serde(default)]
    outcome: Option<Outcome>,
    #[serde(default)]
    cause: Vec<String>,
    pub(super) total_ms: Option<f64>,
    pub(super) pause_ms: Option<f64>,
    pub(super) bytes: Option<u64>,
}

impl Mover {
    /// Starts it. `options` are `rxl migrate`'s.
    pub(super) fn start(guest: &str, target: &str, options: &[String]) -> anyhow::Result<Mover> {
        let report = NamedTempFile::new().context("making a file for the report")?;
        let me = env::current_exe().context("finding rxl itself")?;
        let child = Command::new(me)
            .arg0("rxl")
            .arg("migrate")
            .args(options)
            .arg("--report")
            .arg(report.path())
            .args([guest, target])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting rxl migrate")?;
        Ok(Mover { child, report })
    }

    /// Its number, to send it signals by.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end. What it says is shown with the guest's name before it: at once if
    /// `verbose`, else its last lines if it fails.
    pub(super) fn wait(mut self, guest: &str, verbose: bool, screen: &Screen) -> Ended {
        let mut lines = std::collections::VecDeque::new();
        let said = self.child.stderr.take().map(BufReader::new);
        for line in said.into_iter().flat_map(|said| said.split(b'\n').map_while(Result::ok)) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if verbose {
                screen.line(&format!("{guest}: {line}"));
                continue;
            }
            if lines.len() == LINES_SHOWN {
                lines.pop_front();
            }
            lines.push_back(line);
        }
        let status = self.child.wait();
        let was_killed = !matches!(&status, Ok(status) if status.code().is_some());
        let figures: Option<Figures> =
            fs::read(self.report.path()).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let last = lines.back().cloned();
        let figures = figures.unwrap_or_default();
        let why = || match figures.cause.as_slice() {
            [] => last.unwrap_or_else(|| match status {
                Ok(status) => format!("rxl migrate ended: {status}"),
                Err(error) => format!("rxl migrate: {error}"),
            }),
            causes => causes.join("; "),
        };
        let end = end(figures.outcome, was_killed, why);
        if !matches!(end, End::Moved | End::Cancelled) {
            for line in &lines {
                screen.line(&format!("{guest}: {line}"));
            }
        }
        Ended { end, figures }
    }
}

/// What an outcome means for the guest; without one rxl ended before it had anything to report, or
/// was killed: then its guard knows where the guest is, not we.
fn end(outcome: Option<Outcome>, was_killed: bool, why: impl FnOnce() -> String) -> End {
    match outcome {
        Some(Outcome::Moved | Outcome::Saved) => End::Moved,
        Some(Outcome::Cancelled) => End::Cancelled,
        Some(Outcome::NotResumed | Outcome::Uncertain) => End::Suspended(why()),
        None if was_killed => End::Suspended(why()),
        Some(Outcome::Failed) | None => End::Failed(why()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_whose_migration_was_killed_is_not_tried_elsewhere() {
        let why = || "why".to_owned();
        assert_eq!(end(None, true, why), End::Suspended(why()));
        assert_eq!(end(None, false, why), End::Failed(why()));
        assert_eq!(end(Some(Outcome::Failed), true, why), End::Failed(why()));
        assert_eq!(end(Some(Outcome::Moved), true, why), End::Moved);
    }
}
