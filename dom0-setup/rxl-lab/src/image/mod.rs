//! The three images of the lab, each with its own key, so that a change to the guest program does
//! not compile Xen again:
//!
//! - `hypervisor`: Xen from Debian's source package, with shadow paging ([`hypervisor`]);
//! - `dom0`: root disk, kernel, initramfs and ssh keys of a host ([`dom0`]);
//! - `guest`: the guest program's initramfs and the clock agent ([`guest`]).
//!
//! Keys are over what this tree says (recipes, package names, Debian's suite), not over the exact
//! package versions of the day: those are written into each image's `versions` file, so that a
//! built lab keeps working when the package lists move on.

mod dom0;
mod guest;
mod hypervisor;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::debian::{ensure_machine_packages, missing_packages};
use crate::store::Store;

/// Folders of the built images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Images {
    hypervisor: PathBuf,
    dom0: PathBuf,
    guest: PathBuf,
}

impl Images {
    /// Builds what is missing, installing packages on this machine first where needed.
    pub fn build(store: &Store) -> Result<Self> {
        ensure_machine_packages()?;
        Ok(Self {
            hypervisor: store.find_or_build("hypervisor", &hypervisor::key(), hypervisor::build)?,
            dom0: store.find_or_build("dom0", &dom0::key(), dom0::build)?,
            guest: Self::build_guest(store)?,
        })
    }

    /// The images if all of them, and the machine's packages, are there.
    pub fn find(store: &Store) -> Result<Self> {
        let missing = missing_packages()?;
        if !missing.is_empty() {
            bail!(
                "This machine lacks packages ({}): run `dom0-setup/lab build`",
                missing.join(" ")
            );
        }
        let found = |kind: &str, key| match store.find(kind, &key) {
            Some(dir) => Ok(dir),
            None => bail!("The {kind} image is not built: run `dom0-setup/lab build`"),
        };
        Ok(Self {
            hypervisor: found("hypervisor", hypervisor::key())?,
            dom0: found("dom0", dom0::key())?,
            guest: found("guest", guest::key()?)?,
        })
    }

    #[cfg(test)]
    pub(crate) fn at(dir: &Path) -> Self {
        Self { hypervisor: dir.to_owned(), dom0: dir.to_owned(), guest: dir.to_owned() }
    }

    /// Builds the guest image alone if its sources changed.
    pub fn build_guest(store: &Store) -> Result<PathBuf> {
        store.find_or_build("guest", &guest::key()?, guest::build)
    }

    /// Xen as an ELF file that QEMU's multiboot loader takes.
    pub fn xen(&self) -> PathBuf {
        self.hypervisor.join("xen")
    }

    /// The kernel of dom0; guests use it too.
    pub fn kernel(&self) -> PathBuf {
        self.dom0.join(dom0::KERNEL)
    }

    /// The initramfs of dom0.
    pub fn initramfs(&self) -> PathBuf {
        self.dom0.join(dom0::INITRAMFS)
    }

    /// The root disk of dom0, never written to.
    pub fn root_disk(&self) -> PathBuf {
        self.dom0.join(dom0::ROOT_DISK)
    }

    /// The private key that logs in as root on every host.
    pub fn ssh_key(&self) -> PathBuf {
        self.dom0.join(dom0::USER_KEY)
    }

    /// Host keys of the lab's hosts.
    pub fn known_hosts(&self) -> PathBuf {
        self.dom0.join(dom0::KNOWN_HOSTS)
    }

    /// The clock agent, a static program for the hosts.
    pub fn clock_agent(&self) -> PathBuf {
        self.guest.join(guest::CLOCK_AGENT)
    }

    /// The client of connections without encryption, a static program for the hosts.
    pub fn plain_client(&self) -> PathBuf {
        self.guest.join(guest::PLAIN_CLIENT)
    }
}

pub(crate) use dom0::GUEST_KERNEL_PATH;
pub(crate) use guest::{target_dir, workspace};

/// The initramfs of guests in a guest image's folder.
pub(crate) fn guest_initramfs(image: &Path) -> PathBuf {
    image.join(guest::INITRAMFS)
}
