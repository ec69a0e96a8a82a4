//! Puts programs of this tree on the hosts.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

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
