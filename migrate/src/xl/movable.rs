//! Guests that cannot be moved: told from a guest's configuration and from what the hypervisor
//! says, before anything is done to it or a connection is made.
//!
//! What it is not: all that can go wrong. What only the target knows, it says itself.

use super::config::DomainConfig;

/// What the hypervisor says of a domain, and of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// A PV guest (not HVM, not PVH).
    pub pv: bool,
    /// Width of a PV guest: 64 or 32. Others choose theirs as they run.
    pub address_bits: u32,
    /// Whether the hypervisor has shadow paging.
    pub shadow_paging: bool,
    /// Paused by a toolstack.
    pub paused: bool,
}

/// Why a guest cannot be moved, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unmovable {
    /// It has PCI devices passed through.
    #[error(
        "it has {0} PCI device(s) of a host: their state cannot be moved, and nobody sees what \
         they write to its memory; take them away first (xl pci-list, xl pci-detach)"
    )]
    PciDevices(usize),
    /// It has a NUMA topology of its own.
    #[error(
        "it has a virtual NUMA topology, which no stream can carry; start it without vnuma in its \
         configuration to be able to move it"
    )]
    Vnuma,
    /// It is a 32-bit PV guest.
    #[error(
        "it is a 32-bit PV guest, which rxl cannot move; xl can, with libxl's own \
         libxl-save-helper at both ends"
    )]
    Pv32,
    /// It is a PV guest, and the hypervisor cannot see what it writes.
    #[error(
        "this hypervisor has no shadow paging, without which it cannot see what a PV guest writes \
         while it is moved; run a Xen that is built with CONFIG_SHADOW_PAGING=y, or save the guest \
         (xl save) and restore it at the target, or make it a PVH guest"
    )]
    NoShadowPaging,
    /// It is paused, and would have to run to suspend itself.
    #[error(
        "it is paused, and so cannot do what it has to do before it is moved; let it run first (xl \
         unpause)"
    )]
    Paused,
}

impl Unmovable {
    /// What in a configuration is in the way of moving its guest to another host or a file.
    #[must_use]
    pub fn in_config(config: &DomainConfig) -> Option<Unmovable> {
        match (config.pci_devices(), config.vnuma_nodes()) {
            (0, 0) => None,
            (0, _) => Some(Unmovable::Vnuma),
            (count, _) => Some(Unmovable::PciDevices(count)),
        }
    }

    /// What in a domain is in the way. `live`: it is to run while its memory is sent.
    #[must_use]
    pub fn in_domain(config: &DomainConfig, facts: &Facts, live: bool) -> Option<Unmovable> {
        match facts {
            Facts { pv: true, address_bits: 32, .. } => Some(Unmovable::Pv32),
            Facts { pv: true, shadow_paging: false, .. } if live => Some(Unmovable::NoShadowPaging),
            // An HVM guest may be one that nobody asks.
            Facts { paused: true, .. } if !config.is_hvm() => Some(Unmovable::Paused),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_devices_and_vnuma_in_a_configuration_are_seen() {
        let of = |extra: &str| {
            let json = format!(r#"{{"c_info":{{"name":"web"}},{extra}}}"#);
            Unmovable::in_config(&DomainConfig::parse(&json).unwrap())
        };
        assert_eq!(of(r#""b_info":{"max_vcpus":2},"pcidevs":[]"#), None);
        assert_eq!(of(r#""b_info":{"vnuma_nodes":[]}"#), None);
        let pci = r#""pcidevs":[{"bus":3},{"bus":4}]"#;
        assert_eq!(of(pci), Some(Unmovable::PciDevices(2)));
        let vnuma = r#""b_info":{"vnuma_nodes":[{"memkb":1024,"pnode":0}]}"#;
        assert_eq!(of(vnuma), Some(Unmovable::Vnuma));
    }

    #[test]
    fn pv_guests_need_64_bits_and_shadow_paging_if_they_run_and_most_guests_have_to_run() {
        let config = |kind: &str| {
            let json = format!(r#"{{"c_info":{{"name":"web","type":"{kind}"}}}}"#);
            DomainConfig::parse(&json).unwrap()
        };
        let refused = |facts: &Facts, live| Unmovable::in_domain(&config("pv"), facts, live);
        let pv = Facts { pv: true, address_bits: 64, shadow_paging: true, paused: false };
        assert_eq!(refused(&pv, true), None);
        let no_shadow = Facts { shadow_paging: false, ..pv };
        assert_eq!(refused(&no_shadow, true), Some(Unmovable::NoShadowPaging));
        assert_eq!(refused(&no_shadow, false), None);
        let pv32 = Facts { address_bits: 32, ..pv };
        assert_eq!(refused(&pv32, false), Some(Unmovable::Pv32));
        // 32: what a PVH guest that has just begun may say.
        let pvh = Facts { pv: false, address_bits: 32, shadow_paging: false, paused: false };
        assert_eq!(refused(&pvh, true), None);
        let paused = Facts { paused: true, ..pvh };
        let refused = |kind| Unmovable::in_domain(&config(kind), &paused, false);
        assert_eq!((refused("pvh"), refused("hvm")), (Some(Unmovable::Paused), None));
    }
}
