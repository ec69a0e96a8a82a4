//! The order in which a domain is saved to a file, and what may follow a failure.
//!
//! A file that can be found and a guest that runs on exclude each other: the guest would write to
//! its disks, and whoever restored the file later would have a guest whose memory knows nothing of
//! it. So all is written, and on the disk, under another name; until then a failure, a cancellation
//! or (by the guard) a killed `rxl` lets the guest run on, and the file that had the name before is
//! untouched. Then the guard stands down, the file gets its name, and only then the domain is
//! destroyed. A guest that is to run on (`xl save -c`) is the exception, and its user's choice: it
//! does so as soon as its memory has been read.
//!
//! What it is not: it does nothing to a domain, a file or a screen but through [`Saving`].

use super::leaving::{self, Leaving, Written};

/// What becomes of the domain once it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It ends.
    Destroy,
    /// It runs on.
    Run,
    /// It stays, paused.
    Pause,
}

/// What there is to do it with.
pub trait Saving: Leaving {
    /// What becomes of the domain.
    fn then(&self) -> Then;
    /// Makes sure that all that was written outlives a crash of the host.
    fn sync(&mut self) -> bool;
    /// Gives the file its name, so that that outlives a crash as well. On failure nothing new has
    /// that name.
    fn publish(&mut self) -> bool;
    /// Pauses the domain, so that it does not run when it is resumed.
    fn pause(&mut self) -> bool;
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveEnd {
    /// The file is complete, and the domain is as it was to be.
    Saved,
    /// The file is complete; the suspended domain, which must not run any more, could not be
    /// destroyed.
    SavedWithRemains,
    /// The file is complete; the domain, which was to stay, is suspended and could not be resumed.
    SavedNotResumed,
    /// There is no file, or the one that was there before; the domain was never suspended, or has
    /// been resumed.
    Kept(SaveCause),
    /// The same, but the domain is suspended: it could not be resumed.
    NotResumed(SaveCause),
}

/// Why there is no file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaveCause {
    /// A signal, or whoever else closed the gate.
    #[error("cancelled")]
    Cancelled,
    /// Header or stream.
    #[error("the domain could not be written")]
    NotWritten,
    /// The disk, or the name.
    #[error("the file could not be completed")]
    NotKept,
}

/// From the header to the end.
pub fn run<S: Saving>(side: &mut S) -> SaveEnd {
    match leaving::write(side) {
        Written::Done => {}
        Written::Failed => return give_up(side, SaveCause::NotWritten),
        Written::Cancelled => return give_up(side, SaveCause::Cancelled),
    }
    let then = side.then();
    // A guest that is to run on need not wait for the disk.
    let runs = then == Then::Run && side.resume();
    if !side.sync() {
        return give_up(side, SaveCause::NotKept);
    }
    if !side.gate().commit() {
        return give_up(side, SaveCause::Cancelled);
    }
    // Before the name. A guest that is to run on may be let run on by its guard at any time.
    if then != Then::Run {
        side.stand_down();
    }
    if !side.publish() {
        return give_up(side, SaveCause::NotKept);
    }
    let (done, otherwise) = match then {
        Then::Destroy => (side.destroy(), SaveEnd::SavedWithRemains),
        Then::Run => (runs || side.resume(), SaveEnd::SavedNotResumed),
        // One that could not be paused must not be resumed.
        Then::Pause => (side.pause() && side.resume(), SaveEnd::SavedNotResumed),
    };
    if done { SaveEnd::Saved } else { otherwise }
}

fn give_up<S: Saving>(side: &mut S, cause: SaveCause) -> SaveEnd {
    // Where nobody knows, resuming is safe: there is no file.
    if side.is_suspended() == Some(false) || side.resume() {
        SaveEnd::Kept(cause)
    } else {
        SaveEnd::NotResumed(cause)
    }
}

#[cfg(test)]
mod tests {
    use super::super::channel::Said;
    use super::super::gate::Gate;
    use super::*;

    /// Does everything and writes it down; the step of that name fails, or has somebody cancel.
    struct Side {
        gate: Gate,
        then: Then,
        fails: &'static str,
        cancelled_in: &'static str,
        done: Vec<&'static str>,
        suspended: bool,
    }

    impl Side {
        fn new(then: Then) -> Side {
            let (gate, done) = (Gate::new(), Vec::new());
            Side { gate, then, fails: "", cancelled_in: "", done, suspended: false }
        }

