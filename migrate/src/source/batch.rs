//! Sends one batch of pages: looks up frames, asks for types, maps, normalises page tables, writes
//! a page-data record, or one of digests.
//!
//! It does so in two steps: what a batch consists of is looked up ([`BatchSender::look_up`]) before
//! the batch in front of it is sent ([`BatchSender::send`]), so that its pages can be mapped
//! meanwhile. Both are in one pass, after its dirty bits were read.
//!
//! A batch needs nothing of other batches of its pass, and whoever sends it keeps nothing of it but
//! mappings ([`super::kept`]): what became of its pages is the [`Outcome`], and [`super::pass`]
//! remembers it.

use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::counters::Counters;
use crate::error::{Error, GuestError, Result};
use crate::frame::{Mfn, PAGE_SIZE, PageBuf, PageType, Pfn};
use crate::hypervisor::{
    Access, DomainInfo, ForeignPages, HvResult, PagePiece, SourceDomain, StreamOut,
};
use crate::runs;
use crate::source::kept::{self, Kept};
use crate::source::pv::PhysMap;
use crate::source::reduce::{Reducer, Reducing, SAMPLES};
use crate::stream::digest::{self, PageDigest};
use crate::stream::libxc::{self, PageEntry};
use crate::x86::pv::{self, Unfit};

/// How pfns become frames, and page tables stream content.
pub(super) enum Space<P> {
    /// Pfn and frame are the same.
    Translated {
        /// Pfns: `0..pages`.
        pages: u64,
    },
    /// Through the guest's p2m.
    Pv(PhysMap<P>),
}

impl<P: ForeignPages> Space<P> {
    /// Looks at the domain, which `info` describes.
    ///
    /// # Errors
    /// Xen's; a guest that cannot be saved, or whose p2m makes no sense.
    pub(super) fn open<D>(domain: &D, info: &DomainInfo) -> Result<Self>
    where
        D: SourceDomain<Pages = P>,
    {
        if info.hvm {
            return Ok(Space::Translated { pages: domain.maximum_gpfn()? + 1 });
        }
        if domain.address_bits()? != 64 {
            return Err(Error::Unsupported("a 32-bit PV guest cannot be saved by this version"));
        }
        Ok(Space::Pv(PhysMap::open(domain, info)?))
    }

    /// Number of pfns, holes included.
    pub(super) fn pages(&self) -> u64 {
        match self {
            Space::Translated { pages } => *pages,
            Space::Pv(map) => map.pages(),
        }
    }

    /// The frame behind `pfn` now, if there is one.
    pub(super) fn frame(&self, pfn: Pfn) -> Option<u64> {
        match self {
            Space::Translated { .. } => Some(pfn.0),
            Space::Pv(map) => map.mfn(pfn).map(|mfn| mfn.0),
        }
    }

    /// Whether `frame`, which is mapped, is the page `pfn`. A guest that balloons may have given
    /// it back and got it again as another page since [`Space::frame`]; while it is mapped that
    /// cannot happen any more.
    fn is_at(&self, pfn: Pfn, frame: u64) -> bool {
        match self {
            Space::Translated { .. } => true,
            Space::Pv(map) => map.pfn(Mfn(frame)) == Some(pfn),
        }
    }

    /// Makes a copy of a page table fit for the stream.
    fn normalise(&self, level: u8, table: &mut PageBuf) -> std::result::Result<(), Unfit> {
        match self {
            Space::Translated { .. } => Ok(()),
            Space::Pv(map) => pv::normalise(level, table, |mfn| map.pfn(mfn)),
        }
    }
}

/// Sends batches.
pub(super) struct BatchSender<'a, D: SourceDomain, O> {
    pub(super) domain: &'a D,
    pub(super) out: &'a mut O,
    pub(super) space: Space<D::Pages>,
    /// Copies of page tables, reused from batch to batch.
    tables: Vec<Box<PageBuf>>,
    kept: Kept<D::Pages>,
    /// Pages that were sent out of it.
    kept_pages: u64,
    /// The pass of the latest batch.
    pass: u32,
    /// Leaves out what need not be sent; `None`: everything is sent.
    reducer: Option<Reducer<'a>>,
    /// A page that is looked at.
    page: Box<PageBuf>,
}

