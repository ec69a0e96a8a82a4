//! The process that stays with a received domain, as `xl`'s does: when the guest reboots, powers
//! off or crashes it does what the configuration says.
//!
//! It is rxl again (`domain-monitor`), in a session of its own, with nothing of the migration:
//! what to watch comes through a pipe, its output goes to xl's log file for that domain. It is
//! started early, so that the guest, once it stands still, need not wait for a program to load.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::{env, fs};

use anyhow::Context;
use rxl_migrate::frame::DomId;
use rxl_migrate::xl::header::CONFIG_BYTES_MAX;
use rxl_toolstack::libxl::monitor;

use crate::Exit;
use crate::cli::Globals;
use crate::host::{self, Progress};

/// Where xl's monitors log.
const LOG_DIR: &str = "/var/log/xen";

/// A monitor that has nothing to watch yet. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Monitor(ChildStdin);

impl Monitor {
    /// Starts one. `log_name` is what the domain will be called when it is watched, which names
    /// the log as xl does.
    pub(crate) fn start(log_name: &str) -> anyhow::Result<Monitor> {
        let log = log_path(log_name);
        fs::create_dir_all(LOG_DIR).with_context(|| format!("making {LOG_DIR}"))?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut child = Command::new(env::current_exe().context("finding rxl itself")?)
            .args(["domain-monitor", "--", log_name])
            .stdin(Stdio::piped())
            .stdout(file.try_clone()?)
            .stderr(file)
            .current_dir("/")
            .spawn()
            .context("starting the monitor")?;
        child.stdin.take().context("the monitor has no input").map(Monitor)
    }

    /// Has it watch `domid`; `config` is the configuration to restart it from.
    pub(crate) fn watch(mut self, domid: DomId, config: &str) -> anyhow::Result<()> {
        let order = format!("{domid}\n{config}");
        self.0.write_all(order.as_bytes()).context("telling the monitor what to watch")
    }
}

/// What a monitor is told: a domain's number, and a configuration.
const ORDER_BYTES_MAX: usize = CONFIG_BYTES_MAX + 16;

/// A name from the other host must not lead out of the directory.
fn log_path(name: &str) -> PathBuf {
    PathBuf::from(LOG_DIR).join(format!("xl-{}.log", name.replace('/', "_")))
}

/// The monitor process.
pub(crate) fn run(globals: &Globals) -> anyhow::Result<Exit> {
    // Away from whoever started it, and from its terminal.
    rustix::process::setsid().context("leaving the session")?;
    host::become_save_helper()?;
    let libxl = host::open(globals, Progress::Silent)?;
    let mut order = String::new();
    let limit = u64::try_from(ORDER_BYTES_MAX)?;
    io::stdin().take(limit).read_to_string(&mut order).context("reading what to watch")?;
    // Nothing: there is no domain after all.
    if let Some((domid, config)) = order.split_once('\n') {
        monitor::run(&libxl, DomId(domid.parse()?), config)?;
    }
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_xls_and_no_name_leads_out_of_its_directory() {
        assert_eq!(log_path("a--incoming"), PathBuf::from("/var/log/xen/xl-a--incoming.log"));
        assert_eq!(log_path("../x"), PathBuf::from("/var/log/xen/xl-.._x.log"));
    }
}
