//! Stream formats.
//!
//! [`libxc`] is the inner stream that carries memory and state. The outer libxl stream is
//! written and read by libxl itself, and `xl`'s header and handshake are in [`crate::xl`].

pub mod libxc;

pub use libxc::FormatError;
