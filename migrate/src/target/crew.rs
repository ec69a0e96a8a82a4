//! The process that restores, as the owner of all that workers ask for, on links or on a file.

use std::io;

use crate::error::{Error, Result};
use crate::frame::{INVALID_FRAME, Pfn};
use crate::stream::link::{LinkSet, Offer};
use crate::target::file::{Batch, Batches};
use crate::target::guest::{Guest, Memory};
use crate::target::links::{Answer, Ask, Links, Need};
use crate::target::passes::Passes;
use crate::target::verify::Differing;

/// The workers, if there may be any.
pub(super) struct Crew<'a> {
    links: Option<Box<dyn Links + 'a>>,
    /// Whether any link has been opened.
    opened: bool,
    /// Whether there are workers that read the file which the stream is.
    reads_file: bool,
    passes: Passes,
    /// Links that wait to be let into a pass.
    waiting: Vec<(u8, u32)>,
    /// What is placed from a file.
    batches: Batches,
    /// Pages that are not as they were sent, if that was asked for.
    pub(super) differing: Differing,
}

impl<'a> Crew<'a> {
    pub(super) fn new(links: Option<Box<dyn Links + 'a>>) -> Crew<'a> {
        let reads_file = links.as_ref().is_some_and(|links| links.readers() > 0);
        let (passes, waiting, batches, differing) = Default::default();
        Crew { links, opened: false, reads_file, passes, waiting, batches, differing }
    }

    /// Whether what is in the stream is for workers to read.
    pub(super) fn reads_file(&self) -> bool {
        self.reads_file
    }

    /// Opens links, if this side can. Nobody waits at the other end of those that a file offers.
    pub(super) fn open(&mut self, offer: &Offer) {
        if let Some(links) = self.links.as_mut().filter(|_| !self.reads_file) {
            links.open(offer);
            self.opened = true;
        }
    }

    /// The stream has come to its page data: links may bring theirs.
    pub(super) fn begin(&mut self) {
        self.passes.begin();
        self.let_in();
    }

    /// A pass has ended on the stream.
    pub(super) fn end_pass(&mut self, pass: u32, links: LinkSet) -> Result<()> {
        self.passes.end(pass, links)?;
        self.let_in();
        Ok(())
    }

    /// The sender has lost a link: nothing of it is applied any more, and nothing waits for it.
    pub(super) fn lose(&mut self, link: u8) {
        if let Some(links) = self.links.as_mut().filter(|_| self.opened) {
            links.dismiss(link);
        }
        self.waiting.retain(|(waiting, _)| *waiting != link);
        self.passes.lose(link);
        self.let_in();
    }

    /// All workers are done: the guest's memory is complete.
    pub(super) fn dismiss(&mut self) {
        self.links = None;
    }

    /// Does what workers ask until the stream can be read.
    pub(super) fn serve_until_readable<G: Guest>(&mut self, guest: &mut G) -> Result<()> {
        while self.opened || self.reads_file {
            match self.wait(true)? {
                Need::Stream => break,
                need => self.serve(need, guest)?,
            }
        }
        Ok(())
    }

    /// Does what workers ask until all passes that have ended on the stream are complete.
    pub(super) fn serve_until_complete<G: Guest>(&mut self, guest: &mut G) -> Result<()> {
        while !self.passes.are_complete() {
            if !self.opened {
                return Err(Error::Batch("pages came over links that are not here".into()));
            }
            let need = self.wait(false)?;
            self.serve(need, guest)?;
        }
        Ok(())
    }

    /// Has a worker place `batch`, as soon as one is ready and nobody places any of its pages.
    pub(super) fn place<G: Guest>(&mut self, batch: Batch, guest: &mut G) -> Result<()> {
        loop {
            if let Some(worker) = self.batches.give(&batch) {
                self.answer(worker, &Answer::Place(batch));
                return Ok(());
            }
            let need = self.wait(false)?;
            self.serve(need, guest)?;
        }
    }

    /// Does what workers ask until no batch of a file is under way.
    pub(super) fn serve_until_placed<G: Guest>(&mut self, guest: &mut G) -> Result<()> {
        while self.batches.are_under_way() {
            let need = self.wait(false)?;
            self.serve(need, guest)?;
        }
        Ok(())
    }

    fn wait(&mut self, stream: bool) -> Result<Need> {
        let failed = |source| Error::Worker { what: "waiting for workers", source };
        let links = self.links.as_mut().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        links.wait(stream).map_err(failed)
    }

    fn serve<G: Guest>(&mut self, need: Need, guest: &mut G) -> Result<()> {
        match need {
            Need::Stream => {}
            Need::Ask(link, Ask::Prepare(entries)) => {
                guest.prepare(&entries)?;
                let data = entries.iter().filter(|entry| entry.kind.has_data());
                let pfns: Vec<Pfn> = data.map(|entry| entry.pfn).collect();
                let frames = Guest::frames(guest, pfns.into_iter())?;
                self.answer(link, &Answer::Frames(frames));
            }
            Need::Ask(link, Ask::Resolve(pfns)) => {
                let frames = guest.resolve(&pfns)?;
                self.answer(link, &Answer::Frames(frames));
            }
            Need::Ask(link, Ask::Look(pfns)) => {
                let frame = |pfn: &Pfn| Guest::frame(guest, *pfn).unwrap_or(INVALID_FRAME);
                self.answer(link, &Answer::Frames(pfns.iter().map(frame).collect()));
            }
            Need::Ask(link, Ask::Differ(pfns)) => {
                self.differing.note(pfns);
                self.answer(link, &Answer::GoOn);
            }
            Need::Ask(link, Ask::Pass(pass)) => {
                self.passes.come(link, pass)?;
                self.waiting.push((link, pass));
                self.let_in();
            }
            Need::Ask(worker, Ask::Batch) => self.batches.finish(worker),
            Need::Ask(_, Ask::Failed(why)) => return Err(Error::Batch(why)),
            // What it had placed of its batch nobody knows.
            Need::Ended(_, why) if self.reads_file => return Err(Error::Batch(why)),
            Need::Ended(link, why) => {
                // The sender will notice, say so, and send again what is missing.
                tracing::debug!(link, why, "the worker on a link has ended");
                self.waiting.retain(|(waiting, _)| *waiting != link);
            }
        }
        Ok(())
    }

    /// Lets workers into the passes that have come.
    fn let_in(&mut self) {
        let passes = &self.passes;
        let (now, later): (Vec<_>, Vec<_>) =
            self.waiting.drain(..).partition(|(_, pass)| passes.may_apply(*pass));
        self.waiting = later;
        now.into_iter().for_each(|(link, _)| self.answer(link, &Answer::GoOn));
    }

    /// A worker that has ended meanwhile is heard of later.
    fn answer(&mut self, link: u8, answer: &Answer) {
        if let Some(links) = &mut self.links
            && let Err(error) = links.answer(link, answer)
        {
            tracing::debug!(link, %error, "the worker on a link takes no answer");
        }
    }
}
