//! The sender: writes a running or suspended domain to a libxc stream.
//!
//! [`machine`] decides what comes next and does nothing itself; [`driver`] does what it decides,
//! against the traits of [`crate::hypervisor`]; [`precopy`] decides when to stop copying a
//! running guest, [`estimate`] what a migration would take; [`pass`] sends one set of pages,
//! [`batch`] some of them at a time, with what [`kept`] has mapped; [`pv`] and [`hvm`] know the
//! guests; [`workers`] are other processes that send batches, `crew` is who of them has which,
//! `shares` who has sent which pages last; `reduce` leaves out of pages what need not be sent
//! over a link, as far as that pays (`effort`).
//!
//! Not here: the suspend request (libxl's, asked for through `Toolstack::suspend`), the libxl
//! stream around this one, and what happens to the domain afterwards.

mod batch;
mod crew;
mod driver;
mod effort;
pub mod estimate;
mod hvm;
mod kept;
pub mod machine;
mod pass;
pub mod precopy;
mod pv;
mod reduce;
mod shares;
pub mod workers;

pub use batch::{Outcome, Pass};
pub use driver::{Options, Summary, save, save_with};
pub use machine::Verify;
pub use reduce::{Clock, Reducing};