/// The pass that a batch is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// 0-based.
    pub number: u32,
    /// The guest is suspended: nothing may be put off.
    pub last: bool,
    /// What goes out is not the pages but their digests.
    pub digests: bool,
}

/// What became of the pages of a batch: each is in one of the four lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Sent.
    #[serde(with = "runs::pfns")]
    pub sent: Vec<Pfn>,
    /// Not to be sent while the guest runs; none in the last pass.
    #[serde(with = "runs::pfns")]
    pub put_off: Vec<Pfn>,
    /// Without a frame at this moment.
    #[serde(with = "runs::pfns")]
    pub without_frame: Vec<Pfn>,
    /// Without data: what Xen has behind the frame is no memory, or broken.
    #[serde(with = "runs::entries")]
    pub without_data: Vec<PageEntry>,
    /// How many of `sent` are page tables, which went normalised.
    pub tables: u64,
    /// Records written.
    pub records: u64,
    /// Bytes written.
    pub bytes: u64,
}

impl Outcome {
    /// Number of pages of the batch.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let without = self.without_frame.len() + self.without_data.len();
        (self.sent.len() + self.put_off.len() + without) as u64
    }
}

/// A batch that has been looked up and is to be sent.
pub(super) struct Looked {
    pass: Pass,
    /// Its pages that have data.
    data: Vec<Page>,
    /// What has become of all others.
    outcome: Outcome,
}

/// A page on its way: its pfn, its frame and its type.
#[derive(Clone, Copy)]
struct Page {
    pfn: Pfn,
    frame: u64,
    kind: PageType,
}

/// Where a page is mapped: in which mapping, which page of it.
type Place<P> = (Rc<P>, usize);

/// A page that can be sent.
struct Ready<'m, P> {
    entry: PageEntry,
    place: &'m Place<P>,
    /// Which copy goes instead of it.
    copy: Option<usize>,
}

/// When something is written, and how long the way has been waited for before.
fn before<P: ForeignPages>(
    reducer: Option<&Reducer<'_>>,
    out: &impl StreamOut<P>,
) -> (Duration, u64) {
    reducer.map_or((Duration::ZERO, 0), |reducer| (reducer.now(), out.stalled_ns()))
}

