//! The process that stays with a received domain, as `xl`'s does: when the guest reboots, powers
//! off or crashes it does what the configuration says.
//!
//! It is rxl again (`domain-monitor`), in a session of its own, with nothing of the migration:
//! its configuration comes through a pipe, its output goes to xl's log file for that domain.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
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

/// Starts the monitor of `domid`. `log_name` is the domain's name at that time, which names the
/// log as xl does; `config` is the configuration to restart it from.
pub(crate) fn start(domid: DomId, log_name: &str, config: &str) -> anyhow::Result<()> {
    let log = log_path(log_name);
    fs::create_dir_all(LOG_DIR).with_context(|| format!("making {LOG_DIR}"))?;
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("opening {}", log.display()))?;
    let mut child = Command::new(env::current_exe().context("finding rxl itself")?)
        .args(["domain-monitor", &domid.to_string()])
        .stdin(Stdio::piped())
        .stdout(file.try_clone()?)
        .stderr(file)
        .current_dir("/")
        .spawn()
        .context("starting the monitor")?;
    let mut pipe = child.stdin.take().context("the monitor has no input")?;
    pipe.write_all(config.as_bytes()).context("handing over the configuration")
}

/// A name from the other host must not lead out of the directory.
fn log_path(name: &str) -> PathBuf {
    PathBuf::from(LOG_DIR).join(format!("xl-{}.log", name.replace('/', "_")))
}

/// The monitor process.
pub(crate) fn run(globals: &Globals, domid: u16) -> anyhow::Result<Exit> {
    // Away from whoever started it, and from its terminal.
    rustix::process::setsid().context("leaving the session")?;
    host::become_save_helper()?;
    let mut config = String::new();
    let limit = u64::try_from(CONFIG_BYTES_MAX)?;
    io::stdin().take(limit).read_to_string(&mut config).context("reading the configuration")?;
    let libxl = host::open(globals, Progress::Silent)?;
    monitor::run(&libxl, DomId(domid), &config)?;
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
