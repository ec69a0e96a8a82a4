//! Does what the receiver's state machine says.
//!
//! The order of steps, and what may follow a failure, is [`super::handshake`]'s. Here is up to
//! when each may be cancelled and when the guard stands down; how the domain is made is
//! [`super::making`]'s.
//!
//! What it is not: it does nothing to a domain, a descriptor or a screen but through
//! [`Making`] and [`Arriving`].

use super::channel::{Heard, Said, Until};
use super::handshake::{Message, Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent};
use super::making::{self, Done, FAILED, Making};
use crate::Result;

/// What the receiver has to do it with beside [`Making`]: the channel to the sender.
pub trait Arriving: Making {
    /// Waits for a message; can be cancelled.
    fn hear(&mut self, message: Message) -> Heard;
    /// Writes a message, with the status that belongs to a report.
    fn say(&mut self, message: Message, status: Option<u8>, until: Until) -> Said;
    /// The domain could not be made, and nobody cancelled; the code of the failure.
    fn not_created(&mut self, error: Self::Error) -> u8;
    /// The guard has to act, unless it has been told to stand down.
    fn abandon(&mut self);
}

/// From the banner to the end.
///
/// # Errors
/// Only a bug: an event that the machine does not take.
pub fn run<A: Arriving>(side: &mut A) -> Result<ReceiverEnd> {
    let mut machine = Receiver::new(side.stays_paused());
    let mut action = machine.step(ReceiverEvent::Begin)?;
    loop {
        let heard;
        let event = match action {
            ReceiverAction::Finish(end) => return Ok(end),
            ReceiverAction::Receive(message) => {
                heard = side.hear(message);
                match &heard {
                    Heard::Bytes(bytes) => ReceiverEvent::Received(bytes),
                    Heard::Lost(_) => ReceiverEvent::Lost,
                    Heard::Cancelled => ReceiverEvent::Cancelled,
                }
            }
            ReceiverAction::Send(message) => said(&side.say(message, None, until(message))),
            ReceiverAction::SendReport(status) => {
                said(&side.say(Message::Report, Some(status), Until::TheEnd))
            }
            ReceiverAction::Create => create(side),
            ReceiverAction::Rename => rename(side),
            ReceiverAction::Unpause => done(side.unpause()),
            ReceiverAction::Destroy => done(side.destroy()),
        };
        action = machine.step(event).inspect_err(|_| side.abandon())?;
    }
}

/// What is said after Go is not cancelled.
fn until(message: Message) -> Until {
    match message {
        Message::Banner | Message::Ready => Until::Cancelled,
        Message::Go | Message::Report | Message::Destroyed => Until::TheEnd,
    }
}

fn create<A: Arriving>(side: &mut A) -> ReceiverEvent<'static> {
    match making::make(side) {
        Ok(()) => {
            side.start_monitor();
            ReceiverEvent::Done
        }
        Err(_) if side.gate().is_cancelled() => ReceiverEvent::Cancelled,
        Err(error) => ReceiverEvent::Failed(side.not_created(error)),
    }
}

fn rename<A: Arriving>(side: &mut A) -> ReceiverEvent<'static> {
    if !side.gate().commit() {
        return ReceiverEvent::Cancelled;
    }
    // Before anything is done to a copy that may run from now on.
    side.stand_down();
    done(side.rename())
}

fn said(said: &Said) -> ReceiverEvent<'static> {
    match said {
        Said::Done => ReceiverEvent::Done,
        Said::Cancelled => ReceiverEvent::Cancelled,
        Said::Failed(_) => ReceiverEvent::Failed(FAILED),
    }
}

fn done(done: Done) -> ReceiverEvent<'static> {
    match done {
        Ok(()) => ReceiverEvent::Done,
        Err(code) => ReceiverEvent::Failed(code),
    }
}
