//! The two descriptors between sender and receiver, as [`rxl_migrate::xl::channel`] wants them:
//! waiting on them, with patience and with an eye on the gate.
//!
//! A file has one direction; the other leads nowhere.
//!
//! What it is not: it knows no message. The stream of the domain does not pass through here: the
//! save helper has the descriptor for that long.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rxl_migrate::xl::channel::{self, Direction, Ends, Heard, Ready, Said, Until};
use rxl_migrate::xl::handshake::Message;

use crate::gate::Gate;

/// After so long without a word the user is told what is being waited for. Nothing ends then:
/// ssh may be asking for a password, or the target may be starting many devices.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);

/// Both directions.
#[derive(Debug)]
pub(crate) struct Channel {
    input: OwnedFd,
    output: OwnedFd,
    gate: Arc<Gate>,
}

impl Channel {
    pub(crate) fn new(input: OwnedFd, output: OwnedFd, gate: Arc<Gate>) -> Channel {
        Channel { input, output, gate }
    }

    /// For a file that is written.
    pub(crate) fn to_file(file: OwnedFd, gate: Arc<Gate>) -> io::Result<Channel> {
        Ok(Channel::new(File::open("/dev/null")?.into(), file, gate))
    }

    /// For a file that is read.
    pub(crate) fn from_file(file: OwnedFd, gate: Arc<Gate>) -> io::Result<Channel> {
        let nowhere = File::options().write(true).open("/dev/null")?;
        Ok(Channel::new(file, nowhere.into(), gate))
    }

    pub(crate) fn input(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    pub(crate) fn output(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    /// Waits for a message. `on_silence` is called each [`SILENCE`].
    pub(crate) fn hear(&self, message: Message, until: Until, on_silence: impl FnMut()) -> Heard {
        channel::hear(self, message, until, on_silence)
    }

    /// Writes all of `bytes`.
    pub(crate) fn say(&self, bytes: &[u8], until: Until) -> Said {
        channel::say(self, bytes, until)
    }
}

impl Ends for Channel {
    fn wait(&self, direction: Direction, until: Until) -> io::Result<Ready> {
        let timeout = Timespec::try_from(SILENCE).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (fd, flags) = match direction {
            Direction::Read => (self.input(), PollFlags::IN),
            Direction::Write => (self.output(), PollFlags::OUT),
        };
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

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.input, into)?)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.output, bytes)?)
    }
}
