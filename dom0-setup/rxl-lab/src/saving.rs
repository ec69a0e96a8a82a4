//! One save of a lab guest to a file and its restoration, on the same host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::host::{Host, quote};
use crate::lab::Lab;
use crate::migration::Route;

/// Time that either may take in emulation.
const SAVE_TIMEOUT: Duration = Duration::from_secs(300);

/// A save and a restore in figures.
#[derive(Clone, Debug)]
pub struct SavedAndRestored {
    /// From the start of the save to its end.
    pub save: Duration,
    /// From the start of the restore to its end.
    pub restore: Duration,
    /// Size of the file.
    pub file_bytes: u64,
    /// Pages of the guest that did not hold what they should.
    pub bad_pages: u64,
}

impl Lab {
    /// Saves a guest with the sender of `route`, restores it with its receiver, and has it verify
    /// all of its memory. The file is gone afterwards.
    ///
    /// # Errors
    /// A command fails, the guest is still there after the save, or is not alive after the restore.
    /// Bad pages are no error here: they are in the result.
    pub fn save_and_restore(
        &self,
        guest: &str,
        host: &Host,
        route: Route,
    ) -> Result<SavedAndRestored> {
        let file = save_path(guest);
        let path = quote(&file);
        let started = Instant::now();
        host.run_within(&format!("{} save {guest} {path}", route.sender()), SAVE_TIMEOUT)?;
        let save = started.elapsed();
        ensure!(self.find_guest(guest)?.is_empty(), "{guest} is still there after it was saved");
        let size = host.run(&format!("stat -c %s {path}"))?;
        let file_bytes = size.trim().parse().with_context(|| format!("no size: `{size}`"))?;
        let started = Instant::now();
        host.run_within(&format!("{} restore {path}", route.receiver()), SAVE_TIMEOUT)?;
        let restore = started.elapsed();
        host.run(&format!("rm {path}"))?;
        let report = self.check_guest(guest)?;
        ensure!(report.host == host.name(), "{guest} is on {}", report.host);
        Ok(SavedAndRestored { save, restore, file_bytes, bad_pages: report.bad_pages })
    }
}

/// Where a guest is saved on its host.
#[must_use]
pub fn save_path(guest: &str) -> String {
    format!("/var/tmp/{guest}.save")
}
