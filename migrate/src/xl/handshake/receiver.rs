//! The receiving end of the conversation. Its rules are in the parent's documentation.
//!
//! ```text
//!  New ─► Greeting ─► Creating ─► Announcing ─► AwaitGo ─► Renaming ─► Unpausing ─► Reporting
//!            │           │             │           │           │           │            │
//!            ▼           ▼             ▼           ▼           ▼           ▼            ▼
//!             Nothing               Destroying ◄──┘       ReportingFailure           Running
//!                ▲                     │   ▲                    │
//!                └─────────────────────┤   └────────────────────┘
//!                                      ├─► Acknowledging ─► GivenBack
//!         (cancelled in AwaitGo)       └─► Withdrawing ─► AcknowledgingWithdrawal ─► Nothing
//! ```

use super::Message;
use crate::Error;

/// What the driver has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverAction {
    /// Write this message.
    Send(Message),
    /// Read the header and make a paused copy from the stream; on failure nothing is left of it.
    Create,
    /// Read exactly the bytes of this message.
    Receive(Message),
    /// Give the copy the domain's own name. Cancelling is too late once this has begun.
    Rename,
    /// Let it run.
    Unpause,
    /// Write [`Message::Report`] and this status.
    SendReport(u8),
    /// Destroy the copy.
    Destroy,
    /// Nothing: it is over.
    Finish(ReceiverEnd),
}

/// What came of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverEvent<'a> {
    /// The channel is there.
    Begin,
    /// All bytes of the message that was waited for.
    Received(&'a [u8]),
    /// The channel ended or broke before.
    Lost,
    /// Done.
    Done,
    /// Tried, and failed with this code (never 0; libxl's, without its sign).
    Failed(u8),
    /// Not tried: somebody asked for the end before.
    Cancelled,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverEnd {
    /// The copy is this domain now (paused, if that was asked for), and the sender knows.
    Running,
    /// The copy is this domain now; the sender could not be told and stays suspended.
    RunningUnreported,
    /// There is no copy here, and Go was never received.
    Nothing(ReceiverCause),
    /// The copy could not be started and is gone; `told`: the sender knows and may resume.
    GivenBack {
        /// Whether the sender has been told.
        told: bool,
    },
    /// A copy that must not run is still here, paused: it could not be destroyed.
    Remains,
}

/// Why there is no copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiverCause {
    /// The banner could not be written.
    #[error("the sender is not there")]
    NoSender,
    /// The signal's.
    #[error("cancelled")]
    Cancelled,
    /// Header, memory or stream.
    #[error("the domain could not be made")]
    NotCreated,
    /// Ready could not be written.
    #[error("the sender could not be told that the domain is ready")]
    NotAnnounced,
    /// No permission came.
    #[error("the sender gave no permission to start")]
    NoGo,
    /// Something else came.
    #[error("the sender's permission to start makes no sense")]
    WrongGo,
}

/// The status of a copy that was withdrawn before it could be started (libxl's `ERROR_ABORTED`).
const WITHDRAWN: u8 = 22;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Greeting,
    Creating,
    Announcing,
    AwaitGo,
    Renaming,
    Unpausing,
    Reporting,
    ReportingFailure,
    Destroying(After),
    Acknowledging,
    Withdrawing,
    AcknowledgingWithdrawal,
    Over,
}

/// What follows the destruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// Go never came: nobody to tell.
    NoGo(ReceiverCause),
    /// Somebody cancelled, and Go may be on its way.
    Withdrawn,
    /// The sender has the report of failure, and waits.
    Reported,
    /// The report of failure could not be sent.
    Unreported,
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver {
    state: State,
    stay_paused: bool,
}

impl Receiver {
    /// Before [`ReceiverEvent::Begin`]. `stay_paused`: the copy is not unpaused.
    #[must_use]
    pub fn new(stay_paused: bool) -> Receiver {
        Receiver { state: State::New, stay_paused }
    }

    /// Takes what came of the last action and says what to do next.
    ///
    /// # Errors
    /// [`Error::Machine`] for an event that cannot follow that action; the machine stays where
    /// it was.
    pub fn step(&mut self, event: ReceiverEvent<'_>) -> Result<ReceiverAction, Error> {
        let (state, action) = self
            .next(event)
            .ok_or_else(|| Error::Machine { state: self.state.name(), event: event_name(event) })?;
        self.state = state;
        Ok(action)
    }

