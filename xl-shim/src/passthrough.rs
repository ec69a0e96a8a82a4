//! What rxl leaves to the stock programs, which then take the place of this process: verbs that it
//! does not have are the real `xl`'s, checkpointed streams its save helper's. Arguments and
//! descriptors are as they were given.
//!
//! Either may be installed under another name, because rxl has its place ([`crate::divert`]).

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io, process};

use anyhow::{Context, bail};

use crate::{divert, save_helper};

/// Names the real `xl`, before all other ways to find it.
pub(crate) const ENV_XL: &str = "RXL_XL";
/// The process that has been handed on already: what is then found as `xl` leads back here.
const ENV_HANDED_ON: &str = "RXL_HANDED_ON";

/// Becomes the real `xl`. Returns only if that fails.
pub(crate) fn exec_xl(args: &[OsString]) -> anyhow::Error {
    match find_xl() {
        Ok(xl) => hand_on(Command::new(&xl).arg0("xl"), &xl, args),
        Err(error) => error,
    }
}

/// Becomes libxl's own save helper. Returns only if that fails.
pub(crate) fn exec_stock_helper(args: &[OsString]) -> anyhow::Error {
    match find_stock_helper() {
        Ok(helper) => hand_on(&mut Command::new(&helper), &helper, args),
        Err(error) => error,
    }
}

fn hand_on(command: &mut Command, path: &Path, args: &[OsString]) -> anyhow::Error {
    let me = process::id().to_string();
    if env::var(ENV_HANDED_ON).is_ok_and(|pid| pid == me) {
        return anyhow::anyhow!("{} leads back to rxl; set {ENV_XL}", path.display());
    }
    let error = command.args(args).env(ENV_HANDED_ON, me).exec();
    anyhow::Error::new(error).context(format!("running {}", path.display()))
}

/// The host's real `xl`: `RXL_XL`, the one of the Xen that runs, the only one installed,
/// `/usr/sbin/xl`, the one in `PATH`; never this program under another name.
pub(crate) fn find_xl() -> anyhow::Result<PathBuf> {
    if let Some(xl) = env::var_os(ENV_XL) {
        return Ok(PathBuf::from(xl));
    }
    let in_path = env::var_os("PATH").unwrap_or_default();
    let candidates = tool_dirs()
        .into_iter()
        .chain([PathBuf::from("/usr/sbin")])
        .chain(env::split_paths(&in_path))
        .map(|dir| dir.join("xl"));
    match first_of_others(candidates)? {
        Some(xl) => Ok(xl),
        None => bail!("xl is not installed here (set {ENV_XL} if it has another name)"),
    }
}

/// libxl's own save helper, of the Xen that runs or of the only one installed.
fn find_stock_helper() -> anyhow::Result<PathBuf> {
    match first_of_others(stock_helpers(&tool_dirs()))? {
        Some(helper) => Ok(helper),
        None => bail!("this stream needs libxl's own {}, which is not here", save_helper::NAME),
    }
}

/// Where stock's helper may be in `dirs`: where it is diverted to, and in its own place.
fn stock_helpers(dirs: &[PathBuf]) -> impl Iterator<Item = PathBuf> {
    dirs.iter().flat_map(|dir| {
        let place = dir.join(save_helper::NAME);
        [divert::aside(&place), place]
    })
}

/// The first that is there and is not this program.
fn first_of_others(
    mut candidates: impl Iterator<Item = PathBuf>,
) -> anyhow::Result<Option<PathBuf>> {
    let own = env::current_exe().and_then(|exe| identity(&exe)).context("finding rxl itself")?;
    Ok(candidates.find(|path| identity(path).is_ok_and(|id| id != own)))
}

/// What makes a file that file, whatever its name.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|m| (m.dev(), m.ino()))
}

/// Where the tools of the Xen that runs are, then those of every other that is installed.
fn tool_dirs() -> Vec<PathBuf> {
    let running = running_xen().map(|version| format!("/usr/lib/xen-{version}/bin"));
    running.map(PathBuf::from).into_iter().chain(divert::xen_dirs(Path::new("/"))).collect()
}

/// The version of the hypervisor, as the directories of its tools are named.
fn running_xen() -> Option<String> {
    let part = |name| fs::read_to_string(format!("/sys/hypervisor/version/{name}")).ok();
    Some(format!("{}.{}", part("major")?.trim(), part("minor")?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stock_helper_that_was_put_aside_comes_before_what_is_in_its_place() {
        let dirs = ["/usr/lib/xen-4.17/bin", "/usr/lib/xen-4.20/bin"].map(PathBuf::from);
        let found: Vec<_> = stock_helpers(&dirs).collect();
        let helper = "/usr/lib/xen-4.17/bin/libxl-save-helper";
        assert_eq!(found[0], Path::new(&format!("{helper}.distrib")));
        assert_eq!(found[1], Path::new(helper));
        assert_eq!(found.len(), 4);
    }

    #[test]
    fn this_program_is_never_taken_for_a_stock_one() {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("own"), dir.path().join("other"));
        std::os::unix::fs::symlink(env::current_exe().unwrap(), &own).unwrap();
        fs::write(&other, "").unwrap();
        let found =
            first_of_others([own.clone(), dir.path().join("none"), other.clone()].into_iter());
        assert_eq!(found.unwrap(), Some(other));
        assert_eq!(first_of_others([own].into_iter()).unwrap(), None);
    }
}
