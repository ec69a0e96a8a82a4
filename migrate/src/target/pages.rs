//! Page data: from the stream into guest memory.
//!
//! A record is not read whole. Once its entries are known and what they need is populated, its
//! pages go batch by batch straight into the mapped frames. Page tables make a detour through a
//! private copy, to be localised. Pages that came reduced ([`reduced`]) are unpacked one by one, and
//! each is written whole: a page of zeros too, whatever its frame holds. No mapping outlives its batch: a frame that is mapped writable
//! cannot become a page table.

use crate::error::{Error, Result};
use crate::frame::{PAGE_SIZE, PageBuf, PageType, Pfn, WORDS_PER_PAGE};
use crate::hypervisor::{
    Access, BATCH_PAGES_MAX, ForeignPages, LogLevel, PageSlot, StreamIn, TargetDomain, Toolstack,
};
use crate::stream::FormatError;
use crate::stream::libxc::{PageEntry, RecordKind, page_data_count, page_data_entries};
use crate::stream::reduced::{self, Agreed, REDUCED_BYTES_MAX};
use crate::target::driver::Reader;
use crate::target::file::{Batch, REFERRED_MAX};
use crate::target::guest::{Frames, Guest, Memory};
use crate::x86::pv::referenced;

/// Most entries in a record. One that is full of pages has fewer than 2^15, by the limit that
/// any record has; stock puts 1024 into each.
const ENTRIES_MAX: usize = 1 << 16;

/// Lines about single pages that differ.
const VERIFY_LINES_MAX: u64 = 10;

/// What could not be done, if page data ends early.
const PAGES: &str = "could not read page data from the stream";

/// What came of comparing pages.
#[derive(Debug, Default)]
pub(super) struct Verification {
    bad: u64,
    first: Option<Pfn>,
}

impl Verification {
    pub(super) fn note<T: Toolstack>(&mut self, pfn: Pfn, toolstack: &mut T) {
        self.bad += 1;
        self.first = Some(self.first.map_or(pfn, |first| first.min(pfn)));
        if self.bad <= VERIFY_LINES_MAX {
            toolstack.log(LogLevel::Error, &format!("verify: pfn {pfn} differs"));
        }
    }

    /// Says how many pages differed, if any did.
    pub(super) fn report<T: Toolstack>(&self, toolstack: &mut T) {
        if let Some(first) = self.first {
            let bad = self.bad;
            let text = format!("{bad} pages differ from what was sent before (first: pfn {first})");
            toolstack.log(LogLevel::Error, &text);
        }
    }
}

/// Reads page data and places it. It keeps nothing of one record for the next but room.
pub(super) struct Placer<'a, D> {
    domain: &'a D,
    /// Private copies of page tables, or of all pages while comparing.
    copies: Vec<Box<PageBuf>>,
}

impl<'a, D: TargetDomain> Placer<'a, D> {
    pub(super) fn new(domain: &'a D) -> Self {
        Placer { domain, copies: Vec::new() }
    }

    /// Reads the body of a page-data record, `length` bytes, and places its pages.
    pub(super) fn receive<I, M>(
        &mut self,
        reader: &mut Reader<'_, I, D::Pages>,
        memory: &mut M,
        length: usize,
    ) -> Result<()>
    where
        I: StreamIn<D::Pages>,
        M: Memory,
    {
        let data = with_data(reader, memory, length)?;
        batches(&data).try_for_each(|batch| self.place(reader, memory, batch))
    }

    /// Reads the body of a record of reduced pages, `length` bytes, and places them.
    pub(super) fn receive_reduced<I, M>(
        &mut self,
        reader: &mut Reader<'_, I, D::Pages>,
        memory: &mut M,
        length: usize,
        agreed: &Agreed,
    ) -> Result<()>
    where
        I: StreamIn<D::Pages>,
        M: Memory,
    {
        let kind = RecordKind::RxlReduced.code();
        if length > REDUCED_BYTES_MAX {
            let why = "longer than a record of its kind may be";
            return Err(FormatError::Length { kind, length, why }.into());
        }
        if agreed.reduce.is_none() {
            let why = "comes over a link for which it was not agreed";
            return Err(FormatError::Order { kind, why }.into());
        }
        let body = reader.body(length)?;
        let parsed = reduced::parse(&body)?;
        memory.prepare(&parsed.entries)?;
        let frames = memory.frames(parsed.entries.iter().map(|entry| entry.pfn))?;
        let pages = self.domain.map(&frames, Access::ReadWrite)?;
        let read = |index: usize, into: &mut PageBuf| pages.read_page(index, into);
        parsed.unpack(agreed, read, |index, page| pages.write_page(index, page))?;
        Ok(())
    }

