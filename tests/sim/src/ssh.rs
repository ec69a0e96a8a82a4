//! ssh and sshd: they carry bytes between two pipes and the link.

use crate::pipe::{End, PipeId};
use crate::process::Process;
use crate::world::{Cond, Wait};

/// Bytes that it takes at a time.
const CHUNK: usize = 4096;

/// One end of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It ends when the other end has nothing more to say.
    Client,
    /// It ends when its program has nothing more to say.
    Server,
}

/// A direction: what is read, what has been read, where it goes.
struct Way {
    from: PipeId,
    to: PipeId,
    bytes: Vec<u8>,
    ended: bool,
    closed: bool,
}

impl Way {
    fn new(from: PipeId, to: PipeId) -> Way {
        Way { from, to, bytes: Vec::new(), ended: false, closed: false }
    }

    fn cond(&self) -> Cond {
        if !self.bytes.is_empty() {
            Cond::Writable(self.to)
        } else if !self.ended {
            Cond::Readable(self.from)
        } else {
            Cond::Never
        }
    }

    fn is_over(&self) -> bool {
        self.ended && self.bytes.is_empty()
    }

    /// Moves some bytes. `false`: the way is broken.
    fn carry(&mut self, process: &Process<'_>) -> bool {
        if self.bytes.is_empty() && !self.ended {
            let mut buffer = [0; CHUNK];
            match process.try_read(self.from, &mut buffer) {
                Some(Ok(0)) => self.ended = true,
                Some(Ok(n)) => self.bytes.extend_from_slice(&buffer[..n]),
                Some(Err(_)) => return false,
                None => {}
            }
        }
        if !self.bytes.is_empty() {
            match process.try_write(self.to, &self.bytes) {
                Some(Ok(n)) => drop(self.bytes.drain(..n)),
                Some(Err(_)) => return false,
                None => {}
            }
        }
        true
    }

    /// Passes the end on, once.
    fn close(&mut self, process: &Process<'_>) {
        if self.is_over() && !self.closed {
            self.closed = true;
            process.close(self.to, End::Write);
        }
    }
}

/// Carries `input` to the link `there`, and the link `back` to `output`.
pub(crate) fn relay(
    process: &Process<'_>,
    kind: Kind,
    input: PipeId,
    there: PipeId,
    back: PipeId,
    output: PipeId,
) {
    let (mut out, mut home) = (Way::new(input, there), Way::new(back, output));
    loop {
        // Who has nothing to read any more still sees the connection go.
        let hangup = if home.ended { Cond::Hangup(there) } else { Cond::Never };
        let wait: Wait = [out.cond(), home.cond(), hangup, Cond::Never];
        process.wait(wait);
        if process.holds(hangup) {
            return;
        }
        if !out.carry(process) {
            return;
        }
        if !home.carry(process) {
            match kind {
                Kind::Client => return,
                // The program reads no more; it may still have something to say. But where the
                // connection is what broke, it is over.
                Kind::Server if is_broken(process, back) => return,
                Kind::Server => {
                    home.bytes.clear();
                    home.ended = true;
                }
            }
        }
        match kind {
            Kind::Client => {
                out.close(process);
                if home.is_over() {
                    return;
                }
            }
            Kind::Server => {
                home.close(process);
                if out.is_over() {
                    return;
                }
            }
        }
    }
}

/// Whether reading the link fails.
fn is_broken(process: &Process<'_>, link: PipeId) -> bool {
    let mut nothing = [0; 0];
    matches!(process.try_read(link, &mut nothing), Some(Err(_)))
}
