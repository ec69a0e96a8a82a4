//! A machine with Xen that is none: programs of Xen's toolstack run on it unmodified, at native
//! speed. The hypervisor is the model of [`rxl_migrate::fake`]; this crate lets other processes
//! reach it, and plays libxl to their save helpers.
//!
//! ```text
//!  this process                                      a save helper, stock's or rxl's
//!  ┌──────────────────────────────┐                 ┌───────────────────────────────┐
//!  │ helper: plays libxl          │◄─helper protocol►│ libxl-save-helper, rxl        │
//!  │ machine: guests' own thread  │                 │ libxenguest, libxenctrl       │
//!  │ client, hypercall, domctl    │◄─socket─────────►│ rxl-fake-xen-preload          │
//!  │ rxl_migrate::fake            │  hypercalls, maps│                               │
//!  └──────────────┬───────────────┘                 └───────────────┬───────────────┘
//!                 └────────── memory of the machine: a memfd ───────┘
//! ```
//!
//! A hypercall's structures and buffers are in the program's memory, and read and written there
//! (`/proc/PID/mem`) while it waits. A foreign mapping is a mapping of the machine's memory, made
//! once the model has taken references to its frames; they are dropped when the program unmaps
//! it or ends.
//!
//! What it is not: a measure of a real host. Mapping costs no hypercalls and no TLB flushes, a
//! hypercall costs a round trip to another process, guests have no CPU and no page tables but in
//! memory. What the model lacks is named in [`rxl_migrate::fake`]; a hypercall that it lacks is
//! refused with `ENOSYS` and named by [`Machine::unknown_calls`].
#![forbid(unsafe_code)]

mod bench;
mod client;
mod content;
mod domctl;
mod growth;
mod helper;
mod hypercall;
mod machine;
mod memory;
mod migration;
mod planted;
mod strangers;
mod stream;
mod trouble;
mod usage;
mod ways;
mod wire;

pub use bench::{Bench, Figure};
pub use content::{Content, Rate, Sent, content};
pub use growth::{Growth, clean_pass, grow};
pub use helper::{Ended, Helper, Libxl, Program, Programs};
pub use machine::{Machine, MachineSpec};
pub use migration::{Activity, Filed, GuestKind, Migration, Moved, Rig, Size};
pub use planted::Planted;
pub use strangers::Besieged;
pub use stream::without_optional;
pub use trouble::{Outcome, Weathered};
pub use usage::Usage;
pub use ways::Ways;
