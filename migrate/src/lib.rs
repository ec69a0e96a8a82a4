//! The migration engine: it moves a Xen guest's memory and state through a stream.
//!
//! What it is: stream formats ([`stream`]), the sender ([`source`]), the receiver ([`target`]),
//! x86 specifics ([`x86`]), `xl`'s wire protocol ([`xl`]), the protocol between libxl and its save
//! helper ([`helper`]) and the events of a migration ([`report`], [`counters`], [`progress`]).
//!
//! What it is not: it opens no device, spawns nothing and issues no hypercall. All that it needs
//! of Xen is in the traits of [`hypervisor`], so it builds, tests and fuzzes where no Xen library
//! is installed. It holds no `unsafe` code.
//!
//! ```text
//!   source::machine ──actions──► source::driver ──► hypervisor::SourceDomain   (maps, log-dirty)
//!         ▲                            │            hypervisor::Toolstack      (suspend, ...)
//!         └────────events──────────────┤
//!                                      ▼
//!                          stream::libxc records ──► hypervisor::StreamOut
//! ─────────────────────────────────── wire ─────────────────────────────────────────────────
//!                          stream::libxc records ◄── hypervisor::StreamIn
//!                                      │
//!   target::machine ◄──record headers──┤
//!         └────────actions──► target::driver ─────► hypervisor::TargetDomain   (populate, place)
//! ```
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod counters;
pub mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod frame;
pub mod helper;
pub mod hypervisor;
pub mod progress;
pub mod report;
mod runs;
pub mod source;
pub mod stream;
pub mod target;
pub mod x86;
pub mod xl;

pub use error::{Error, Result};
