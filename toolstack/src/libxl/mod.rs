//! Domain management by the host's libxl, loaded at run time.
//!
//! libxl's ABI is its release's own, and rxl is one binary for all of 4.14 to 4.22. So nothing
//! links it, and nothing here relies on a layout that differs between those releases:
//! - `libxl_domain_config` (and all in it) is opaque, in a room many times its size, and changed
//!   only as JSON text (`rxl_migrate::xl::config`); its first member is `c_info`;
//! - `libxl_dominfo`, `libxl_version_info`, `libxl_domain_restore_params` and `libxl_event` up to
//!   its union are the same in all of them, as are the enumerations `libxl_error`,
//!   `libxl_shutdown_reason` and `libxl_event_type` (new errors are added at the end);
//! - the functions used have the same prototypes, under their real names: the inline functions
//!   that `LIBXL_API_VERSION` selects are for programs written for releases before 4.14.
//!
//! This was checked by comparing `libxl.h`, `libxl_event.h` and `libxl_types.idl` of each.
//!
//! What a program must know. libxl handles SIGCHLD as long as a [`Libxl`] lives: no other handler
//! may be installed (libxl ends the process if it finds one), but the program's own children are
//! left alone and may be waited for by pid. Nothing may be ignored of libxl's children either:
//! SIGCHLD stays unblocked in at least one thread. libxl logs to `stderr`.
//!
//! The unsafe code is in `ctx` (library, context, logger, children) and `ffi` (calls).

mod ctx;
mod ffi;
mod held;
mod library;
mod memory;
pub mod monitor;
mod operation;
mod start;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{CpuCap, SourceDomain};
use rxl_migrate::xl::movable::Facts;
use rxl_xen_sys::{libxl as xl, stable};

use crate::lifecycle::{DomainState, Lifecycle, LifecycleError, Result, ShortOfMemory};
use crate::xc::LiveDomain;

use ctx::Context;
use ffi::{DomainInfo, Rc};
use operation::Operations;
use start::StartError;

/// Why libxl cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no libxl, or none that has all functions.
    #[error("no usable libxl (libxenlight) on this host; {advice}; tried: {}", refused.join("; "))]
    NoLibrary {
        /// What to install.
        advice: String,
        /// Each file and what the dynamic linker said.
        refused: Vec<String>,
    },
    /// No memory for the logger.
    #[error("libxl's logger cannot be made")]
    Logger,
    /// libxl is there, Xen is not, or not for us.
    #[error(
        "libxl ({}) cannot reach Xen (libxl error {rc}): is this a Xen host's dom0, is xenstored \
         running, and are you root?",
        library.display()
    )]
    NoXen {
        /// The library that was loaded.
        library: PathBuf,
        /// libxl's code.
        rc: i32,
    },
}

/// What of libxl's log goes to `stderr`. The default is xl's.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// How many steps more than xl's default: xl's number of `-v`.
    pub verbosity: u8,
    /// Whether libxl draws progress ("Frames iteration 0 …"). Not, where rxl draws its own.
    pub progress: bool,
    /// Whether progress overwrites its line even where `stderr` is no terminal (xl's `-t`).
    pub carriage_return: bool,
    /// Whether lines start with date and pid (xl's `-T`).
    pub timestamps: bool,
}

impl Default for LogOptions {
    fn default() -> LogOptions {
        LogOptions { verbosity: 0, progress: true, carriage_return: false, timestamps: false }
    }
}

impl LogOptions {
    fn level(self) -> stable::xentoollog_level {
        stable::XTL_PROGRESS.saturating_sub(self.verbosity.into())
    }

    fn flags(self) -> u32 {
        let hide = if self.progress { 0 } else { stable::XTL_STDIOSTREAM_HIDE_PROGRESS };
        let cr = if self.carriage_return { stable::XTL_STDIOSTREAM_PROGRESS_USE_CR } else { 0 };
        let stamp = stable::XTL_STDIOSTREAM_SHOW_DATE | stable::XTL_STDIOSTREAM_SHOW_PID;
        hide | cr | if self.timestamps { stamp } else { 0 }
    }
}

/// Makes libxl run `path` as its save helper, in this process and in those that it starts. Call
/// it first thing in `main`; without it libxl runs the one that the user's `LIBXL_SAVE_HELPER`
/// names, or its own.
///
/// # Errors
/// Other threads run already; the environment of a process with threads cannot be changed.
pub fn use_save_helper(path: &OsStr) -> io::Result<()> {
    ctx::set_save_helper(path)
}

/// This host's libxl. Not shared between threads; [`Lifecycle::canceller`]'s functions are.
#[derive(Debug)]
pub struct Libxl {
    context: Arc<Context>,
    operations: Arc<Operations>,
    /// xl's lock, from [`Lifecycle::reserve_memory`] to the end of the restore.
    reservation: RefCell<Option<File>>,
}

