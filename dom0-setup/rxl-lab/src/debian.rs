//! Debian's packages: on this machine, and as material for the images.
//!
//! The mirror is whatever the machine's own apt sources name. The machine's apt configuration is
//! never changed: pins and source lines go into temporary files, named by options.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::process::{output, succeeds};
use crate::progress::step;
use crate::release::Release;

/// The Debian release of the machine.
const SUITE: &str = "bookworm";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// QEMU of later releases breaks Xen guests: its emulated SVM powers them off at once.
const QEMU_VERSION_PREFIX: &str = "1:7.2";

/// How dpkg-query is to list packages.
const STATUS_FORMAT: &str = "${Package} ${db:Status-Status} ${Version}\n";

/// What the machine needs to build images, to run hosts and to build rxl.
const MACHINE_PACKAGES: &[&str] = &[
    "bc",
    "bison",
    "build-essential",
    "busybox-static",
    "clang",
    "debian-archive-keyring",
    "dpkg-dev",
    "e2fsprogs",
    "flex",
    "iproute2",
    "kmod",
    "libclang-dev",
    "libxen-dev",
    "mmdebstrap",
    "openssh-client",
    "pkg-config",
    "python3",
    "qemu-system-x86",
    "qemu-utils",
    "util-linux",
    "xz-utils",
    "zstd",
];

/// Installs what is missing of [`MACHINE_PACKAGES`].
pub(crate) fn ensure_machine_packages() -> Result<()> {
    let missing = missing_packages()?;
    if missing.is_empty() {
        return Ok(());
    }
    let pins = tempfile::NamedTempFile::new()?;
    fs::write(
        pins.path(),
        format!("Package: src:qemu\nPin: version {QEMU_VERSION_PREFIX}*\nPin-Priority: 1001\n"),
    )?;
    step(&format!("installed {}", missing.join(" ")), || {
        output(&mut apt_get(&["update"]))?;
        let pin_file = format!("Dir::Etc::Preferences={}", pins.path().display());
        let options = ["-o", &pin_file, "install", "-y", "--no-install-recommends"];
        output(apt_get(&options).arg("--allow-downgrades").args(&missing))?;
        Ok(())
    })
}

/// Installs what modules for a kernel of that release are built with.
pub(crate) fn ensure_kernel_headers(release: &str) -> Result<()> {
    let package = format!("linux-headers-{release}");
    let listing =
        Command::new("dpkg-query").args(["-W", "-f", STATUS_FORMAT, &package]).output()?;
    if is_fit(&String::from_utf8_lossy(&listing.stdout), &package) {
        return Ok(());
    }
    step(&format!("installed {package}"), || {
        output(&mut apt_get(&["update"]))?;
        output(&mut apt_get(&["install", "-y", "--no-install-recommends", &package]))
            .with_context(|| {
                format!("The mirror has no {package} any more: build the dom0 image again")
            })?;
        Ok(())
    })
}

/// Names of the packages that the machine lacks, or has in a version that does not work.
pub(crate) fn missing_packages() -> Result<Vec<&'static str>> {
    // dpkg-query fails when it knows nothing of one of the names; what it prints still counts.
    let listing = Command::new("dpkg-query")
        .args(["-W", "-f", STATUS_FORMAT])
        .args(MACHINE_PACKAGES)
        .output()
        .context("Cannot start `dpkg-query`: the lab needs a Debian machine")?;
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    Ok(MACHINE_PACKAGES.iter().copied().filter(|name| !is_fit(&listing, name)).collect())
}

fn is_fit(listing: &str, package: &str) -> bool {
    listing.lines().any(|line| {
        let mut words = line.split(' ');
        words.next() == Some(package)
            && words.next() == Some("installed")
            && (!package.starts_with("qemu-")
                || words.next().is_some_and(|version| version.starts_with(QEMU_VERSION_PREFIX)))
    })
}

/// The packages of a release, as material for images: neither the machine's lists nor what it has
/// installed matters.
#[derive(Debug)]
pub(crate) struct Mirror {
    /// Source lines of the release.
    lines: [String; 2],
    /// Sources and lists for apt.
    state: TempDir,
}

