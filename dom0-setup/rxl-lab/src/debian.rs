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

use crate::process::{output, succeeds};
use crate::progress::step;

/// The Debian release of the machine and of the hosts in the lab.
pub(crate) const SUITE: &str = "bookworm";

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

/// `deb` or `deb-src` lines for [`SUITE`] from the machine's own sources.
pub(crate) fn source_lines(kind: &str) -> Result<String> {
    let targets = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(CREATED_BY) $(SITE) $(RELEASE) $(COMPONENT)",
    ]))?;
    let lines = source_lines_from(&targets, kind);
    if lines.is_empty() {
        bail!("This machine's apt sources name no `{SUITE}`: the lab needs Debian 12");
    }
    Ok(lines)
}

fn source_lines_from(targets: &str, kind: &str) -> String {
    let updates = [SUITE.to_owned(), format!("{SUITE}-updates"), format!("{SUITE}-security")];
    let lines: BTreeSet<String> = targets
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (creator, site) = (words.next()?, words.next()?);
            let (release, component) = (words.next()?, words.next()?);
            let wanted = creator == "Packages"
                && component == "main"
                && updates.iter().any(|suite| suite == release);
            wanted.then(|| format!("{kind} [signed-by={KEYRING}] {site} {release} {component}\n"))
        })
        .collect();
    lines.into_iter().collect()
}

/// Unpacks the newest source package `name` that the mirror has under `dir`; gives the folder of
/// its tree.
pub(crate) fn unpack_source(name: &str, dir: &Path) -> Result<PathBuf> {
    let sources = dir.join("sources.list");
    fs::write(&sources, source_lines("deb-src")?)?;
    let lists = dir.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let unpacked = dir.join("source");
    fs::create_dir(&unpacked)?;
    let apt = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command
            .arg("-q")
            .arg(format!("-oDir::Etc::SourceList={}", sources.display()))
            .arg("-oDir::Etc::SourceParts=/dev/null")
            .arg(format!("-oDir::State::Lists={}", lists.display()))
            .args(["-oAPT::Sandbox::User=root", "-oDir::Cache::srcpkgcache="])
            .arg("-oDir::Cache::pkgcache=")
            .args(arguments)
            .current_dir(&unpacked);
        output(&mut command)
    };
    apt("apt-get", &["update"])?;
    // A mirror's index may name a security update whose source it does not hold: then the one
    // before it will do.
    let mut failures = Vec::new();
    for version in newest_first(&apt("apt-cache", &["showsrc", name])?) {
        match apt("apt-get", &["source", &format!("{name}={version}")]) {
            Ok(_) => return only_entry(&unpacked, Path::is_dir),
            Err(error) => failures.push(format!("{version}: {error:#}")),
        }
    }
    bail!("The mirror has no source of {name}:\n{}", failures.join("\n"))
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

/// Downloads the newest binary package `name` and unpacks it into `dir`; gives its version.
pub(crate) fn unpack_binary(name: &str, dir: &Path) -> Result<String> {
    let scratch = tempfile::tempdir()?;
    output(apt_get(&["download", "-oAPT::Sandbox::User=root", name]).current_dir(scratch.path()))?;
    let archive = only_entry(scratch.path(), Path::is_file)?;
    output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(dir))?;
    let version = output(Command::new("dpkg-deb").arg("-f").arg(&archive).arg("Version"))?;
    Ok(version.trim().to_owned())
}

/// The package that a metapackage such as `linux-image-amd64` depends on first.
pub(crate) fn first_dependency(name: &str) -> Result<String> {
    let listing = output(Command::new("apt-cache").args(["depends", "--important", name]))?;
    listing
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .with_context(|| format!("apt knows no dependency of {name}"))
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
    fn test_source_lines_keeps_main_of_suite_only() {
        let targets = "Packages http://mirror.test/d bookworm main\n\
                       DEP-11 http://mirror.test/d bookworm main\n\
                       Packages http://mirror.test/d bookworm main\n\
                       Packages http://mirror.test/s bookworm-security main\n\
                       Packages http://mirror.test/d bookworm-backports main\n\
                       Packages http://mirror.test/d bookworm contrib\n";
        assert_eq!(
            source_lines_from(targets, "deb-src"),
            format!(
                "deb-src [signed-by={KEYRING}] http://mirror.test/d bookworm main\n\
                 deb-src [signed-by={KEYRING}] http://mirror.test/s bookworm-security main\n"
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
