//! What a guard does: it puts things right if the process that it belongs to is killed.
//!
//! Who sends or receives a domain holds it in a state that only it can end: suspended here, half
//! built there. Should that process die without a word (SIGKILL, out of memory), its guard sees
//! the end of the pipe between them:
//!
//! - at the source, or where the guest is saved, it waits until the guest has suspended, if it was
//!   asked to, and resumes it under its own name, without log-dirty, at its own speed ([`keep`]).
//!   Whether it was asked is known to the save helper, which has the guard told before libxl asks;
//! - at the target it destroys the copy that has the name of [`super::incoming_name`] ([`clear`]).
//!
//! The first it also does for an owner that has ended and left the guest running, where the guest
//! may still follow a request to suspend
//! ([`may_suspend_yet`](super::leaving::may_suspend_yet)).
//!
//! It does neither once it has been told to stand down, which its owner does *before* it tries to
//! write Go or to give a file its name, and when it has received Go: from then on the other copy
//! may run. Should its owner die after that, only the user can find out where the guest is: the
//! guard says so ([`Duty::Tell`]).
//!
//! A guard that acts must not meet another migration of the same domain: it would let a guest run
//! on that the other has suspended, or destroy the other's copy. So a guard holds what its owner
//! holds, a lock for the domain, and the next owner begins when that is free.
//!
//! What it is not: a process, or the lock. It reads no clock.

use std::io::{self, Read};

/// On the pipe from the owner: from now on the other copy may run.
pub const STAND_DOWN: &[u8] = b"x";
/// The same: it is over, and whatever there was to say has been said.
pub const OVER: &[u8] = b".";

/// What a guard has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Put things right.
    Act,
    /// Tell the user, who alone can find out where the guest may run.
    Tell,
    /// Nothing.
    Nothing,
}

/// What a guard asks of its host.
pub trait Keeper {
    /// The host's refusal.
    type Error;

    /// Whether the domain is suspended.
    ///
    /// # Errors
    /// Nobody can say.
    fn is_suspended(&mut self) -> Result<bool, Self::Error>;
    /// Waits until asking again makes sense; `false`: a guest that was asked to suspend would
    /// have followed by now.
    fn wait(&mut self) -> bool;
    /// Switches log-dirty off: a save helper that was killed has left it on.
    fn log_dirty_off(&mut self);
    /// Gives the domain the processor time back that it had, if it was to be slowed.
    fn speed_up(&mut self);
    /// Gives the domain its own name back, if it has that of [`super::away_name`].
    ///
    /// # Errors
    /// The host's.
    fn restore_name(&mut self) -> Result<(), Self::Error>;
    /// Lets the domain run on.
    ///
    /// # Errors
    /// The host's.
    fn resume(&mut self) -> Result<(), Self::Error>;
}

/// Waits for the last word or the end of `owner`.
pub fn duty(owner: &mut impl Read) -> Duty {
    let mut left = Duty::Act;
    let mut word = [0];
    loop {
        match owner.read(&mut word) {
            Ok(0) => return left,
            Ok(_) if word == *OVER => return Duty::Nothing,
            Ok(_) => left = Duty::Tell,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return left,
        }
    }
}

/// Puts the source right: the guest runs on under its own name, or under another if that cannot
/// be had. A host that cannot say how the guest is will be asked again. `asked`: whether the guest
/// may have been asked to suspend; one that was not will not be waited for.
///
/// # Errors
/// The host's last: the guest may be suspended still, or have the wrong name.
pub fn keep<K: Keeper>(host: &mut K, asked: bool) -> Result<(), K::Error> {
    let suspended = loop {
        let suspended = host.is_suspended();
        let is_known = suspended.as_ref().is_ok_and(|suspended| *suspended || !asked);
        if is_known || !host.wait() {
            break suspended;
        }
    };
    host.log_dirty_off();
    host.speed_up();
    if !suspended? {
        return Ok(());
    }
    let named = host.restore_name();
    host.resume().and(named)
}

/// Puts the target right: no half-built copy is left. `find` looks for the copy by its name.
///
/// # Errors
/// The host's; the copy is still there then.
pub fn clear<C, E>(
    find: impl FnOnce() -> Option<C>,
    destroy: impl FnOnce(C) -> Result<(), E>,
) -> Result<(), E> {
    find().map_or(Ok(()), destroy)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that answers as it is told; `true` is success.
    #[derive(Default)]
    struct Host {
        suspended: Vec<Result<bool, &'static str>>,
        name_fails: bool,
        done: Vec<&'static str>,
    }

    impl Keeper for Host {
        type Error = &'static str;

        fn is_suspended(&mut self) -> Result<bool, &'static str> {
            self.suspended.pop().unwrap_or(Ok(false))
        }

        fn wait(&mut self) -> bool {
            !self.suspended.is_empty()
        }

        fn log_dirty_off(&mut self) {
            self.done.push("log-dirty off");
        }

        fn speed_up(&mut self) {
            self.done.push("speed up");
        }

        fn restore_name(&mut self) -> Result<(), &'static str> {
            if self.name_fails { Err("the name is taken") } else { Ok(()) }
        }

        fn resume(&mut self) -> Result<(), &'static str> {
            self.done.push("resume");
            Ok(())
        }
    }

    #[test]
    fn a_guest_is_resumed_once_it_is_suspended_even_if_the_host_refuses_its_name() {
        let suspended = vec![Ok(true), Err("nobody knows"), Ok(false)];
        let mut host = Host { suspended, name_fails: true, done: Vec::new() };
        assert_eq!(keep(&mut host, true), Err("the name is taken"));
        assert_eq!(host.done, ["log-dirty off", "speed up", "resume"]);
    }

    #[test]
    fn a_guest_that_never_suspends_runs_on_without_log_dirty() {
        let mut host = Host { suspended: vec![Ok(false); 3], ..Host::default() };
        assert_eq!(keep(&mut host, true), Ok(()));
        assert_eq!(host.done, ["log-dirty off", "speed up"]);
        let mut host = Host { suspended: vec![Err("nobody knows"); 2], ..Host::default() };
        assert_eq!(keep(&mut host, true), Err("nobody knows"));
        assert_eq!(host.done, ["log-dirty off", "speed up"]);
    }

    #[test]
    fn a_guest_that_nobody_asked_to_suspend_is_not_waited_for() {
        let suspended = vec![Ok(true), Ok(false), Err("nobody knows")];
        let mut host = Host { suspended, ..Host::default() };
        assert_eq!(keep(&mut host, false), Ok(()));
        assert_eq!(host.done, ["log-dirty off", "speed up"]);
        assert_eq!(host.suspended, [Ok(true)]);
    }

    #[test]
    fn a_guard_acts_if_its_owner_goes_without_a_word_and_tells_if_it_goes_in_between() {
        let after = |words: &[&[u8]]| duty(&mut words.concat().as_slice());
        assert_eq!(after(&[]), Duty::Act);
        assert_eq!(after(&[STAND_DOWN]), Duty::Tell);
        assert_eq!(after(&[STAND_DOWN, OVER]), Duty::Nothing);
        assert_eq!(after(&[OVER]), Duty::Nothing);
    }
}
