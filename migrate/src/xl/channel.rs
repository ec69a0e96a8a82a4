//! Whole messages over the two descriptors between sender and receiver: patience and cancelling.
//!
//! What it is not: it knows what a message looks like only to notice early that something else
//! speaks; what a message means is [`handshake`](super::handshake)'s. It opens and polls nothing:
//! that is [`Ends`]. The stream of the domain does not pass through here.

use std::io::{self, Read};

use super::handshake::Message;

/// Bytes that a pipe takes without blocking once it polls writable (`PIPE_BUF`).
const WRITE_CHUNK: usize = 4096;

/// Whether waiting may be ended by the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Until the message or the cancellation.
    Cancelled,
    /// It is too late to cancel.
    TheEnd,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Something to read, or the end of it.
    Read,
    /// Room to write.
    Write,
}

/// What a wait came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// It is there; or an error or the end, which the read or write that follows shows.
    Now,
    /// The gate closed first.
    Cancelled,
    /// Nothing has happened for so long that the user should hear of it.
    Silence,
}

/// The descriptors to the other end.
pub trait Ends {
    /// Waits for `direction`, or for the gate if `until` says so.
    ///
    /// # Errors
    /// The system's.
    fn wait(&self, direction: Direction, until: Until) -> io::Result<Ready>;
    /// Reads what is there, at most `into.len()` bytes; 0 is the end.
    ///
    /// # Errors
    /// The descriptor's.
    fn read(&self, into: &mut [u8]) -> io::Result<usize>;
    /// Writes so much of `bytes` as there is room for.
    ///
    /// # Errors
    /// The descriptor's.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
}

/// What came instead of a message, or the message.
#[derive(Debug)]
pub enum Heard {
    /// All of it, or so much as shows that it is another.
    Bytes(Vec<u8>),
    /// The other end is gone.
    Lost(io::Error),
    /// The gate closed.
    Cancelled,
}

/// What became of bytes to write.
#[derive(Debug)]
pub enum Said {
    /// They are written.
    Done,
    /// Some may be.
    Failed(io::Error),
    /// Some may be: the gate closed.
    Cancelled,
}

/// Waits for a message. `on_silence` is called whenever nothing has happened for long.
pub fn hear<E: Ends + ?Sized>(
    ends: &E,
    message: Message,
    until: Until,
    mut on_silence: impl FnMut(),
) -> Heard {
    let mut bytes = vec![0; message.wire_bytes()];
    let mut have = 0;
    while let Some(rest) = bytes.get_mut(have..).filter(|r| !r.is_empty()) {
        match ends.wait(Direction::Read, until) {
            Ok(Ready::Now) => {}
            Ok(Ready::Cancelled) => return Heard::Cancelled,
            Ok(Ready::Silence) => {
                on_silence();
                continue;
            }
            Err(error) => return Heard::Lost(error),
        }
        match ends.read(rest) {
            Ok(0) => return Heard::Lost(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(error) if is_no_matter(&error) => {}
            Err(error) => return Heard::Lost(error),
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
pub fn say<E: Ends + ?Sized>(ends: &E, bytes: &[u8], until: Until) -> Said {
    for chunk in bytes.chunks(WRITE_CHUNK) {
        let mut left = chunk;
        while !left.is_empty() {
            match ends.wait(Direction::Write, until) {
                Ok(Ready::Now) => {}
                Ok(Ready::Cancelled) => return Said::Cancelled,
                Ok(Ready::Silence) => continue,
                Err(error) => return Said::Failed(error),
            }
            match ends.write(left) {
                Ok(n) => left = left.get(n..).unwrap_or_default(),
                Err(error) if is_no_matter(&error) => {}
                Err(error) => return Said::Failed(error),
            }
        }
    }
    Said::Done
}

fn is_no_matter(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Reading the header: a plain reader that ends with an error when the gate closes.
#[derive(Debug)]
pub struct Cancellable<'a, E: ?Sized>(pub &'a E);

impl<E: Ends + ?Sized> Read for Cancellable<'_, E> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.wait(Direction::Read, Until::Cancelled)? {
                Ready::Now => return self.0.read(buf),
                Ready::Cancelled => return Err(io::Error::other("cancelled")),
                Ready::Silence => {}
            }
        }
    }
}
