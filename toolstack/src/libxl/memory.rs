//! Room for a domain in this host's memory: what xl does before it creates one.
//!
//! With `autoballoon` (xl.conf(5)) dom0 gives up what is missing, under a lock that all xl's take;
//! without it the room is there or not. How much a domain takes is libxl's own arithmetic
//! (`libxl_domain_need_memory`: target, shadow or HAP tables, IOMMU tables, a fixed part).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::{Errno, retry_on_intr};
use rxl_xen_sys::libxl as xl;

use crate::lifecycle::{LifecycleError, ShortOfMemory};

use super::ctx::Context;
use super::failed;
use super::ffi::Rc;

/// xl's settings.
const XL_CONF: &str = "/etc/xen/xl.conf";
/// The lock, unless xl.conf names another. On Debian `/var/lock` is `/run/lock`.
const LOCK: &str = "/var/lock/xl";
/// How long dom0 may take in all, in seconds.
const PATIENCE: f64 = 30.0;
/// How long it may take at a time without progress, in seconds.
const STEP: i32 = 10;
/// KiB in a MiB.
const MIB: u64 = 1024;

/// KiB that a domain of `config` takes, overhead included.
pub(super) fn needed(context: &Context, config: &str) -> Result<u64, LifecycleError> {
    let need = context.config_from_json(config).and_then(|config| context.need_memory(&config));
    need.map_err(|rc| failed(rc, || "asking how much memory a domain needs".to_owned()))
}

/// [`reserve`] for a domain of `config`.
pub(super) fn reserve_for(context: &Context, config: &str) -> Result<Option<File>, ShortOfMemory> {
    reserve(context, needed(context, config)?)
}

/// Makes room of `need` KiB. The lock, if one was needed, keeps it until it is dropped.
pub(super) fn reserve(context: &Context, need: u64) -> Result<Option<File>, ShortOfMemory> {
    let settings = Settings::parse(&fs::read_to_string(XL_CONF).unwrap_or_default());
    if !settings.autoballoon.is_on(context) {
        let free = free(context)?;
        return if free >= need { Ok(None) } else { Err(short(need, free)) };
    }
    let lock = take_lock(&settings.lockfile)?;
    balloon(context, need)?;
    Ok(Some(lock))
}

/// Has dom0 shrink until `need` KiB are free, as long as it makes progress.
fn balloon(context: &Context, need: u64) -> Result<(), ShortOfMemory> {
    let mut credit = PATIENCE;
    loop {
        let free = free(context)?;
        if free >= need {
            return Ok(());
        }
        let missing = i64::try_from(need - free).unwrap_or(i64::MAX);
        let begin = Instant::now();
        let shrunk = credit > 0.0
            && context.shrink_dom0(missing).is_ok()
            && context.wait_for_dom0(STEP).is_ok();
        if !shrunk {
            return Err(short(need, free));
        }
        // At least a second, so that a dom0 that says it is done but frees nothing ends this.
        credit -= begin.elapsed().as_secs_f64().max(1.0);
    }
}

/// KiB that no domain has.
fn free(context: &Context) -> Result<u64, LifecycleError> {
    context.free_memory().map_err(|rc| failed(rc, || "asking for the host's memory".to_owned()))
}

fn short(need: u64, free: u64) -> ShortOfMemory {
    ShortOfMemory::Need { need_mib: need.div_ceil(MIB), free_mib: free / MIB }
}

/// xl's lock. It is a record lock (`fcntl`), so no other descriptor of this file may be closed
/// while it is held.
fn take_lock(path: &Path) -> Result<File, LifecycleError> {
    let lock = || -> rustix::io::Result<File> {
        let file = File::options().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            tracing::info!("waiting for another toolstack to let go of {}", path.display());
            retry_on_intr(|| fcntl_lock(&file, FlockOperation::LockExclusive))?;
        }
        Ok(file)
    };
    const LOCK_FAILED: Rc = xl::ERROR_LOCK_FAIL;
    lock().map_err(|e| failed(LOCK_FAILED, || format!("locking {} ({e})", path.display())))
}

/// Whether dom0 shrinks for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Autoballoon {
    On,
    Off,
    /// Unless dom0's memory was set on Xen's command line.
    Auto,
}

impl Autoballoon {
    fn is_on(self, context: &Context) -> bool {
        match self {
            Autoballoon::On => true,
            Autoballoon::Off => false,
            Autoballoon::Auto => !context.command_line().is_some_and(|line| sets_dom0_mem(&line)),
        }
    }
}

/// What counts here of xl.conf.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    autoballoon: Autoballoon,
    lockfile: PathBuf,
}

