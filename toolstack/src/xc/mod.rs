//! One domain of this host behind the engine's traits ([`rxl_migrate::hypervisor`]), by the
//! hypercalls themselves.
//!
//! What it is: [`LiveDomain`], which implements `Domain`, `SourceDomain` and `TargetDomain`;
//! [`Mapping`], guest memory in this process; [`FdOut`] and [`FdIn`], the stream.
//!
//! What it is not: it knows no order of a migration and no format of a stream, and it neither
//! makes nor destroys a domain.
//!
//! Only libxencall and libxenforeignmemory are used, whose ABI is stable, and `handle` finds out
//! which version of the domctl interface runs. The structures of the domctls used here are the
//! same in all releases from 4.14 to 4.22, but for the tail of `getdomaininfo`, so one binary
//! serves them all. Hypercall buffers come from `/dev/xen/hypercall` (Linux 4.18 on).
//!
//! A handle must not be used after a `fork` without `exec` (`xencall.h`): a worker opens its own.
//!
//! # Safety
//! The modules that allow `unsafe` do so for three reasons, which each states again: calls of the
//! C libraries and a kernel module (`handle`, `foreign`, `grants`, `window`), hypercalls with a
//! pointer to a buffer in their argument (`source`, `target`, `vcpu`, `policy`, `domain`, `host`),
//! and memory that a guest writes at the same time, which is only read and written by volatile
//! accesses or by the kernel (`foreign`, `stream`).
//!
//! Specified in `xen/include/public` (`domctl.h`, `memory.h`, `hvm/hvm_op.h`, `xen.h`).

use std::io;

use rxl_migrate::hypervisor::HvError;

mod ahead;
mod domain;
mod foreign;
mod grants;
mod handle;
mod host;
mod link;
mod policy;
mod sealed;
mod source;
mod stream;
mod target;
mod vcpu;
mod window;

pub use domain::LiveDomain;
pub use foreign::{MapperWanted, Mapping, want_mapper};
pub use link::{Heartbeat, Idle, ReceivingLink, SendingLink, limit_rate};
pub use sealed::{SealedIn, SealedOut};
#[cfg(test)]
pub(crate) use stream::PIPE_BYTES;
pub use stream::{FdIn, FdOut, FileAt, Patience};

/// `op` failed because of `source`.
fn hv(op: &'static str, source: impl Into<io::Error>) -> HvError {
    HvError { op, source: source.into() }
}

/// A hypercall's name, for errors, and its number.
macro_rules! op {
    ($name:ident) => {
        (stringify!($name), rxl_xen_sys::abi::$name)
    };
}
use op;
