//! The order of a save, without doing any of it.
//!
//! ```text
//!            live                                      not live
//!   Begin ─► QemuLogDirty(on)? ─► WriteHead            Begin ─► WriteHead ─► Suspend ─► SendPass
//!         ─► LogDirtyOn ─► SendPass 0 (all)                                  (all, last) ─► tail
//!         ┌► ReadDirty ─┬─ enough ──► Suspend ─► ReadDirty(last) ─► SendPass(last) ─► tail
//!         └─ SendPass n ◄┬─ not yet
//!                        └─ Throttle ◄─ never, at this speed
//!   tail: [WriteVerify ─► SendPass(all) | SendDigests] ─► WriteTail ─► Cleanup ─► Done
//!   any failure or abort ─► Cleanup ─► Failed
//! ```
//!
//! Two orders are what correctness hangs on, and this file is where they are kept: log-dirty is
//! on before the first page is read, and the dirty bits are read (and so cleared) *before* the
//! pages of their pass, never after.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::source::precopy::{Decision, Policy, Precopy, Seen};

/// What the driver is to do; it answers with the event named here, or with [`Event::Failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Switch the device model's dirty logging on → [`Event::Done`].
    QemuLogDirtyOn,
    /// Switch log-dirty on → [`Event::Done`].
    LogDirtyOn,
    /// Write headers and static data → [`Event::Done`].
    WriteHead,
    /// Send pages → [`Event::Done`].
    SendPass {
        /// 0-based.
        pass: u32,
        /// Which.
        set: PageSet,
        /// The guest is suspended: what cannot be sent now is lost, so it is an error.
        last: bool,
    },
    /// Read and clear the dirty bits → [`Event::Dirty`].
    ReadDirty {
        /// The guest is suspended.
        last: bool,
    },
    /// Leave the guest so much of its processors, until it is suspended → [`Event::Done`].
    Throttle {
        /// Percent.
        percent: u8,
    },
    /// Have the guest suspended → [`Event::Done`].
    Suspend {
        /// How long it is expected to be so, if the policy knows.
        expected: Option<Duration>,
    },
    /// Give up, by the user's choice: the guest would be suspended for so long →
    /// [`Event::Failed`].
    GiveUp {
        /// How long it is expected to be.
        pause: Duration,
    },
    /// Write the record after which pages are compared → [`Event::Done`].
    WriteVerify,
    /// Send the digests of all pages that were sent → [`Event::Done`].
    SendDigests {
        /// 0-based.
        pass: u32,
    },
    /// Write the state records and END → [`Event::Done`].
    WriteTail,
    /// Switch off whatever was switched on; never fails → [`Event::Done`].
    Cleanup,
    /// It is over.
    Finish {
        /// Whether the stream is complete.
        complete: bool,
    },
}

/// How the receiver is to see that the memory has arrived as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Verify {
    /// Not at all.
    #[default]
    No,
    /// Everything is sent a second time at the end, as stock does; what differs is told, and
    /// nothing follows from it.
    Again,
    /// By digests ([`crate::stream::digest`]); a page that differs fails the migration. Only a
    /// receiver that is rxl takes such a stream.
    Digests,
}

/// Which pages a pass covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSet {
    /// The whole p2m.
    All,
    /// Those whose dirty bits have been read and that have not been sent since; in the last pass
    /// also those that were put off.
    Pending,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Go.
    Begin,
    /// The action succeeded.
    Done,
    /// The dirty bits have been read: what is left to send, and what the pass before has shown.
    Dirty(Seen),
    /// The action failed, or somebody wants an end.
    Failed,
}

