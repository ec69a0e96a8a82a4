//! The sending end of the conversation. Its rules are in the parent's documentation.
//!
//! ```text
//! New ─► AwaitBanner ─► Sending ─► Renaming ─► AwaitReady ─► Granting ─► AwaitReport ─► Destroying
//!           │            │           │            │            │            │ │            │
//!           │         Asking ──┐     │            │   (not tried)           │ ▼            ▼
//!           ▼            │     ▼     ▼            ▼            │            │ AwaitDestroyed
//!         Kept ◄─────────┘   Resuming ◄──── RenamingBack ◄─────┘            │      │    Moved
//!           ▲                  │   │              ▲                         │      │
//!           └──────────────────┘   ▼              │                         ▼      ▼
//!                             NotResumed          │           Uncertain (stays suspended)
//!                                                 └── received Destroyed ──────────┘
//! ```

use super::{Message, report_status};
use crate::Error;

/// What the driver has to do next. Nothing else may be done to the domain meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderAction {
    /// Read exactly the bytes of this message.
    Receive(Message),
    /// Write the header and the stream; the domain is suspended afterwards.
    SendDomain,
    /// Find out whether the domain is suspended.
    AskWhetherSuspended,
    /// Give the domain the name that says that it is on its way.
    RenameAway,
    /// Write [`Message::Go`]. Whoever has begun to do so has tried.
    SendGo,
    /// Destroy the domain: it runs on the target.
    Destroy,
    /// Give it back its name.
    RenameBack,
    /// Let it run on.
    Resume,
    /// Nothing: it is over.
    Finish(SenderEnd),
}

/// What came of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderEvent<'a> {
    /// The transport has been started.
    Begin,
    /// All bytes of the message that was waited for.
    Received(&'a [u8]),
    /// The channel ended or broke before.
    Lost,
    /// Done.
    Done,
    /// Tried, and failed.
    Failed,
    /// Not tried: somebody asked for the end before.
    Cancelled,
    /// The answer to [`SenderAction::AskWhetherSuspended`].
    Suspended(bool),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderEnd {
    /// The domain runs on the target and is gone here.
    Moved,
    /// It runs on the target; the suspended copy here could not be destroyed.
    MovedWithRemains,
    /// It is here, resumed if it had been suspended.
    Kept(SenderCause),
    /// It is here alone, but suspended, and could not be resumed.
    NotResumed(SenderCause),
    /// Go may have reached the target. It is suspended here and may run there.
    Uncertain(SenderCause),
}

/// Why the domain did not move, or is not known to have moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SenderCause {
    /// The transport ended before the receiver spoke.
    #[error("the target did not answer")]
    NoBanner,
    /// Something else than a receiver spoke.
    #[error("what answered at the target is not a migration receiver")]
    WrongBanner,
    /// The user, or a signal.
    #[error("cancelled")]
    Cancelled,
    /// The stream could not be made or written.
    #[error("the domain could not be sent")]
    NotSent,
    /// The transport ended before the receiver had the domain.
    #[error("the target did not take the domain")]
    NoReady,
    /// The receiver said something else.
    #[error("the target did not say that it has the domain")]
    WrongReady,
    /// The local name could not be changed.
    #[error("the domain could not be renamed here")]
    NotRenamed,
    /// The receiver's report.
    #[error("the target could not start the domain (status code {0})")]
    TargetFailed(u8),
    /// Writing Go failed.
    #[error("the permission to start could not be sent")]
    GoNotSent,
    /// No report came.
    #[error("the target did not report whether it started the domain")]
    NoReport,
    /// Something else came.
    #[error("the target's report makes no sense")]
    WrongReport,
    /// After a report of failure the receiver did not say that its copy is gone.
    #[error(
        "the target could not start the domain (status code {0}) nor say that its copy is gone"
    )]
    NotDestroyed(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    AwaitBanner,
    Sending,
    Asking(SenderCause),
    Renaming,
    AwaitReady,
    Granting,
    /// Why nobody knows, if there is none.
    AwaitReport(SenderCause),
    AwaitDestroyed(u8),
    Destroying,
    RenamingBack(SenderCause),
    Resuming(SenderCause),
    Over,
}

/// The sending end.
#[derive(Debug)]
pub struct Sender {
    state: State,
}

impl Default for Sender {
    fn default() -> Self {
        Sender::new()
    }
}

impl Sender {
    /// Before [`SenderEvent::Begin`].
    #[must_use]
    pub fn new() -> Sender {
        Sender { state: State::New }
    }

    /// Takes what came of the last action and says what to do next.
    ///
    /// # Errors
    /// [`Error::Machine`] for an event that cannot follow that action; the machine stays where
    /// it was.
    pub fn step(&mut self, event: SenderEvent<'_>) -> Result<SenderAction, Error> {
        let (state, action) = self
            .next(event)
            .ok_or_else(|| Error::Machine { state: self.state.name(), event: event_name(event) })?;
        self.state = state;
        Ok(action)
    }