    /// Reads the body of a page-data record, and compares its pages with what has been placed:
    /// those that differ.
    pub(super) fn compare<I, M>(
        &mut self,
        reader: &mut Reader<'_, I, D::Pages>,
        memory: &mut M,
        length: usize,
    ) -> Result<Vec<Pfn>>
    where
        I: StreamIn<D::Pages>,
        M: Memory,
    {
        let data = with_data(reader, memory, length)?;
        let mut bad = Vec::new();
        for batch in batches(&data) {
            bad.extend(self.compare_batch(reader, memory, batch)?);
        }
        Ok(bad)
    }

    /// Reads the pages of `batch`, whose pfns differ, into the guest.
    pub(super) fn place<I, M>(
        &mut self,
        reader: &mut Reader<'_, I, D::Pages>,
        memory: &mut M,
        batch: &[PageEntry],
    ) -> Result<()>
    where
        I: StreamIn<D::Pages>,
        M: Frames,
    {
        let frames = memory.frames(batch.iter().map(|entry| entry.pfn))?;
        let pages = self.domain.map(&frames, Access::ReadWrite)?;
        self.make_copies(batch.iter().filter(|entry| is_table(entry)).count());
        let mut copies = self.copies.iter_mut();
        let slot = |(index, entry)| match is_table(entry).then(|| copies.next()).flatten() {
            Some(copy) => PageSlot::Copied(copy),
            None => PageSlot::Mapped(index),
        };
        let mut slots: Vec<PageSlot<'_>> = batch.iter().enumerate().map(slot).collect();
        read_pages(reader, &pages, &mut slots)?;

        let mut tables: Vec<(usize, &mut PageBuf)> = Vec::new();
        for (index, slot) in slots.into_iter().enumerate() {
            if let PageSlot::Copied(copy) = slot {
                tables.push((index, copy));
            }
        }
        let mut copies: Vec<&mut PageBuf> =
            tables.iter_mut().map(|(_, copy)| &mut **copy).collect();
        memory.localise(&mut copies)?;
        for (index, table) in tables {
            pages.write_page(index, table);
        }
        Ok(())
    }

    /// Reads the pages of `batch` and compares them with the guest's: those that differ.
    fn compare_batch<I, M>(
        &mut self,
        reader: &mut Reader<'_, I, D::Pages>,
        memory: &mut M,
        batch: &[PageEntry],
    ) -> Result<Vec<Pfn>>
    where
        I: StreamIn<D::Pages>,
        M: Memory,
    {
        let frames = memory.frames(batch.iter().map(|entry| entry.pfn))?;
        let pages = self.domain.map(&frames, Access::Read)?;
        self.make_copies(batch.len());
        let slots = self.copies.iter_mut().map(|copy| PageSlot::Copied(copy));
        let mut slots: Vec<PageSlot<'_>> = slots.take(batch.len()).collect();
        read_pages(reader, &pages, &mut slots)?;

        let both = batch.iter().zip(&mut self.copies);
        let tables = both.filter(|(entry, _)| matches!(entry.kind, PageType::Table { .. }));
        let mut tables: Vec<&mut PageBuf> = tables.map(|(_, copy)| &mut **copy).collect();
        memory.localise(&mut tables)?;
        let mut there = PageBuf::zeroed();
        let mut bad = Vec::new();
        for (index, (entry, sent)) in batch.iter().zip(&self.copies).enumerate() {
            pages.read_page(index, &mut there);
            if there.0 != sent.0 {
                bad.push(entry.pfn);
            }
        }
        Ok(bad)
    }

    /// Sees to it that there are at least `count` private copies.
    fn make_copies(&mut self, count: usize) {
        if count > self.copies.len() {
            self.copies.resize_with(count, PageBuf::zeroed);
        }
    }
}

