//! Puts programs of this tree on the hosts.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::{target_dir, workspace};
use crate::lab::Lab;
use crate::process::output;
use crate::progress::step;

/// Where rxl is installed on a host.
pub const RXL_PATH: &str = "/usr/local/bin/rxl";

/// The name under which libxl runs rxl as its helper.
pub const HELPER_PATH: &str = "/usr/local/lib/rxl/libxl-save-helper";

/// Where other programs of this tree go.
const PROGRAMS_DIR: &str = "/usr/local/lib/rxl-lab";

impl Lab {
    /// Builds rxl for release and installs it on every host, with its link as libxl's helper.
    pub fn push_rxl(&self) -> Result<()> {
        step("built rxl", || build(&["--package", "rxl"]))?;
        step("installed rxl on all hosts", || {
            self.install("rxl", RXL_PATH)?;
            self.on_all_hosts(|host| {
                host.run(&format!(
                    "mkdir -p $(dirname {HELPER_PATH}) && ln -sfn {RXL_PATH} {HELPER_PATH}"
                ))
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
