//! What comes over links: the workers that place it, and what they ask of the process that
//! restores the domain.
//!
//! A worker only moves bytes. Which pfns have memory, where, and of which type they are is known in
//! one place, the process that reads the stream: it gives memory, checks every entry, and lets no
//! worker into a pass before its time. So whatever a worker is told by its peer goes through
//! [`Ask`]. Both are the same program, so this is nobody else's format; what comes over the link is
//! the peer's, and hostile.
//!
//! What it is not: processes, sockets, or the opening of connections (`toolstack`).

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::frame::{INVALID_FRAME, Mfn, PageBuf, Pfn};
use crate::hypervisor::{BATCH_PAGES_MAX, StreamIn, TargetDomain};
use crate::runs;
use crate::stream::FormatError;
use crate::stream::digest::DIGESTS_BYTES_MAX;
use crate::stream::libxc::{PageEntry, RECORD_HEADER_BYTES, ReadKind, RecordHeader, RecordKind};
use crate::stream::link::{self, Offer};
use crate::stream::reduced::Agreed;
use crate::target::driver::Reader;
use crate::target::file::{Batch, REFERRED_MAX};
use crate::target::guest::{Frames, Memory};
use crate::target::pages::Placer;
use crate::target::verify::Verifier;
use crate::x86::pv::{localise, referenced};

/// Longest message in bytes: a batch of a file, of which no two numbers are neighbours. Most have 16
/// digits, which leaves room for names.
pub const MESSAGE_BYTES_MAX: usize = 2 * 25 * (BATCH_PAGES_MAX + REFERRED_MAX);

/// What could not be read, if a link ends early.
const LINK: &str = "could not read from a link";

