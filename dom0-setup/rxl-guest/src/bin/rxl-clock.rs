//! The clock agent on a lab host: tells and steps the wall clock over a pipe, with no process
//! start between a question and its answer.
//!
//! ```text
//! > now
//! < 1700000000123456789
//! > step -1500000
//! < ok
//! ```

use std::io::{BufRead, Write, stdin, stdout};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, Timespec, clock_settime};

fn main() -> Result<()> {
    let mut out = stdout().lock();
    for line in stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("now", "") => writeln!(out, "{}", now()?.as_nanos())?,
            ("step", nanoseconds) => {
                step(nanoseconds.parse().context("Not a number of nanoseconds")?)?;
                writeln!(out, "ok")?;
            }
            _ => bail!("The commands are: now, step NANOSECONDS"),
        }
        out.flush()?;
    }
    Ok(())
}

fn now() -> Result<Duration> {
    SystemTime::now().duration_since(UNIX_EPOCH).context("The clock is before 1970")
}

fn step(nanoseconds: i64) -> Result<()> {
    let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
    let now = now()?;
    let target =
        if nanoseconds < 0 { now.checked_sub(distance) } else { now.checked_add(distance) };
    let target = target.context("The step leads out of range")?;
    let target = Timespec {
        tv_sec: target.as_secs().try_into().context("The step leads out of range")?,
        tv_nsec: target.subsec_nanos().into(),
    };
    clock_settime(ClockId::Realtime, target).context("Cannot set the clock")
}