impl Event {
    fn name(self) -> &'static str {
        match self {
            Event::Begin => "begin",
            Event::Done => "done",
            Event::Dirty(_) => "dirty",
            Event::Failed => "failed",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    QemuLogDirty,
    Head,
    LogDirty,
    LivePass { passes: u32 },
    Reading { passes: u32 },
    Throttling { passes: u32 },
    Suspending { passes: u32 },
    GivingUp,
    ReadingLast { passes: u32 },
    LastPass { passes: u32 },
    Verify { passes: u32 },
    VerifyPass,
    Tail,
    Cleanup { complete: bool },
    Over,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Idle => "idle",
            State::QemuLogDirty => "switching the device model's log-dirty on",
            State::Head => "writing the head",
            State::LogDirty => "switching log-dirty on",
            State::LivePass { .. } => "in a live pass",
            State::Reading { .. } => "reading dirty bits",
            State::Throttling { .. } => "slowing the guest",
            State::Suspending { .. } => "suspending",
            State::GivingUp => "giving up",
            State::ReadingLast { .. } => "reading the last dirty bits",
            State::LastPass { .. } => "in the last pass",
            State::Verify { .. } => "starting verification",
            State::VerifyPass => "in the verification pass",
            State::Tail => "writing the tail",
            State::Cleanup { .. } => "cleaning up",
            State::Over => "over",
        }
    }
}

/// The sender's state.
#[derive(Debug)]
pub struct Machine {
    state: State,
    live: bool,
    hvm: bool,
    verify: Verify,
    precopy: Precopy,
}

impl Machine {
    /// A save that has not begun. `live`: the guest runs during most of it. `hvm`: the guest has,
    /// or may have, a device model that writes its memory. `verify`: how the memory is compared at
    /// the end. `policy` says when the guest is suspended.
    #[must_use]
    pub fn new(live: bool, hvm: bool, verify: Verify, policy: Policy) -> Machine {
        Machine { state: State::Idle, live, hvm, verify, precopy: Precopy::new(policy) }
    }

    /// What to do after `event`.
    ///
    /// # Errors
    /// [`Error::Machine`] for an event that answers no action; nothing changes.
    pub fn step(&mut self, event: Event) -> Result<Action> {
        let (state, action) = self.transition(event)?;
        self.state = state;
        Ok(action)
    }

    /// The pause that would be expected if the guest were suspended after the latest live pass.
    #[must_use]
    pub fn expected_pause(&self) -> Option<Duration> {
        self.precopy.expected()
    }

    fn transition(&mut self, event: Event) -> Result<(State, Action)> {
        let next = match (self.state, event) {
            (State::Cleanup { .. } | State::Over, Event::Failed) | (_, Event::Begin)
                if self.state != State::Idle =>
            {
                return Err(self.misfit(event));
            }
            (State::Idle, Event::Begin) if self.live && self.hvm => {
                (State::QemuLogDirty, Action::QemuLogDirtyOn)
            }
            (State::Idle, Event::Begin) | (State::QemuLogDirty, Event::Done) => {
                (State::Head, Action::WriteHead)
            }
            (State::Head, Event::Done) if self.live => (State::LogDirty, Action::LogDirtyOn),
            (State::Head, Event::Done) => {
                (State::Suspending { passes: 0 }, Action::Suspend { expected: None })
            }
            (State::LogDirty, Event::Done) => (
                State::LivePass { passes: 1 },
                Action::SendPass { pass: 0, set: PageSet::All, last: false },
            ),
            (State::LivePass { passes }, Event::Done) => {
                (State::Reading { passes }, Action::ReadDirty { last: false })
            }
            (State::Reading { passes }, Event::Dirty(seen)) => {
                match self.precopy.decide(passes, &seen) {
                    Decision::Continue => next_pass(passes),
                    Decision::Throttle(percent) => {
                        (State::Throttling { passes }, Action::Throttle { percent })
                    }
                    Decision::Stop(expected) => {
                        (State::Suspending { passes }, Action::Suspend { expected })
                    }
                    Decision::Cancel(pause) => (State::GivingUp, Action::GiveUp { pause }),
                }
            }
            (State::Throttling { passes }, Event::Done) => next_pass(passes),
            (State::Suspending { passes }, Event::Done) if self.live => {
                (State::ReadingLast { passes }, Action::ReadDirty { last: true })
            }
            (State::Suspending { passes }, Event::Done) => (
                State::LastPass { passes },
                Action::SendPass { pass: passes, set: PageSet::All, last: true },
            ),
            (State::ReadingLast { passes }, Event::Dirty(_)) => (
                State::LastPass { passes },
                Action::SendPass { pass: passes, set: PageSet::Pending, last: true },
            ),
            (State::LastPass { passes }, Event::Done) if self.verify == Verify::Again => {
                (State::Verify { passes }, Action::WriteVerify)
            }
            (State::LastPass { passes }, Event::Done) if self.verify == Verify::Digests => {
                (State::VerifyPass, Action::SendDigests { pass: passes + 1 })
            }
            (State::Verify { passes }, Event::Done) => (
                State::VerifyPass,
                Action::SendPass { pass: passes + 1, set: PageSet::All, last: true },
            ),
            (State::LastPass { .. } | State::VerifyPass, Event::Done) => {
                (State::Tail, Action::WriteTail)
            }
            (State::Tail, Event::Done) => (State::Cleanup { complete: true }, Action::Cleanup),
            (State::Cleanup { complete }, Event::Done) => {
                (State::Over, Action::Finish { complete })
            }
            (_, Event::Failed) => (State::Cleanup { complete: false }, Action::Cleanup),
            _ => return Err(self.misfit(event)),
        };
        Ok(next)
    }

