//! The moment up to which a migration can be cancelled.
//!
//! A [`Gate`] is open until somebody cancels or the driver commits (it is about to try the step
//! that cannot be taken back); whoever comes first wins, the other is told. So Ctrl-C either ends
//! a migration with the guest running where it was, or comes too late and is ignored; it never
//! meets the handshake half way.
//!
//! What it is not: it takes no signal and wakes nobody.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTED: u8 = 2;

/// Open, cancelled or committed.
#[derive(Debug, Default)]
pub struct Gate(AtomicU8);

impl Gate {
    /// An open one.
    #[must_use]
    pub const fn new() -> Gate {
        Gate(AtomicU8::new(OPEN))
    }

    /// Asks for the end. `false`: too late, or asked before.
    pub fn cancel(&self) -> bool {
        self.0.compare_exchange(OPEN, CANCELLED, SeqCst, SeqCst).is_ok()
    }

    /// From now on nothing is cancelled. `false`: it has been cancelled before.
    pub fn commit(&self) -> bool {
        self.0.compare_exchange(OPEN, COMMITTED, SeqCst, SeqCst) != Err(CANCELLED)
    }

    /// Whether somebody cancelled in time.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(SeqCst) == CANCELLED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_first_wins_the_gate() {
        let gate = Gate::new();
        assert!(gate.commit() && gate.commit());
        assert!(!gate.cancel() && !gate.is_cancelled());
        let gate = Gate::new();
        assert!(gate.cancel() && !gate.cancel());
        assert!(!gate.commit() && gate.is_cancelled());
    }
}
