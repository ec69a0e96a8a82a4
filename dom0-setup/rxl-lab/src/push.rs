//! Puts programs of this tree on the hosts.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::debian::{Mirror, ensure_kernel_headers};
use crate::host::{Host, quote};
use crate::image::{target_dir, workspace};
use crate::lab::Lab;
use crate::process::output;
use crate::progress::step;

/// Where rxl is installed on a host.
pub const RXL_PATH: &str = "/usr/bin/rxl";

/// Where a host finds rxl's package.
const PACKAGE_PATH: &str = "/var/cache/rxl-lab/rxl.deb";

/// Time that dpkg may take in emulation.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(180);

/// Where packages wait to be installed.
const PACKAGES_DIR: &str = "/var/cache/rxl-lab/packages";

/// Where dpkg keeps what is installed.
const PACKAGES_RECORD: &str = "/var/lib/dpkg/status";

/// Time that apt may take for them, a compiler among them.
const PACKAGES_TIMEOUT: Duration = Duration::from_secs(1200);

/// Where a host finds the kernel module's sources.
const MODULE_SOURCES: &str = "/usr/local/src/rxl-map";

/// The kernel module of this tree, and its device.
const MODULE: &str = "rxl_map";

/// Where other programs of this tree go.
const PROGRAMS_DIR: &str = "/usr/local/lib/rxl-lab";

impl Lab {
    /// Builds rxl's package and installs it on every host, as a user would.
    pub fn push_rxl(&self) -> Result<()> {
        let package = step("built rxl's package", || {
            output(&mut Command::new(workspace().join("dom0-setup/package")))
        })?;
        let package = fs::read(package.trim()).context("The package is not where it should be")?;
        step("installed rxl on all hosts", || {
            self.on_all_hosts(|host| {
                host.write_file(PACKAGE_PATH, "644", &package)?;
                host.run_within(&format!("dpkg --install {PACKAGE_PATH}"), INSTALL_TIMEOUT)
            })
        })?;
        Ok(())
    }

    /// Builds an example of a package of this tree for release and installs it on every host;
    /// gives its path there.
    pub fn push_example(&self, package: &str, example: &str) -> Result<String> {
        let path = format!("{PROGRAMS_DIR}/{example}");
        step(&format!("built and installed {example}"), || {
            build(&["--package", package, "--example", example])?;
            self.install(&format!("examples/{example}"), &path)
        })?;
        Ok(path)
    }

    /// Builds the program of a package of this tree that has its name, for release, and installs
    /// it on every host; gives its path there.
    pub fn push_program(&self, package: &str) -> Result<String> {
        let path = format!("{PROGRAMS_DIR}/{package}");
        step(&format!("built and installed {package}"), || {
            build(&["--package", package])?;
            self.install(package, &path)
        })?;
        Ok(path)
    }

    /// Builds the kernel module of this tree for the hosts' kernel and loads it on every host, in
    /// the place of one that is loaded.
    pub fn push_module(&self) -> Result<()> {
        let first = self.hosts().first().context("The lab has no host")?;
        let release = first.run("uname -r")?.trim().to_owned();
        let built = step("built the kernel module", || build_module(&release))?;
        let module = fs::read(&built)?;
        step("loaded the kernel module on all hosts", || {
            let path = format!("{PROGRAMS_DIR}/{MODULE}.ko");
            self.on_all_hosts(|host| {
                host.write_file(&path, "644", &module)?;
                host.run(&format!(
                    "! grep -q '^{MODULE} ' /proc/modules || rmmod {MODULE}; insmod {path}"
                ))
            })
        })?;
        Ok(())
    }

