//! Sends one batch of pages: looks up frames, asks for types, maps, normalises page tables, writes
//! a page-data record.
//!
//! A batch needs nothing of other batches of its pass, and whoever sends it keeps nothing of it but
//! mappings ([`super::kept`]): what became of its pages is the [`Outcome`], and [`super::pass`]
//! remembers it.

use std::rc::Rc;

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
}

/// The pass that a batch is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// 0-based.
    pub number: u32,
    /// The guest is suspended: nothing may be put off.
    pub last: bool,
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

/// A page on its way: its pfn, its frame and its type.
#[derive(Clone, Copy)]
struct Page {
    pfn: Pfn,
    frame: u64,
    kind: PageType,
}

/// Where a page is mapped: in which mapping, which page of it.
type Place<P> = (Rc<P>, usize);

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
        let (tables, kept) = (Vec::new(), Kept::new());
        BatchSender { domain, out, space, tables, kept, kept_pages: 0, pass: 0 }
    }

    /// What has been done for the domain so far, and with kept mappings.
    pub(super) fn counters(&self) -> Counters {
        Counters { kept_pages: self.kept_pages, ..self.domain.counters() }
    }

    /// Sends `batch`, at most [`crate::hypervisor::BATCH_PAGES_MAX`] pages, as part of `pass`.
    ///
    /// # Errors
    /// Xen's, the stream's; in the last pass also a page that cannot be sent.
    pub(super) fn send(&mut self, batch: &[Pfn], pass: Pass) -> Result<Outcome> {
        if self.pass != pass.number {
            self.pass = pass.number;
            self.let_go_of_stale(pass);
        }
        let mut outcome = Outcome::default();
        let pages = self.look_up(batch, &mut outcome)?;
        let (data, empty): (Vec<Page>, Vec<Page>) =
            pages.into_iter().partition(|page| page.kind.has_data());
        let empty = empty.iter().map(|page| PageEntry { pfn: page.pfn, kind: page.kind });
        outcome.without_data.extend(empty);
        self.send_pages(&data, pass, &mut outcome)?;
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
    fn look_up(&self, batch: &[Pfn], outcome: &mut Outcome) -> Result<Vec<Page>> {
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

    /// Sends pages that have data, as one record. If they cannot be mapped while the guest runs,
    /// tries halves, so that only the pages at fault are put off.
    fn send_pages(&mut self, pages: &[Page], pass: Pass, outcome: &mut Outcome) -> Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        match self.map(pages) {
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
                    self.send_pages(left, pass, outcome)?;
                    self.send_pages(right, pass, outcome)
                }
            },
        }
    }

    /// Finds `pages` among the mappings that are kept, and maps the others.
    fn map(&self, pages: &[Page]) -> HvResult<Mapped<D::Pages>> {
        let find = |page: &Page| match &self.space {
            Space::Pv(_) => self.kept.find(page.pfn, page.frame),
            // The frame that is mapped may be behind another gfn by now.
            Space::Translated { .. } => None,
        };
        let kept: Vec<_> = pages.iter().map(find).collect();
        let others = pages.iter().zip(&kept).filter(|(_, place)| place.is_none());
        let new_pages: Vec<(Pfn, u64)> = others.map(|(page, _)| (page.pfn, page.frame)).collect();
        let frames: Vec<u64> = new_pages.iter().map(|(_, frame)| *frame).collect();
        let new = match frames.as_slice() {
            [] => None,
            frames => Some(Rc::new(self.domain.map(frames, Access::Read)?)),
        };
        let mut next = new.iter().flat_map(|new| (0..).map(|index| (Rc::clone(new), index)));
        let places = kept.into_iter().filter_map(|place| place.or_else(|| next.next())).collect();
        Ok(Mapped { places, new, new_pages })
    }

    /// Keeps what was mapped for a batch of `pass`, if that is of use: what only the first pass has
    /// sent is not. What the last pass maps is kept because it can be removed after the pause.
    fn keep(&mut self, mapped: Mapped<D::Pages>, pass: Pass) {
        let pages_max = match pass {
            Pass { number: 0, .. } => return,
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
        Pass { last, .. }: Pass,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let mut entries = Vec::with_capacity(pages.len());
        let mut sources = Vec::with_capacity(pages.len());
        let mut copies = 0;
        for (page, place) in pages.iter().zip(&mapped.places) {
            if !last && !self.space.is_at(page.pfn, page.frame) {
                outcome.put_off.push(page.pfn);
                continue;
            }
            let source = match page.kind.table_level() {
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
            entries.push(PageEntry { pfn: page.pfn, kind: page.kind });
            sources.push((place, source));
        }
        if entries.is_empty() {
            return Ok(());
        }
        let head = libxc::page_data_head(&entries)?;
        let pieces: Vec<PagePiece<'_, D::Pages>> = sources
            .iter()
            .map(|&((memory, index), copy)| match copy.and_then(|c| self.tables.get(c)) {
                Some(table) => PagePiece::Copied(table),
                None => PagePiece::Mapped(memory.as_ref(), *index),
            })
            .collect();
        self.out
            .write_pages(&head, &pieces)
            .map_err(|source| Error::Stream { what: "writing page data", source })?;
        self.kept_pages += sources.iter().filter(|(place, _)| mapped.had(place)).count() as u64;
        outcome.bytes += (head.len() + pieces.len() * PAGE_SIZE) as u64;
        outcome.records += 1;
        outcome.tables += copies as u64;
        outcome.sent.extend(entries.iter().map(|entry| entry.pfn));
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