/// A record that names `pages`, without their content.
fn alloc_only<P>(pages: &[Ready<'_, P>]) -> Result<Vec<u8>> {
    let entry = |page: &Ready<'_, P>| PageEntry { kind: PageType::AllocOnly, ..page.entry };
    Ok(libxc::page_data_head(&pages.iter().map(entry).collect::<Vec<_>>())?)
}

/// Those of `pages` that are nowhere, and their frames.
fn others<P>(pages: &[Page], places: &[Option<Place<P>>]) -> Vec<(Pfn, u64)> {
    let others = pages.iter().zip(places).filter(|(_, place)| place.is_none());
    others.map(|(page, _)| (page.pfn, page.frame)).collect()
}

fn frames_of(pages: &[(Pfn, u64)]) -> Vec<u64> {
    pages.iter().map(|(_, frame)| *frame).collect()
}

/// Pages that are mapped.
struct Mapped<P> {
    /// Where each is.
    places: Vec<Place<P>>,
    /// The mapping that was made for those that were in none, if there were such.
    new: Option<Rc<P>>,
    /// What it has: pages and their frames.
    new_pages: Vec<(Pfn, u64)>,
}

impl<P> Mapped<P> {
    /// Whether `place` was mapped before.
    fn had(&self, (memory, _): &Place<P>) -> bool {
        self.new.as_ref().is_none_or(|new| !Rc::ptr_eq(new, memory))
    }
}

impl<'a, D, O> BatchSender<'a, D, O>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
{
    /// Sends pages of `domain`, which `space` describes, to `out`.
    pub(super) fn new(domain: &'a D, out: &'a mut O, space: Space<D::Pages>) -> Self {
        let (tables, kept, page) = (Vec::new(), Kept::new(), PageBuf::zeroed());
        let (kept_pages, pass, reducer) = (0, 0, None);
        BatchSender { domain, out, space, tables, kept, kept_pages, pass, reducer, page }
    }

    /// The same, but for what may be left out of what it sends.
    pub(super) fn reduced(self, reducing: Reducing<'a>) -> Self {
        BatchSender { reducer: Reducer::new(reducing), ..self }
    }

    /// Others may have sent pages of these runs since this has.
    pub(super) fn take_over(&mut self, runs: &[u64]) {
        if let Some(reducer) = &mut self.reducer {
            runs.iter().for_each(|run| reducer.forget_run(*run));
        }
    }

    /// What has been done for the domain so far, and with kept mappings.
    pub(super) fn counters(&self) -> Counters {
        let left_out = self.reducer.as_ref().map(|reducer| reducer.left_out).unwrap_or_default();
        Counters { kept_pages: self.kept_pages, left_out, ..self.domain.counters() }
    }

    /// Looks up what `batch`, at most [`crate::hypervisor::BATCH_PAGES_MAX`] pages, consists of, as
    /// part of `pass`.
    ///
    /// # Errors
    /// Xen's.
    pub(super) fn look_up(&mut self, batch: &[Pfn], pass: Pass) -> Result<Looked> {
        if self.pass != pass.number {
            self.pass = pass.number;
            self.let_go_of_stale(pass);
        }
        let mut outcome = Outcome::default();
        let pages = self.pages_of(batch, &mut outcome)?;
        let (data, empty): (Vec<Page>, Vec<Page>) =
            pages.into_iter().partition(|page| page.kind.has_data());
        let empty = empty.iter().map(|page| PageEntry { pfn: page.pfn, kind: page.kind });
        outcome.without_data.extend(empty);
        Ok(Looked { pass, data, outcome })
    }

    /// Sends a batch. While it goes out, what `next` needs can be mapped.
    ///
    /// # Errors
    /// Xen's, the stream's; in the last pass also a page that cannot be sent.
    pub(super) fn send(&mut self, batch: Looked, next: Option<&Looked>) -> Result<Outcome> {
        let Looked { pass, data, mut outcome } = batch;
        if let Some(reducer) = &mut self.reducer {
            let gone = outcome.without_data.iter().map(|entry| entry.pfn);
            outcome.without_frame.iter().copied().chain(gone).for_each(|pfn| reducer.forget(pfn));
        }
        let mapped = self.map(&data);
        if let Some(next) = next {
            let pages = others(&next.data, &self.find_kept(&next.data));
            self.domain.map_ahead(&frames_of(&pages));
        }
        self.send_pages(&data, mapped, pass, &mut outcome)?;
        Ok(outcome)
    }

    /// Lets go of mappings that are of no use any more. Nothing is unmapped in the last pass, for
    /// that would be part of the pause; what a suspended guest has given back, it does not miss.
    fn let_go_of_stale(&mut self, pass: Pass) {
        let space = &self.space;
        if !pass.last {
            self.kept.let_go_of_stale(|pfn| space.frame(pfn));
        }
    }

    /// The pages of `batch` that have a frame, with their types.
    fn pages_of(&self, batch: &[Pfn], outcome: &mut Outcome) -> Result<Vec<Page>> {
        let mut pages = Vec::with_capacity(batch.len());
        for &pfn in batch {
            match self.space.frame(pfn) {
                Some(frame) => pages.push(Page { pfn, frame, kind: PageType::Normal }),
                None => outcome.without_frame.push(pfn),
            }
        }
        if !pages.is_empty() {
            let frames: Vec<u64> = pages.iter().map(|page| page.frame).collect();
            let kinds = self.domain.page_types(&frames)?;
            for (page, kind) in pages.iter_mut().zip(kinds) {
                page.kind = kind;
            }
        }
        Ok(pages)
    }

    /// Sends pages that have data and are `mapped`, as one record. If they cannot be mapped while
    /// the guest runs, tries halves, so that only the pages at fault are put off.
    fn send_pages(
        &mut self,
        pages: &[Page],
        mapped: HvResult<Mapped<D::Pages>>,
        pass: Pass,
        outcome: &mut Outcome,
    ) -> Result<()> {
        match mapped {
            Ok(mapped) => {
                self.send_mapped(pages, &mapped, pass, outcome)?;
                self.keep(mapped, pass);
                Ok(())
            }
            Err(error) if pass.last => Err(error.into()),
            Err(_) => match pages {
                [page] => {
                    outcome.put_off.push(page.pfn);
                    Ok(())
                }
                _ => {
                    let (left, right) = pages.split_at(pages.len() / 2);
                    self.send_pages(left, self.map(left), pass, outcome)?;
                    self.send_pages(right, self.map(right), pass, outcome)
                }
            },
        }
    }

    /// Where each of `pages` is mapped already.
    fn find_kept(&self, pages: &[Page]) -> Vec<Option<Place<D::Pages>>> {
        let find = |page: &Page| match &self.space {
            Space::Pv(_) => self.kept.find(page.pfn, page.frame),
            // The frame that is mapped may be behind another gfn by now.
            Space::Translated { .. } => None,
        };
        pages.iter().map(find).collect()
    }

    /// Finds `pages` among the mappings that are kept, and maps the others.
    fn map(&self, pages: &[Page]) -> HvResult<Mapped<D::Pages>> {
        let kept = self.find_kept(pages);
        let new_pages = others(pages, &kept);
        let new = match frames_of(&new_pages).as_slice() {
            [] => None,
            frames => Some(Rc::new(self.domain.map(frames, Access::Read)?)),
        };
        let mut next = new.iter().flat_map(|new| (0..).map(|index| (Rc::clone(new), index)));
        let places = kept.into_iter().filter_map(|place| place.or_else(|| next.next())).collect();
        Ok(Mapped { places, new, new_pages })
    }

    /// Keeps what was mapped for a batch of `pass`, if that is of use: what only the first pass has
    /// sent is not, nor what is digested, which is all memory. What the last pass maps is kept
    /// because it can be removed after the pause.
    fn keep(&mut self, mapped: Mapped<D::Pages>, pass: Pass) {
        let pages_max = match pass {
            Pass { number: 0, .. } | Pass { digests: true, .. } => return,
            Pass { last: true, .. } => kept::LAST_PASS_PAGES_MAX,
            Pass { .. } if matches!(self.space, Space::Pv(_)) => kept::PAGES_MAX,
            Pass { .. } => return,
        };
        if let Some(memory) = mapped.new {
            self.kept.keep(memory, mapped.new_pages, pages_max);
        }
    }

    fn send_mapped(
        &mut self,
        pages: &[Page],
        mapped: &Mapped<D::Pages>,
        Pass { last, digests, .. }: Pass,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let mut ready = Vec::with_capacity(pages.len());
        let mut copies = 0;
        for (page, place) in pages.iter().zip(&mapped.places) {
            if !last && !self.space.is_at(page.pfn, page.frame) {
                outcome.put_off.push(page.pfn);
                continue;
            }
            let copy = match page.kind.table_level() {
                Some(level) if !matches!(self.space, Space::Translated { .. }) => {
                    if !self.copy_table(page, level, place, copies, last)? {
                        outcome.put_off.push(page.pfn);
                        continue;
                    }
                    copies += 1;
                    Some(copies - 1)
                }
                _ => None,
            };
            ready.push(Ready { entry: PageEntry { pfn: page.pfn, kind: page.kind }, place, copy });
        }
        if ready.is_empty() {
            return Ok(());
        }
        outcome.sent.extend(ready.iter().map(|page| page.entry.pfn));
        outcome.tables += copies as u64;
        self.kept_pages += ready.iter().filter(|page| mapped.had(page.place)).count() as u64;
        if digests {
            return self.write_digests(&ready, outcome);
        }
        if !self.looks_at(&ready) {
            return self.write_whole(&ready, outcome);
        }
        // A table that has been copied is not what the receiver will have.
        let (tables, ready): (Vec<_>, Vec<_>) =
            ready.into_iter().partition(|page| page.entry.kind != PageType::Normal);
        if !tables.is_empty() {
            self.write_whole(&tables, outcome)?;
        }
        self.write_reduced(&ready, outcome)
    }

    /// Writes what pages come to, as one record.
    fn write_digests(
        &mut self,
        ready: &[Ready<'_, D::Pages>],
        outcome: &mut Outcome,
    ) -> Result<()> {
        let mut pairs = Vec::with_capacity(ready.len());
        for Ready { entry, place: (memory, index), copy } in ready {
            let digest = match copy.and_then(|copy| self.tables.get(copy)) {
                Some(table) => PageDigest::of(table),
                None => {
                    memory.read_page(*index, &mut self.page);
                    PageDigest::of(&self.page)
                }
            };
            pairs.push((*entry, digest));
        }
        let record = digest::record(&pairs)?;
        let written = self.out.write_all(&record);
        written.map_err(|source| Error::Stream { what: "writing digests", source })?;
        outcome.bytes += record.len() as u64;
        outcome.records += 1;
        Ok(())
    }

    /// Writes pages as they are, as one record.
    fn write_whole(&mut self, ready: &[Ready<'_, D::Pages>], outcome: &mut Outcome) -> Result<()> {
        let entries: Vec<PageEntry> = ready.iter().map(|page| page.entry).collect();
        let head = libxc::page_data_head(&entries)?;
        let pieces: Vec<PagePiece<'_, D::Pages>> = ready
            .iter()
            .map(|page| match page.copy.and_then(|copy| self.tables.get(copy)) {
                Some(table) => PagePiece::Copied(table),
                None => PagePiece::Mapped(page.place.0.as_ref(), page.place.1),
            })
            .collect();
        let bytes = head.len() + pieces.len() * PAGE_SIZE;
        let (from, stalled) = before(self.reducer.as_ref(), self.out);
        self.out
            .write_pages(&head, &pieces)
            .map_err(|source| Error::Stream { what: "writing page data", source })?;
        if let Some(reducer) = &mut self.reducer {
            reducer.note_written(from, self.out.stalled_ns() > stalled, bytes);
            // What went is what the guest had at some moment.
            entries.iter().for_each(|entry| reducer.forget(entry.pfn));
        }
        outcome.bytes += bytes as u64;
        outcome.records += 1;
        Ok(())
    }

    /// Whether less may be sent of these pages than they are, and that is likely to pay.
    fn looks_at(&mut self, ready: &[Ready<'_, D::Pages>]) -> bool {
        let Some(reducer) = &mut self.reducer else { return false };
        reducer.begin(|sample, into| {
            if let Some(page) = ready.get(sample * ready.len() / SAMPLES) {
                page.place.0.read_page(page.place.1, into);
            }
        })
    }

    /// Writes what need be sent of pages.
    fn write_reduced(
        &mut self,
        ready: &[Ready<'_, D::Pages>],
        outcome: &mut Outcome,
    ) -> Result<()> {
        let again = self.pass > 0;
        let mut told = again || !matches!(self.space, Space::Translated { .. });
        for page in ready {
            let Some(reducer) = &mut self.reducer else { return Ok(()) };
            let from = reducer.now();
            page.place.0.read_page(page.place.1, &mut self.page);
            if let Some(record) = reducer.add(page.entry, &self.page, again, from)? {
                if !told {
                    // The receiver gives memory to all of them at once, and so in large extents.
                    told = true;
                    self.write_record(&alloc_only(ready)?, outcome)?;
                }
                self.write_record(&record, outcome)?;
            }
        }
        let last = match &mut self.reducer {
            Some(reducer) => {
                reducer.end();
                reducer.take()?
            }
            None => None,
        };
        last.map_or(Ok(()), |record| self.write_record(&record, outcome))
    }

    fn write_record(&mut self, record: &[u8], outcome: &mut Outcome) -> Result<()> {
        let (from, stalled) = before(self.reducer.as_ref(), self.out);
        self.out
            .write_all(record)
            .map_err(|source| Error::Stream { what: "writing page data", source })?;
        if let Some(reducer) = &mut self.reducer {
            reducer.note_written(from, self.out.stalled_ns() > stalled, record.len());
        }
        outcome.bytes += record.len() as u64;
        outcome.records += 1;
        Ok(())
    }

    /// Copies the table `page`, which is mapped at `place`, and normalises the copy, which becomes
    /// number `slot`. `false`: it is in motion, and has to be put off.
    fn copy_table(
        &mut self,
        page: &Page,
        level: u8,
        (memory, index): &Place<D::Pages>,
        slot: usize,
        last: bool,
    ) -> Result<bool> {
        if self.tables.len() <= slot {
            self.tables.push(PageBuf::zeroed());
        }
        let Some(table) = self.tables.get_mut(slot) else { return Ok(false) };
        memory.read_page(*index, table);
        match self.space.normalise(level, table) {
            Ok(()) => Ok(true),
            // What was a table when its type was asked for may be data by now, which looks like
            // anything, a superpage included.
            Err(_) if !last => Ok(false),
            Err(Unfit::Superpage) => Err(GuestError::Superpage { pfn: page.pfn, level }.into()),
            Err(Unfit::Frame { entry, mfn }) => {
                Err(GuestError::Table { pfn: page.pfn, level, entry, mfn }.into())
            }
        }
    }
}
