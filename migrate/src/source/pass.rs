//! Sends one set of pages, batch by batch, and remembers what has become of every page.
//!
//! A page that cannot be sent while the guest runs (it has been ballooned out, its table is in
//! motion, its frame cannot be mapped any more) is *put off*: its bit is remembered and it
//! belongs to the last pass. In the last pass nothing can be put off: what has memory goes out,
//! or the save fails. Stock drops a table there without a word; see `GuestError::Table`.
//!
//! A page that a lost link may have taken with it is sent *again*: with the next pass, or, in the
//! last, in one more set of pages, until all that has been sent is confirmed.

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::frame::{PAGE_SIZE, PageType, Pfn};
use crate::hypervisor::{BATCH_PAGES_MAX, LogLevel, SourceDomain, StreamOut, Toolstack};
use crate::report::{Event, PassPages};
use crate::source::batch::{BatchSender, Looked, Outcome, Pass};
use crate::source::crew::{Crew, Noted, Total};
use crate::source::shares::{Owners, Shares};
use crate::source::workers::{WorkerId, Workers};
use crate::stream::libxc::{self, PageEntry};
use crate::stream::link;

/// How often it is told how far a pass is, at most.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// One pass under way, and what outlives it.
pub(super) struct PassSender<'a, D: SourceDomain, O, T> {
    pub(super) batches: BatchSender<'a, D, O>,
    pub(super) toolstack: &'a mut T,
    /// Who sends the batches; else this process does.
    crew: Option<Crew<'a>>,
    /// Who of them sent which pages last, and so has them mapped and knows what was sent.
    owners: Owners,
    /// Pages that the domain owns, of those that it may have.
    owned: u64,
    /// Whether the receiver has been told of links, and so has to be told of passes.
    offered: bool,
    /// Pages put off to the last pass.
    deferred: PageBitmap,
    /// Pages that a lost link took with it; it is up to the caller to send them.
    pub(super) again: PageBitmap,
    /// Pages that the receiver has heard of, and must be told when they vanish.
    sent: PageBitmap,
    /// Bytes of the stream and of all links so far.
    pub(super) bytes: u64,
    /// Bytes of the pages that were sent, as many as they are.
    pub(super) page_bytes: u64,
}

/// A pass in numbers.
struct Progress {
    pass: Pass,
    what: String,
    pages: PassPages,
    done: u64,
    /// Of the latest batch that is done nothing had to be sent.
    hole: bool,
    /// When it was last told how far it is.
    told: Option<Duration>,
}

impl Progress {
    /// How many of the `left` pages that nobody has been handed yet are likely to have content. A
    /// guest may have far fewer pages than pfns, its holes all at the end: if those counted,
    /// whoever is slow would be handed much too much shortly before.
    fn likely_left(&self, owned: u64, left: u64) -> u64 {
        let handed = self.pages.wanted.saturating_sub(left);
        let with_content = handed.saturating_sub(self.pages.empty + self.pages.deferred);
        let owned = owned.saturating_sub(with_content);
        // Holes are sooner done with in large pieces.
        if self.hole || owned == 0 { left } else { owned.min(left) }
    }
}

