//! Puts this tree's rxl on the hosts.

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

impl Lab {
    /// Builds rxl for release and installs it on every host, with its link as libxl's helper.
    pub fn push_rxl(&self) -> Result<()> {
        step("built rxl", || {
            output(
                Command::new("cargo")
                    .args(["build", "--quiet", "--release", "--package", "rxl"])
                    .current_dir(workspace()),
            )
        })?;
        let binary = target_dir().join("release/rxl");
        let program =
            fs::read(&binary).with_context(|| format!("The build gave no {}", binary.display()))?;
        step("installed rxl on all hosts", || {
            self.on_all_hosts(|host| {
                host.write_file(RXL_PATH, "755", &program)?;
                host.run(&format!(
                    "mkdir -p $(dirname {HELPER_PATH}) && ln -sfn {RXL_PATH} {HELPER_PATH}"
                ))
            })
        })?;
        Ok(())
    }
}
