//! What Xen says of the host: a sysctl, whose interface has a version of its own, and what it
//! means for a domain.
#![allow(unsafe_code)]

use std::io;

use rxl_migrate::hypervisor::{Domain, HvResult};
use rxl_migrate::xl::movable::Facts;
use rxl_xen_sys::abi;

use super::domain::LiveDomain;
use super::handle::Hypercalls;
use super::{hv, op};

/// Versions of the sysctl interface in which `physinfo` begins with the fields that are used here:
/// Xen 4.22 to 4.14, and some to spare.
const SYSCTL_VERSIONS: [u32; 6] = [0x18, 0x17, 0x16, 0x15, 0x14, 0x13];

impl LiveDomain {
    /// What decides whether this domain can be moved.
    ///
    /// # Errors
    /// The hypercalls'.
    pub fn facts(&self) -> HvResult<Facts> {
        let info = self.info()?;
        let pv = !info.hvm;
        let address_bits = if pv { self.address_bits()? } else { 64 };
        let capabilities = physinfo(&self.xen)?.capabilities;
        let shadow_paging = capabilities & abi::XEN_SYSCTL_PHYSCAP_shadow != 0;
        Ok(Facts { pv, address_bits, shadow_paging, paused: info.paused })
    }
}

fn physinfo(xen: &Hypercalls) -> HvResult<abi::xen_sysctl_physinfo> {
    let op = op!(XEN_SYSCTL_physinfo);
    for version in SYSCTL_VERSIONS {
        match xen.sysctl(op, version, abi::xen_sysctl_physinfo::default()) {
            Err(e) if e.source.raw_os_error() == Some(libc::EACCES) => {}
            result => return result,
        }
    }
    let text = "this Xen has none of the sysctl interfaces 0x13 to 0x18 (Xen 4.14 to 4.22)";
    Err(hv(op.0, io::Error::new(io::ErrorKind::Unsupported, text)))
}
