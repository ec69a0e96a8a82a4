//! Does what the receiver's state machine says.
//!
//! The order of steps, and what may follow a failure, is [`super::handshake`]'s. Here is up to
//! when each may be cancelled, when the guard begins to watch and when it stands down, and what
//! making the domain consists of.
//!
//! What it is not: it does nothing to a domain, a descriptor or a screen but through
//! [`Arriving`].

use super::channel::{Heard, Said, Until};
use super::gate::Gate;
use super::handshake::{Message, Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent};
use crate::Result;

/// The status that says "failed" where libxl gave no code of its own (`ERROR_FAIL`).
pub const FAILED: u8 = 3;

/// What came of a request: a failure is libxl's code without its sign, never 0.
pub type Done = std::result::Result<(), u8>;

/// What the receiver has to do it with: the channel, this host, the guard. Requests block; the
/// user hears of failures from the implementor.
pub trait Arriving {
    /// Why no domain could be made.
    type Error;

    /// Up to when it can be cancelled.
    fn gate(&self) -> &Gate;
    /// Leave the domain paused.
    fn stays_paused(&self) -> bool;
    /// Waits for a message; can be cancelled.
    fn hear(&mut self, message: Message) -> Heard;
    /// Writes a message, with the status that belongs to a report.
    fn say(&mut self, message: Message, status: Option<u8>, until: Until) -> Said;
    /// Reads the header; can be cancelled. From here on the domain's name is known.
    ///
    /// # Errors
    /// It is no header, or has no usable configuration.
    fn read_header(&mut self) -> std::result::Result<(), Self::Error>;
    /// From now on, until this process and its guard have ended, nobody else receives a domain of
    /// that name here or puts right what is left of one.
    ///
    /// # Errors
    /// Somebody does: a guard may take its time, and would take this copy for its own.
    fn claim_name(&mut self) -> std::result::Result<(), Self::Error>;
    /// Makes sure that no domain has the name of [`super::incoming_name`].
    ///
    /// # Errors
    /// There is one: another migration, or its remains.
    fn check_name(&mut self) -> std::result::Result<(), Self::Error>;
    /// Makes room.
    ///
    /// # Errors
    /// There is not enough.
    fn reserve_memory(&mut self) -> std::result::Result<(), Self::Error>;
    /// From now on, should this process die, a guard destroys the domain of that name.
    fn start_guard(&mut self);
    /// Makes the domain, paused, from the stream. On an error nothing is left of it.
    ///
    /// # Errors
    /// libxl's.
    fn restore(&mut self) -> std::result::Result<(), Self::Error>;
    /// From now on somebody acts when the domain reboots or ends.
    fn start_monitor(&mut self);
    /// The domain could not be made, and nobody cancelled; the code of the failure.
    fn not_created(&mut self, error: Self::Error) -> u8;
    /// The guard may no longer do anything.
    fn stand_down(&mut self);
    /// The guard has to act, unless it has been told to stand down.
    fn abandon(&mut self);
    /// Gives the copy the domain's own name.
    ///
    /// # Errors
    /// libxl's code.
    fn rename(&mut self) -> Done;
    /// Lets the copy run.
    ///
    /// # Errors
    /// libxl's code.
    fn unpause(&mut self) -> Done;
    /// Destroys the copy.
    ///
    /// # Errors
    /// libxl's code.
    fn destroy(&mut self) -> Done;
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
    match make(side) {
        Ok(()) => ReceiverEvent::Done,
        Err(_) if side.gate().is_cancelled() => ReceiverEvent::Cancelled,
        Err(error) => ReceiverEvent::Failed(side.not_created(error)),
    }
}

/// Header, room, stream: a paused copy.
fn make<A: Arriving>(side: &mut A) -> std::result::Result<(), A::Error> {
    side.read_header()?;
    side.claim_name()?;
    // Before the guard, which would destroy what has that name.
    side.check_name()?;
    side.reserve_memory()?;
    side.start_guard();
    side.restore()?;
    side.start_monitor();
    Ok(())
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
