//! What runs inside guests: an initramfs with one program; and two programs for the hosts, for
//! their clocks and for connections without encryption. All are static binaries of the crate
//! `rxl-guest`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::process::output;
use crate::store::ImageKey;

pub(super) const INITRAMFS: &str = "initramfs.cpio";
pub(super) const CLOCK_AGENT: &str = "rxl-clock";
pub(super) const PLAIN_CLIENT: &str = "lab-rsh";

const PACKAGE: &str = "rxl-guest";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Raise it when the steps below change in a way that changes what they make.
const RECIPE: &str = "2";

pub(super) fn key() -> Result<ImageKey> {
    let mut files = Vec::new();
    let crate_dir = workspace().join("dom0-setup").join(PACKAGE);
    collect_files(&crate_dir, &mut files)?;
    files.sort();
    let mut parts = vec![RECIPE.as_bytes().to_vec()];
    for file in files {
        let name = file.strip_prefix(&crate_dir)?.to_string_lossy().into_owned();
        parts.push(name.into_bytes());
        parts.push(fs::read(&file)?);
    }
    Ok(ImageKey::over(parts.iter().map(Vec::as_slice)))
}

pub(super) fn build(image: &Path) -> Result<()> {
    let binaries = build_static(PACKAGE)?;
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &fs::read(binaries.join(PACKAGE))?);
    fs::write(image.join(INITRAMFS), archive.finish())?;
    for program in [CLOCK_AGENT, PLAIN_CLIENT] {
        fs::copy(binaries.join(program), image.join(program))?;
    }
    Ok(())
}

/// Builds a package of this tree as static binaries; gives the folder with them.
fn build_static(package: &str) -> Result<PathBuf> {
    let target_dir = target_dir().join("static");
    let mut command = Command::new("cargo");
    command
        .args(["build", "--quiet", "--release", "--target", TARGET, "--package", package])
        .arg("--target-dir")
        .arg(&target_dir)
        .current_dir(workspace())
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    output(&mut command).with_context(|| format!("Cannot build {package}"))?;
    Ok(target_dir.join(TARGET).join("release"))
}

/// Root of the tree that this program was built from.
pub(crate) fn workspace() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).unwrap_or(crate_dir).to_owned()
}

/// Cargo's target folder of that tree.
pub(crate) fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

fn collect_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("Cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect_files(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}
