//! What the hosts' processors did, as this machine's scheduler knows it: how long the threads that
//! emulate them ran, and how long they waited because this machine had no processor free.

use std::fs;
use std::ops::Sub;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::state::State;

/// Of all processors of one host, since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Time that they ran.
    pub busy: Duration,
    /// Time that they had something to do and no processor of this machine to do it on.
    pub waited: Duration,
}

impl Load {
    /// The share of `wall` and of `vcpus` processors that was busy.
    #[must_use]
    pub fn share(self, wall: Duration, vcpus: u8) -> f64 {
        self.busy.as_secs_f64() / wall.as_secs_f64() / f64::from(vcpus.max(1))
    }
}

impl Sub for Load {
    type Output = Load;

    fn sub(self, before: Load) -> Load {
        Load {
            busy: self.busy.saturating_sub(before.busy),
            waited: self.waited.saturating_sub(before.waited),
        }
    }
}

impl Lab {
    /// What the processors of every host have done since it was started, in the order of hosts.
    ///
    /// # Errors
    /// A host's QEMU is gone.
    pub fn loads(&self) -> Result<Vec<Load>> {
        let state = State::load(self.store())?.context("The lab is down")?;
        state.processes.iter().map(|process| of_process(process.pid())).collect()
    }
}

fn of_process(pid: i32) -> Result<Load> {
    let mut sum = Load::default();
    let mut processors = 0;
    let threads = fs::read_dir(format!("/proc/{pid}/task")).context("A host's QEMU is gone")?;
    for thread in threads {
        // A thread may end while it is looked at.
        if let Some(load) = of_thread(&thread?.path()) {
            sum.busy += load.busy;
            sum.waited += load.waited;
            processors += 1;
        }
    }
    anyhow::ensure!(processors > 0, "QEMU {pid} has no thread with a processor's name");
    Ok(sum)
}

/// `None` for a thread that emulates no processor.
fn of_thread(dir: &Path) -> Option<Load> {
    let name = fs::read_to_string(dir.join("comm")).ok()?;
    // QEMU names them so when it is asked to (`debug-threads`).
    if !name.starts_with("CPU ") {
        return None;
    }
    parse(&fs::read_to_string(dir.join("schedstat")).ok()?)
}

/// `schedstat` of a thread: nanoseconds that it ran, that it waited, and a count.
fn parse(schedstat: &str) -> Option<Load> {
    let mut fields = schedstat.split_ascii_whitespace().map(|word| word.parse().ok());
    let mut next = || fields.next().flatten().map(Duration::from_nanos);
    Some(Load { busy: next()?, waited: next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_schedstat_reads_both_times() {
        let load = parse("2000000000 500 17\n").expect("a schedstat");
        assert_eq!(load.waited, Duration::from_nanos(500));
        assert!((load.share(Duration::from_secs(4), 2) - 0.25).abs() < 1e-9);
        assert_eq!(parse("12"), None);
    }
}
