//! The keys by which root moves between hosts, and from this machine to them, with no question
//! asked: one key of root's and one of the hosts' for every lab, whatever its hosts run.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::process::output;
use crate::store::ImageKey;

pub(super) const USER_KEY: &str = "id_ed25519";
pub(super) const HOST_KEY: &str = "ssh_host_ed25519_key";
pub(super) const KNOWN_HOSTS: &str = "known_hosts";

/// Raise it when the steps below change in a way that changes what they make.
const RECIPE: &str = "1";

pub(super) fn key() -> ImageKey {
    ImageKey::over([RECIPE.as_bytes()])
}

pub(super) fn build(image: &Path) -> Result<()> {
    for name in [USER_KEY, HOST_KEY] {
        output(
            Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "rxl-lab", "-f"])
                .arg(image.join(name)),
        )?;
    }
    let public = fs::read_to_string(image.join(HOST_KEY).with_extension("pub"))?;
    fs::write(image.join(KNOWN_HOSTS), format!("* {public}"))?;
    Ok(())
}
