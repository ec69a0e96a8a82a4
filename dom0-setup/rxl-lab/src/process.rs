//! Child processes: run to the end with good error text, or identified over a restart of the lab
//! program by pid *and* start time, so that a recycled pid is never taken for one of ours.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// Lines of a failed command's output that an error message quotes.
const QUOTED_LINES_MAX: usize = 15;

/// Runs a command to its end and returns its standard output; an error quotes its last lines.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = describe(command);
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("Cannot start `{shown}`"))?;
    checked(&shown, &output)
}

/// Like [`output`], feeding `input` to the command's standard input.
pub(crate) fn output_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let shown = describe(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("Cannot start `{shown}`"))?;
    let mut stdin = child.stdin.take().context("The child has no standard input")?;
    let output = thread::scope(|scope| {
        // A thread of its own: a child that fills its output pipe before reading all of its input
        // would otherwise block both sides. A broken pipe shows in the exit status.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    })
    .with_context(|| format!("Cannot wait for `{shown}`"))?;
    checked(&shown, &output)
}

/// Whether the command runs and exits with 0; its output is dropped.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn checked(shown: &str, output: &Output) -> Result<String> {
    if !output.status.success() {
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        bail!("`{shown}` ended with {}:\n{}", output.status, last_lines(&text, QUOTED_LINES_MAX));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn describe(command: &Command) -> String {
    let mut shown = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        shown.push(' ');
        shown.push_str(&argument.to_string_lossy());
    }
    if let Some((cut, _)) = shown.char_indices().nth(200) {
        shown.truncate(cut);
        shown.push('…');
    }
    shown
}

/// The last `count` lines of a text.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(count);
    lines.into_iter().skip(skipped).collect::<Vec<_>>().join("\n")
}

/// A process as recorded in the lab's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot at which the process began.
    start_ticks: u64,
}

impl ProcessId {
    /// The identity of a process that runs now.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).context("A pid out of range")?;
        let start_ticks =
            start_ticks(pid).with_context(|| format!("Process {pid} is gone already"))?;
        Ok(Self { pid, start_ticks })
    }

    /// The pid, for messages.
    pub(crate) fn pid(self) -> i32 {
        self.pid
    }

    /// Whether this very process still runs.
    pub(crate) fn is_alive(self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// Whether the process's command line has a path below `dir` in it.
    pub(crate) fn command_line_names(self, dir: &Path) -> bool {
        let line = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let wanted = format!("{}/", dir.display());
        self.is_alive() && String::from_utf8_lossy(&line).contains(&wanted)
    }

    /// Ends the process: SIGTERM, and SIGKILL if it is still there after `grace`.
    pub(crate) fn end(self, grace: Duration) -> Result<()> {
        for (signal, wait) in [(Signal::TERM, grace), (Signal::KILL, Duration::from_secs(5))] {
            if !self.is_alive() {
                return Ok(());
            }
            let pid = Pid::from_raw(self.pid).context("Pid 0 in the lab's state")?;
            // It may end between the test and the signal; the loop then finds it gone.
            let _ = kill_process(pid, signal);
            let deadline = Instant::now() + wait;
            while self.is_alive() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(20));
            }
        }
        if self.is_alive() { bail!("Process {} survives SIGKILL", self.pid) } else { Ok(()) }
    }
}

fn start_ticks(pid: i32) -> Option<u64> {
    let (state, ticks) = parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    // A zombie has ended; only its parent has not looked yet.
    (state != 'Z').then_some(ticks)
}

/// State letter and start time out of `/proc/PID/stat`. The command name in parentheses may itself
/// contain spaces and parentheses, so fields are counted from the last one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_stat_name_with_parenthesis_reads_start() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 991 10 11";
        assert_eq!(parse_stat(stat), Some(('S', 991)));
    }

    #[test]
    fn test_process_id_of_other_start_is_not_alive() {
        let own = ProcessId::of(std::process::id()).expect("own process");
        assert!(own.is_alive());
        assert!(!ProcessId { start_ticks: own.start_ticks + 1, ..own }.is_alive());
    }

    #[test]
    fn test_last_lines_short_text_is_whole() {
        assert_eq!(last_lines("a\nb", 5), "a\nb");
        assert_eq!(last_lines("a\nb\nc", 2), "b\nc");
    }
}