impl Libxl {
    /// Loads this host's libxl and connects to Xen.
    ///
    /// # Errors
    /// [`OpenError`]; libxl has logged more.
    pub fn open(options: LogOptions) -> std::result::Result<Libxl, OpenError> {
        let context = Arc::new(Context::open(options)?);
        let operations = Arc::default();
        Ok(Libxl { context, operations, reservation: RefCell::new(None) })
    }

    /// After a restore that failed: libxl has destroyed the domain, except where the operation
    /// was aborted, which lets that fail or leaves the domain half made.
    fn clear_away(&self, domain: DomId) {
        if matches!(self.context.info(domain), Ok(Some(_)))
            && let Err(rc) = self.context.destroy(domain)
        {
            tracing::error!("domain {domain} cannot be destroyed (libxl error {rc})");
        }
    }
}

fn failed(rc: Rc, what: impl FnOnce() -> String) -> LifecycleError {
    LifecycleError { what: what(), rc }
}

fn state_of(info: Option<DomainInfo>) -> DomainState {
    match info {
        None => DomainState::Gone,
        Some(DomainInfo { dying: true, .. }) => DomainState::Dead,
        Some(DomainInfo { shutdown: true, reason: xl::LIBXL_SHUTDOWN_REASON_SUSPEND, .. }) => {
            DomainState::Suspended
        }
        Some(DomainInfo { shutdown: true, .. }) => DomainState::Dead,
        Some(_) => DomainState::Alive,
    }
}

impl Lifecycle for Libxl {
    fn resolve(&self, name_or_id: &str) -> Result<DomId> {
        let found = match name_or_id {
            // libxl would take it for the number 0.
            "" => Err(xl::ERROR_INVAL),
            name => self.context.domid_of(name),
        };
        let exists = |domain: DomId| match self.context.info(domain)? {
            Some(_) => Ok(domain),
            None => Err(xl::ERROR_DOMAIN_NOTFOUND),
        };
        found.and_then(exists).map_err(|rc| failed(rc, || format!("finding domain {name_or_id}")))
    }

    fn name(&self, domain: DomId) -> Result<String> {
        let name = self.context.name_of(domain).ok_or(xl::ERROR_DOMAIN_NOTFOUND);
        name.map_err(|rc| failed(rc, || format!("finding the name of domain {domain}")))
    }

    fn state(&self, domain: DomId) -> Result<DomainState> {
        let info = self.context.info(domain);
        info.map(state_of).map_err(|rc| failed(rc, || format!("asking Xen of domain {domain}")))
    }

    fn config(&self, domain: DomId) -> Result<String> {
        let config = self.context.retrieve_config(domain);
        config.map_err(|rc| failed(rc, || format!("reading domain {domain}'s configuration")))
    }

    fn facts(&self, domain: DomId) -> Result<Facts> {
        LiveDomain::open(domain).and_then(|live| live.facts()).map_err(|error| {
            let what = format!("asking Xen of domain {domain} ({error}: {})", error.source);
            LifecycleError { what, rc: xl::ERROR_FAIL }
        })
    }

    fn save(&self, domain: DomId, fd: BorrowedFd<'_>, live: bool, debug: bool) -> Result<()> {
        let flags = if live { xl::LIBXL_SUSPEND_LIVE } else { 0 }
            | if debug { xl::LIBXL_SUSPEND_DEBUG } else { 0 };
        let save = |id| self.context.suspend(domain, fd, flags, id);
        let saved = self.operations.run(&self.context, save);
        saved.map_err(|rc| failed(rc, || format!("saving domain {domain}")))
    }

    fn log_dirty_off(&self, domain: DomId) -> Result<()> {
        let off = LiveDomain::open(domain).and_then(|live| live.log_dirty_off());
        off.map_err(|error| {
            let what = format!("switching log-dirty of domain {domain} off ({})", error.source);
            LifecycleError { what, rc: xl::ERROR_FAIL }
        })
    }

    fn cpu_cap(&self, domain: DomId) -> Result<CpuCap> {
        let cap = LiveDomain::open(domain).and_then(|live| live.cpu_cap());
        cap.map_err(|error| {
            let why = error.source;
            let what = format!("asking the scheduler for the limit of domain {domain} ({why})");
            LifecycleError { what, rc: xl::ERROR_FAIL }
        })
    }

    fn set_cpu_cap(&self, domain: DomId, cap: CpuCap) -> Result<()> {
        let set = LiveDomain::open(domain).and_then(|live| live.set_cpu_cap(cap));
        set.map_err(|error| {
            let (cap, why) = (cap.0, error.source);
            let what = format!(
                "giving domain {domain} its processors back ({why}; xl sched-credit2 -d {domain} \
                 -c {cap})"
            );
            LifecycleError { what, rc: xl::ERROR_FAIL }
        })
    }

