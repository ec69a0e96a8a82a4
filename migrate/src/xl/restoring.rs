//! The order in which a domain is restored from a file, and what may follow a failure: either it
//! is there under its own name, or nothing is. Until then it can be cancelled, and a guard watches.
//!
//! What it is not: it does nothing to a domain, a file or a screen but through [`Making`].

use super::making::{self, Making};

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreEnd<E> {
    /// The domain is there, and runs unless it was to stay paused.
    Restored,
    /// Somebody cancelled; there is no domain.
    Cancelled,
    /// No domain could be made.
    NotMade(E),
    /// It was made, and could not be given its name or be started; it is gone again.
    NotStarted,
    /// A copy that must not run is still here, paused: it could not be destroyed.
    Remains,
}

/// From the header to the end.
pub fn run<M: Making>(side: &mut M) -> RestoreEnd<M::Error> {
    if let Err(error) = making::make(side) {
        let cancelled = side.gate().is_cancelled();
        return if cancelled { RestoreEnd::Cancelled } else { RestoreEnd::NotMade(error) };
    }
    if !side.gate().commit() {
        return undo(side, RestoreEnd::Cancelled);
    }
    // Before anything is done to a copy that may run from now on.
    side.stand_down();
    let started = side.rename().is_ok() && (side.stays_paused() || side.unpause().is_ok());
    if !started {
        return undo(side, RestoreEnd::NotStarted);
    }
    side.start_monitor();
    RestoreEnd::Restored
}

fn undo<M: Making>(side: &mut M, end: RestoreEnd<M::Error>) -> RestoreEnd<M::Error> {
    if side.destroy().is_ok() { end } else { RestoreEnd::Remains }
}

#[cfg(test)]
mod tests {
    use super::super::gate::Gate;
    use super::super::making::{Done, FAILED};
    use super::*;

    /// Does everything and writes it down; the step of that name fails, or has somebody cancel.
    #[derive(Default)]
    struct Side {
        gate: Gate,
        paused: bool,
        fails: &'static str,
        cancelled_in: &'static str,
        done: Vec<&'static str>,
    }

    impl Side {
        fn step(&mut self, name: &'static str) -> Done {
            if self.cancelled_in == name {
                self.gate.cancel();
            }
            if self.fails == name {
                return Err(FAILED);
            }
            self.done.push(name);
            Ok(())
        }
    }

    macro_rules! steps {
        ($($function:ident)*) => {$(
            fn $function(&mut self) -> Done {
                self.step(stringify!($function))
            }
        )*};
    }

    impl Making for Side {
        type Error = u8;

        fn gate(&self) -> &Gate {
            &self.gate
        }

        fn stays_paused(&self) -> bool {
            self.paused
        }

        steps! { read_header claim_name check_name reserve_memory restore rename unpause destroy }

        fn start_guard(&mut self) {
            self.done.push("start_guard");
        }

        fn start_monitor(&mut self) {
            self.done.push("start_monitor");
        }

        fn stand_down(&mut self) {
            self.done.push("stand_down");
        }
    }

    const MADE: [&str; 6] =
        ["read_header", "claim_name", "check_name", "reserve_memory", "start_guard", "restore"];

    #[test]
    fn a_guard_watches_until_the_domain_gets_its_name() {
        let mut side = Side::default();
        assert_eq!(run(&mut side), RestoreEnd::Restored);
        let then: &[&str] = &["stand_down", "rename", "unpause", "start_monitor"];
        assert_eq!(side.done, [MADE.as_slice(), then].concat());
        let mut side = Side { paused: true, ..Side::default() };
        assert_eq!(run(&mut side), RestoreEnd::Restored);
        assert!(!side.done.contains(&"unpause"));
    }

    #[test]
    fn whatever_fails_leaves_no_domain_or_says_that_one_is_left() {
        for step in MADE.iter().filter(|step| **step != "start_guard") {
            let mut side = Side { fails: step, ..Side::default() };
            assert_eq!(run(&mut side), RestoreEnd::NotMade(FAILED), "{step}");
            assert_eq!(side.done, MADE[..side.done.len()], "nothing follows {step}");
        }
        for fails in ["rename", "unpause"] {
            let mut side = Side { fails, ..Side::default() };
            assert_eq!(run(&mut side), RestoreEnd::NotStarted);
            assert_eq!(side.done.last(), Some(&"destroy"));
        }
        let mut side = Side { cancelled_in: "restore", fails: "destroy", ..Side::default() };
        assert_eq!(run(&mut side), RestoreEnd::Remains);
    }

    #[test]
    fn cancelling_is_possible_until_the_domain_gets_its_name() {
        let mut side = Side { cancelled_in: "read_header", fails: "restore", ..Side::default() };
        assert_eq!(run(&mut side), RestoreEnd::Cancelled);
        let mut side = Side { cancelled_in: "restore", ..Side::default() };
        assert_eq!(run(&mut side), RestoreEnd::Cancelled);
        assert_eq!(side.done, [MADE.as_slice(), &["destroy"]].concat());
        let mut side = Side { cancelled_in: "rename", ..Side::default() };
        assert_eq!(run(&mut side), RestoreEnd::Restored);
    }
}
