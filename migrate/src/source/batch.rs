//! Sends one batch of pages: looks up frames, asks for types, maps, normalises page tables, writes
//! a page-data record.
//!
//! A batch needs nothing of other batches of its pass, and whoever sends it keeps nothing of it:
//! what became of its pages is the [`Outcome`], and [`super::pass`] remembers it.

use serde::{Deserialize, Serialize};

use crate::error::{Error, GuestError, Result};
use crate::frame::{Mfn, PAGE_SIZE, PageBuf, PageType, Pfn};
use crate::hypervisor::{Access, DomainInfo, ForeignPages, PagePiece, SourceDomain, StreamOut};
use crate::runs;
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

impl<'a, D, O> BatchSender<'a, D, O>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
{
    /// Sends pages of `domain`, which `space` describes, to `out`.
    pub(super) fn new(domain: &'a D, out: &'a mut O, space: Space<D::Pages>) -> Self {
        BatchSender { domain, out, space, tables: Vec::new() }
    }

    /// Sends `batch`, at most [`crate::hypervisor::BATCH_PAGES_MAX`] pages. `last`: the guest is
    /// suspended, nothing may be put off.
    ///
    /// # Errors
    /// Xen's, the stream's; in the last pass also a page that cannot be sent.
    pub(super) fn send(&mut self, batch: &[Pfn], last: bool) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let pages = self.look_up(batch, &mut outcome)?;
        let (data, empty): (Vec<Page>, Vec<Page>) =
            pages.into_iter().partition(|page| page.kind.has_data());
        let empty = empty.iter().map(|page| PageEntry { pfn: page.pfn, kind: page.kind });
        outcome.without_data.extend(empty);
        self.send_pages(&data, last, &mut outcome)?;
        Ok(outcome)
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
    fn send_pages(&mut self, pages: &[Page], last: bool, outcome: &mut Outcome) -> Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let frames: Vec<u64> = pages.iter().map(|p| p.frame).collect();
        match self.domain.map(&frames, Access::Read) {
            Ok(mapping) => self.send_mapped(pages, &mapping, last, outcome),
            Err(error) if last => Err(error.into()),
            Err(_) => match pages {
                [page] => {
                    outcome.put_off.push(page.pfn);
                    Ok(())
                }
                _ => {
                    let (left, right) = pages.split_at(pages.len() / 2);
                    self.send_pages(left, last, outcome)?;
                    self.send_pages(right, last, outcome)
                }
            },
        }
    }

    fn send_mapped(
        &mut self,
        pages: &[Page],
        mapping: &D::Pages,
        last: bool,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let mut entries = Vec::with_capacity(pages.len());
        let mut sources = Vec::with_capacity(pages.len());
        let mut copies = 0;
        for (index, page) in pages.iter().enumerate() {
            if !last && !self.space.is_at(page.pfn, page.frame) {
                outcome.put_off.push(page.pfn);
                continue;
            }
            let source = match page.kind.table_level() {
                Some(level) if !matches!(self.space, Space::Translated { .. }) => {
                    if !self.copy_table(index, page, level, mapping, copies, last)? {
                        outcome.put_off.push(page.pfn);
                        continue;
                    }
                    copies += 1;
                    Some(copies - 1)
                }
                _ => None,
            };
            entries.push(PageEntry { pfn: page.pfn, kind: page.kind });
            sources.push((index, source));
        }
        if entries.is_empty() {
            return Ok(());
        }
        let head = libxc::page_data_head(&entries)?;
        let pieces: Vec<PagePiece<'_, D::Pages>> = sources
            .iter()
            .map(|&(index, copy)| match copy.and_then(|c| self.tables.get(c)) {
                Some(table) => PagePiece::Copied(table),
                None => PagePiece::Mapped(mapping, index),
            })
            .collect();
        self.out
            .write_pages(&head, &pieces)
            .map_err(|source| Error::Stream { what: "writing page data", source })?;
        outcome.bytes += (head.len() + pieces.len() * PAGE_SIZE) as u64;
        outcome.records += 1;
        outcome.tables += copies as u64;
        outcome.sent.extend(entries.iter().map(|entry| entry.pfn));
        Ok(())
    }

    /// Copies the table `page` and normalises the copy, which becomes number `slot`. `false`: it
    /// is in motion, and has to be put off.
    fn copy_table(
        &mut self,
        index: usize,
        page: &Page,
        level: u8,
        mapping: &D::Pages,
        slot: usize,
        last: bool,
    ) -> Result<bool> {
        if self.tables.len() <= slot {
            self.tables.push(PageBuf::zeroed());
        }
        let Some(table) = self.tables.get_mut(slot) else { return Ok(false) };
        mapping.read_page(index, table);
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