/// Reads the entries of a record, prepares the guest for them, and returns those whose pages
/// follow.
fn with_data<I, P, M>(
    reader: &mut Reader<'_, I, P>,
    memory: &mut M,
    length: usize,
) -> Result<Vec<PageEntry>>
where
    I: StreamIn<P>,
    P: ForeignPages,
    M: Memory,
{
    let short = |why| FormatError::Length { kind: RecordKind::PageData.code(), length, why };
    if length < 8 {
        return Err(short("shorter than its count").into());
    }
    let count = page_data_count(reader.array(PAGES)?, length)?;
    if count > ENTRIES_MAX {
        return Err(short("more pages than a record may have here").into());
    }
    let mut entries = page_data_entries(&reader.vec(8 * count, PAGES)?, length)?;
    memory.prepare(&entries)?;
    entries.retain(|entry| entry.kind.has_data());
    Ok(entries)
}

/// Reads the entries of a page-data record of a file, `length` bytes, and its page tables, prepares
/// the guest for them, and passes over the pages, for others to read: `give` gets each batch before
/// the next is made.
pub(super) fn batches_in_file<I, P, G>(
    reader: &mut Reader<'_, I, P>,
    guest: &mut G,
    length: usize,
    mut give: impl FnMut(Batch, &mut G) -> Result<()>,
) -> Result<()>
where
    I: StreamIn<P>,
    P: ForeignPages,
    G: Guest,
{
    let data = with_data(reader, guest, length)?;
    let mut offset = reader.pass_over((PAGE_SIZE * data.len()) as u64, PAGES)?;
    for mut rest in batches(&data) {
        while !rest.is_empty() {
            let (count, referred) = first_in_file(reader, offset, rest)?;
            let (entries, later) = rest.split_at(count);
            let frames = Guest::frames(guest, entries.iter().map(|entry| entry.pfn))?;
            let referred_frames = guest.resolve(&referred)?;
            let entries = entries.to_vec();
            give(Batch { offset, entries, frames, referred, referred_frames }, guest)?;
            offset += (PAGE_SIZE * count) as u64;
            rest = later;
        }
    }
    Ok(())
}

/// How many of `entries`, whose pages begin at byte `offset` of the file, make a batch, and the pfns
/// that the page tables among them refer to, ascending: at most [`REFERRED_MAX`].
fn first_in_file<I, P>(
    reader: &mut Reader<'_, I, P>,
    offset: u64,
    entries: &[PageEntry],
) -> Result<(usize, Vec<Pfn>)>
where
    I: StreamIn<P>,
    P: ForeignPages,
{
    let mut referred = Vec::new();
    let mut count = entries.len();
    for (index, _) in entries.iter().enumerate().filter(|(_, entry)| is_table(entry)) {
        let table = reader.page_at(offset + (PAGE_SIZE * index) as u64, PAGES)?;
        let more: Vec<Pfn> = referenced(&table).collect();
        if referred.len() + more.len() > REFERRED_MAX {
            count = index;
            break;
        }
        referred.extend(more);
    }
    referred.sort_unstable();
    referred.dedup();
    Ok((count, referred))
}

/// The first table of a batch is never too much for it.
const _: () = assert!(WORDS_PER_PAGE <= REFERRED_MAX);

/// A pfn may come again in a record, and its last occurrence counts: such are kept apart, for
/// within a batch page tables are written after all else.
fn batches(data: &[PageEntry]) -> impl Iterator<Item = &[PageEntry]> {
    let ascending = data.chunk_by(|a, b| a.pfn < b.pfn);
    ascending.flat_map(|run| run.chunks(BATCH_PAGES_MAX))
}

fn is_table(entry: &PageEntry) -> bool {
    entry.kind.table_level().is_some()
}

fn read_pages<I, P>(
    reader: &mut Reader<'_, I, P>,
    pages: &P,
    slots: &mut [PageSlot<'_>],
) -> Result<()>
where
    I: StreamIn<P>,
    P: ForeignPages,
{
    reader
        .input
        .read_pages(pages, slots)
        .map_err(|source| Error::Stream { what: PAGES, source })?;
    reader.bytes += (PAGE_SIZE * slots.len()) as u64;
    Ok(())
}
