//! A machine with Xen, modelled in memory: for unit and property tests, here and in other crates.
//!
//! [`Host`] holds frames, the m2p and domains. [`FakeDomain`] implements the traits of
//! [`crate::hypervisor`] on one of its domains, [`FakePages`] is guest memory mapped into the
//! toolstack, [`FakeToolstack`] is libxl, [`Wire`] a stream in memory, [`Script`] one that is made
//! by hand. Guests ([`PvSpec`], [`HvmSpec`]) have contents, page tables and a p2m of their own, and
//! change them between any two calls and any two reads if they are told to
//! ([`Host::run_guests`]). [`compare`] says in what a restored domain differs from the suspended
//! one that it was made from.
//!
//! It is a model, so what real Xen checks is checked: a frame that is not the domain's cannot be
//! mapped; a frame that is mapped writable, by anybody, cannot become a page table; page tables
//! are validated entry by entry when they are pinned or loaded; types are what validation says;
//! a mapping goes on to see its frame after the guest has given that away; memory that is handed
//! out holds rubbish; log-dirty knows nothing of writes by the device model unless that reports
//! them. Where real Xen would let a mistake of the toolstack pass (memory given twice to one
//! pfn), it is an error here.
//!
//! What it is not: fast, 32-bit, or a model of time. Superpages, shadow paging and the p2m pool
//! are absent.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "an index or number out of range is a bug in the model, which is to stop the test"
)]

mod compare;
mod domain;
mod guest_hvm;
mod guest_pv;
mod host;
mod lifecycle;
mod memory;
mod pages;
mod physmap;
mod policy;
mod pv_build;
mod rng;
mod script;
mod stream;
#[cfg(test)]
mod tests;
mod toolstack;
mod xen;

pub use compare::compare;
pub use domain::{FakeDomain, VcpuPart};
pub use guest_hvm::HvmSpec;
pub use host::{Host, HostSpec};
pub use pages::FakePages;
pub use pv_build::{Kind as P2mKind, PvSpec};
pub use rng::Rng;
pub use script::{Script, WIRING, tables};
pub use stream::{Wire, fill_pages, put_pages};
pub use toolstack::{FakeToolstack, Heard};