        fn step(&mut self, name: &'static str) -> bool {
            if self.cancelled_in == name {
                self.gate.cancel();
            }
            let ok = self.fails != name;
            if ok {
                self.done.push(name);
            }
            ok
        }
    }

    impl Leaving for Side {
        fn gate(&self) -> &Gate {
            &self.gate
        }

        fn write_header(&mut self) -> Said {
            if self.step("header") { Said::Done } else { Said::Failed(std::io::Error::other("")) }
        }

        fn save(&mut self) -> bool {
            self.suspended = self.step("save");
            self.suspended
        }

        fn log_dirty_off(&mut self) {
            self.step("log-dirty off");
        }

        fn speed_up(&mut self) {}

        fn is_suspended(&mut self) -> Option<bool> {
            Some(self.suspended)
        }

        fn stand_down(&mut self) {
            self.step("stand down");
        }

        fn destroy(&mut self) -> bool {
            self.step("destroy")
        }

        fn resume(&mut self) -> bool {
            self.suspended = !self.step("resume");
            !self.suspended
        }
    }

    impl Saving for Side {
        fn then(&self) -> Then {
            self.then
        }

        fn sync(&mut self) -> bool {
            self.step("sync")
        }

        fn publish(&mut self) -> bool {
            self.step("publish")
        }

        fn pause(&mut self) -> bool {
            self.step("pause")
        }
    }

    #[test]
    fn the_domain_ends_only_once_its_file_is_on_the_disk_under_its_name() {
        let mut side = Side::new(Then::Destroy);
        assert_eq!(run(&mut side), SaveEnd::Saved);
        assert_eq!(side.done, ["header", "save", "sync", "stand down", "publish", "destroy"]);
    }

    #[test]
    fn a_domain_that_stays_is_resumed_and_if_it_is_to_be_paused_is_paused_before() {
        let mut side = Side::new(Then::Run);
        assert_eq!(run(&mut side), SaveEnd::Saved);
        assert_eq!(side.done, ["header", "save", "resume", "sync", "publish"]);
        let mut side = Side::new(Then::Pause);
        assert_eq!(run(&mut side), SaveEnd::Saved);
        assert_eq!(side.done[3..], ["stand down", "publish", "pause", "resume"]);
        let mut side = Side { fails: "pause", ..Side::new(Then::Pause) };
        assert_eq!(run(&mut side), SaveEnd::SavedNotResumed);
        assert!(!side.done.contains(&"resume"), "{:?}", side.done);
    }

    #[test]
    fn whatever_fails_before_the_file_has_its_name_lets_the_domain_run_on() {
        for (fails, cause, resumed) in [
            ("header", SaveCause::NotWritten, false),
            ("save", SaveCause::NotWritten, false),
            ("sync", SaveCause::NotKept, true),
            ("publish", SaveCause::NotKept, true),
        ] {
            for then in [Then::Destroy, Then::Run, Then::Pause] {
                let mut side = Side { fails, ..Side::new(then) };
                assert_eq!(run(&mut side), SaveEnd::Kept(cause), "{fails}");
                assert_eq!(side.done.contains(&"resume"), resumed, "{fails}");
                assert!(!side.done.contains(&"destroy") && !side.done.contains(&"pause"));
            }
        }
    }

    #[test]
    fn cancelling_is_possible_until_the_file_gets_its_name() {
        for at in ["header", "save", "sync"] {
            let mut side = Side { cancelled_in: at, ..Side::new(Then::Destroy) };
            assert_eq!(run(&mut side), SaveEnd::Kept(SaveCause::Cancelled), "{at}");
            assert_eq!(side.done.contains(&"resume"), at != "header");
            assert!(!side.done.contains(&"publish") && !side.done.contains(&"stand down"));
        }
        let mut side = Side { cancelled_in: "publish", ..Side::new(Then::Destroy) };
        assert_eq!(run(&mut side), SaveEnd::Saved);
    }

    #[test]
    fn a_domain_that_cannot_be_resumed_or_destroyed_is_told_from_one_that_runs() {
        let end = |fails, then| run(&mut Side { fails, ..Side::new(then) });
        assert_eq!(end("destroy", Then::Destroy), SaveEnd::SavedWithRemains);
        assert_eq!(end("resume", Then::Run), SaveEnd::SavedNotResumed);
        let mut side = Side { cancelled_in: "save", fails: "resume", ..Side::new(Then::Run) };
        assert_eq!(run(&mut side), SaveEnd::NotResumed(SaveCause::Cancelled));
    }
}
