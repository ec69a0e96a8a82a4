//! Does what the sender's state machine says: the one place that decides about the domain on its
//! way.
//!
//! The order of steps, and what may follow a failure, is [`super::handshake`]'s. Here is up to
//! when each may be cancelled, and that the guard stands down *before* Go is tried: whoever finds
//! this process dead must not let the domain run on from then on.
//!
//! What it is not: it does nothing to a domain, a descriptor or a screen but through
//! [`Departing`].

use super::channel::{Heard, Said, Until};
use super::gate::Gate;
use super::handshake::{Message, Sender, SenderAction, SenderEnd, SenderEvent};
use crate::Result;
use crate::report::Event;

/// What the sender has to do it with: one domain on its way, the channel, the guard. Requests
/// block; why one failed is the implementor's to keep for the user.
pub trait Departing {
    /// Up to when it can be cancelled.
    fn gate(&self) -> &Gate;
    /// Waits for a message.
    fn hear(&mut self, message: Message, until: Until) -> Heard;
    /// Writes the header; can be cancelled.
    fn write_header(&mut self) -> Said;
    /// Writes the domain's stream, after which it is suspended. `false`: it failed, and how the
    /// domain is has to be asked.
    fn save(&mut self) -> bool;
    /// Switches log-dirty off: a save helper that was killed has left it on.
    fn log_dirty_off(&mut self);
    /// Whether the domain is suspended; `None` where nobody can say.
    fn is_suspended(&mut self) -> Option<bool>;
    /// Gives the domain the name of [`super::away_name`].
    fn rename_away(&mut self) -> bool;
    /// The guard may no longer do anything.
    fn stand_down(&mut self);
    /// The guard has to act, unless it has been told to stand down.
    fn abandon(&mut self);
    /// Writes Go; cannot be cancelled. `false`: it may have been written nevertheless.
    fn write_go(&mut self) -> bool;
    /// Destroys the domain.
    fn destroy(&mut self) -> bool;
    /// Gives the domain its own name.
    fn rename_back(&mut self) -> bool;
    /// Lets the domain run on.
    fn resume(&mut self) -> bool;
}

/// From the banner to the end.
///
/// # Errors
/// Only a bug: an event that the machine does not take. The domain then is as it is, and the
/// guard's unless Go has been tried.
pub fn run<D: Departing>(side: &mut D) -> Result<SenderEnd> {
    let mut machine = Sender::new();
    let mut action = machine.step(SenderEvent::Begin)?;
    loop {
        let heard;
        let event = match action {
            SenderAction::Finish(end) => return Ok(end),
            SenderAction::Receive(message) => {
                heard = side.hear(message, until(message));
                match &heard {
                    Heard::Bytes(bytes) => SenderEvent::Received(bytes),
                    Heard::Lost(_) => SenderEvent::Lost,
                    Heard::Cancelled => SenderEvent::Cancelled,
                }
            }
            SenderAction::SendDomain => send_domain(side),
            SenderAction::AskWhetherSuspended => match side.is_suspended() {
                Some(suspended) => SenderEvent::Suspended(suspended),
                None => SenderEvent::Failed,
            },
            SenderAction::RenameAway if side.gate().is_cancelled() => SenderEvent::Cancelled,
            SenderAction::RenameAway => done(side.rename_away()),
            SenderAction::SendGo => send_go(side),
            SenderAction::Destroy => done(side.destroy()),
            SenderAction::RenameBack => done(side.rename_back()),
            SenderAction::Resume => done(side.resume()),
        };
        action = machine.step(event).inspect_err(|_| side.abandon())?;
    }
}

/// Whether the guest, which was left running or could not be resumed, may still follow a request
/// to suspend that nobody waits for any more: then the guard has to stay and let it run on.
/// `events` are the save helper's.
pub fn may_suspend_yet<'a>(end: SenderEnd, events: impl IntoIterator<Item = &'a Event>) -> bool {
    let pending = events.into_iter().fold(false, |pending, event| match event {
        Event::SuspendAsked => true,
        Event::Suspended => false,
        _ => pending,
    });
    pending && matches!(end, SenderEnd::Kept(_) | SenderEnd::NotResumed(_))
}

/// After Go nothing is cancelled.
fn until(message: Message) -> Until {
    match message {
        Message::Report | Message::Destroyed => Until::TheEnd,
        Message::Banner | Message::Ready | Message::Go => Until::Cancelled,
    }
}

fn send_domain<D: Departing>(side: &mut D) -> SenderEvent<'static> {
    match side.write_header() {
        Said::Done => {}
        Said::Cancelled => return SenderEvent::Cancelled,
        Said::Failed(_) => return SenderEvent::Failed,
    }
    if side.gate().is_cancelled() {
        return SenderEvent::Cancelled;
    }
    if side.save() {
        return SenderEvent::Done;
    }
    side.log_dirty_off();
    if side.gate().is_cancelled() { SenderEvent::Cancelled } else { SenderEvent::Failed }
}

fn send_go<D: Departing>(side: &mut D) -> SenderEvent<'static> {
    if !side.gate().commit() {
        return SenderEvent::Cancelled;
    }
    // Before the try.
    side.stand_down();
    done(side.write_go())
}

fn done(ok: bool) -> SenderEvent<'static> {
    if ok { SenderEvent::Done } else { SenderEvent::Failed }
}

#[cfg(test)]
mod tests {
    use super::super::handshake::SenderCause;
    use super::*;

    #[test]
    fn a_guest_may_suspend_late_if_it_was_asked_and_has_not_and_is_still_here() {
        let kept = SenderEnd::Kept(SenderCause::Cancelled);
        let asked = [Event::Dirty { pages: 3 }, Event::SuspendAsked];
        assert!(may_suspend_yet(kept, &asked));
        // What could not be resumed may have been running.
        assert!(may_suspend_yet(SenderEnd::NotResumed(SenderCause::NotSent), &asked));
        assert!(!may_suspend_yet(SenderEnd::Moved, &asked));
        assert!(!may_suspend_yet(kept, &asked[..1]));
        assert!(!may_suspend_yet(kept, &[Event::SuspendAsked, Event::Suspended]));
    }
}
