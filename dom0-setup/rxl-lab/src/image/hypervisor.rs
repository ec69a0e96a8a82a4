//! The hypervisor. Of 4.17 it is Debian's source and configuration, with shadow paging switched on:
//! Debian's own binary has it off, and then a PV guest has no log-dirty mode ("Failed to enable
//! logdirty: 22"). Of 4.20 it is that binary: PV guests can come there, but not leave while they
//! run.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail, ensure};

use crate::debian::Mirror;
use crate::process::output;
use crate::progress::step;
use crate::release::Release;
use crate::store::ImageKey;

const SOURCE_PACKAGE: &str = "xen";
const CONFIG_CHANGE: &str = "CONFIG_SHADOW_PAGING=y";

/// Raise it when the steps below change in a way that changes what they make.
const RECIPE: &str = "1";

pub(super) fn key(release: Release) -> ImageKey {
    let package = binary_package(release);
    let parts = [RECIPE, release.suite(), SOURCE_PACKAGE, &package, CONFIG_CHANGE];
    ImageKey::over(parts.map(str::as_bytes))
}

fn binary_package(release: Release) -> String {
    format!("xen-hypervisor-{release}-amd64")
}

pub(super) fn build(release: Release, image: &Path) -> Result<()> {
    match release {
        Release::Xen417 => compile(release, image),
        Release::Xen420 => take(release, image),
    }
}

/// Debian's binary.
fn take(release: Release, image: &Path) -> Result<()> {
    let scratch = tempfile::tempdir_in(image)?;
    let package = binary_package(release);
    let version = Mirror::of(release)?.unpack_binary(&package, scratch.path())?;
    let packed = scratch.path().join(format!("boot/xen-{release}-amd64.gz"));
    let unpacked = Command::new("gzip").arg("-dc").arg(&packed).output();
    let unpacked = unpacked.context("Cannot start gzip")?;
    ensure!(unpacked.status.success(), "{} cannot be unpacked", packed.display());
    fs::write(image.join("xen"), unpacked.stdout)?;
    fs::write(image.join("versions"), format!("{package} {version}\n"))?;
    Ok(())
}

/// Debian's source, with shadow paging.
fn compile(release: Release, image: &Path) -> Result<()> {
    let scratch = tempfile::tempdir_in(image)?;
    let source = step("fetched Xen's source", || {
        let mirror = Mirror::of(release)?;
        mirror.unpack_binary(&binary_package(release), scratch.path())?;
        mirror.unpack_source(SOURCE_PACKAGE, scratch.path())
    })?;
    let tree = source.join("xen");
    configure(&scratch.path().join(format!("boot/xen-{release}-amd64.config")), &tree)?;
    step("compiled Xen", || {
        let jobs = available_parallelism().map_or(1, usize::from);
        output(make(&tree).arg(format!("-j{jobs}")))
    })?;
    fs::copy(tree.join("xen"), image.join("xen")).context("The build gave no `xen`")?;
    let changelog = source.join("debian/changelog");
    let version =
        output(Command::new("dpkg-parsechangelog").arg("-SVersion").arg("-l").arg(changelog))?;
    fs::write(image.join("versions"), format!("{SOURCE_PACKAGE} {version}"))?;
    Ok(())
}

fn configure(debian_config: &Path, tree: &Path) -> Result<()> {
    let config = fs::read_to_string(debian_config)
        .with_context(|| format!("The package has no {}", debian_config.display()))?;
    let target = tree.join(".config");
    fs::write(&target, with_change(&config))?;
    output(make(tree).arg("olddefconfig"))?;
    if !fs::read_to_string(&target)?.lines().any(|line| line == CONFIG_CHANGE) {
        bail!("Xen's configuration does not take {CONFIG_CHANGE}");
    }
    Ok(())
}

/// The configuration with the one option set, whatever it said before.
fn with_change(config: &str) -> String {
    let mut changed: String = config
        .lines()
        .filter(|line| !line.contains("CONFIG_SHADOW_PAGING"))
        .flat_map(|line| [line, "\n"])
        .collect();
    changed.push_str(CONFIG_CHANGE);
    changed.push('\n');
    changed
}

fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    // Debian's own Python: one that comes first in PATH may lack what the build scripts need.
    command.arg("-C").arg(tree).arg("PYTHON=/usr/bin/python3");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_with_change_option_off_turns_on() {
        let config = "CONFIG_PV=y\n# CONFIG_SHADOW_PAGING is not set\nCONFIG_HVM=y\n";
        assert_eq!(with_change(config), "CONFIG_PV=y\nCONFIG_HVM=y\nCONFIG_SHADOW_PAGING=y\n");
    }
}
