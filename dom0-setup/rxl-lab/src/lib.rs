//! The nested-QEMU Xen lab: real Xen hosts on a machine without hardware virtualisation.
//!
//! [`Images::build`] makes what a lab boots from, [`Lab::up`] boots it, [`Lab::attach`] finds the
//! one that is up. A [`Host`] runs commands; guests are started, checked and stopped by name
//! through the [`Lab`], because after a migration only the lab knows where they are.
//!
//! ```no_run
//! use rxl_lab::{GuestKind, GuestSpec, Lab, Store};
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::attach(&Store::open()?)?;
//! let host1 = lab.host("host1")?;
//! lab.start_guest(host1, &GuestSpec::new("pv1", GuestKind::Pv, 128))?;
//! host1.run_within("xl migrate pv1 host2", std::time::Duration::from_secs(300))?;
//! assert_eq!(lab.check_guest("pv1")?.bad_pages, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Emulation distorts costs: compare figures of one run with each other, and count rather than
//! time where possible.

pub mod clock;
mod cpio;
mod debian;
pub mod demo;
mod devices;
mod guest;
mod host;
mod image;
mod lab;
mod load;
mod migration;
mod network;
mod plain;
mod process;
mod progress;
mod push;
mod qemu;
mod release;
mod saving;
mod state;
mod store;

pub use crate::devices::guest_address;
pub use crate::guest::{Content, GuestKind, GuestReport, GuestSpec};
pub use crate::host::{COMMAND_TIMEOUT, Finished, Host, quote};
pub use crate::image::Images;
pub use crate::lab::{HostStatus, Lab, status};
pub use crate::load::Load;
pub use crate::migration::{Measured, Migration, REPORT_PATH, Route, Way};
pub use crate::network::{NAMESPACE, address};
pub use crate::push::RXL_PATH;
pub use crate::release::Release;
pub use crate::saving::{SavedAndRestored, save_path};
pub use crate::state::Shape;
pub use crate::store::Store;
