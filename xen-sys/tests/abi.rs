//! The layouts that one binary relies on for every release from 4.14 to 4.22, and what a program
//! that uses this crate is linked with.
//!
//! That the bindings agree with the installed headers is tested by the bindings themselves, at
//! compile time. The numbers here are of the interface as it is documented, so that headers of a
//! release which changes it do not go unnoticed.

use std::mem::{offset_of, size_of};

use rxl_xen_sys::abi::*;
use rxl_xen_sys::stable;

#[test]
fn a_domctl_is_a_head_of_16_bytes_and_a_union_of_128() {
    assert_eq!(size_of::<xen_domctl>(), 144);
    assert_eq!(offset_of!(xen_domctl, interface_version), 4);
    assert_eq!(offset_of!(xen_domctl, domain), 8);
    assert_eq!(offset_of!(xen_domctl, u), 16);
}

#[test]
fn domctl_arguments_are_where_all_releases_have_them() {
    assert_eq!(offset_of!(xen_domctl_getdomaininfo, flags), 4);
    assert_eq!(offset_of!(xen_domctl_getdomaininfo, tot_pages), 8);
    assert_eq!(offset_of!(xen_domctl_getdomaininfo, shared_info_frame), 48);
    assert_eq!(offset_of!(xen_domctl_getdomaininfo, max_vcpu_id), 68);
    assert_eq!(offset_of!(xen_domctl_shadow_op, dirty_bitmap), 16);
    assert_eq!(offset_of!(xen_domctl_shadow_op, pages), 24);
    assert_eq!(offset_of!(xen_domctl_shadow_op, stats), 32);
    assert_eq!(size_of::<xen_domctl_hvmcontext>(), 16);
    assert_eq!(size_of::<xen_domctl_ext_vcpucontext>(), 64);
    assert_eq!(offset_of!(xen_domctl_tsc_info, incarnation), 8);
    assert_eq!(offset_of!(xen_domctl_tsc_info, elapsed_nsec), 16);
    assert_eq!(size_of::<xen_domctl_vcpuextstate>(), 32);
    assert_eq!(size_of::<xen_domctl_cpu_policy>(), 40);
    assert_eq!(size_of::<xen_cpuid_leaf_t>(), 24);
    assert_eq!(size_of::<xen_msr_entry_t>(), 16);
    assert_eq!(size_of::<xen_domctl_vcpu_msr_t>(), 16);
}

#[test]
fn other_hypercalls_arguments_are_where_all_releases_have_them() {
    assert_eq!(size_of::<multicall_entry>(), 64);
    assert_eq!(size_of::<mmuext_op>(), 24);
    assert_eq!(size_of::<xen_memory_reservation>(), 32);
    assert_eq!(offset_of!(xen_memory_reservation, domid), 24);
    assert_eq!(size_of::<xen_machphys_mfn_list>(), 24);
    assert_eq!(size_of::<xen_hvm_param>(), 16);
    assert_eq!(size_of::<grant_entry_v1>(), 8);
    assert_eq!((size_of::<xen_sysctl>(), offset_of!(xen_sysctl, u)), (136, 8));
    assert_eq!(offset_of!(xen_sysctl_physinfo, capabilities), 28);
    assert_eq!((XEN_SYSCTL_physinfo, XEN_SYSCTL_PHYSCAP_shadow), (3, 1 << 4));
}

#[test]
fn numbers_of_domctls_are_those_of_all_releases() {
    let numbers = [
        (XEN_DOMCTL_getdomaininfo, 5),
        (XEN_DOMCTL_shadow_op, 10),
        (XEN_DOMCTL_setvcpucontext, 12),
        (XEN_DOMCTL_getvcpucontext, 13),
        (XEN_DOMCTL_getvcpuinfo, 14),
        (XEN_DOMCTL_gethvmcontext, 33),
        (XEN_DOMCTL_sethvmcontext, 34),
        (XEN_DOMCTL_set_address_size, 35),
        (XEN_DOMCTL_get_address_size, 36),
        (XEN_DOMCTL_set_ext_vcpucontext, 42),
        (XEN_DOMCTL_get_ext_vcpucontext, 43),
        (XEN_DOMCTL_gettscinfo, 59),
        (XEN_DOMCTL_settscinfo, 60),
        (XEN_DOMCTL_getpageframeinfo3, 61),
        (XEN_DOMCTL_setvcpuextstate, 62),
        (XEN_DOMCTL_getvcpuextstate, 63),
        (XEN_DOMCTL_get_vcpu_msrs, 72),
        (XEN_DOMCTL_set_vcpu_msrs, 73),
        (XEN_DOMCTL_get_cpu_policy, 82),
        (XEN_DOMCTL_set_cpu_policy, 83),
    ];
    for (got, expected) in numbers {
        assert_eq!(got, expected);
    }
}

#[test]
fn a_program_is_linked_with_stable_libraries_only() {
    let used: unsafe extern "C" fn(*mut stable::xencall_handle) -> i32 = stable::xencall_close;
    assert_ne!(used as usize, 0);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains("libxencall.so"));
    for unstable in ["libxenlight", "libxenctrl", "libxenguest", "libxlutil"] {
        assert!(!maps.contains(unstable), "{unstable} is loaded");
    }
}
