//! What `xl` adds around a libxl stream: a header with the domain's configuration ([`header`])
//! and, for a migration, a conversation between the two ends ([`handshake`]).
//!
//! What it is not: it spawns no transport, reads no configuration file and calls no libxl. Both
//! parts are formats and state machines; `rxl` drives them. The formats have no specification of
//! their own: they are what `xl` of Xen 4.5 and later writes and reads.

pub mod handshake;
pub mod header;
