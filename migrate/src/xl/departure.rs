//! Does what the sender's state machine says: the one place that decides about the domain on its
//! way.
//!
//! The order of steps, and what may follow a failure, is [`super::handshake`]'s. Here is up to
//! when each may be cancelled, and that the guard stands down *before* Go is tried: whoever finds
//! this process dead must not let the domain run on from then on.
//!
//! What it is not: it does nothing to a domain, a descriptor or a screen but through
//! [`Leaving`] and [`Departing`].

use super::channel::{Heard, Until};
use super::handshake::{Message, Sender, SenderAction, SenderEnd, SenderEvent};
use super::leaving::{self, Leaving, Written};
use crate::Result;
use crate::report::Event;

/// What the sender has to do it with beside [`Leaving`]: the channel to the receiver.
pub trait Departing: Leaving {
    /// Waits for a message.
    fn hear(&mut self, message: Message, until: Until) -> Heard;
    /// Gives the domain the name of [`super::away_name`].
    fn rename_away(&mut self) -> bool;
    /// The guard has to act, unless it has been told to stand down.
    fn abandon(&mut self);
    /// Writes Go; cannot be cancelled. `false`: it may have been written nevertheless.
    fn write_go(&mut self) -> bool;
    /// Gives the domain its own name.
    fn rename_back(&mut self) -> bool;
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
            SenderAction::SendDomain => match leaving::write(side) {
                Written::Done => SenderEvent::Done,
                Written::Failed => SenderEvent::Failed,
                Written::Cancelled => SenderEvent::Cancelled,
            },
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

/// Whether the guest is here and may still follow a request to suspend
/// ([`leaving::may_suspend_yet`]).
pub fn may_suspend_yet<'a>(end: SenderEnd, events: impl IntoIterator<Item = &'a Event>) -> bool {
    matches!(end, SenderEnd::Kept(_) | SenderEnd::NotResumed(_)) && leaving::may_suspend_yet(events)
}

/// After Go nothing is cancelled.
fn until(message: Message) -> Until {
    match message {
        Message::Report | Message::Destroyed => Until::TheEnd,
        Message::Banner | Message::Ready | Message::Go => Until::Cancelled,
    }
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
    fn a_guest_that_is_gone_or_may_run_elsewhere_is_not_waited_for() {
        let asked = [Event::SuspendAsked];
        assert!(may_suspend_yet(SenderEnd::Kept(SenderCause::Cancelled), &asked));
        // What could not be resumed may have been running.
        assert!(may_suspend_yet(SenderEnd::NotResumed(SenderCause::NotSent), &asked));
        assert!(!may_suspend_yet(SenderEnd::Moved, &asked));
    }
}