impl Mirror {
    /// The release's lists, from where the machine's own sources are.
    pub(crate) fn of(release: Release) -> Result<Mirror> {
        let targets = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(CREATED_BY) $(SITE) $(RELEASE) $(COMPONENT)",
        ]))?;
        let lines = ["deb", "deb-src"].map(|kind| source_lines(&targets, kind, release.suite()));
        if lines.iter().any(String::is_empty) {
            bail!("This machine's apt sources name no `{SUITE}`: the lab needs Debian 12");
        }
        let state = tempfile::tempdir()?;
        fs::write(state.path().join("sources.list"), lines.concat())?;
        fs::create_dir_all(state.path().join("lists/partial"))?;
        fs::write(state.path().join("status"), "")?;
        let mirror = Mirror { lines, state };
        mirror.apt("apt-get", &["update"], mirror.state.path())?;
        Ok(mirror)
    }

    /// `deb` lines, for who fetches packages himself.
    pub(crate) fn binary_lines(&self) -> &str {
        let [binary, _] = &self.lines;
        binary
    }

    fn apt(&self, program: &str, arguments: &[&str], dir: &Path) -> Result<String> {
        let state = self.state.path().display();
        let mut command = Command::new(program);
        command
            .arg("-q")
            .arg(format!("-oDir::Etc::SourceList={state}/sources.list"))
            .arg("-oDir::Etc::SourceParts=/dev/null")
            .arg(format!("-oDir::State::Lists={state}/lists"))
            .arg(format!("-oDir::State::Status={state}/status"))
            .args(["-oAPT::Sandbox::User=root", "-oDir::Cache::srcpkgcache="])
            .arg("-oDir::Cache::pkgcache=")
            .args(arguments)
            .current_dir(dir);
        output(&mut command)
    }

    /// Unpacks the newest source package `name` under `dir`; gives the folder of its tree.
    pub(crate) fn unpack_source(&self, name: &str, dir: &Path) -> Result<PathBuf> {
        let unpacked = dir.join("source");
        fs::create_dir(&unpacked)?;
        // A mirror's index may name a security update whose source it does not hold: then the one
        // before it will do.
        let mut failures = Vec::new();
        for version in newest_first(&self.apt("apt-cache", &["showsrc", name], dir)?) {
            match self.apt("apt-get", &["source", &format!("{name}={version}")], &unpacked) {
                Ok(_) => return only_entry(&unpacked, Path::is_dir),
                Err(error) => failures.push(format!("{version}: {error:#}")),
            }
        }
        bail!("The mirror has no source of {name}:\n{}", failures.join("\n"))
    }

    /// Downloads the newest binary package `name` and unpacks it into `dir`; gives its version.
    pub(crate) fn unpack_binary(&self, name: &str, dir: &Path) -> Result<String> {
        let scratch = tempfile::tempdir()?;
        self.apt("apt-get", &["download", name], scratch.path())?;
        let archive = only_entry(scratch.path(), Path::is_file)?;
        output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(dir))?;
        let version = output(Command::new("dpkg-deb").arg("-f").arg(&archive).arg("Version"))?;
        Ok(version.trim().to_owned())
    }

    /// Downloads `packages` into `dir`, with all that they need and a system lacks whose dpkg has
    /// `status` for its record of what is installed.
    pub(crate) fn download(&self, packages: &[&str], status: &str, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir.join("partial"))?;
        // The record of the system in the place of this mirror's, which is empty.
        let record = dir.join("partial/status");
        fs::write(&record, status)?;
        let mut arguments = vec!["install", "-y", "--download-only", "--no-install-recommends"];
        let options = [
            format!("-oDir::State::Status={}", record.display()),
            format!("-oDir::Cache::archives={}", dir.display()),
        ];
        arguments.extend(options.iter().map(String::as_str));
        arguments.extend(packages);
        self.apt("apt-get", &arguments, dir)?;
        fs::remove_dir_all(dir.join("partial"))?;
        Ok(())
    }

    /// The package that a metapackage such as `linux-image-amd64` depends on first.
    pub(crate) fn first_dependency(&self, name: &str) -> Result<String> {
        let listing =
            self.apt("apt-cache", &["depends", "--important", name], self.state.path())?;
        listing
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .with_context(|| format!("apt knows no dependency of {name}"))
    }
}

/// `deb` or `deb-src` lines for `suite`, which the mirrors of the machine's release have too.
fn source_lines(targets: &str, kind: &str, suite: &str) -> String {
    let parts = ["", "-updates", "-security"];
    let lines: BTreeSet<String> = targets
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (creator, site) = (words.next()?, words.next()?);
            let (release, component) = (words.next()?, words.next()?);
            let part = release.strip_prefix(SUITE).filter(|part| parts.contains(part))?;
            let wanted = creator == "Packages" && component == "main";
            wanted.then(|| format!("{kind} [signed-by={KEYRING}] {site} {suite}{part} main\n"))
        })
        .collect();
    lines.into_iter().collect()
}

/// Versions in a listing of source packages, newest first.
fn newest_first(listing: &str) -> Vec<String> {
    let versions: BTreeSet<&str> =
        listing.lines().filter_map(|line| line.strip_prefix("Version: ")).collect();
    let mut versions: Vec<String> = versions.into_iter().map(str::to_owned).collect();
    versions.sort_by(|a, b| {
        let is_later = succeeds(Command::new("dpkg").args(["--compare-versions", a, "gt", b]));
        if is_later { Ordering::Less } else { Ordering::Greater }
    });
    versions
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(["-q", "-y"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn only_entry(dir: &Path, wanted: impl Fn(&Path) -> bool) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if wanted(&path) {
            found.push(path);
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(found) => bail!("{} entries instead of one in {}", found.len(), dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_source_lines_keeps_main_of_the_machines_release_only() {
        let targets = "Packages http://mirror.test/d bookworm main\n\
                       DEP-11 http://mirror.test/d bookworm main\n\
                       Packages http://mirror.test/d bookworm main\n\
                       Packages http://mirror.test/s bookworm-security main\n\
                       Packages http://mirror.test/d bookworm-backports main\n\
                       Packages http://mirror.test/d bookworm contrib\n";
        assert_eq!(
            source_lines(targets, "deb-src", "trixie"),
            format!(
                "deb-src [signed-by={KEYRING}] http://mirror.test/d trixie main\n\
                 deb-src [signed-by={KEYRING}] http://mirror.test/s trixie-security main\n"
            )
        );
    }

    #[test]
    fn test_is_fit_later_qemu_is_not() {
        let listing = "qemu-utils installed 1:10.0.2\nqemu-system-x86 installed 1:7.2+dfsg-7\n\
                       bc config-files 1.07\nflex installed 2.6\n";
        assert!(!is_fit(listing, "qemu-utils"));
        assert!(is_fit(listing, "qemu-system-x86"));
        assert!(!is_fit(listing, "bc"));
        assert!(is_fit(listing, "flex"));
        assert!(!is_fit(listing, "bison"));
    }
}
