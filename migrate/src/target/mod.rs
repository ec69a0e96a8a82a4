//! The receiver: fills an empty, paused domain from a libxc stream.
//!
//! [`machine`] decides which record may come when and does nothing itself; `driver` reads the
//! records that it allows and applies them, against the traits of [`crate::hypervisor`]; `pages`
//! places page data; `memory` and `p2m` know which pfns have memory; `pv` and `hvm` know the
//! guests, behind the trait `guest::Guest`; `verify` compares with digests. [`links`] are the connections beside the stream: what a
//! worker on one of them does, and, in `crew` and `passes`, how all stay in step. [`file`] is how
//! workers share a stream that is a file.
//!
//! Not here: making the domain, the libxl stream around this one, devices, and unpausing. A
//! restore that fails leaves a half-built domain, which is libxl's to destroy.
//!
//! The stream is hostile: every length, count and frame number in it is held against a limit
//! before it costs memory, and nothing past its END record is read.

mod crew;
mod driver;
pub mod file;
mod guest;
mod hvm;
pub mod links;
pub mod machine;
mod memory;
mod p2m;
mod pages;
mod passes;
mod pv;
mod vcpu;
mod verify;

#[cfg(test)]
mod tests;

pub use driver::{Options, Outcome, restore, restore_with};
