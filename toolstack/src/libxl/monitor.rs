//! What `xl` leaves behind for each domain: a process that waits for the domain's end and does
//! what the configuration says (`on_poweroff`, `on_reboot`, `on_crash`, `on_watchdog`,
//! `on_soft_reset`).
//!
//! This is the loop alone; whoever calls it has made the process a daemon and `stderr` its log.
//! Unlike xl's it outlives a suspension: xl's monitor ends when its domain suspends, so that a
//! domain that a failed migration resumes has none any more.
//!
//! Duties of xl's monitor that are left out: ejecting CD-ROMs on the guest's request, taking a
//! configuration that `xl config-update` stored (it is in xl.cfg's syntax), and the console and
//! VNC clients of `xl create -c` and `-V`.

use std::thread::sleep;
use std::time::{Duration, SystemTime};

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::config::{ConfigError, DomainConfig};
use rxl_xen_sys::libxl as xl;

use crate::lifecycle::{DomainState, Lifecycle, LifecycleError, Result};

use super::ffi::{DomainEvent, RcResult, utc_suffix};
use super::{Libxl, failed, memory};

/// Where xl puts core dumps.
const DUMP_DIR: &str = "/var/lib/xen/dump";
/// How often a suspended domain is looked at. libxl has no event for "resumed".
const SUSPENDED_POLL: Duration = Duration::from_secs(1);
/// Between the end of a domain and the making of its successor. xl waits as long, since making it
/// at once failed at times (devices of the old one on their way out).
const RESTART_DELAY: Duration = Duration::from_secs(2);

/// Why a monitor gave up.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// A request was refused.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// The configuration that was handed over, or libxl's.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// What is done when a domain has shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Destroy,
    Restart,
    RestartRename,
    Preserve,
    CoredumpDestroy,
    CoredumpRestart,
    SoftReset,
}

impl Action {
    /// As the configuration says. Where it says nothing, that is `destroy`: libxl's JSON leaves
    /// out what has the default of `libxl_action_on_shutdown`. (The other defaults of xl.cfg(5)
    /// are xl's, which writes them down.) An action of a newer libxl is not guessed at.
    fn of(reason: u8, config: &DomainConfig) -> Action {
        let field = match i32::from(reason) {
            xl::LIBXL_SHUTDOWN_REASON_POWEROFF => "on_poweroff",
            xl::LIBXL_SHUTDOWN_REASON_REBOOT => "on_reboot",
            xl::LIBXL_SHUTDOWN_REASON_CRASH => "on_crash",
            xl::LIBXL_SHUTDOWN_REASON_WATCHDOG => "on_watchdog",
            xl::LIBXL_SHUTDOWN_REASON_SOFT_RESET => "on_soft_reset",
            _ => return Action::Destroy,
        };
        match config.field(field) {
            None => Action::Destroy,
            Some(name) => Action::named(name).unwrap_or(Action::Preserve),
        }
    }

    /// From libxl's name of a `libxl_action_on_shutdown`.
    fn named(name: &str) -> Option<Action> {
        Some(match name {
            "destroy" => Action::Destroy,
            "restart" => Action::Restart,
            "restart_rename" => Action::RestartRename,
            "preserve" => Action::Preserve,
            "coredump_destroy" => Action::CoredumpDestroy,
            "coredump_restart" => Action::CoredumpRestart,
            "soft_reset" => Action::SoftReset,
            _ => return None,
        })
    }
}

/// Watches `domain`, whose configuration (libxl's JSON) is `config`, and each domain that it is
/// restarted as. Returns when there is nothing left to watch: the domain was destroyed, here or
/// by somebody else (it was migrated away), or is preserved.
///
/// # Errors
/// A request failed, so that the domain is not watched any more; the text says which.
pub fn run(libxl: &Libxl, domain: DomId, config: &str) -> std::result::Result<(), MonitorError> {
    let mut domain = domain;
    let mut config = DomainConfig::parse(config)?;
    loop {
        let (name, pid) = (config.name().unwrap_or("?"), std::process::id());
        log(&format!("Waiting for domain {name} (domid {domain}) to die [pid {pid}]"));
        let Some(reason) = wait_for_end(libxl, domain)? else {
            log(&format!("Domain {domain} has been destroyed."));
            return Ok(());
        };
        log(&format!("Domain {domain} has shut down, reason code {reason} {reason:#x}"));
        match act(libxl, domain, reason, &mut config)? {
            Some(next) => domain = next,
            None => {
                log("Done. Exiting now");
                return Ok(());
            }
        }
    }
}

/// Until the domain shuts down for good: the reason, or `None` if it was destroyed first.
fn wait_for_end(libxl: &Libxl, domain: DomId) -> Result<Option<u8>> {
    let context = &libxl.context;
    loop {
        let seen = || -> RcResult<DomainEvent> {
            let watch = context.watch_death(domain, libxl.operations.new_id())?;
            context.wait_domain(&watch)
        };
        match seen().map_err(|rc| failed(rc, || format!("watching domain {domain}")))? {
            DomainEvent::Death => return Ok(None),
            DomainEvent::Shutdown(reason)
                if i32::from(reason) == xl::LIBXL_SHUTDOWN_REASON_SUSPEND =>
            {
                log("Domain has suspended.");
                while libxl.state(domain)? == DomainState::Suspended {
                    sleep(SUSPENDED_POLL);
                }
            }
            DomainEvent::Shutdown(reason) => return Ok(Some(reason)),
        }
    }
}

