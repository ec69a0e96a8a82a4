//! The range lock of the kernel module (`dom0-setup/kmod/range_lock.c`), run in user space.
//!
//! The C code is the module's own, built against headers in `shim` that take the place of the
//! kernel's. Its threads are coroutines. They give way before they take the lock's guard and when
//! they wait, which are all moments at which it matters who comes first, and a scheduler decides
//! who goes on and who is killed: every way there is ([`explore`]), or one that a test draws
//! ([`Run`]). After each step the lock is compared with what it promises.
//!
//! What it cannot show: what the kernel's spinlocks and completions do, and weak memory.

mod c;
mod run;

pub use c::Killed;
pub use run::{Choice, Hold, Run, Stacks, explore};
