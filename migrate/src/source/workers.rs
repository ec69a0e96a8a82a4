//! Workers that send batches, as the process that makes the passes and they see each other.
//!
//! The kernel holds a process's address-space lock for as long as it maps a batch, so threads
//! would map one after the other; processes do not. They are the same program, so what they say
//! ([`Request`], [`Reply`]) is nobody else's format.
//!
//! Each keeps mappings of its own, so it gets, if possible, pages that it had before.
//!
//! A worker sends over the one stream, in turn with the others, or over a link of its own
//! ([`crate::stream::link`]). It does one request after the other. What it sends over a link the
//! receiver confirms, record by record; what is not confirmed when a link is lost is sent again
//! over another way.
//!
//! What it is not: processes, or the descriptors between them (`toolstack`); who gets which batch
//! (`crew`). A stream that several write must take a batch in one piece; that is the business of
//! their [`StreamOut`].

use std::io;

use serde::{Deserialize, Serialize};

use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::frame::Pfn;
use crate::hypervisor::{BATCH_PAGES_MAX, SourceDomain, StreamOut};
use crate::runs;
use crate::source::batch::{BatchSender, Looked, Outcome, Pass, Space};
use crate::source::reduce::Reducing;
use crate::stream::libxc::{self, PageEntry};
use crate::stream::link::{self, Offer};

/// Longest request or reply in bytes: every pfn of a batch with all its digits, twice over.
pub const MESSAGE_BYTES_MAX: usize = 64 * BATCH_PAGES_MAX;

/// One of the workers; a number that is not used again.
pub type WorkerId = usize;

/// What a worker is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Send a batch.
    Batch {
        /// Its pages, at most [`BATCH_PAGES_MAX`].
        #[serde(with = "runs::pfns")]
        pages: Vec<Pfn>,
        /// Those runs of 64 pages of them that others may have sent since this worker has.
        #[serde(with = "runs::frames")]
        taken_over: Vec<u64>,
        /// The pass that they are sent in.
        pass: Pass,
    },
    /// Tell the receiver of pages without data.
    Entries(#[serde(with = "runs::entries")] Vec<PageEntry>),
    /// What it sends from now on belongs to this pass. Only over a link.
    Pass(u32),
    /// Wait until all that it has sent is confirmed. Only over a link.
    Confirm,
    /// Say what it has done.
    Count,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// What became of the pages of a batch (no page of any other request), or why it failed.
    pub done: std::result::Result<Outcome, Failure>,
    /// Records that this worker has sent so far.
    pub sent: u64,
    /// Those of them that the receiver has confirmed.
    pub confirmed: u64,
    /// What it has done, if that was asked for.
    pub counters: Option<Box<Counters>>,
}

/// Why a request could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// The way to the receiver is broken.
    Way(String),
    /// Anything else.
    Batch(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Stream { .. } => Failure::Way(error.chain()),
            _ => Failure::Batch(error.chain()),
        }
    }
}

/// What the process that makes the passes learns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A new worker, ready for requests; over which link it sends, if not over the stream.
    Joined(WorkerId, Option<u8>),
    /// The answer to the oldest request that this worker has.
    Reply(WorkerId, Reply),
    /// The worker is no more, and with it the requests that it had.
    Ended(WorkerId, String),
}

/// The workers, as the process that makes the passes sees them.
pub trait Workers {
    /// What the receiver is told, so that links can be made; `None`: there will be none.
    fn offer(&self) -> Option<Offer>;
    /// Hands a request to a worker. It never waits: there is room for a handful.
    ///
    /// # Errors
    /// The worker has ended.
    fn submit(&mut self, worker: WorkerId, request: &Request) -> io::Result<()>;
    /// The next news; `wait` for some. `None` only if it does not wait.
    ///
    /// # Errors
    /// The system's; somebody wants an end of it all.
    fn news(&mut self, wait: bool) -> io::Result<Option<News>>;
    /// Ends a worker and closes its link. There is no news of it any more.
    fn dismiss(&mut self, worker: WorkerId);
}

/// The process that makes the passes, as a worker that sends over an `O` sees it.
pub trait Employer<O> {
    /// The next request; `None` at the end. A link is watched meanwhile: others may wait for what
    /// it has carried, and whoever has nothing to send over it would not notice that it is lost.
    ///
    /// # Errors
    /// It cannot be read, or is none; the link is broken, or the receiver has been silent on it
    /// for too long.
    fn next(&mut self, way: &mut O) -> io::Result<Option<Request>>;
    /// The request after that, if it is there already.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    fn next_at_hand(&mut self) -> io::Result<Option<Request>>;
    /// Answers it.
    ///
    /// # Errors
    /// Nobody listens any more.
    fn reply(&mut self, reply: &Reply) -> io::Result<()>;
}