/// What a worker asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// To check these entries, give memory to their pages, and note their types; the frames of
    /// those with data are wanted.
    Prepare(#[serde(with = "runs::entries")] Vec<PageEntry>),
    /// For the frames of pages that page tables refer to, which get memory if they have none.
    Resolve(#[serde(with = "runs::pfns")] Vec<Pfn>),
    /// For the frames of these pages, as far as they have memory.
    Look(#[serde(with = "runs::pfns")] Vec<Pfn>),
    /// Nothing: these pages are not as they were sent.
    Differ(#[serde(with = "runs::pfns")] Vec<Pfn>),
    /// To be let into this pass; all of the earlier ones is placed.
    Pass(u32),
    /// For a batch of the file that the stream is, which may have come already; the oldest that it
    /// had is placed, and its page tables are mapped no more.
    Batch,
    /// Nothing: it has to give up, for a reason that is not the link's.
    Failed(String),
}

/// What it is answered. A question that has a bad answer ends the restore, and with it the worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The frames, in order; [`INVALID_FRAME`] where there is none.
    Frames(#[serde(with = "runs::frames")] Vec<u64>),
    /// Go on.
    GoOn,
    /// Place this batch.
    Place(Batch),
}

/// What the process that restores has to attend to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// The stream can be read, or is at its end.
    Stream,
    /// The worker on this link, or with this number, asks.
    Ask(u8, Ask),
    /// The worker on this link, or with this number, is no more: why.
    Ended(u8, String),
}

/// The workers, as the process that restores sees them. Dropping it ends them all.
pub trait Links {
    /// Workers that read the stream, which is a file, by themselves ([`crate::target::file`]), with
    /// numbers from 0 on. If there are any, no link is opened.
    fn readers(&self) -> u8 {
        0
    }
    /// Starts to open what is offered, each with a worker of its own. What cannot be opened is no
    /// error.
    fn open(&mut self, offer: &Offer);
    /// Waits until a worker needs something, or, with `stream`, until the stream can be read.
    ///
    /// # Errors
    /// The system's; without `stream`, the stream has ended: a sender that is still there may have
    /// to say that a link is lost.
    fn wait(&mut self, stream: bool) -> io::Result<Need>;
    /// Answers a worker.
    ///
    /// # Errors
    /// It has ended.
    fn answer(&mut self, link: u8, answer: &Answer) -> io::Result<()>;
    /// Ends the worker on `link`: when this returns, it has no hand in the guest's memory any more.
    /// There is no news of it either.
    fn dismiss(&mut self, link: u8);
}

/// The process that restores, as a worker sees it.
pub trait Owner {
    /// Asks, and waits for an answer; the next batch may have come before.
    ///
    /// # Errors
    /// Nobody is there any more.
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer>;
}

/// A link as its receiver sees it.
pub trait LinkIn<P: crate::hypervisor::ForeignPages>: StreamIn<P> {
    /// Confirms that so many records are applied.
    ///
    /// # Errors
    /// The link is broken.
    fn confirm(&mut self, records: u64) -> io::Result<()>;
}

/// Places what comes over the link `input` in the memory of `domain`, until the link ends. What
/// is not the link's fault the owner is told. `agreed` is what both ends know of the link.
///
/// # Errors
/// The link's, or the owner's.
pub fn work<D, I>(domain: &D, input: &mut I, owner: &mut impl Owner, agreed: Agreed) -> Result<()>
where
    D: TargetDomain,
    I: LinkIn<D::Pages>,
{
    let mut worker = Worker {
        placer: Placer::new(domain),
        verifier: Verifier::new(domain),
        reader: Reader::new(input),
        memory: Asked::new(owner),
        agreed,
        let_in: false,
        records: 0,
    };
    loop {
        match worker.next() {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error @ (Error::Stream { .. } | Error::Worker { .. })) => return Err(error),
            Err(error) => return Err(worker.memory.give_up(error)),
        }
    }
}

struct Worker<'a, 'b, D: TargetDomain, I, O> {
    placer: Placer<'a, D>,
    verifier: Verifier<'a, D>,
    reader: Reader<'b, I, D::Pages>,
    memory: Asked<'b, O>,
    agreed: Agreed,
    /// Whether it has been let into a pass.
    let_in: bool,
    /// Records applied.
    records: u64,
}

impl<D: TargetDomain, I: LinkIn<D::Pages>, O: Owner> Worker<'_, '_, D, I, O> {
    /// Applies the next record; `false` where the link ends.
    fn next(&mut self) -> Result<bool> {
        let mut header = [0; RECORD_HEADER_BYTES];
        match self.reader.input.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(source) => return Err(Error::Stream { what: LINK, source }),
        }
        let header = RecordHeader::parse(header)?;
        match header.kind {
            ReadKind::Known(
                kind @ (RecordKind::PageData | RecordKind::RxlReduced | RecordKind::RxlDigests),
            ) if !self.let_in => {
                let why = "comes over a link before its first pass";
                return Err(FormatError::Order { kind: kind.code(), why }.into());
            }
            ReadKind::Known(kind @ (RecordKind::PageData | RecordKind::RxlReduced)) => {
                let Worker { placer, reader, memory, agreed, .. } = self;
                match kind {
                    RecordKind::PageData => placer.receive(reader, memory, header.length)?,
                    _ => placer.receive_reduced(reader, memory, header.length, agreed)?,
                }
                self.confirm()?;
            }
            ReadKind::Known(RecordKind::RxlDigests) if header.length <= DIGESTS_BYTES_MAX => {
                self.verify(header.length)?;
                self.confirm()?;
            }
            ReadKind::Known(RecordKind::RxlPass) if header.length == 8 => {
                let pass = link::parse_pass(&self.reader.array::<8>(LINK)?)?;
                self.memory.ask(&Ask::Pass(pass))?;
                self.let_in = true;
                self.confirm()?;
            }
            ReadKind::Known(kind) => {
                let why = "is not for links";
                return Err(FormatError::Order { kind: kind.code(), why }.into());
            }
            ReadKind::Optional(code) => return Err(FormatError::UnknownRecord(code).into()),
        }
        Ok(true)
    }

    /// Compares pages with digests, and tells the owner of those that differ.
    fn verify(&mut self, length: usize) -> Result<()> {
        let differing = self.verifier.compare(&mut self.reader, &mut self.memory, length)?;
        if !differing.is_empty() {
            self.memory.ask(&Ask::Differ(differing))?;
        }
        Ok(())
    }

    /// One more record is applied.
    fn confirm(&mut self) -> Result<()> {
        self.records += 1;
        let confirmed = self.reader.input.confirm(self.records);
        confirmed.map_err(|source| Error::Stream { what: "confirming a record", source })
    }
}

