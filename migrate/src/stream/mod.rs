//! Stream formats.
//!
//! [`libxc`] is the inner stream that carries memory and state. The outer libxl stream is
//! written and read by libxl itself, but for a look at its start ([`libxl`]); `xl`'s header and
//! handshake are in [`crate::xl`]. [`link`] is what two rxl ends add to it, [`reduced`] how they
//! send less, with pages [`packed`], [`digest`] how they compare.

pub mod digest;
pub mod libxc;
pub mod libxl;
pub mod link;
pub mod packed;
pub mod reduced;

pub use libxc::FormatError;