    fn canceller(&self) -> Box<dyn Fn() + Send + Sync> {
        operation::canceller(&self.context, &self.operations)
    }

    fn restore(&self, config: &str, fd: BorrowedFd<'_>) -> Result<DomId> {
        let _reservation = self.reservation.take();
        match start::check(fd, || self.operations.is_cancelled()) {
            // What was cancelled ends in `run`.
            Ok(()) | Err(StartError::Cancelled) => {}
            Err(e) => {
                let what = format!("restoring the domain ({e})");
                return Err(LifecycleError { what, rc: xl::ERROR_INVAL });
            }
        }
        let restored = self.operations.run(&self.context, |id| {
            let config = self.context.config_from_json(config)?;
            let (result, domain) = self.context.restore(&config, fd, id);
            if let (Err(_), Some(domain)) = (result, domain) {
                self.clear_away(domain);
            }
            result.and_then(|()| domain.ok_or(xl::ERROR_FAIL))
        });
        restored.map_err(|rc| failed(rc, || "restoring the domain".to_owned()))
    }

    fn rename(&self, domain: DomId, from: &str, to: &str) -> Result<()> {
        let done = self.context.rename(domain, from, to);
        done.map_err(|rc| failed(rc, || format!("renaming domain {domain} from {from} to {to}")))
    }

    fn pause(&self, domain: DomId) -> Result<()> {
        let done = self.context.pause(domain);
        done.map_err(|rc| failed(rc, || format!("pausing domain {domain}")))
    }

    fn unpause(&self, domain: DomId) -> Result<()> {
        let done = self.context.unpause(domain);
        done.map_err(|rc| failed(rc, || format!("unpausing domain {domain}")))
    }

    fn resume(&self, domain: DomId) -> Result<()> {
        let done = self.context.resume(domain);
        done.map_err(|rc| failed(rc, || format!("resuming domain {domain}")))
    }

    fn destroy(&self, domain: DomId) -> Result<()> {
        let done = self.context.destroy(domain);
        done.map_err(|rc| failed(rc, || format!("destroying domain {domain}")))
    }

    fn needed_memory(&self, config: &str) -> Result<u64> {
        memory::needed(&self.context, config)
    }

    fn make_room(&self, kib: u64) -> std::result::Result<(), ShortOfMemory> {
        memory::reserve(&self.context, kib).map(drop)
    }

    fn reserve_memory(&self, config: &str) -> std::result::Result<(), ShortOfMemory> {
        let lock = memory::reserve_for(&self.context, config)?;
        self.reservation.replace(lock);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_suspended_only_if_that_is_why_it_shut_down_and_it_is_not_dying() {
        let info = |shutdown, dying, reason| Some(DomainInfo { shutdown, dying, reason });
        let (poweroff, suspend) =
            (xl::LIBXL_SHUTDOWN_REASON_POWEROFF, xl::LIBXL_SHUTDOWN_REASON_SUSPEND);
        assert_eq!(state_of(None), DomainState::Gone);
        assert_eq!(state_of(info(false, false, suspend)), DomainState::Alive);
        assert_eq!(state_of(info(true, false, suspend)), DomainState::Suspended);
        assert_eq!(state_of(info(true, true, suspend)), DomainState::Dead);
        assert_eq!(state_of(info(true, false, poweroff)), DomainState::Dead);
    }

    #[test]
    fn the_log_is_xls_by_default_and_each_v_shows_one_level_more() {
        let xl = LogOptions::default();
        assert_eq!((xl.level(), xl.flags()), (stable::XTL_PROGRESS, 0));
        assert_eq!(LogOptions { verbosity: 3, ..xl }.level(), stable::XTL_DEBUG);
        assert_eq!(LogOptions { verbosity: 200, ..xl }.level(), stable::XTL_NONE);
        let quiet = LogOptions { progress: false, timestamps: true, ..xl };
        assert_eq!(quiet.flags(), 0o4 | 0o2 | 0o1);
        assert_eq!(LogOptions { carriage_return: true, ..xl }.flags(), 0o10);
    }

    #[test]
    fn without_xen_opening_says_so_and_nothing_breaks() {
        if std::path::Path::new("/proc/xen/capabilities").exists() {
            eprintln!("not tested: this host runs Xen");
            return;
        }
        for _ in 0..2 {
            match Libxl::open(LogOptions::default()) {
                Err(e @ OpenError::NoXen { .. }) => {
                    let text = e.to_string();
                    assert!(text.contains("libxenlight.so.4."), "{text}");
                    assert!(text.contains("cannot reach Xen (libxl error -3)"), "{text}");
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
