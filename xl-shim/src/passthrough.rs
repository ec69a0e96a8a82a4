//! The verbs that rxl does not have: the host's real `xl` takes the place of this process, with
//! all arguments as they were given.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io, process};

use anyhow::{Context, bail};

/// Names the real `xl`, before all other ways to find it.
pub(crate) const ENV_XL: &str = "RXL_XL";
/// The process that has been handed on already: what is then found as `xl` leads back here.
const ENV_HANDED_ON: &str = "RXL_HANDED_ON";

/// Becomes the real `xl`. Returns only if that fails.
pub(crate) fn exec_xl(args: &[OsString]) -> anyhow::Error {
    let me = process::id().to_string();
    if env::var(ENV_HANDED_ON).is_ok_and(|pid| pid == me) {
        return anyhow::anyhow!("what is installed as xl leads back to rxl; set {ENV_XL}");
    }
    let xl = match find_xl() {
        Ok(xl) => xl,
        Err(error) => return error,
    };
    let error = Command::new(&xl).arg0("xl").args(args).env(ENV_HANDED_ON, me).exec();
    anyhow::Error::new(error).context(format!("running {}", xl.display()))
}

/// The host's real `xl`: `RXL_XL`, the one of the Xen that runs, the only one installed,
/// `/usr/sbin/xl`, the one in `PATH`; never this program under another name.
pub(crate) fn find_xl() -> anyhow::Result<PathBuf> {
    if let Some(xl) = env::var_os(ENV_XL) {
        return Ok(PathBuf::from(xl));
    }
    let own = env::current_exe().and_then(|exe| identity(&exe)).context("finding rxl itself")?;
    let is_real = |path: &PathBuf| identity(path).is_ok_and(|id| id != own);
    let in_path = env::var_os("PATH").unwrap_or_default();
    let candidates = running_xen()
        .into_iter()
        .map(|version| PathBuf::from(format!("/usr/lib/xen-{version}/bin/xl")))
        .chain(installed())
        .chain([PathBuf::from("/usr/sbin/xl")])
        .chain(env::split_paths(&in_path).map(|dir| dir.join("xl")));
    match candidates.into_iter().find(is_real) {
        Some(xl) => Ok(xl),
        None => bail!("xl is not installed here (set {ENV_XL} if it has another name)"),
    }
}

/// libxl's own save helper.
pub(crate) fn find_stock_helper() -> Option<PathBuf> {
    find_xl().ok()?.parent().map(|bin| bin.join("libxl-save-helper")).filter(|p| p.exists())
}

/// What makes a file that file, whatever its name.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|m| (m.dev(), m.ino()))
}

/// The version of the hypervisor, as the directories of its tools are named.
fn running_xen() -> Option<String> {
    let part = |name| fs::read_to_string(format!("/sys/hypervisor/version/{name}")).ok();
    Some(format!("{}.{}", part("major")?.trim(), part("minor")?.trim()))
}

/// Every `/usr/lib/xen-*/bin/xl`.
fn installed() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("xen-"))
        .map(|entry| entry.path().join("bin/xl"))
        .filter(|xl| xl.exists())
        .collect();
    found.sort();
    found
}