    fn next(&self, event: ReceiverEvent<'_>) -> Option<(State, ReceiverAction)> {
        use ReceiverAction as Act;
        use ReceiverCause as Cause;
        use ReceiverEnd as End;
        use ReceiverEvent as Ev;
        Some(match (self.state, event) {
            (State::New, Ev::Begin) => (State::Greeting, Act::Send(Message::Banner)),

            (State::Greeting, Ev::Done) => (State::Creating, Act::Create),
            (State::Greeting, Ev::Failed(_)) => over(End::Nothing(Cause::NoSender)),
            (State::Greeting, Ev::Cancelled) => over(End::Nothing(Cause::Cancelled)),

            (State::Creating, Ev::Done) => (State::Announcing, Act::Send(Message::Ready)),
            (State::Creating, Ev::Failed(_)) => over(End::Nothing(Cause::NotCreated)),
            (State::Creating, Ev::Cancelled) => over(End::Nothing(Cause::Cancelled)),

            (State::Announcing, Ev::Done) => (State::AwaitGo, Act::Receive(Message::Go)),
            (State::Announcing, Ev::Failed(_)) => destroy(After::NoGo(Cause::NotAnnounced)),
            (State::Announcing, Ev::Cancelled) => destroy(After::NoGo(Cause::Cancelled)),

            (State::AwaitGo, Ev::Received(bytes)) if bytes == Message::Go.text() => {
                (State::Renaming, Act::Rename)
            }
            (State::AwaitGo, Ev::Received(_)) => destroy(After::NoGo(Cause::WrongGo)),
            (State::AwaitGo, Ev::Lost) => destroy(After::NoGo(Cause::NoGo)),
            // Go may be on its way: the sender is told, so that it need not stay suspended.
            (State::AwaitGo, Ev::Cancelled) => destroy(After::Withdrawn),

            (State::Renaming, Ev::Done) if !self.stay_paused => (State::Unpausing, Act::Unpause),
            (State::Renaming | State::Unpausing, Ev::Done) => {
                (State::Reporting, Act::SendReport(0))
            }
            (State::Renaming | State::Unpausing, Ev::Failed(code)) => {
                (State::ReportingFailure, Act::SendReport(code.max(1)))
            }
            (State::Renaming, Ev::Cancelled) => (State::ReportingFailure, Act::SendReport(1)),

            (State::Reporting, Ev::Done) => over(End::Running),
            (State::Reporting, Ev::Failed(_)) => over(End::RunningUnreported),

            (State::ReportingFailure, Ev::Done) => destroy(After::Reported),
            (State::ReportingFailure, Ev::Failed(_)) => destroy(After::Unreported),

            (State::Destroying(After::NoGo(cause)), Ev::Done) => over(End::Nothing(cause)),
            (State::Destroying(After::Withdrawn), Ev::Done) => {
                (State::Withdrawing, Act::SendReport(WITHDRAWN))
            }
            (State::Withdrawing, Ev::Done) => {
                (State::AcknowledgingWithdrawal, Act::Send(Message::Destroyed))
            }
            (State::Withdrawing, Ev::Failed(_))
            | (State::AcknowledgingWithdrawal, Ev::Done | Ev::Failed(_)) => {
                over(End::Nothing(Cause::Cancelled))
            }
            (State::Destroying(After::Unreported), Ev::Done) => {
                over(End::GivenBack { told: false })
            }
            (State::Destroying(After::Reported), Ev::Done) => {
                (State::Acknowledging, Act::Send(Message::Destroyed))
            }
            (State::Destroying(_), Ev::Failed(_)) => over(End::Remains),
            (State::Acknowledging, Ev::Done) => over(End::GivenBack { told: true }),
            (State::Acknowledging, Ev::Failed(_)) => over(End::GivenBack { told: false }),
            _ => return None,
        })
    }
}

fn over(end: ReceiverEnd) -> (State, ReceiverAction) {
    (State::Over, ReceiverAction::Finish(end))
}

fn destroy(after: After) -> (State, ReceiverAction) {
    (State::Destroying(after), ReceiverAction::Destroy)
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::New => "a receiver that has not begun",
            State::Greeting => "a receiver sending its banner",
            State::Creating => "a receiver making the domain",
            State::Announcing => "a receiver announcing that it is ready",
            State::AwaitGo => "a receiver waiting for permission",
            State::Renaming => "a receiver renaming the domain",
            State::Unpausing => "a receiver unpausing the domain",
            State::Reporting => "a receiver reporting success",
            State::ReportingFailure => "a receiver reporting failure",
            State::Destroying(_) => "a receiver destroying its copy",
            State::Acknowledging | State::AcknowledgingWithdrawal => {
                "a receiver giving the domain back"
            }
            State::Withdrawing => "a receiver reporting that it was cancelled",
            State::Over => "a receiver that is done",
        }
    }
}

fn event_name(event: ReceiverEvent<'_>) -> &'static str {
    match event {
        ReceiverEvent::Begin => "begin",
        ReceiverEvent::Received(_) => "bytes",
        ReceiverEvent::Lost => "end of the channel",
        ReceiverEvent::Done => "success",
        ReceiverEvent::Failed(_) => "failure",
        ReceiverEvent::Cancelled => "cancellation",
    }
}
