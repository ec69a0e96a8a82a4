//! Sends one set of pages, batch by batch: look up frames, ask for types, map, normalise page
//! tables, write a page-data record.
//!
//! A page that cannot be sent while the guest runs (it has been ballooned out, its table is in
//! motion, its frame cannot be mapped any more) is *deferred*: its bit is remembered and it
//! belongs to the last pass. In the last pass nothing can be put off: what has memory goes out,
//! or the save fails. Stock drops a table there without a word; see `GuestError::Table`.

use crate::bitmap::PageBitmap;
use crate::error::{Error, GuestError, Result};
use crate::frame::{Mfn, PageBuf, PageType, Pfn};
use crate::hypervisor::{
    Access, BATCH_PAGES_MAX, ForeignPages, PagePiece, SourceDomain, StreamOut, Toolstack,
};
use crate::report::{Event, PassPages};
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
    /// Number of pfns, holes included.
    pub(super) fn pages(&self) -> u64 {
        match self {
            Space::Translated { pages } => *pages,
            Space::Pv(map) => map.pages(),
        }
    }

    /// The frame behind `pfn` now, if there is one.
    fn frame(&self, pfn: Pfn) -> Option<u64> {
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

/// One pass under way, and what outlives it.
pub(super) struct PassSender<'a, D: SourceDomain, O, T> {
    pub(super) domain: &'a D,
    pub(super) out: &'a mut O,
    pub(super) toolstack: &'a mut T,
    pub(super) space: Space<D::Pages>,
    /// Pages put off to the last pass.
    deferred: PageBitmap,
    /// Pages that the receiver has heard of, and must be told when they vanish.
    sent: PageBitmap,
    /// Bytes of the stream so far.
    pub(super) bytes: u64,
    /// Copies of page tables, reused from batch to batch.
    tables: Vec<Box<PageBuf>>,
}

