//! What a process and its descendants have used, as `/proc` says while they live.

use std::fs;
use std::process;
use std::time::Duration;

/// Processor time and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Time on a processor, of all of them. Of a process with several threads, its first one's.
    pub cpu: Duration,
    /// The sum of the most that each had resident, in KiB. What is mapped of guests is part of it.
    pub peak_kib: u64,
    /// How many processes these are.
    pub processes: u32,
}

impl Usage {
    /// Of the process `pid` and its descendants; none of those that are gone.
    #[must_use]
    pub fn of(pid: u32) -> Usage {
        let mut all = Usage::default();
        let mut of_interest = vec![pid];
        let parents = parents();
        while let Some(pid) = of_interest.pop() {
            of_interest.extend(parents.iter().filter(|(_, parent)| *parent == pid).map(|p| p.0));
            let Some((cpu, peak_kib)) = of_one(pid) else { continue };
            all.cpu += cpu;
            all.peak_kib += peak_kib;
            all.processes += 1;
        }
        all
    }
}

fn of_one(pid: u32) -> Option<(Duration, u64)> {
    // Nanoseconds on a processor, nanoseconds waiting for one, how often.
    let times = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    let cpu = Duration::from_nanos(times.split_whitespace().next()?.parse().ok()?);
    Some((cpu, status_number(pid, "VmHWM:")?))
}

/// The number in a line of a process's status.
fn status_number(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Processes and their parents, as far as they can be descendants of this one.
fn parents() -> Vec<(u32, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| u32::try_from(status_number(pid, "PPid:")?).ok();
    let pairs = pids.filter_map(|pid| Some((pid, parent(pid)?)));
    pairs.filter(|(pid, _)| *pid != process::id()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_has_its_descendants_counted() {
        let mut shell = Command::new("sh").args(["-c", "sleep 60 & wait"]).spawn().unwrap();
        let used = loop {
            let used = Usage::of(shell.id());
            if used.processes == 2 {
                break used;
            }
        };
        assert!(used.peak_kib > 0);
        let children = parents().into_iter().filter(|(_, parent)| *parent == shell.id());
        for (child, _) in children {
            assert!(Command::new("kill").arg(child.to_string()).status().unwrap().success());
        }
        assert!(shell.wait().unwrap().code().is_some());
        assert_eq!(Usage::of(shell.id()), Usage::default());
    }
}
