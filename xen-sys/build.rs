//! Generates the bindings from the headers of the installed `libxen-dev`.
//!
//! Three sets, a module each: `abi` (types and numbers of hypercalls), `stable` (linked
//! libraries) and `libxl` (loaded at run time). Each is limited to what rxl uses, by the lists
//! below: a line here is what a new hypercall or function needs.

use std::env;
use std::error::Error;
use std::path::PathBuf;

use bindgen::{Builder, EnumVariation, RustEdition, RustTarget};

/// Libraries to link, by their pkg-config names, with the oldest version that has what is used.
const LINKED: [(&str, &str); 3] =
    [("xencall", "1.0"), ("xenforeignmemory", "1.3"), ("xentoollog", "1.0")];

const ABI_TYPES: &[&str] = &[
    "grant_entry_v1",
    "mmuext_op",
    "multicall_entry",
    "shared_info",
    "start_info",
    "vcpu_guest_context",
    "vcpu_info",
    "xen_cpuid_leaf_t",
    "xen_domctl",
    "xen_domctl_vcpu_msr_t",
    "xen_hvm_param",
    "xen_machphys_mfn_list",
    "xen_memory_reservation",
    "xen_msr_entry_t",
    "xen_sysctl",
];

const ABI_CONSTANTS: &[&str] = &[
    "DOMID_XEN",
    "GTF_permit_access",
    "HVMOP_[gs]et_param",
    "HVM_PARAM_.*",
    "MMUEXT_PIN_L[1-4]_TABLE",
    "SHUTDOWN_suspend",
    "VGCF_online",
    "XENMEM_machphys_mfn_list",
    "XENMEM_maximum_gpfn",
    "XENMEM_maximum_ram_page",
    "XENMEM_populate_physmap",
    "XENMEM_resource_grant_table.*",
    "XENVER_version",
    "XEN_DOMCTL_.*",
    "XEN_DOMINF_.*",
    "XEN_SCHEDULER_CREDIT2?",
    "XEN_SYSCTL_PHYSCAP_shadow",
    "XEN_SYSCTL_physinfo",
    "__HYPERVISOR_(domctl|hvm_op|memory_op|mmuext_op|multicall|sysctl|xen_version)",
];

const STABLE_FUNCTIONS: &[&str] = &[
    "xencall_(open|close|alloc_buffer_pages|free_buffer_pages)",
    "xencall[1-4]",
    "xenforeignmemory_(open|close|map|unmap|map_resource|unmap_resource)",
    "xtl_createlogger_stdiostream",
    "xtl_logger_destroy",
];

const LIBXL_FUNCTIONS: &[&str] = &[
    "libxl_ao_abort",
    "libxl_childproc_setmode",
    "libxl_ctx_(alloc|free)",
    "libxl_domain_config_(init|dispose|from_json|to_json)",
    "libxl_domain_(core_dump|create_new|create_restore|preserve|soft_reset)",
    "libxl_domain_(destroy|pause|rename|resume|shutdown|suspend|unpause)",
    "libxl_domain_(info|need_memory|qualifier_to_domid)",
    "libxl_domain_restore_params_(init|dispose)",
    "libxl_domid_to_name",
    "libxl_dominfo_(init|dispose)",
    "libxl_error_to_string",
    "libxl_evdisable_domain_death",
    "libxl_evenable_domain_death",
    "libxl_event_(free|wait)",
    "libxl_get_(free_memory|memory_target|version_info)",
    "libxl_name_to_domid",
    "libxl_retrieve_domain_configuration",
    "libxl_set_memory_target",
    "libxl_uuid_generate",
    "libxl_wait_for_(free_memory|memory_target)",
];

/// Types that the functions above only point at through `void *` or integers.
const LIBXL_TYPES: &[&str] =
    &["libxl_domain_type", "libxl_error", "libxl_event_type", "libxl_shutdown_reason"];

const LIBXL_CONSTANTS: &[&str] = &["INVALID_DOMID", "LIBXL_SUSPEND_.*", "LIBXL_VERSION"];

fn main() -> Result<(), Box<dyn Error>> {
    for (library, version) in LINKED {
        pkg_config::Config::new().atleast_version(version).probe(library)?;
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let abi = builder("headers/abi.h").clang_macro_fallback();
    let abi = ABI_TYPES.iter().fold(abi, Builder::allowlist_type);
    let abi = ABI_CONSTANTS.iter().fold(abi, Builder::allowlist_var);
    abi.generate()?.write_to_file(out.join("abi.rs"))?;

    let stable = builder("headers/stable.h")
        .allowlist_var("XTL_.*")
        .blocklist_type("FILE|_IO_FILE")
        .raw_line("use libc::FILE;");
    let stable = STABLE_FUNCTIONS.iter().fold(stable, Builder::allowlist_function);
    stable.generate()?.write_to_file(out.join("stable.rs"))?;

    let libxl = builder("headers/libxl.h")
        .dynamic_library_name("Libxl")
        .dynamic_link_require_all(true)
        .blocklist_type("xentoollog_logger")
        .raw_line("use super::stable::xentoollog_logger;");
    let libxl = LIBXL_FUNCTIONS.iter().fold(libxl, Builder::allowlist_function);
    let libxl = LIBXL_TYPES.iter().fold(libxl, Builder::allowlist_type);
    let libxl = LIBXL_CONSTANTS.iter().fold(libxl, Builder::allowlist_var);
    libxl.generate()?.write_to_file(out.join("libxl.rs"))?;
    Ok(())
}

/// What all three have in common. C enums become integers with constants: a value that this
/// header does not know is then a number like any other, and not undefined behaviour.
fn builder(header: &str) -> Builder {
    Builder::default()
        .header(header)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()))
        .rust_target(RustTarget::stable(88, 0).unwrap_or_default())
        .rust_edition(RustEdition::Edition2024)
        .default_enum_style(EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_default(true)
        .generate_comments(false)
        .layout_tests(true)
        .wrap_unsafe_ops(true)
}
