//! What the first program must do for itself: file systems, the command line, free memory.

use std::fs;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

/// Memory left to the kernel beside a share of what is taken (page tables, the version table).
const MARGIN_BYTES: usize = 10 << 20;
const MARGIN_SHARE: usize = 64;

/// Mounts /proc, /sys and /dev.
pub(crate) fn mount_filesystems() -> Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target)?;
        mount(kind, target, kind, MountFlags::empty(), None)
            .with_context(|| format!("Cannot mount {target}"))?;
    }
    Ok(())
}

/// The kernel's command line.
pub(crate) fn command_line() -> Result<String> {
    fs::read_to_string("/proc/cmdline").context("Cannot read the command line")
}

/// Bytes of memory that can be taken with the system staying healthy, and `leave_mib` left alone.
pub(crate) fn memory_to_take(leave_mib: usize) -> Result<usize> {
    let info = fs::read_to_string("/proc/meminfo").context("Cannot read memory information")?;
    let free = free_bytes(&info).context("No MemFree in memory information")?;
    Ok(free.saturating_sub(MARGIN_BYTES + free / MARGIN_SHARE + (leave_mib << 20)))
}

fn free_bytes(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_free_bytes_reads_kib() {
        assert_eq!(free_bytes("MemTotal: 9 kB\nMemFree:    2048 kB\n"), Some(2 << 20));
        assert_eq!(free_bytes("MemTotal: 9 kB\n"), None);
    }
}