    fn next(&self, event: SenderEvent<'_>) -> Option<(State, SenderAction)> {
        use SenderAction as Act;
        use SenderCause as Cause;
        use SenderEnd as End;
        use SenderEvent as Ev;
        Some(match (self.state, event) {
            (State::New, Ev::Begin) => (State::AwaitBanner, Act::Receive(Message::Banner)),

            (State::AwaitBanner, Ev::Received(bytes)) if bytes == Message::Banner.text() => {
                (State::Sending, Act::SendDomain)
            }
            (State::AwaitBanner, Ev::Received(_)) => over(End::Kept(Cause::WrongBanner)),
            (State::AwaitBanner, Ev::Lost) => over(End::Kept(Cause::NoBanner)),
            (State::AwaitBanner, Ev::Cancelled) => over(End::Kept(Cause::Cancelled)),

            // While the target is busy with what it has got: the guest waits for both.
            (State::Sending, Ev::Done) => (State::Renaming, Act::RenameAway),
            (State::Sending, Ev::Failed) => ask_state(Cause::NotSent),
            (State::Sending, Ev::Cancelled) => ask_state(Cause::Cancelled),
            (State::Asking(cause), Ev::Suspended(false)) => over(End::Kept(cause)),
            // Where nobody knows, resuming is safe: Go was never tried.
            (State::Asking(cause), Ev::Suspended(true) | Ev::Failed) => resume(cause),

            (State::Renaming, Ev::Done) => (State::AwaitReady, Act::Receive(Message::Ready)),
            (State::Renaming, Ev::Failed) => resume(Cause::NotRenamed),
            (State::Renaming, Ev::Cancelled) => resume(Cause::Cancelled),

            (State::AwaitReady, Ev::Received(bytes)) if bytes == Message::Ready.text() => {
                (State::Granting, Act::SendGo)
            }
            (State::AwaitReady, Ev::Received(_)) => rename_back(Cause::WrongReady),
            (State::AwaitReady, Ev::Lost) => rename_back(Cause::NoReady),
            (State::AwaitReady, Ev::Cancelled) => rename_back(Cause::Cancelled),

            (State::Granting, Ev::Done) => await_report(Cause::NoReport),
            // A receiver that gave up may have said so before it went.
            (State::Granting, Ev::Failed) => await_report(Cause::GoNotSent),
            (State::Granting, Ev::Cancelled) => rename_back(Cause::Cancelled),

            (State::AwaitReport(_), Ev::Received(bytes)) => match report_status(bytes) {
                Some(0) => (State::Destroying, Act::Destroy),
                Some(status) => (State::AwaitDestroyed(status), Act::Receive(Message::Destroyed)),
                None => over(End::Uncertain(Cause::WrongReport)),
            },
            (State::AwaitReport(cause), Ev::Lost) => over(End::Uncertain(cause)),

            (State::AwaitDestroyed(status), Ev::Received(bytes))
                if bytes == Message::Destroyed.text() =>
            {
                rename_back(Cause::TargetFailed(status))
            }
            (State::AwaitDestroyed(status), Ev::Received(_) | Ev::Lost) => {
                over(End::Uncertain(Cause::NotDestroyed(status)))
            }

            (State::Destroying, Ev::Done) => over(End::Moved),
            (State::Destroying, Ev::Failed) => over(End::MovedWithRemains),

            // A domain with a wrong name that runs is better than one that does not run.
            (State::RenamingBack(cause), Ev::Done | Ev::Failed) => resume(cause),
            (State::Resuming(cause), Ev::Done) => over(End::Kept(cause)),
            (State::Resuming(cause), Ev::Failed) => over(End::NotResumed(cause)),
            _ => return None,
        })
    }
}

fn over(end: SenderEnd) -> (State, SenderAction) {
    (State::Over, SenderAction::Finish(end))
}

fn ask_state(cause: SenderCause) -> (State, SenderAction) {
    (State::Asking(cause), SenderAction::AskWhetherSuspended)
}

fn resume(cause: SenderCause) -> (State, SenderAction) {
    (State::Resuming(cause), SenderAction::Resume)
}

fn await_report(without: SenderCause) -> (State, SenderAction) {
    (State::AwaitReport(without), SenderAction::Receive(Message::Report))
}

fn rename_back(cause: SenderCause) -> (State, SenderAction) {
    (State::RenamingBack(cause), SenderAction::RenameBack)
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::New => "a sender that has not begun",
            State::AwaitBanner => "a sender waiting for the banner",
            State::Sending => "a sender sending the domain",
            State::Asking(_) => "a sender asking how its domain is",
            State::Renaming => "a sender renaming its domain",
            State::AwaitReady => "a sender waiting for the target",
            State::Granting => "a sender granting the start",
            State::AwaitReport(_) => "a sender waiting for the report",
            State::AwaitDestroyed(_) => "a sender waiting for the target's cleanup",
            State::Destroying => "a sender destroying its copy",
            State::RenamingBack(_) => "a sender renaming its domain back",
            State::Resuming(_) => "a sender resuming its domain",
            State::Over => "a sender that is done",
        }
    }
}

fn event_name(event: SenderEvent<'_>) -> &'static str {
    match event {
        SenderEvent::Begin => "begin",
        SenderEvent::Received(_) => "bytes",
        SenderEvent::Lost => "end of the channel",
        SenderEvent::Done => "success",
        SenderEvent::Failed => "failure",
        SenderEvent::Cancelled => "cancellation",
        SenderEvent::Suspended(_) => "the domain's state",
    }
}