impl Settings {
    /// Lines `key="value"`, comments from `#` on. What is not understood is left at its default.
    fn parse(text: &str) -> Settings {
        let mut settings =
            Settings { autoballoon: Autoballoon::Auto, lockfile: PathBuf::from(LOCK) };
        let statements = text.lines().filter_map(|line| line.split('#').next()?.split_once('='));
        for (key, value) in statements {
            let value = value.trim().trim_end_matches(';').trim_end().trim_matches(['"', '\'']);
            match (key.trim(), value) {
                ("autoballoon", "on" | "1") => settings.autoballoon = Autoballoon::On,
                ("autoballoon", "off" | "0") => settings.autoballoon = Autoballoon::Off,
                ("autoballoon", "auto") => settings.autoballoon = Autoballoon::Auto,
                ("autoballoon", other) => tracing::warn!("{XL_CONF}: autoballoon={other}?"),
                ("lockfile", file) => settings.lockfile = PathBuf::from(file),
                _ => {}
            }
        }
        settings
    }
}

/// Whether Xen's command line limits dom0's memory (xen-command-line, `dom0_mem`).
fn sets_dom0_mem(command_line: &str) -> bool {
    let amounts = command_line.split(' ').filter_map(|word| word.strip_prefix("dom0_mem="));
    amounts
        .map(|list| list.strip_suffix(',').unwrap_or(list))
        .any(|list| list.split(',').all(is_amount))
}

/// `[min:|max:](SIZE|[SIZE+]N%)`.
fn is_amount(text: &str) -> bool {
    let amount = ["min:", "max:"].iter().find_map(|p| text.strip_prefix(p)).unwrap_or(text);
    let Some(share) = amount.strip_suffix('%') else { return is_size(amount) };
    let (size, percent) = share.split_once('+').map_or((None, share), |(s, p)| (Some(s), p));
    size.is_none_or(is_size) && matches!(percent.len(), 1..=2) && is_number(percent)
}

/// `[-]N[bkmgt]`.
fn is_size(text: &str) -> bool {
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    is_number(unsigned.strip_suffix(|c: char| "bBkKmMgGtT".contains(c)).unwrap_or(unsigned))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xl_conf_says_whether_dom0_shrinks_and_where_the_lock_is() {
        let settings = |text| Settings::parse(text);
        let default = Settings { autoballoon: Autoballoon::Auto, lockfile: LOCK.into() };
        assert_eq!(settings(""), default);
        assert_eq!(settings("#autoballoon=\"off\"\n"), default);
        assert_eq!(settings("autoballoon=\"off\"\n").autoballoon, Autoballoon::Off);
        assert_eq!(settings(" autoballoon = 'on' # yes\n").autoballoon, Autoballoon::On);
        assert_eq!(settings("autoballoon=0;\nclaim_mode=1").autoballoon, Autoballoon::Off);
        assert_eq!(settings("autoballoon=\"perhaps\"\n"), default);
        assert_eq!(settings("lockfile=\"/run/x\"").lockfile, Path::new("/run/x"));
    }

    #[test]
    fn dom0_mem_is_found_in_every_form_that_xen_takes_and_nowhere_else() {
        for line in [
            "dom0_mem=512M",
            "console=com1 dom0_mem=min:64M,max:1G loglvl=all",
            "dom0_mem=1G+10%,max:50%",
            "dom0_mem=-256M",
            "dom0_mem=4096,",
        ] {
            assert!(sets_dom0_mem(line), "{line}");
        }
        for line in
            ["", "dom0_max_vcpus=2", "xdom0_mem=1G", "dom0_mem=", "dom0_mem=lots", "dom0_mem=100%"]
        {
            assert!(!sets_dom0_mem(line), "{line}");
        }
    }

    #[test]
    fn the_lock_is_a_record_lock_on_the_whole_file_until_it_is_dropped() {
        use std::os::unix::fs::MetadataExt;
        let path = std::env::temp_dir().join(format!("rxl-lock-{}", std::process::id()));
        let lock = take_lock(&path).unwrap();
        let inode = format!(":{} 0 EOF", fs::metadata(&path).unwrap().ino());
        // As the kernel lists locks: "1: POSIX  ADVISORY  WRITE 123 fe:00:456 0 EOF".
        let held = || {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            locks.lines().any(|l| l.contains("POSIX") && l.contains("WRITE") && l.ends_with(&inode))
        };
        assert!(held());
        drop(lock);
        assert!(!held());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_shortage_is_told_in_whole_mib_that_do_not_flatter() {
        let text = short(1025, 1023).to_string();
        assert!(text.contains("needs 2 MiB, 0 MiB are free"), "{text}");
    }
}