/// Does what is configured; a domain to watch from now on comes back.
fn act(
    libxl: &Libxl,
    domain: DomId,
    reason: u8,
    config: &mut DomainConfig,
) -> Result<Option<DomId>> {
    let mut action = Action::of(reason, config);
    log(&format!("Action for shutdown reason code {reason} is {action:?}"));
    if let Action::CoredumpDestroy | Action::CoredumpRestart = action {
        dump_core(libxl, domain, config.name().unwrap_or("unnamed"));
        let restart = action == Action::CoredumpRestart;
        action = if restart { Action::Restart } else { Action::Destroy };
    }
    match action {
        Action::Preserve => Ok(None),
        Action::Restart => {
            reload(libxl, domain, config);
            destroy(libxl, domain)?;
            restart(libxl, config).map(Some)
        }
        Action::RestartRename => {
            reload(libxl, domain, config);
            preserve(libxl, domain, config)?;
            restart(libxl, config).map(Some)
        }
        Action::SoftReset => {
            reload(libxl, domain, config);
            soft_reset(libxl, domain, config).map(|()| Some(domain))
        }
        Action::Destroy | Action::CoredumpDestroy | Action::CoredumpRestart => {
            destroy(libxl, domain)?;
            Ok(None)
        }
    }
}

/// Takes the configuration of now: devices may have come and gone.
fn reload(libxl: &Libxl, domain: DomId, config: &mut DomainConfig) {
    let now = libxl.config(domain).map_err(|e| e.to_string());
    match now.and_then(|json| DomainConfig::parse(&json).map_err(|e| e.to_string())) {
        Ok(now) => *config = now,
        Err(e) => log(&format!("{e}; using the old configuration")),
    }
}

fn destroy(libxl: &Libxl, domain: DomId) -> Result<()> {
    log(&format!("Domain {domain} needs to be cleaned up: destroying the domain"));
    libxl.destroy(domain)
}

fn dump_core(libxl: &Libxl, domain: DomId, name: &str) {
    let file = format!("{DUMP_DIR}/{name}");
    log(&format!("dumping core to {file}"));
    if let Err(rc) = libxl.context.core_dump(domain, &file) {
        log(&format!("core dump failed (rc={rc})."));
    }
}

/// Leaves the dead domain where it is, under another name.
fn preserve(libxl: &Libxl, domain: DomId, config: &DomainConfig) -> Result<()> {
    let suffix = utc_suffix(SystemTime::now());
    log(&format!(
        "Preserving domain {domain} {} with suffix{suffix}",
        config.name().unwrap_or("?")
    ));
    let context = &libxl.context;
    let done = context
        .config_from_json(&config.to_json())
        .and_then(|config| context.preserve(domain, &config, &suffix));
    done.map_err(|rc| failed(rc, || format!("preserving domain {domain}")))
}

fn restart(libxl: &Libxl, config: &DomainConfig) -> Result<DomId> {
    log("Done. Rebooting now");
    sleep(RESTART_DELAY);
    let json = config.to_json();
    let context = &libxl.context;
    // A shortage is no reason not to try: it is an estimate, and the guest had its memory before.
    let room = memory::reserve_for(context, &json).map_err(|e| log(&e.to_string())).ok();
    let made = context.config_from_json(&json).and_then(|config| context.create(&config));
    drop(room);
    let domain = made.map_err(|rc| failed(rc, || "making the domain again".to_owned()))?;
    libxl.unpause(domain)?;
    Ok(domain)
}

fn soft_reset(libxl: &Libxl, domain: DomId, config: &DomainConfig) -> Result<()> {
    let context = &libxl.context;
    let done = context
        .config_from_json(&config.to_json())
        .and_then(|config| context.soft_reset(domain, &config));
    done.map_err(|rc| failed(rc, || format!("resetting domain {domain}")))?;
    libxl.unpause(domain)
}

fn log(line: &str) {
    eprintln!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const POWEROFF: u8 = 0;
    const REBOOT: u8 = 1;
    const CRASH: u8 = 3;
    const WATCHDOG: u8 = 4;
    const SOFT_RESET: u8 = 5;

    fn config(fields: &str) -> DomainConfig {
        DomainConfig::parse(&format!("{{\"c_info\":{{}}{fields}}}")).unwrap()
    }

    #[test]
    fn each_reason_has_its_own_setting() {
        let config = config(
            r#","on_poweroff":"preserve","on_reboot":"restart_rename","on_crash":"coredump_restart",
               "on_watchdog":"coredump_destroy","on_soft_reset":"destroy""#,
        );
        assert_eq!(Action::of(POWEROFF, &config), Action::Preserve);
        assert_eq!(Action::of(REBOOT, &config), Action::RestartRename);
        assert_eq!(Action::of(CRASH, &config), Action::CoredumpRestart);
        assert_eq!(Action::of(WATCHDOG, &config), Action::CoredumpDestroy);
        assert_eq!(Action::of(SOFT_RESET, &config), Action::Destroy);
    }

    #[test]
    fn what_libxl_leaves_out_is_destroy() {
        for reason in [POWEROFF, REBOOT, CRASH, WATCHDOG, SOFT_RESET] {
            assert_eq!(Action::of(reason, &config("")), Action::Destroy);
        }
    }

    #[test]
    fn an_action_that_is_not_known_leaves_the_domain_alone() {
        let config = config(r#","on_crash":"something_new""#);
        assert_eq!(Action::of(CRASH, &config), Action::Preserve);
    }

    #[test]
    fn a_reason_that_nobody_knows_ends_the_domain() {
        assert_eq!(Action::of(99, &config(r#","on_poweroff":"preserve""#)), Action::Destroy);
    }
}