/// A page on its way: its pfn, its frame and its type.
#[derive(Clone, Copy)]
struct Page {
    pfn: Pfn,
    frame: u64,
    kind: PageType,
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
        domain: &'a D,
        out: &'a mut O,
        toolstack: &'a mut T,
        space: Space<D::Pages>,
    ) -> Self {
        let pages = space.pages();
        PassSender {
            domain,
            out,
            toolstack,
            space,
            deferred: PageBitmap::new(pages),
            sent: PageBitmap::new(pages),
            bytes: 0,
            tables: Vec::new(),
        }
    }

    /// Those of the pages put off that have memory now, and those that the receiver was sent and
    /// must hear the end of.
    pub(super) fn due(&self) -> PageBitmap {
        let mut due = PageBitmap::new(self.deferred.len());
        let is_due = |pfn: &Pfn| self.space.frame(*pfn).is_some() || self.sent.get(*pfn);
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
            self.send_batch(&batch, &mut progress)?;
            progress.done += batch.len() as u64;
            self.report(&progress);
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
        self.out.write_all(record).map_err(|source| Error::Stream { what, source })?;
        self.bytes += record.len() as u64;
        Ok(())
    }

    fn report(&mut self, progress: &Progress) {
        let (done, pages) = (progress.done, progress.pages.wanted);
        self.toolstack.progress(&progress.what, done, pages);
        let (pass, bytes) = (progress.pass, self.bytes);
        self.toolstack.event(&Event::PassProgress { pass, done, pages, bytes });
    }

    fn send_batch(&mut self, batch: &[Pfn], progress: &mut Progress) -> Result<()> {
        let mut pages = Vec::with_capacity(batch.len());
        let mut gone = Vec::new();
        for &pfn in batch {
            match self.space.frame(pfn) {
                Some(frame) => pages.push(Page { pfn, frame, kind: PageType::Normal }),
                None => {
                    self.put_off(pfn, progress);
                    gone.push(pfn);
                }
            }
        }
        if !pages.is_empty() {
            let frames: Vec<u64> = pages.iter().map(|p| p.frame).collect();
            let kinds = self.domain.page_types(&frames)?;
            for (page, kind) in pages.iter_mut().zip(kinds) {
                page.kind = kind;
            }
        }
        let (data, empty): (Vec<Page>, Vec<Page>) =
            pages.into_iter().partition(|p| p.kind.has_data());
        progress.pages.empty += empty.len() as u64;
        self.send_vanished(&gone, &empty)?;
        self.send_pages(&data, progress)
    }

    /// Tells the receiver of pages that it was sent and that have no memory any more. A page it
    /// never heard of needs no word.
    fn send_vanished(&mut self, gone: &[Pfn], empty: &[Page]) -> Result<()> {
        let gone = gone.iter().map(|&pfn| PageEntry { pfn, kind: PageType::Invalid });
        let empty = empty.iter().map(|p| PageEntry { pfn: p.pfn, kind: p.kind });
        let known: Vec<PageEntry> = gone
            .chain(empty)
            .filter(|e| self.sent.get(e.pfn) || e.kind == PageType::Broken)
            .collect();
        if known.is_empty() {
            return Ok(());
        }
        let head = libxc::page_data_head(&known)?;
        self.write_record(&head, "writing page data")
    }

    /// Sends pages that have data, as one record. If they cannot be mapped while the guest runs,
    /// tries halves, so that only the pages at fault are put off.
    fn send_pages(&mut self, pages: &[Page], progress: &mut Progress) -> Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let frames: Vec<u64> = pages.iter().map(|p| p.frame).collect();
        match self.domain.map(&frames, Access::Read) {
            Ok(mapping) => self.send_mapped(pages, &mapping, progress),
            Err(error) if progress.last => Err(error.into()),
            Err(_) => match pages {
                [page] => {
                    self.put_off(page.pfn, progress);
                    Ok(())
                }
                _ => {
                    let (left, right) = pages.split_at(pages.len() / 2);
                    self.send_pages(left, progress)?;
                    self.send_pages(right, progress)
                }
            },
        }
    }

    fn send_mapped(
        &mut self,
        pages: &[Page],
        mapping: &D::Pages,
        progress: &mut Progress,
    ) -> Result<()> {
        let mut entries = Vec::with_capacity(pages.len());
        let mut sources = Vec::with_capacity(pages.len());
        let mut copies = 0;
        for (index, page) in pages.iter().enumerate() {
            if !progress.last && !self.space.is_at(page.pfn, page.frame) {
                self.put_off(page.pfn, progress);
                continue;
            }
            let source = match page.kind.table_level() {
                Some(level) if !matches!(self.space, Space::Translated { .. }) => {
                    if !self.copy_table(index, page, level, mapping, copies, progress)? {
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
        let pieces: Vec<PagePiece<'_>> = sources
            .iter()
            .map(|&(index, copy)| match copy.and_then(|c| self.tables.get(c)) {
                Some(table) => PagePiece::Copied(table),
                None => PagePiece::Mapped(index),
            })
            .collect();
        self.out
            .write_pages(&head, mapping, &pieces)
            .map_err(|source| Error::Stream { what: "writing page data", source })?;
        self.bytes += (head.len() + pieces.len() * crate::frame::PAGE_SIZE) as u64;
        progress.pages.tables += copies as u64;
        progress.pages.plain += (entries.len() - copies) as u64;
        entries.iter().for_each(|e| self.sent.set(e.pfn));
        Ok(())
    }

    /// Copies the table `page` and normalises the copy, which becomes number `slot`. `false`: it
    /// is in motion and has been put off.
    fn copy_table(
        &mut self,
        index: usize,
        page: &Page,
        level: u8,
        mapping: &D::Pages,
        slot: usize,
        progress: &mut Progress,
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
            Err(_) if !progress.last => {
                self.put_off(page.pfn, progress);
                Ok(false)
            }
            Err(Unfit::Superpage) => Err(GuestError::Superpage { pfn: page.pfn, level }.into()),
            Err(Unfit::Frame { entry, mfn }) => {
                Err(GuestError::Table { pfn: page.pfn, level, entry, mfn }.into())
            }
        }
    }

    /// Leaves `pfn` to the last pass; in the last pass it has simply no memory.
    fn put_off(&mut self, pfn: Pfn, progress: &mut Progress) {
        if progress.last {
            progress.pages.empty += 1;
        } else {
            progress.pages.deferred += 1;
            self.deferred.set(pfn);
        }
    }
}