/// Memory that another process knows.
pub(super) struct Asked<'a, O> {
    owner: &'a mut O,
    /// The frame of each pfn with data of the last record, in order.
    frames: Vec<(Pfn, u64)>,
}

impl<'a, O: Owner> Asked<'a, O> {
    pub(super) fn new(owner: &'a mut O) -> Self {
        Asked { owner, frames: Vec::new() }
    }

    /// Tells the owner that `error` ends the worker's work.
    pub(super) fn give_up(&mut self, error: Error) -> Error {
        // If it cannot be told, there is nobody who could act on it.
        let _ = self.owner.ask(&Ask::Failed(error.chain()));
        error
    }

    pub(super) fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        let what = "asking the process that restores";
        self.owner.ask(ask).map_err(|source| Error::Worker { what, source })
    }

    /// Asks for the frames of `pfns`.
    fn frames_of(&mut self, ask: &Ask, pfns: &[Pfn]) -> Result<Vec<(Pfn, u64)>> {
        match self.ask(ask)? {
            Answer::Frames(frames) if frames.len() == pfns.len() => {
                Ok(pfns.iter().copied().zip(frames).collect())
            }
            _ => Err(bug("an answer that does not fit")),
        }
    }
}

impl<O: Owner> Frames for Asked<'_, O> {
    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>> {
        pfns.map(finder(&self.frames)).collect()
    }

    fn localise(&mut self, tables: &mut [&mut PageBuf]) -> Result<()> {
        let mut pfns: Vec<Pfn> = tables.iter().flat_map(|table| referenced(table)).collect();
        pfns.sort_unstable();
        pfns.dedup();
        let mut frames = Vec::with_capacity(pfns.len());
        for pfns in pfns.chunks(BATCH_PAGES_MAX) {
            frames.extend(self.frames_of(&Ask::Resolve(pfns.to_vec()), pfns)?);
        }
        let mut frame = finder(&frames);
        tables.iter_mut().try_for_each(|table| localise(table, |pfn| frame(pfn).map(Mfn)))
    }
}

impl<O: Owner> Memory for Asked<'_, O> {
    fn prepare(&mut self, entries: &[PageEntry]) -> Result<()> {
        let mut all = Vec::new();
        for entries in entries.chunks(BATCH_PAGES_MAX) {
            let data = entries.iter().filter(|entry| entry.kind.has_data());
            let pfns: Vec<Pfn> = data.map(|entry| entry.pfn).collect();
            let frames = self.frames_of(&Ask::Prepare(entries.to_vec()), &pfns)?;
            all.extend(frames);
        }
        // Stable: where a pfn comes twice, its frame is the same.
        all.sort_by_key(|(pfn, _)| *pfn);
        self.frames = all;
        Ok(())
    }

    fn look(&mut self, pfns: &[Pfn]) -> Result<Vec<Option<u64>>> {
        let frames = self.frames_of(&Ask::Look(pfns.to_vec()), pfns)?;
        Ok(frames.iter().map(|(_, frame)| Some(*frame).filter(|f| *f != INVALID_FRAME)).collect())
    }
}

/// Finds the frames of pfns in `frames`, which is by pfn: at once where they come in that order, as
/// they mostly do.
pub(super) fn finder(frames: &[(Pfn, u64)]) -> impl FnMut(Pfn) -> Result<u64> {
    let mut next = 0;
    move |pfn| {
        let found = match frames.get(next) {
            Some((known, _)) if *known == pfn => next,
            _ => frames.partition_point(|(known, _)| *known < pfn),
        };
        next = found + 1;
        let frame = frames.get(found).filter(|(known, _)| *known == pfn).map(|(_, frame)| *frame);
        frame.ok_or_else(|| bug("a frame that nobody asked for"))
    }
}

pub(super) fn bug(event: &'static str) -> Error {
    Error::Machine { state: "placing pages of a link or a file", event }
}