/// What the receiver has said of the records that came over this way.
pub trait Confirmed {
    /// Number of records that it has confirmed. Does not wait.
    ///
    /// # Errors
    /// The way is broken.
    fn confirmed(&mut self) -> io::Result<u64>;
    /// Waits until it has confirmed `records` of them.
    ///
    /// # Errors
    /// The way is broken, or the receiver has been silent for too long.
    fn wait_confirmed(&mut self, records: u64) -> io::Result<()>;
}

/// Does requests, sending pages of `domain` to `out`, until there are no more; `reducing` is what
/// of them may be left out, over a link.
///
/// # Errors
/// Xen's, before there is any request, or the employer's. What goes wrong with a request is only
/// told.
pub fn work<D, O>(
    domain: &D,
    out: &mut O,
    employer: &mut impl Employer<O>,
    reducing: Reducing<'_>,
) -> Result<()>
where
    D: SourceDomain,
    O: StreamOut<D::Pages> + Confirmed,
{
    let talk = |source| Error::Worker { what: "talking to the save helper", source };
    let space = Space::open(domain, &domain.info()?)?;
    let batches = BatchSender::new(domain, out, space).reduced(reducing);
    let mut worker = Worker { batches, ahead: None, sent: 0 };
    let mut at_hand = None;
    loop {
        let request = match at_hand.take() {
            Some(request) => request,
            None => match employer.next(worker.batches.out).map_err(talk)? {
                Some(request) => request,
                None => return Ok(()),
            },
        };
        at_hand = employer.next_at_hand().map_err(talk)?;
        let counters = (request == Request::Count).then(|| Box::new(worker.counters()));
        let done = worker.serve(request, at_hand.as_ref()).map_err(Failure::from);
        // A way that is broken shows it again where it matters.
        let confirmed = worker.batches.out.confirmed().unwrap_or(0);
        let reply = Reply { done, sent: worker.sent, confirmed, counters };
        employer.reply(&reply).map_err(talk)?;
    }
}

struct Worker<'a, D: SourceDomain, O> {
    batches: BatchSender<'a, D, O>,
    /// The batch of the request that is next.
    ahead: Option<Looked>,
    /// Records so far.
    sent: u64,
}

impl<D, O> Worker<'_, D, O>
where
    D: SourceDomain,
    O: StreamOut<D::Pages> + Confirmed,
{
    /// Does `request`, after which there is `next`.
    fn serve(&mut self, request: Request, next: Option<&Request>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let ahead = self.ahead.take();
        match request {
            Request::Batch { pages, taken_over, pass } => {
                let batch = match ahead {
                    Some(batch) => batch,
                    None => self.look_up(&pages, &taken_over, pass)?,
                };
                if let Some(Request::Batch { pages, taken_over, pass }) = next {
                    self.ahead = Some(self.look_up(pages, taken_over, *pass)?);
                }
                outcome = self.batches.send(batch, self.ahead.as_ref())?;
                self.sent += outcome.records;
            }
            Request::Entries(entries) => {
                let head = libxc::page_data_head(&entries)?;
                self.write(&head, "writing page data")?;
                self.sent += 1;
                outcome.bytes = head.len() as u64;
            }
            Request::Pass(pass) => {
                self.write(&link::pass_record(pass)?, "writing to a link")?;
                self.sent += 1;
            }
            Request::Confirm => {
                let wait = self.batches.out.wait_confirmed(self.sent);
                let what = "waiting for the receiver's confirmation";
                wait.map_err(|source| Error::Stream { what, source })?;
            }
            Request::Count => {}
        }
        Ok(outcome)
    }

    fn look_up(&mut self, pages: &[Pfn], taken_over: &[u64], pass: Pass) -> Result<Looked> {
        self.batches.take_over(taken_over);
        self.batches.look_up(pages, pass)
    }

    fn counters(&self) -> Counters {
        let mut counters = self.batches.counters();
        counters.stalled_ns = self.batches.out.stalled_ns();
        counters
    }

    fn write(&mut self, bytes: &[u8], what: &'static str) -> Result<()> {
        self.batches.out.write_all(bytes).map_err(|source| Error::Stream { what, source })
    }
}
