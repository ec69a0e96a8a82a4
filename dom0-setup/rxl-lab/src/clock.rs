//! The hosts' wall clocks, and what a guest's gap over a migration means.
//!
//! A guest's `CLOCK_BOOTTIME` is carried over a suspension by Xen's wall clock: the kernel reads
//! it before it suspends on one host and after it resumes on the other, and adds the difference.
//! Xen has it from dom0, whose kernel pushes it down each time the clock is set. So the gap that a
//! guest reports is the true one plus how much the target's wall clock is ahead of the source's.
//! Emulated clocks drift, so [`sync`] is worth calling right before a measurement; it leaves the
//! hosts within about a millisecond of this machine.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::host::Host;

/// Where the clock agent is on a host.
pub(crate) const AGENT_PATH: &str = "/usr/local/lib/rxl-lab/rxl-clock";

const QUESTIONS: usize = 12;
const ROUNDS: usize = 4;
const GOOD_ENOUGH: Duration = Duration::from_micros(500);

/// How far a host's clock is from this machine's.
#[derive(Clone, Copy, Debug)]
pub struct ClockOffset {
    /// Nanoseconds by which the host is ahead.
    pub nanoseconds: i64,
    /// Time of the quickest question and answer; half of it bounds the error.
    pub round_trip: Duration,
}

/// Sets the host's clock to this machine's; gives what is left as measured afterwards.
pub(crate) fn sync(host: &Host) -> Result<ClockOffset> {
    let mut agent = Agent::start(host)?;
    let mut offset = agent.measure()?;
    for _ in 0..ROUNDS {
        if offset.nanoseconds.unsigned_abs() < duration_ns(GOOD_ENOUGH) {
            break;
        }
        agent.ask(&format!("step {}", -offset.nanoseconds))?;
        offset = agent.measure()?;
    }
    Ok(offset)
}

/// Measures a host's clock.
pub(crate) fn measure(host: &Host) -> Result<ClockOffset> {
    Agent::start(host)?.measure()
}

struct Agent {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Agent {
    fn start(host: &Host) -> Result<Self> {
        let mut child = host.spawn(AGENT_PATH)?;
        let questions = child.stdin.take().context("No pipe to the clock agent")?;
        let answers = child.stdout.take().context("No pipe from the clock agent")?;
        Ok(Self { child, questions, answers: BufReader::new(answers) })
    }

    fn ask(&mut self, question: &str) -> Result<String> {
        self.questions.write_all(format!("{question}\n").as_bytes())?;
        let mut answer = String::new();
        ensure!(self.answers.read_line(&mut answer)? > 0, "The clock agent has ended");
        Ok(answer.trim().to_owned())
    }

    /// The offset by the quickest of several questions.
    fn measure(&mut self) -> Result<ClockOffset> {
        let mut best: Option<ClockOffset> = None;
        for _ in 0..QUESTIONS {
            let before = wall_clock_ns()?;
            let start = Instant::now();
            let host: i64 = self.ask("now")?.parse().context("The clock agent gives no time")?;
            let round_trip = start.elapsed();
            let middle = before + i64::try_from(round_trip.as_nanos() / 2)?;
            if best.is_none_or(|best| round_trip < best.round_trip) {
                best = Some(ClockOffset { nanoseconds: host - middle, round_trip });
            }
        }
        best.context("No question was asked")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It would end by itself at the end of its input; ending ssh is quicker.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wall_clock_ns() -> Result<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    i64::try_from(now.as_nanos()).context("The clock is out of range")
}

fn duration_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
