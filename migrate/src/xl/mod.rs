//! What `xl` adds around a libxl stream: a header ([`header`]) with the domain's configuration
//! ([`config`]) and, for a migration, a conversation between the two ends.
//!
//! [`handshake`] says in what order things happen and does nothing itself. [`departure`] and
//! [`arrival`] do what it says, against traits: up to when a step may be cancelled ([`gate`]), when
//! the guards stand down, what comes before what. [`saving`] and [`restoring`] are the same for a
//! file, which nobody talks to; [`leaving`] and [`making`] are what a file and a migration have in
//! common. [`movable`] says which guests cannot be moved at all. [`guard`] is what a guard does for
//! an owner that was killed, [`channel`] how messages are heard and said. `rxl` implements the
//! traits with libxl, pipes and processes, the simulator those of a migration with models of them.
//!
//! What it is not: it spawns no transport, reads no configuration file and calls no libxl. The
//! formats have no specification of their own: they are what `xl` of Xen 4.5 and later writes and
//! reads.

pub mod arrival;
pub mod channel;
pub mod config;
pub mod departure;
pub mod gate;
pub mod guard;
pub mod handshake;
pub mod header;
pub mod leaving;
pub mod making;
pub mod movable;
pub mod restoring;
pub mod saving;

pub use gate::Gate;

/// What [`away_name`] appends.
pub const AWAY: &str = "--migratedaway";

/// The name that says that a domain is on its way.
#[must_use]
pub fn away_name(name: &str) -> String {
    format!("{name}{AWAY}")
}

/// The name of a copy that may not run yet.
#[must_use]
pub fn incoming_name(name: &str) -> String {
    format!("{name}--incoming")
}