    fn misfit(&self, event: Event) -> Error {
        Error::Machine { state: self.state.name(), event: event.name() }
    }
}

/// One more pass over what is dirty, after `passes`.
fn next_pass(passes: u32) -> (State, Action) {
    let action = Action::SendPass { pass: passes, set: PageSet::Pending, last: false };
    (State::LivePass { passes: passes + 1 }, action)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::PAGE_SIZE;
    use crate::source::precopy::{AtLimit, Limits};

    const SUSPEND: Action = Action::Suspend { expected: None };

    fn machine(live: bool, hvm: bool) -> Machine {
        Machine::new(live, hvm, Verify::No, Policy::Stock)
    }

    /// `pages` are left.
    fn left(pages: u64) -> Event {
        Event::Dirty(Seen { left: pages * PAGE_SIZE as u64, ..Seen::default() })
    }

    /// Runs a save whose dirty counts are `dirty`, failing at step `fail`; the actions taken.
    fn run(mut machine: Machine, dirty: &[u64], fail: Option<usize>) -> Vec<Action> {
        let mut dirty = dirty.iter().copied();
        let mut event = Event::Begin;
        let mut actions = Vec::new();
        loop {
            let action = machine.step(event).unwrap();
            actions.push(action);
            event = match action {
                Action::Finish { .. } => return actions,
                Action::Cleanup => Event::Done,
                _ if fail == Some(actions.len() - 1) => Event::Failed,
                Action::ReadDirty { .. } => left(dirty.next().unwrap_or(0)),
                _ => Event::Done,
            };
        }
    }

    #[test]
    fn a_live_save_reads_dirty_bits_between_passes_and_stops_when_few_are_left() {
        let pass = |pass, set, last| Action::SendPass { pass, set, last };
        assert_eq!(
            run(machine(true, true), &[1000, 10, 30], None),
            [
                Action::QemuLogDirtyOn,
                Action::WriteHead,
                Action::LogDirtyOn,
                pass(0, PageSet::All, false),
                Action::ReadDirty { last: false },
                pass(1, PageSet::Pending, false),
                Action::ReadDirty { last: false },
                SUSPEND,
                Action::ReadDirty { last: true },
                pass(2, PageSet::Pending, true),
                Action::WriteTail,
                Action::Cleanup,
                Action::Finish { complete: true },
            ]
        );
    }

    #[test]
    fn a_save_of_a_stopped_guest_sends_all_once_without_log_dirty() {
        assert_eq!(
            run(machine(false, true), &[], None),
            [
                Action::WriteHead,
                SUSPEND,
                Action::SendPass { pass: 0, set: PageSet::All, last: true },
                Action::WriteTail,
                Action::Cleanup,
                Action::Finish { complete: true },
            ]
        );
    }

    #[test]
    fn a_guest_that_would_be_suspended_for_too_long_is_left_alone_if_the_user_wants_that() {
        let limits = Limits { passes: 1, at_limit: AtLimit::Cancel, ..Limits::default() };
        let mut machine = Machine::new(true, false, Verify::No, Policy::ByTime(limits));
        let seconds = |took| Duration::from_secs(took);
        let seen = Seen { left: 1 << 30, sent: 1 << 30, took: seconds(1), ..Seen::default() };
        for event in [Event::Begin, Event::Done, Event::Done, Event::Done] {
            machine.step(event).unwrap();
        }
        let pause = seconds(1) + limits.fixed;
        assert_eq!(machine.step(Event::Dirty(seen)).unwrap(), Action::GiveUp { pause });
        assert_eq!(machine.step(Event::Failed).unwrap(), Action::Cleanup);
        assert_eq!(machine.step(Event::Done).unwrap(), Action::Finish { complete: false });
    }

    #[test]
    fn verification_sends_everything_again_after_the_last_pass() {
        let actions = run(Machine::new(true, false, Verify::Again, Policy::Stock), &[], None);
        let verify = actions.iter().position(|a| *a == Action::WriteVerify).unwrap();
        assert!(matches!(actions[verify - 1], Action::SendPass { last: true, .. }));
        assert!(matches!(
            actions[verify + 1],
            Action::SendPass { set: PageSet::All, last: true, .. }
        ));
        assert_eq!(actions[verify + 2], Action::WriteTail);
    }

    #[test]
    fn digests_come_after_the_last_pass_and_before_the_state() {
        let actions = run(Machine::new(true, false, Verify::Digests, Policy::Stock), &[], None);
        let digests = actions.iter().position(|a| matches!(a, Action::SendDigests { .. })).unwrap();
        assert!(matches!(actions[digests - 1], Action::SendPass { last: true, .. }));
        assert_eq!(actions[digests + 1], Action::WriteTail);
    }

    #[test]
    fn an_event_that_answers_nothing_is_refused_and_changes_nothing() {
        let mut machine = machine(true, false);
        assert!(matches!(machine.step(left(3)), Err(Error::Machine { .. })));
        assert_eq!(machine.step(Event::Begin).unwrap(), Action::WriteHead);
        assert!(matches!(machine.step(Event::Begin), Err(Error::Machine { .. })));
    }

    proptest! {
        #[test]
        fn whatever_happens_it_ends_after_one_cleanup_and_says_whether_it_is_complete(
            live: bool, hvm: bool,
            verify in prop::sample::select(&[Verify::No, Verify::Again, Verify::Digests][..]),
            dirty in prop::collection::vec(0_u64..200, 0..8),
            fail in prop::option::of(0_usize..30),
        ) {
            let actions = run(Machine::new(live, hvm, verify, Policy::Stock), &dirty, fail);
            let cleanups = actions.iter().filter(|a| **a == Action::Cleanup).count();
            prop_assert_eq!(cleanups, 1);
            let complete = actions.last() == Some(&Action::Finish { complete: true });
            prop_assert_eq!(complete, actions.contains(&Action::WriteTail)
                && fail.is_none_or(|f| f >= actions.len() - 2));
            // The last pass happens only after the suspension, and after reading what is dirty.
            if let Some(last) = actions.iter().position(
                |a| matches!(a, Action::SendPass { last: true, .. })) {
                let before = &actions[..last];
                prop_assert!(before.contains(&SUSPEND));
                prop_assert_eq!(before.last() == Some(&Action::ReadDirty { last: true }), live);
            }
        }
    }
}
