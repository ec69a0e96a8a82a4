//! Other processes that send batches: what they and the process that makes the passes say to each
//! other.
//!
//! The kernel holds a process's address-space lock for as long as it maps a batch, so threads
//! would map one after the other; processes do not. They are the same program, so what they say
//! ([`Request`], [`Reply`]) is nobody else's format. A worker that is free takes the next request,
//! whichever that is; nothing orders batches of one pass, and between passes nothing is under way.
//!
//! What it is not: processes, or the descriptors between them (`toolstack`). A stream that several
//! write must take a batch in one piece; that is the business of their [`StreamOut`].

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::frame::Pfn;
use crate::hypervisor::{BATCH_PAGES_MAX, SourceDomain, StreamOut};
use crate::source::batch::{BatchSender, Outcome, Space};

/// Longest request or reply in bytes: every pfn of a batch with all its digits, twice over.
pub const MESSAGE_BYTES_MAX: usize = 64 * BATCH_PAGES_MAX;

/// A batch to send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Its pages, at most [`BATCH_PAGES_MAX`].
    pub batch: Vec<Pfn>,
    /// The guest is suspended: nothing may be put off.
    pub last: bool,
}

/// What became of a batch, or why it could not be sent.
pub type Reply = std::result::Result<Outcome, String>;

/// The workers, as the process that makes the passes sees them.
pub trait Workers {
    /// How many requests should be under way, so that none of them waits for work.
    fn depth(&self) -> usize;
    /// Hands a request to the next worker that is free.
    ///
    /// # Errors
    /// There is none any more.
    fn submit(&mut self, request: &Request) -> io::Result<()>;
    /// Waits for a reply to any request.
    ///
    /// # Errors
    /// A worker has ended, and with it the batch that it had.
    fn collect(&mut self) -> io::Result<Reply>;
}

/// The process that makes the passes, as a worker sees it.
pub trait Employer {
    /// The next request; `None` at the end.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    fn next(&mut self) -> io::Result<Option<Request>>;
    /// Answers it.
    ///
    /// # Errors
    /// Nobody listens any more.
    fn reply(&mut self, reply: &Reply) -> io::Result<()>;
}

/// Sends batches of `domain` to `out` until there are no more.
///
/// # Errors
/// Xen's, before there is any request, or the employer's. What goes wrong with a batch is only
/// told.
pub fn work<D, O>(domain: &D, out: &mut O, employer: &mut impl Employer) -> Result<()>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
{
    let talk = |source| Error::Worker { what: "talking to the save helper", source };
    let space = Space::open(domain, &domain.info()?)?;
    let mut batches = BatchSender::new(domain, out, space);
    while let Some(request) = employer.next().map_err(talk)? {
        let sent = batches.send(&request.batch, request.last);
        employer.reply(&sent.map_err(|error| error.chain())).map_err(talk)?;
    }
    Ok(())
}
