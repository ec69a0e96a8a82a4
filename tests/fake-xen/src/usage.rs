//! What a process and its descendants have used, as `/proc` says while they live.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process;
use std::time::{Duration, Instant};

/// Between two looks at who there is.
pub(crate) const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// Processor time and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Time on a processor, of all of them, with all their threads.
    pub cpu: Duration,
    /// The sum of the most that each had resident, in KiB. What is mapped of guests is part of it.
    pub peak_kib: u64,
    /// The same without shared memory, in which guests' is: what would count on Xen, where foreign
    /// frames are never resident. What was there for a moment may not have been seen.
    pub own_kib: u64,
    /// How many processes these were.
    pub processes: u32,
}

/// Looks at a process and its descendants now and then, because who has ended cannot be asked any
/// more. Who lives for less than a few looks may be missed, but not the processor time that it
/// took.
#[derive(Debug)]
pub(crate) struct Watch {
    pid: u32,
    /// The most that each had resident, and of its own, in KiB.
    peaks: BTreeMap<u32, (u64, u64)>,
    looked: Option<Instant>,
}

impl Watch {
    /// Of the process `pid`.
    pub(crate) fn new(pid: u32) -> Watch {
        Watch { pid, peaks: BTreeMap::new(), looked: None }
    }

    /// To be called as often as possible: looks if it is time to.
    pub(crate) fn glance(&mut self) {
        if self.looked.is_none_or(|looked| looked.elapsed() >= WATCH_INTERVAL) {
            self.look();
        }
    }

    /// What they have used so far.
    pub(crate) fn usage(&mut self) -> Usage {
        let cpu = self.look();
        let processes = u32::try_from(self.peaks.len()).unwrap_or(u32::MAX);
        let peak_kib = self.peaks.values().map(|(peak, _)| peak).sum();
        let own_kib = self.peaks.values().map(|(_, own)| own).sum();
        Usage { cpu, peak_kib, own_kib, processes }
    }

    /// Takes note of everybody: how long they all have been on a processor.
    fn look(&mut self) -> Duration {
        let mut cpu = Duration::ZERO;
        for pid in family(self.pid) {
            if let Some((peak, own)) = resident_kib(pid) {
                let most = self.peaks.entry(pid).or_default();
                *most = (most.0.max(peak), most.1.max(own));
            }
            cpu += ticks(pid).unwrap_or_default();
        }
        self.looked = Some(Instant::now());
        cpu
    }
}

/// `pid` and its descendants that are there.
fn family(pid: u32) -> BTreeSet<u32> {
    let (parents, mut family, mut of_interest) = (parents(), BTreeSet::new(), vec![pid]);
    while let Some(pid) = of_interest.pop() {
        of_interest.extend(parents.iter().filter(|(_, parent)| *parent == pid).map(|p| p.0));
        family.insert(pid);
    }
    family
}

/// How long the threads of a process have been on a processor, and those of its descendants that
/// are gone and waited for.
fn ticks(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, which may have spaces, ends with the last parenthesis.
    let (_, fields) = stat.rsplit_once(')')?;
    // Fields 14 to 17 of proc(5): in user mode and in the kernel, and the same of children.
    let times = fields.split_whitespace().skip(11).take(4);
    let ticks = times.map_while(|time| time.parse::<u64>().ok()).sum::<u64>();
    Some(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// What a process had resident at most, and what it has now but for shared memory.
fn resident_kib(pid: u32) -> Option<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let number = |name| number_in(&status, name);
    Some((number("VmHWM:")?, number("RssAnon:")? + number("RssFile:")?))
}

/// The number in a line of a process's status.
fn number_in(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Processes and their parents, as far as they can be descendants of this one.
fn parents() -> Vec<(u32, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        u32::try_from(number_in(&status, "PPid:")?).ok()
    };
    let pairs = pids.filter_map(|pid| Some((pid, parent(pid)?)));
    pairs.filter(|(pid, _)| *pid != process::id()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap()
    }

    #[test]
    fn who_has_ended_is_counted_if_it_was_seen() {
        let mut shell = shell("cat | cat; echo over");
        let mut watch = Watch::new(shell.id());
        while watch.usage().processes < 3 {}
        let before = watch.usage();
        drop(shell.stdin.take().unwrap());
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let after = watch.usage();
        assert_eq!((line.trim(), after.processes), ("over", 3));
        assert!(after.peak_kib >= before.peak_kib && after.cpu >= before.cpu);
        assert!(0 < after.own_kib && after.own_kib <= after.peak_kib, "{after:?}");
        assert!(shell.wait().unwrap().code().is_some());
    }

    #[test]
    fn processor_time_of_a_child_that_nobody_saw_is_not_lost() {
        let busy = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
        let mut shell = shell(&format!("(eval '{busy}'); echo over; read -r _"));
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let usage = Watch::new(shell.id()).usage();
        assert_eq!(usage.processes, 1);
        assert!(usage.cpu > Duration::from_millis(10), "{usage:?}");
        shell.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(shell.wait().unwrap().success());
    }
}
