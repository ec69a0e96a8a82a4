//! Xen's C interfaces as `bindgen` reads them from the installed headers. Nothing here is safe to
//! call without reading the header, and nothing is added to what the headers say.
//!
//! - [`abi`]: numbers and structures of the hypercalls (`xen/*.h`, with `__XEN_TOOLS__`). Their
//!   layouts are checked against the compiler's when this crate is built.
//! - [`stable`]: libxencall, libxenforeignmemory and libxentoollog, linked in the ordinary way:
//!   their ABI stays over releases of Xen.
//! - [`libxl`]: the struct [`libxl::Libxl`] of function pointers, to be filled by
//!   [`libxl::Libxl::new`] from a shared library at run time. libxl's ABI changes with every
//!   release, so linking it would tie a program to one; **the structures in this module are those
//!   of the release it was built for** and may be smaller than the running release's.
//!
//! C enums are integers with constants, named as in C (`ERROR_FAIL`, `LIBXL_DOMAIN_TYPE_PV`).

macro_rules! generated {
    ($(#[$doc:meta])* $module:ident, $file:literal) => {
        $(#[$doc])*
        #[allow(
            missing_docs,
            missing_debug_implementations,
            non_camel_case_types,
            non_snake_case,
            non_upper_case_globals,
            unreachable_pub,
            clippy::all,
            clippy::undocumented_unsafe_blocks,
            clippy::multiple_unsafe_ops_per_block,
            clippy::ptr_as_ptr,
            clippy::unwrap_used,
            clippy::indexing_slicing,
            clippy::cast_possible_truncation,
            clippy::cast_possible_wrap,
            clippy::cast_sign_loss,
            reason = "generated: names, layouts and (missing) documentation are the C headers'"
        )]
        pub mod $module {
            include!(concat!(env!("OUT_DIR"), "/", $file));
        }
    };
}

generated! {
    /// Hypercalls: numbers and structures.
    abi, "abi.rs"
}
generated! {
    /// Linked libraries.
    stable, "stable.rs"
}
generated! {
    /// libxl, to be loaded at run time.
    libxl, "libxl.rs"
}