impl<'a, D, O, T> PassSender<'a, D, O, T>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
    T: Toolstack,
{
    /// A sender that has sent nothing yet of a domain that owns `owned` pages.
    pub(super) fn new(
        owned: u64,
        batches: BatchSender<'a, D, O>,
        toolstack: &'a mut T,
        workers: Option<Box<dyn Workers + 'a>>,
    ) -> Self {
        let pages = batches.space.pages();
        PassSender {
            batches,
            toolstack,
            crew: workers.map(Crew::new),
            owners: Owners::new(pages),
            owned,
            offered: false,
            deferred: PageBitmap::new(pages),
            again: PageBitmap::new(pages),
            sent: PageBitmap::new(pages),
            bytes: 0,
            page_bytes: 0,
        }
    }

    /// Adds those of the pages put off that have memory now, and those that the receiver was sent
    /// and must hear the end of.
    pub(super) fn add_due(&self, set: &mut PageBitmap) {
        let is_due = |pfn: &Pfn| self.batches.space.frame(*pfn).is_some() || self.sent.get(*pfn);
        if self.deferred.count() > 0 {
            self.deferred.iter().filter(is_due).for_each(|pfn| set.set(pfn));
        }
    }

    /// The record that offers links to the receiver, if there can be any.
    pub(super) fn offer(&mut self) -> Option<Vec<u8>> {
        let record = self.crew.as_ref()?.offer()?.record();
        self.offered = record.is_some();
        record
    }

    /// Sends the pages of `set`. When it returns, the receiver has confirmed all that went over
    /// links, but for what is to be sent again. `last`: the guest is suspended, and nothing may be
    /// put off; what had to be sent again has been, and has taken the place of `set`. `meanwhile`
    /// is done while the workers, if there are any, send the last batches.
    ///
    /// # Errors
    /// Xen's, the stream's, [`Error::Aborted`]; in the last pass also a page that cannot be sent.
    pub(super) fn send(
        &mut self,
        pass: u32,
        set: &mut PageBitmap,
        last: bool,
        meanwhile: &mut dyn FnMut(&BatchSender<'a, D, O>) -> Result<()>,
    ) -> Result<()> {
        let pages = PassPages { wanted: set.count(), ..PassPages::default() };
        let what = if last { "Frames".into() } else { format!("Frames iteration {pass}") };
        let of = Pass { number: pass, last, digests: false };
        let mut progress = Progress { pass: of, what, pages, done: 0, hole: false, told: None };
        self.toolstack.event(&Event::PassStarted { pass, last, pages: pages.wanted });
        self.send_all(set, &mut progress, meanwhile)?;
        self.toolstack.event(&Event::PassEnded {
            pass,
            last,
            pages: progress.pages,
            bytes: self.bytes,
        });
        Ok(())
    }

    /// Sends the digests of all pages that the receiver has heard of: how many those are. The guest
    /// is suspended, and its last pass is over. `set` is room for them.
    ///
    /// # Errors
    /// As [`PassSender::send`] for the last pass.
    pub(super) fn send_digests(&mut self, pass: u32, set: &mut PageBitmap) -> Result<u64> {
        set.clone_from(&self.sent);
        let pages = PassPages { wanted: set.count(), ..PassPages::default() };
        let pass = Pass { number: pass, last: true, digests: true };
        let what = "Digests".into();
        let mut progress = Progress { pass, what, pages, done: 0, hole: false, told: None };
        self.send_all(set, &mut progress, &mut |_| Ok(()))?;
        Ok(pages.wanted)
    }

    /// Sends `set`, and in the last pass what was lost of it, until all is confirmed.
    fn send_all(
        &mut self,
        set: &mut PageBitmap,
        progress: &mut Progress,
        meanwhile: &mut dyn FnMut(&BatchSender<'a, D, O>) -> Result<()>,
    ) -> Result<()> {
        self.report(progress);
        loop {
            self.send_set(set, progress)?;
            meanwhile(&self.batches)?;
            self.collect_all(progress)?;
            self.end_pass()?;
            // What is still on its way would be part of the pause, and of no estimate of it.
            self.confirm(progress)?;
            if !progress.pass.last || self.again.count() == 0 {
                return Ok(());
            }
            set.clear_all();
            set.take(&mut self.again);
            progress.pages.wanted += set.count();
        }
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

    fn report(&mut self, progress: &mut Progress) {
        let (done, pages) = (progress.done, progress.pages.wanted);
        self.toolstack.progress(&progress.what, done, pages);
        let now = self.toolstack.now();
        if progress.told.is_some_and(|told| now.saturating_sub(told) < PROGRESS_INTERVAL) {
            return;
        }
        progress.told = Some(now);
        let (pass, bytes) = (progress.pass.number, self.bytes);
        let links = self.crew.as_ref().map(Crew::link_bytes).unwrap_or_default();
        self.toolstack.event(&Event::PassProgress { pass, done, pages, bytes, links });
    }

    /// Sends all of `set`, or hands it to the workers.
    fn send_set(&mut self, set: &PageBitmap, progress: &mut Progress) -> Result<()> {
        let mut shares = Shares::new(set, &self.owners);
        let pass = progress.pass;
        // What this process sends next, if there are no workers until then.
        let mut own: Option<(Vec<Pfn>, Looked)> = None;
        while shares.pages() > 0 {
            self.take_news(false, progress)?;
            match (self.free_worker(progress)?, &mut self.crew) {
                (Some(worker), Some(crew)) => {
                    let batch = match own.take() {
                        Some((batch, _)) => {
                            // It may be mapped already, for nobody.
                            self.batches.domain.map_ahead(&[]);
                            batch
                        }
                        None => {
                            let left = progress.likely_left(self.owned, shares.pages());
                            let wanted = crew.batch_pages(worker, left);
                            shares.next_batch(Some(worker), wanted)
                        }
                    };
                    let taken_over = self.owners.note(Some(worker), &batch);
                    crew.send(worker, batch, taken_over, pass);
                }
                _ => {
                    let batch = shares.next_batch(None, BATCH_PAGES_MAX);
                    self.owners.note(None, &batch);
                    let next = self.batches.look_up(&batch, pass)?;
                    if let Some((_, looked)) = own.take() {
                        self.send_own(looked, Some(&next), progress)?;
                    }
                    own = Some((batch, next));
                }
            }
        }
        own.map_or(Ok(()), |(_, looked)| self.send_own(looked, None, progress))
    }

    fn send_own(
        &mut self,
        batch: Looked,
        next: Option<&Looked>,
        progress: &mut Progress,
    ) -> Result<()> {
        let outcome = self.batches.send(batch, next)?;
        self.note(&outcome, progress)
    }

    /// Waits for a worker that can take a batch. `None`: there is none at all.
    fn free_worker(&mut self, progress: &mut Progress) -> Result<Option<WorkerId>> {
        while let Some(crew) = self.crew.as_mut().filter(|crew| crew.len() > 0) {
            if let Some(worker) = crew.free() {
                return Ok(Some(worker));
            }
            self.take_news(true, progress)?;
        }
        Ok(None)
    }

    /// Waits until no worker has a batch any more.
    fn collect_all(&mut self, progress: &mut Progress) -> Result<()> {
        while self.crew.as_ref().is_some_and(|crew| !crew.is_idle()) {
            self.take_news(true, progress)?;
        }
        Ok(())
    }

    /// Tells the receiver that a pass has ended, and sends links on to the next.
    fn end_pass(&mut self) -> Result<()> {
        let Some(crew) = self.crew.as_mut().filter(|_| self.offered) else { return Ok(()) };
        let (pass, links) = crew.end_pass();
        self.write_record(&link::pass_end_record(pass, links)?, "writing the end of a pass")
    }

    /// Waits until the receiver has confirmed all that went over links; what it has not, because
    /// a link is lost, has to be sent again.
    fn confirm(&mut self, progress: &mut Progress) -> Result<()> {
        if let Some(crew) = &mut self.crew {
            crew.confirm();
        }
        self.collect_all(progress)
    }

    /// Tells what this process and all workers have done. It is all over: whoever fails now is not
    /// counted, and that is all.
    pub(super) fn tell_work(&mut self) {
        self.tell_counts(Total::default(), self.batches.counters());
        if let Some(crew) = &mut self.crew {
            crew.count();
        }
        // The stream has had its last record: whatever the news, nothing is written any more.
        while let Some(crew) = self.crew.as_mut().filter(|crew| !crew.is_idle()) {
            match crew.news(true) {
                Ok(Some(Noted::Counted(total, counters))) => self.tell_counts(total, counters),
                Ok(Some(Noted::Lost { total, .. })) => self.tell_counts(total, Counters::default()),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn tell_counts(&mut self, total: Total, counters: Counters) {
        let Total { link, bytes, batches, queued } = total;
        self.toolstack.event(&Event::Counted { link, bytes, batches, queued, counters });
    }

    /// Takes what news there is of the workers; `wait` for some. Tells of an abort as well.
    fn take_news(&mut self, mut wait: bool, progress: &mut Progress) -> Result<()> {
        if self.toolstack.aborted() {
            return Err(Error::Aborted);
        }
        while let Some(crew) = &mut self.crew {
            let noted = crew.news(wait).map_err(|error| match self.toolstack.aborted() {
                true => Error::Aborted,
                false => error,
            })?;
            match noted {
                None => break,
                Some(noted) => self.act(noted, progress)?,
            }
            wait = false;
        }
        Ok(())
    }

    fn act(&mut self, noted: Noted, progress: &mut Progress) -> Result<()> {
        match noted {
            Noted::Nothing => {}
            Noted::Joined(link) => self.toolstack.event(&Event::LinkJoined { link }),
            Noted::Done(outcome) => self.note(&outcome, progress)?,
            Noted::Counted(total, counters) => self.tell_counts(total, counters),
            Noted::Lost { link, pages, why, total } => {
                self.write_record(&link::link_lost_record(link)?, "telling of a lost link")?;
                pages.iter().for_each(|pfn| self.again.set(*pfn));
                let text = format!("Connection {link} is lost: {why}");
                self.toolstack.log(LogLevel::Warn, &text);
                self.toolstack.event(&Event::LinkLost { link, why });
                self.tell_counts(total, Counters::default());
            }
        }
        Ok(())
    }

    /// Remembers what has become of the pages of a batch, and tells the receiver what it must know.
    fn note(&mut self, outcome: &Outcome, progress: &mut Progress) -> Result<()> {
        self.count(outcome, progress);
        self.tell_vanished(outcome)?;
        progress.done += outcome.pages();
        // Other answers than those to batches are about no page.
        if outcome.pages() > 0 {
            progress.hole = outcome.sent.is_empty();
        }
        self.report(progress);
        Ok(())
    }

    fn count(&mut self, outcome: &Outcome, progress: &mut Progress) {
        self.bytes += outcome.bytes;
        self.page_bytes += (outcome.sent.len() * PAGE_SIZE) as u64;
        outcome.sent.iter().for_each(|pfn| self.sent.set(*pfn));
        let count = |list: usize| list as u64;
        let pages = &mut progress.pages;
        pages.tables += outcome.tables;
        pages.plain += count(outcome.sent.len()).saturating_sub(outcome.tables);
        pages.empty += count(outcome.without_data.len());
        if progress.pass.last {
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
        if known.is_empty() || self.crew.as_mut().is_some_and(|crew| crew.tell(&known)) {
            return Ok(());
        }
        let head = libxc::page_data_head(&known)?;
        self.write_record(&head, "writing page data")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_not_taken_for_pages_that_are_left() {
        // 1000 pages of a guest that could have 100,000.
        let progress = |wanted, empty, hole| {
            let pages = PassPages { wanted, empty, ..PassPages::default() };
            let pass = Pass { number: 0, last: false, digests: false };
            Progress { pass, what: "".into(), pages, done: 0, hole, told: None }
        };
        let left = |left, empty| progress(100_000, empty, false).likely_left(1000, left);
        assert_eq!(left(100_000, 0), 1000);
        assert_eq!(left(99_300, 0), 300);
        assert_eq!(left(99_000, 0), 99_000);
        // Some of them were holes.
        assert_eq!(left(98_500, 600), 100);
        assert_eq!(left(98_000, 1000), 98_000);
        // In one of them, with pages behind it.
        assert_eq!(progress(100_000, 600, true).likely_left(1000, 98_500), 98_500);
        // A pass over what was written.
        assert_eq!(progress(500, 0, false).likely_left(1000, 200), 200);
    }
}
