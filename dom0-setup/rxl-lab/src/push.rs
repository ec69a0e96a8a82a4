//! Puts programs of this tree on the hosts.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::debian::ensure_kernel_headers;
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

    /// Puts what a build made on every host.
    fn install(&self, built: &str, path: &str) -> Result<()> {
        let binary = target_dir().join("release").join(built);
        let program =
            fs::read(&binary).with_context(|| format!("The build gave no {}", binary.display()))?;
        self.on_all_hosts(|host| host.write_file(path, "755", &program))?;
        Ok(())
    }
}

fn build(what: &[&str]) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["build", "--quiet", "--release"]).args(what).current_dir(workspace());
    output(&mut command).map(drop)
}

/// Builds the module in cargo's target folder, from a copy of its sources: the kernel's build
/// leaves its files beside them.
fn build_module(release: &str) -> Result<PathBuf> {
    ensure_kernel_headers(release)?;
    let dir = target_dir().join("kmod").join(release);
    fs::create_dir_all(&dir)?;
    for entry in fs::read_dir(workspace().join("dom0-setup/kmod"))? {
        let source = entry?.path();
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
