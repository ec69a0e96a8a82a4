//! What there is on a host, counted, so that counts from before and after can be compared.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result};
use rxl_lab::Host;

/// Time to count, on an emulated host.
const TIMEOUT: Duration = Duration::from_secs(180);
/// Memory that a process may have gained, in KiB: allocators keep what they have had.
const PROCESS_MEMORY_SLACK_KIB: i64 = 1024;
/// Mappings that a process may have gained: an allocator's.
const MAPPINGS_SLACK: i64 = 2;
/// Free memory of the host that may be missing, in MiB: Xen's own tables.
const FREE_MEMORY_SLACK_MIB: i64 = 2;

/// Counts by what they count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census(BTreeMap<String, i64>);

/// Prints `label<TAB>count` for everything that a migration could leave behind.
const SCRIPT: &str = r#"
count() { printf '%s\t%s\n' "$1" "$2"; }
for dir in /proc/[0-9]*; do
    [ "$dir" = /proc/$$ ] && continue
    read -r name < $dir/comm || continue
    # A kernel thread has no mapping; sshd's are the connections of the tests themselves.
    mappings=$(grep -c '' $dir/maps) || continue
    case $name in sshd) continue ;; esac
    set -- $dir/fd/*
    descriptors=$#
    memory=0
    while read -r key value _; do
        [ "$key" = VmData: ] && memory=$value
    done < $dir/status
    count "$name: processes" 1
    count "$name: descriptors" $descriptors
    count "$name: mappings" $mappings
    count "$name: memory (KiB)" $memory
done 2>/dev/null
count 'domains' $(xl list | grep -c '')
count 'free memory (MiB)' $(xl info free_memory)
count 'mounts' $(grep -c '' /proc/mounts)
count 'xenstore nodes' $(xenstore-ls | grep -c '')
# What rxls say of their end may be read for a minute, and goes when the next begins.
count 'files in /run' $(find /run -xdev -not '(' -path '/run/rxl/*' -mmin -3 ')' | grep -c '')
count 'files in /tmp' $(find /tmp -xdev | grep -c '')
count 'files in /var/lib/xen' $(find /var/lib/xen -xdev | grep -c '')
"#;

impl Census {
    /// Counts what is on a host.
    ///
    /// # Errors
    /// The host does not answer.
    pub fn take(host: &Host) -> Result<Census> {
        Census::parse(&host.run_within(SCRIPT, TIMEOUT)?)
    }

    /// Lines with the same label, of processes of the same name, are added up.
    fn parse(text: &str) -> Result<Census> {
        let mut counts = BTreeMap::new();
        for line in text.lines() {
            let (label, count) = line.split_once('\t').with_context(|| format!("`{line}`"))?;
            let count: i64 = count.parse().with_context(|| format!("`{line}`"))?;
            *counts.entry(label.to_owned()).or_insert(0) += count;
        }
        Ok(Census(counts))
    }

    /// A line for each count, before and after, those that mean a leak marked; and how many leaks
    /// there are.
    #[must_use]
    pub fn compare(&self, after: &Census) -> (Vec<String>, usize) {
        let labels: BTreeSet<_> = self.0.keys().chain(after.0.keys()).collect();
        let count = |census: &Census, label: &String| census.0.get(label).copied().unwrap_or(0);
        let mut leaks = 0;
        let mut lines = Vec::new();
        for label in labels {
            let (old, new) = (count(self, label), count(after, label));
            let leak = is_leak(label, old, new);
            leaks += usize::from(leak);
            let mark = if leak { "  LEAK" } else { "" };
            lines.push(format!("{label:<40} {old:>10} {new:>10}{mark}"));
        }
        (lines, leaks)
    }
}

fn is_leak(label: &str, before: i64, after: i64) -> bool {
    if label.starts_with("free memory") {
        return after < before - FREE_MEMORY_SLACK_MIB;
    }
    let slack = match label.rsplit_once(": ") {
        Some((_, "memory (KiB)")) => PROCESS_MEMORY_SLACK_KIB,
        Some((_, "mappings")) => MAPPINGS_SLACK,
        _ => 0,
    };
    after > before + slack
}

#[cfg(test)]
mod tests {
    use super::*;

    fn census(text: &str) -> Census {
        Census::parse(text).unwrap()
    }

    #[test]
    fn processes_of_one_name_are_added_up() {
        let both = census("xl: processes\t1\nxl: descriptors\t9\nxl: processes\t1\n");
        assert_eq!(both.0["xl: processes"], 2);
        assert!(Census::parse("no number\n").is_err());
    }

    #[test]
    fn more_is_a_leak_less_is_not_and_of_free_memory_it_is_the_other_way_round() {
        let leaks = |before: &str, after: &str| census(before).compare(&census(after)).1;
        assert_eq!(leaks("xl: descriptors\t9", "xl: descriptors\t10"), 1);
        assert_eq!(leaks("xl: descriptors\t9", "xl: descriptors\t8"), 0);
        assert_eq!(leaks("", "rxl: processes\t1"), 1);
        assert_eq!(leaks("xenstored: memory (KiB)\t900", "xenstored: memory (KiB)\t1900"), 0);
        assert_eq!(leaks("xenstored: memory (KiB)\t900", "xenstored: memory (KiB)\t2000"), 1);
        assert_eq!(leaks("free memory (MiB)\t2000", "free memory (MiB)\t1990"), 1);
        assert_eq!(leaks("free memory (MiB)\t2000", "free memory (MiB)\t2100"), 0);
    }
}
