//! What a domain on its way has in common wherever it goes, to another host
//! ([`departure`](super::departure)) or to a file ([`saving`](super::saving)): header and stream
//! are written, and if that fails the domain runs on where it is.
//!
//! What it is not: it does nothing to a domain, a descriptor or a screen but through [`Leaving`].

use super::channel::Said;
use super::gate::Gate;
use crate::report::Event;

/// What there is to do it with: one domain, somewhere to write, the guard. Requests block; why one
/// failed is the implementor's to keep for the user.
pub trait Leaving {
    /// Up to when it can be cancelled.
    fn gate(&self) -> &Gate;
    /// Writes the header; can be cancelled.
    fn write_header(&mut self) -> Said;
    /// Writes the domain's stream, after which it is suspended. `false`: it failed, and how the
    /// domain is has to be asked.
    fn save(&mut self) -> bool;
    /// Switches log-dirty off: a save helper that was killed has left it on.
    fn log_dirty_off(&mut self);
    /// Gives the domain the processor time back that it had: a save helper that was killed while it
    /// slowed it has not.
    fn speed_up(&mut self);
    /// Whether the domain is suspended; `None` where nobody can say.
    fn is_suspended(&mut self) -> Option<bool>;
    /// The guard may no longer do anything.
    fn stand_down(&mut self);
    /// Destroys the domain.
    fn destroy(&mut self) -> bool;
    /// Lets the domain run on.
    fn resume(&mut self) -> bool;
}

/// What became of header and stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// Both are written; the domain is suspended.
    Done,
    /// How the domain is has to be asked.
    Failed,
    /// The same, because somebody cancelled.
    Cancelled,
}

/// Header, then stream.
pub(super) fn write<L: Leaving>(side: &mut L) -> Written {
    match side.write_header() {
        Said::Done => {}
        Said::Cancelled => return Written::Cancelled,
        Said::Failed(_) => return Written::Failed,
    }
    if side.gate().is_cancelled() {
        return Written::Cancelled;
    }
    let saved = side.save();
    side.speed_up();
    if saved {
        return Written::Done;
    }
    side.log_dirty_off();
    if side.gate().is_cancelled() { Written::Cancelled } else { Written::Failed }
}

/// Whether a guest that was left running, or could not be resumed, may still follow a request to
/// suspend that nobody waits for any more: then the guard has to stay and let it run on. `events`
/// are the save helper's.
pub fn may_suspend_yet<'a>(events: impl IntoIterator<Item = &'a Event>) -> bool {
    events.into_iter().fold(false, |pending, event| match event {
        Event::SuspendAsked => true,
        Event::Suspended => false,
        _ => pending,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_suspend_late_if_it_was_asked_and_has_not() {
        let asked = [Event::Dirty { pages: 3 }, Event::SuspendAsked];
        assert!(may_suspend_yet(&asked));
        assert!(!may_suspend_yet(&asked[..1]));
        assert!(!may_suspend_yet(&[Event::SuspendAsked, Event::Suspended]));
    }
}
