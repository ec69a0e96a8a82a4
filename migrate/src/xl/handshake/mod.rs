//! The conversation between the two ends of a migration, as state machines without I/O.
//!
//! ```text
//!  sender (source host)                                  receiver (target host)
//!        │ ◄──────────────── Banner ─────────────────────────── │
//!        │ ── header, configuration, libxl stream ────────────► │  makes NAME--incoming, paused
//!  renames NAME to NAME--migratedaway                           │
//!        │ ◄──────────────── Ready ──────────────────────────── │
//!        │ ═══════════════════ Go ════════════════════════════► │  renames to NAME, unpauses
//!        │ ◄──────────────── Report, status 0 ───────────────── │
//!  destroys its copy                                       leaves its copy running
//!        │
//!        │ ◄──────────────── Report, status ≠ 0 ─────────────── │  destroys its copy
//!        │ ◄──────────────── Destroyed ──────────────────────── │
//!  renames back, resumes
//! ```
//!
//! xl renames once it has Ready. Here both ends are busy at the same time: the guest stands still.
//!
//! The rules, which hold in every order of events and are what the tests state:
//!
//! - The sender resumes its copy only if it never *tried* to send Go, or has received Destroyed.
//!   It destroys its copy only after a report of success.
//! - The receiver unpauses its copy only after it has received Go. It sends Destroyed only after
//!   its copy is gone, and destroys no copy that it has unpaused.
//! - A receiver that is cancelled while it waits for Go destroys its copy and says the same as one
//!   that could not start it: a sender that has sent Go meanwhile need not stay suspended.
//! - So at no moment do two copies run, and at no moment is there none that runs or could be
//!   resumed by hand. Where the sender cannot know ([`SenderEnd::Uncertain`]) it stays suspended.
//!
//! What it is not: it reads no clock and no descriptor, and has no limits in time. A driver does
//! what an action says, one at a time, and answers with the event that came of it. Cancelling is
//! answering an action with `Cancelled` *instead of* doing it (or, while waiting for bytes,
//! instead of waiting longer); where that would break a rule it is not a legal event.

mod receiver;
mod sender;
#[cfg(test)]
mod tests;

pub use receiver::{Receiver, ReceiverAction, ReceiverCause, ReceiverEnd, ReceiverEvent};
pub use sender::{Sender, SenderAction, SenderCause, SenderEnd, SenderEvent};

/// The fixed strings. A NUL at the end is part of the message where it is written here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Receiver: it listens.
    Banner,
    /// Receiver: it has a paused copy that is complete.
    Ready,
    /// Sender: the copy may run. The point of no return.
    Go,
    /// Receiver: whether the copy runs; a byte follows, 0 for yes.
    Report,
    /// Receiver, after a report of failure: its copy is gone. The same bytes as [`Message::Go`].
    Destroyed,
}

impl Message {
    /// The bytes, the status after [`Message::Report`] not included.
    #[must_use]
    pub const fn text(self) -> &'static [u8] {
        match self {
            Message::Banner => b"xl migration receiver ready, send binary domain data.\n",
            Message::Ready => b"domain received, ready to unpause\0",
            Message::Go | Message::Destroyed => b"domain is yours, you are cleared to unpause\0",
            Message::Report => b"my copy unpause results are as follows\0",
        }
    }

    /// How many bytes to read for the whole message.
    #[must_use]
    pub const fn wire_bytes(self) -> usize {
        match self {
            Message::Report => self.text().len() + 1,
            _ => self.text().len(),
        }
    }
}

/// The status in a whole [`Message::Report`]; `None` if the bytes are something else.
fn report_status(bytes: &[u8]) -> Option<u8> {
    match bytes.strip_prefix(Message::Report.text()) {
        Some([status]) => Some(*status),
        _ => None,
    }
}