    /// Installs DKMS on every host, with what modules are built with for the kernel that runs
    /// there, and puts the module's sources there; gives where.
    pub fn push_dkms(&self) -> Result<&'static str> {
        step("installed DKMS on all hosts", || {
            self.on_all_hosts(|host| {
                self.install_dkms(host).with_context(|| format!("DKMS on {}", host.name()))?;
                for source in module_sources()? {
                    let name = source.file_name().context("A file has no name")?.to_string_lossy();
                    host.write_file(
                        &format!("{MODULE_SOURCES}/{name}"),
                        "644",
                        &fs::read(&source)?,
                    )?;
                }
                Ok(())
            })
        })?;
        Ok(MODULE_SOURCES)
    }

    /// Installs Debian's packages of that name on every host, with what they need.
    pub fn push_packages(&self, names: &[&str]) -> Result<()> {
        step(&format!("installed {} on all hosts", names.join(" ")), || {
            self.on_all_hosts(|host| self.install_packages(host, names))
        })?;
        Ok(())
    }

    fn install_dkms(&self, host: &Host) -> Result<()> {
        let release = host.run("uname -r")?;
        // The script needs what udev makes elsewhere.
        host.run("ln -sfn /proc/self/fd /dev/fd")?;
        self.install_packages(host, &["dkms", &format!("linux-headers-{}", release.trim())])
    }

    fn install_packages(&self, host: &Host, names: &[&str]) -> Result<()> {
        record_kernel(host)?;
        let status = host.run(&format!("cat {PACKAGES_RECORD}"))?;
        let packages = tempfile::tempdir()?;
        Mirror::of(self.shape().release(host.number()))?
            .download(names, &status, packages.path())
            .context("A mirror that no longer has what fits the kernel: build the image again")?;
        // Nothing is lacking if nothing had to be downloaded.
        let mut is_complete = true;
        for package in fs::read_dir(packages.path())? {
            let package = package?.path();
            if package.extension().is_some_and(|extension| extension == "deb") {
                let name = package.file_name().context("A file has no name")?.to_string_lossy();
                host.write_file(&format!("{PACKAGES_DIR}/{name}"), "644", &fs::read(&package)?)?;
                is_complete = false;
            }
        }
        if is_complete {
            return Ok(());
        }
        let install = format!(
            "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
             {PACKAGES_DIR}/*.deb && rm -r {PACKAGES_DIR}"
        );
        host.run_within(&install, PACKAGES_TIMEOUT).map(drop)
    }

    /// Puts what a build made on every host.
    fn install(&self, built: &str, path: &str) -> Result<()> {
        let binary = target_dir().join("release").join(built);
        let program =
            fs::read(&binary).with_context(|| format!("The build gave no {}", binary.display()))?;
        self.on_all_hosts(|host| host.write_file(path, "755", &program))?;
        Ok(())
    }
}

/// Has dpkg know of the kernel, which packages ask for: the image has it without its package, which
/// would build an initramfs.
fn record_kernel(host: &Host) -> Result<()> {
    let said = host.run("uname -rv")?;
    let (release, version) = kernel(&said).context("A kernel that is not Debian's")?;
    let package = format!("linux-image-{release}");
    let record = format!(
        "\nPackage: {package}\nStatus: install ok installed\nArchitecture: amd64\n\
         Version: {version}\nMaintainer: rxl-lab\nDescription: kernel of the image\n\n"
    );
    host.run(&format!(
        "grep -q '^Package: {package}$' {PACKAGES_RECORD} || printf %s {} >> {PACKAGES_RECORD}",
        quote(&record)
    ))
    .map(drop)
}

/// Release and version, from what a kernel says of itself: `6.1.0-9-amd64 #1 SMP Debian 6.1.9-1
/// (2026-11-01)`.
fn kernel(said: &str) -> Option<(&str, &str)> {
    let release = said.split_whitespace().next()?;
    let version = said.split_once(" Debian ")?.1.split_whitespace().next()?;
    Some((release, version))
}

fn build(what: &[&str]) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["build", "--quiet", "--release"]).args(what).current_dir(workspace());
    output(&mut command).map(drop)
}

/// Files of the module.
fn module_sources() -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(workspace().join("dom0-setup/kmod"))?;
    Ok(entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?)
}

/// Builds the module in cargo's target folder, from a copy of its sources: the kernel's build
/// leaves its files beside them.
fn build_module(release: &str) -> Result<PathBuf> {
    ensure_kernel_headers(release)?;
    let dir = target_dir().join("kmod").join(release);
    fs::create_dir_all(&dir)?;
    for source in module_sources()? {
        let name = source.file_name().context("A file has no name")?;
        let (content, copy) = (fs::read(&source)?, dir.join(name));
        // One that is newer is built again.
        if fs::read(&copy).ok().as_ref() != Some(&content) {
            fs::write(copy, content)?;
        }
    }
    let headers = format!("KDIR=/usr/src/linux-headers-{release}");
    output(Command::new("make").args(["-s", "-C"]).arg(&dir).args([headers.as_str(), "modules"]))?;
    Ok(dir.join(format!("{MODULE}.ko")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_says_its_release_and_its_packages_version() {
        let said = "6.1.0-9-amd64 #1 SMP PREEMPT_DYNAMIC Debian 6.1.9-1 (2026-11-01)\n";
        assert_eq!(kernel(said), Some(("6.1.0-9-amd64", "6.1.9-1")));
        assert_eq!(kernel("6.9.0 #1 SMP\n"), None);
    }
}
