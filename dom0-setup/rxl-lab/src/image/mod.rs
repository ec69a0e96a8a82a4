//! The images of the lab, each with its own key, so that a change to the guest program does not
//! compile Xen again. For each release of Xen:
//!
//! - `hypervisor`: Xen, of 4.17 with shadow paging ([`hypervisor`]);
//! - `dom0`: root disk, kernel and initramfs of a host ([`dom0`]);
//!
//! and for all:
//!
//! - `keys`: root's and the hosts' ssh keys ([`keys`]);
//! - `guest`: the guest program's initramfs and the clock agent ([`guest`]).
//!
//! Keys are over what this tree says (recipes, package names, Debian's suite), not over the exact
//! package versions of the day: those are written into each image's `versions` file, so that a
//! built lab keeps working when the package lists move on.

mod dom0;
mod guest;
mod hypervisor;
mod keys;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::debian::{ensure_machine_packages, missing_packages};
use crate::release::Release;
use crate::store::Store;

/// Folders of the built images that a lab boots from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Images {
    // The record of a lab that an older tree has booted lacks some: it can still be taken down.
    #[serde(default)]
    keys: PathBuf,
    guest: PathBuf,
    #[serde(default)]
    hosts: BTreeMap<Release, HostImages>,
}

/// What a host of one release boots from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HostImages {
    hypervisor: PathBuf,
    dom0: PathBuf,
}

impl Images {
    /// Builds what is missing for hosts of `releases`, installing packages on this machine first
    /// where needed.
    pub fn build(store: &Store, releases: &[Release]) -> Result<Self> {
        ensure_machine_packages()?;
        let keys = store.find_or_build("keys", &keys::key(), keys::build)?;
        let host = |release: &Release| {
            let release = *release;
            let key = hypervisor::key(release);
            let hypervisor = store
                .find_or_build("hypervisor", &key, |image| hypervisor::build(release, image))?;
            let key = dom0::key(release, &keys);
            let dom0 =
                store.find_or_build("dom0", &key, |image| dom0::build(release, &keys, image))?;
            Ok((release, HostImages { hypervisor, dom0 }))
        };
        let hosts = releases.iter().map(host).collect::<Result<_>>()?;
        Ok(Self { guest: Self::build_guest(store)?, keys, hosts })
    }

    /// The images if all of them, and the machine's packages, are there.
    pub fn find(store: &Store, releases: &[Release]) -> Result<Self> {
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
        let keys = found("keys", keys::key())?;
        let host = |release: &Release| {
            let hypervisor = found("hypervisor", hypervisor::key(*release))?;
            let dom0 = found("dom0", dom0::key(*release, &keys))?;
            Ok((*release, HostImages { hypervisor, dom0 }))
        };
        let hosts = releases.iter().map(host).collect::<Result<_>>()?;
        Ok(Self { guest: found("guest", guest::key()?)?, keys, hosts })
    }

    /// What hosts of a release boot from.
    pub(crate) fn host(&self, release: Release) -> Result<&HostImages> {
        self.hosts.get(&release).with_context(|| {
            format!("The lab that is up has no image of Xen {release}: another tree has booted it")
        })
    }

    /// Builds the guest image alone if its sources changed.
    pub fn build_guest(store: &Store) -> Result<PathBuf> {
        store.find_or_build("guest", &guest::key()?, guest::build)
    }

    /// The private key that logs in as root on every host.
    pub fn ssh_key(&self) -> PathBuf {
        self.keys.join(keys::USER_KEY)
    }

    /// Host keys of the lab's hosts.
    pub fn known_hosts(&self) -> PathBuf {
        self.keys.join(keys::KNOWN_HOSTS)
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

impl HostImages {
    #[cfg(test)]
    pub(crate) fn at(dir: &Path) -> Self {
        Self { hypervisor: dir.to_owned(), dom0: dir.to_owned() }
    }

    /// Xen as an ELF file that QEMU's multiboot loader takes.
    pub(crate) fn xen(&self) -> PathBuf {
        self.hypervisor.join("xen")
    }

    /// The kernel of dom0; guests use it too.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.dom0.join(dom0::KERNEL)
    }

    /// The initramfs of dom0.
    pub(crate) fn initramfs(&self) -> PathBuf {
        self.dom0.join(dom0::INITRAMFS)
    }

    /// The root disk of dom0, never written to.
    pub(crate) fn root_disk(&self) -> PathBuf {
        self.dom0.join(dom0::ROOT_DISK)
    }
}

pub(crate) use dom0::GUEST_KERNEL_PATH;
pub(crate) use guest::{target_dir, workspace};

/// The initramfs of guests in a guest image's folder.
pub(crate) fn guest_initramfs(image: &Path) -> PathBuf {
    image.join(guest::INITRAMFS)
}
