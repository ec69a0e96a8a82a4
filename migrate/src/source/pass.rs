//! Sends one set of pages, batch by batch, and remembers what has become of every page.
//!
//! A page that cannot be sent while the guest runs (it has been ballooned out, its table is in
//! motion, its frame cannot be mapped any more) is *put off*: its bit is remembered and it
//! belongs to the last pass. In the last pass nothing can be put off: what has memory goes out,
//! or the save fails. Stock drops a table there without a word; see `GuestError::Table`.

use crate::bitmap::PageBitmap;
use crate::error::{Error, Result};
use crate::frame::{PageType, Pfn};
use crate::hypervisor::{BATCH_PAGES_MAX, SourceDomain, StreamOut, Toolstack};
use crate::report::{Event, PassPages};
use crate::source::batch::{BatchSender, Outcome};
use crate::source::workers::{Request, Workers};
use crate::stream::libxc::{self, PageEntry};

/// One pass under way, and what outlives it.
pub(super) struct PassSender<'a, D: SourceDomain, O, T> {
    pub(super) batches: BatchSender<'a, D, O>,
    pub(super) toolstack: &'a mut T,
    /// Who sends the batches; else this process does.
    workers: Option<Box<dyn Workers>>,
    /// Batches that the workers have.
    under_way: usize,
    /// Pages put off to the last pass.
    deferred: PageBitmap,
    /// Pages that the receiver has heard of, and must be told when they vanish.
    sent: PageBitmap,
    /// Bytes of the stream so far.
    pub(super) bytes: u64,
}

/// A pass in numbers.
struct Progress {
    pass: u32,
    last: bool,
    what: String,
    pages: PassPages,
    done: u64,
}

impl<'a, D, O, T> PassSender<'a, D, O, T>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
    T: Toolstack,
{
    /// A sender that has sent nothing yet.
    pub(super) fn new(
        batches: BatchSender<'a, D, O>,
        toolstack: &'a mut T,
        workers: Option<Box<dyn Workers>>,
    ) -> Self {
        let pages = batches.space.pages();
        PassSender {
            batches,
            toolstack,
            workers,
            under_way: 0,
            deferred: PageBitmap::new(pages),
            sent: PageBitmap::new(pages),
            bytes: 0,
        }
    }

    /// Those of the pages put off that have memory now, and those that the receiver was sent and
    /// must hear the end of.
    pub(super) fn due(&self) -> PageBitmap {
        let mut due = PageBitmap::new(self.deferred.len());
        let is_due = |pfn: &Pfn| self.batches.space.frame(*pfn).is_some() || self.sent.get(*pfn);
        self.deferred.iter().filter(is_due).for_each(|pfn| due.set(pfn));
        due
    }

    /// Sends the pages of `set`. `last`: the guest is suspended, nothing may be put off.
    ///
    /// # Errors
    /// Xen's, the stream's, [`Error::Aborted`]; in the last pass also a page that cannot be sent.
    pub(super) fn send(&mut self, pass: u32, set: &PageBitmap, last: bool) -> Result<()> {
        let pages = PassPages { wanted: set.count(), ..PassPages::default() };
        let what = if last { "Frames".into() } else { format!("Frames iteration {pass}") };
        let mut progress = Progress { pass, last, what, pages, done: 0 };
        self.toolstack.event(&Event::PassStarted { pass, last, pages: pages.wanted });
        self.report(&progress);
        let mut pfns = set.iter();
        loop {
            let batch: Vec<Pfn> = pfns.by_ref().take(BATCH_PAGES_MAX).collect();
            if batch.is_empty() {
                break;
            }
            if self.toolstack.aborted() {
                return Err(Error::Aborted);
            }
            self.send_batch(batch, &mut progress)?;
        }
        while self.under_way > 0 {
            self.collect(&mut progress)?;
        }
        self.toolstack.event(&Event::PassEnded {
            pass,
            last,
            pages: progress.pages,
            bytes: self.bytes,
        });
        Ok(())
    }

    /// Writes a record that is not page data.
    ///
    /// # Errors
    /// The stream's.
    pub(super) fn write_record(&mut self, record: &[u8], what: &'static str) -> Result<()> {
        self.batches.out.write_all(record).map_err(|source| Error::Stream { what, source })?;
        self.bytes += record.len() as u64;
        Ok(())
    }

    fn report(&mut self, progress: &Progress) {
        let (done, pages) = (progress.done, progress.pages.wanted);
        self.toolstack.progress(&progress.what, done, pages);
        let (pass, bytes) = (progress.pass, self.bytes);
        self.toolstack.event(&Event::PassProgress { pass, done, pages, bytes });
    }

    /// Sends a batch, or hands it to the workers.
    fn send_batch(&mut self, batch: Vec<Pfn>, progress: &mut Progress) -> Result<()> {
        let Some(workers) = &mut self.workers else {
            let outcome = self.batches.send(&batch, progress.last)?;
            return self.note(&outcome, progress);
        };
        let depth = workers.depth();
        let submitted = workers.submit(&Request { batch, last: progress.last });
        submitted.map_err(|source| Error::Worker { what: "handing out work", source })?;
        self.under_way += 1;
        while self.under_way >= depth {
            self.collect(progress)?;
        }
        Ok(())
    }

    /// Waits for one of the batches that the workers have.
    fn collect(&mut self, progress: &mut Progress) -> Result<()> {
        if self.toolstack.aborted() {
            return Err(Error::Aborted);
        }
        let Some(workers) = &mut self.workers else { return Ok(()) };
        let reply = workers.collect().map_err(|source| match self.toolstack.aborted() {
            true => Error::Aborted,
            false => Error::Worker { what: "waiting for workers", source },
        })?;
        self.under_way = self.under_way.saturating_sub(1);
        self.note(&reply.map_err(Error::Batch)?, progress)
    }

    /// Remembers what has become of the pages of a batch, and tells the receiver what it must know.
    fn note(&mut self, outcome: &Outcome, progress: &mut Progress) -> Result<()> {
        self.count(outcome, progress);
        self.tell_vanished(outcome)?;
        progress.done += outcome.pages();
        self.report(progress);
        Ok(())
    }

    fn count(&mut self, outcome: &Outcome, progress: &mut Progress) {
        self.bytes += outcome.bytes;
        outcome.sent.iter().for_each(|pfn| self.sent.set(*pfn));
        let count = |list: usize| list as u64;
        let pages = &mut progress.pages;
        pages.tables += outcome.tables;
        pages.plain += count(outcome.sent.len()).saturating_sub(outcome.tables);
        pages.empty += count(outcome.without_data.len());
        if progress.last {
            // Without a frame now, they have simply no memory.
            pages.empty += count(outcome.without_frame.len());
            return;
        }
        for pfn in outcome.put_off.iter().chain(&outcome.without_frame) {
            pages.deferred += 1;
            self.deferred.set(*pfn);
        }
    }

    /// Tells the receiver of pages that it was sent and that have no memory any more. A page it
    /// never heard of needs no word.
    fn tell_vanished(&mut self, outcome: &Outcome) -> Result<()> {
        let gone = outcome.without_frame.iter();
        let gone = gone.map(|&pfn| PageEntry { pfn, kind: PageType::Invalid });
        let known: Vec<PageEntry> = gone
            .chain(outcome.without_data.iter().copied())
            .filter(|e| self.sent.get(e.pfn) || e.kind == PageType::Broken)
            .collect();
        if known.is_empty() {
            return Ok(());
        }
        let head = libxc::page_data_head(&known)?;
        self.write_record(&head, "writing page data")
    }
}
