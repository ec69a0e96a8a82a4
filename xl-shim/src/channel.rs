//! The two descriptors between sender and receiver: whole messages, patience and cancelling.
//!
//! What it is not: it knows what a message looks like only to notice early that something else
//! speaks; what a message means is [`rxl_migrate::xl::handshake`]'s. The stream of the domain
//! does not pass through here: the save helper has the descriptor for that long.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rxl_migrate::xl::handshake::Message;

use crate::gate::Gate;

/// After so long without a word the user is told what is being waited for. Nothing ends then:
/// ssh may be asking for a password, or the target may be starting many devices.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);

/// Bytes that a pipe takes without blocking once it polls writable (`PIPE_BUF`).
const WRITE_CHUNK: usize = 4096;

/// Whether waiting may be ended by the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Until the message or the cancellation.
    Cancelled,
    /// It is too late to cancel.
    TheEnd,
}

/// What came instead of a message.
#[derive(Debug)]
pub(crate) enum Heard {
    /// All of it, or so much as shows that it is another.
    Bytes(Vec<u8>),
    /// The other end is gone.
    Lost(io::Error),
    /// The gate closed.
    Cancelled,
}

/// What became of bytes to write.
#[derive(Debug)]
pub(crate) enum Said {
    Done,
    Failed(io::Error),
    Cancelled,
}

/// Both directions.
#[derive(Debug)]
pub(crate) struct Channel {
    input: OwnedFd,
    output: OwnedFd,
    gate: Arc<Gate>,
}

enum Ready {
    Now,
    Cancelled,
    Silence,
}

impl Channel {
    pub(crate) fn new(input: OwnedFd, output: OwnedFd, gate: Arc<Gate>) -> Channel {
        Channel { input, output, gate }
    }

    pub(crate) fn input(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    pub(crate) fn output(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    /// Waits for a message. `on_silence` is called each [`SILENCE`].
    pub(crate) fn hear(
        &self,
        message: Message,
        until: Until,
        mut on_silence: impl FnMut(),
    ) -> Heard {
        let mut bytes = vec![0; message.wire_bytes()];
        let mut have = 0;
        while let Some(rest) = bytes.get_mut(have..).filter(|r| !r.is_empty()) {
            match self.wait(self.input(), PollFlags::IN, until) {
                Ok(Ready::Now) => {}
                Ok(Ready::Cancelled) => return Heard::Cancelled,
                Ok(Ready::Silence) => {
                    on_silence();
                    continue;
                }
                Err(error) => return Heard::Lost(error),
            }
            match rustix::io::read(&self.input, rest) {
                Ok(0) => return Heard::Lost(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => have += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Heard::Lost(error.into()),
            }
            let text = message.text();
            let said = bytes.get(..have.min(text.len())).unwrap_or_default();
            if !text.starts_with(said) {
                bytes.truncate(have);
                return Heard::Bytes(bytes);
            }
        }
        Heard::Bytes(bytes)
    }

    /// Writes all of `bytes`.
    pub(crate) fn say(&self, bytes: &[u8], until: Until) -> Said {
        for chunk in bytes.chunks(WRITE_CHUNK) {
            let mut left = chunk;
            while !left.is_empty() {
                match self.wait(self.output(), PollFlags::OUT, until) {
                    Ok(Ready::Now) => {}
                    Ok(Ready::Cancelled) => return Said::Cancelled,
                    Ok(Ready::Silence) => continue,
                    Err(error) => return Said::Failed(error),
                }
                match rustix::io::write(&self.output, left) {
                    Ok(n) => left = left.get(n..).unwrap_or_default(),
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                    Err(error) => return Said::Failed(error.into()),
                }
            }
        }
        Said::Done
    }

    fn wait(&self, fd: BorrowedFd<'_>, flags: PollFlags, until: Until) -> io::Result<Ready> {
        let timeout = Timespec::try_from(SILENCE).map_err(|_| io::ErrorKind::InvalidInput)?;
        let channel = PollFd::from_borrowed_fd(fd, flags);
        let wake = PollFd::from_borrowed_fd(self.gate.wake_fd(), PollFlags::IN);
        let mut fds = match until {
            Until::Cancelled => vec![channel, wake],
            Until::TheEnd => vec![channel],
        };
        loop {
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(Ready::Silence),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) if fds.get(1).is_some_and(|wake| !wake.revents().is_empty()) => {
                    return Ok(Ready::Cancelled);
                }
                // An error or the end of the channel shows in the read or write that follows.
                Ok(_) => return Ok(Ready::Now),
            }
        }
    }
}

/// Reading the header: as a plain reader that ends with an error when the gate closes.
impl Read for &Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.wait(self.input(), PollFlags::IN, Until::Cancelled)? {
                Ready::Now => return Ok(rustix::io::read(&self.input, buf)?),
                Ready::Cancelled => return Err(io::Error::other("cancelled")),
                Ready::Silence => {}
            }
        }
    }
}
