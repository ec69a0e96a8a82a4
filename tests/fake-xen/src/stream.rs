//! A stream in pieces, to be tampered with: records, and pages within them.
//!
//! Not a judge of streams: Debian's verifier is. The format is [`rxl_migrate::stream::libxc`]'s.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use rxl_migrate::frame::{PAGE_SIZE, PFN_MASK, PageType};
use rxl_migrate::stream::libxc::{OPTIONAL, RECORD_HEADER_BYTES, RecordKind, StreamHeader, record};

/// Bytes before the entries of a page-data record.
const PAGES_HEAD_BYTES: usize = 8;

/// One page of a page-data record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) pfn: u64,
    pub(crate) kind: PageType,
    /// What it holds, if its type has data.
    pub(crate) data: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
enum Record {
    Pages(Vec<Page>),
    /// As it was, header and padding included.
    Other(Vec<u8>),
}

/// A whole stream.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    header: Vec<u8>,
    records: Vec<Record>,
}

/// Where a page is in a stream: record, and page within.
pub(crate) type Place = (usize, usize);

/// A libxc stream without its optional records: stock's receiver skips them, its verifier does not.
///
/// # Errors
/// It is not a stream.
pub fn without_optional(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = Stream::parse(bytes)?;
    stream.records.retain(|record| match record {
        Record::Pages(_) => true,
        Record::Other(record) => {
            let kind = record.first_chunk().map_or(0, |kind| u32::from_le_bytes(*kind));
            kind & OPTIONAL == 0
        }
    });
    stream.to_bytes()
}

impl Stream {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Stream> {
        let (header, mut rest) =
            bytes.split_at_checked(StreamHeader::BYTES).context("no header")?;
        let mut records = Vec::new();
        while !rest.is_empty() {
            let word = |offset: usize| {
                let bytes = rest.get(offset..).and_then(|bytes| bytes.first_chunk());
                bytes.map(|bytes| u32::from_le_bytes(*bytes)).context("a record ends early")
            };
            let (kind, length) = (word(0)?, word(4)? as usize);
            let whole = RECORD_HEADER_BYTES + length.next_multiple_of(8);
            let (this, others) = rest.split_at_checked(whole).context("a record ends early")?;
            rest = others;
            let body = this.get(RECORD_HEADER_BYTES..).unwrap_or_default();
            records.push(match kind == RecordKind::PageData.code() {
                true => Record::Pages(pages(body)?),
                false => Record::Other(this.to_vec()),
            });
        }
        Ok(Stream { header: header.to_vec(), records })
    }

    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = self.header.clone();
        for this in &self.records {
            match this {
                Record::Other(record) => bytes.extend_from_slice(record),
                // A record of no page is none.
                Record::Pages(pages) if pages.is_empty() => {}
                Record::Pages(pages) => bytes.extend(page_data(pages)?),
            }
        }
        Ok(bytes)
    }

    /// All pages with their places, in order.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (Place, &Page)> {
        self.records.iter().enumerate().flat_map(|(record, this)| {
            let pages = match this {
                Record::Pages(pages) => pages.as_slice(),
                Record::Other(_) => &[],
            };
            pages.iter().enumerate().map(move |(page, this)| ((record, page), this))
        })
    }

    /// Changes a byte of the last page that holds ordinary memory.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn change_page(&mut self) -> Result<()> {
        let records = self.records.iter_mut().rev();
        let mut pages = records.flat_map(|record| match record {
            Record::Pages(pages) => pages.as_mut_slice(),
            Record::Other(_) => &mut [],
        });
        let page = pages.rfind(|page| page.kind == PageType::Normal);
        let byte = page.and_then(|page| page.data.as_mut()?.get_mut(PAGE_SIZE / 2));
        *byte.context("no ordinary memory")? ^= 0x20;
        Ok(())
    }

    /// The places of each pfn's data.
    pub(crate) fn data_by_pfn(&self) -> BTreeMap<u64, Vec<(Place, &Page)>> {
        let mut found: BTreeMap<u64, Vec<_>> = BTreeMap::new();
        for (place, page) in self.pages().filter(|(_, page)| page.data.is_some()) {
            found.entry(page.pfn).or_default().push((place, page));
        }
        found
    }

    /// The place of the first page of the last pass: pfns of pages with data ascend in a pass.
    /// (rxl tells of pages that have vanished when the rest of their batch is sent.)
    pub(crate) fn last_pass(&self) -> Option<Place> {
        let at = |(place, page): (Place, &Page)| (place, page.pfn);
        let pages: Vec<(Place, u64)> =
            self.pages().filter(|(_, page)| page.data.is_some()).map(at).collect();
        let mut descents = pages.windows(2).filter_map(|pair| match pair {
            [(_, before), (place, pfn)] if pfn < before => Some(*place),
            _ => None,
        });
        descents.next_back().or(pages.first().map(|(place, _)| *place))
    }

    /// Leaves a page out.
    pub(crate) fn remove(&mut self, (record, page): Place) -> Result<()> {
        match self.records.get_mut(record) {
            Some(Record::Pages(pages)) if page < pages.len() => drop(pages.remove(page)),
            _ => anyhow::bail!("no page at {record}, {page}"),
        }
        Ok(())
    }

    /// Sends a page once more, after all others.
    pub(crate) fn append(&mut self, page: Page) -> Result<()> {
        let last = self.records.iter().rposition(|record| matches!(record, Record::Pages(_)));
        let after = last.context("a stream without pages")? + 1;
        self.records.insert(after, Record::Pages(vec![page]));
        Ok(())
    }
}

fn pages(body: &[u8]) -> Result<Vec<Page>> {
    let count = body.first_chunk().map(|word| u32::from_le_bytes(*word)).context("no count")?;
    let entries = body.get(PAGES_HEAD_BYTES..).unwrap_or_default();
    let (entries, mut data) =
        entries.split_at_checked(8 * count as usize).context("entries are missing")?;
    let mut pages = Vec::new();
    for entry in entries.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry)) {
        let kind = u8::try_from(entry >> 60).ok().and_then(PageType::from_nibble);
        let kind = kind.context("an unknown type")?;
        let page = if kind.has_data() {
            let (page, rest) = data.split_at_checked(PAGE_SIZE).context("data is missing")?;
            data = rest;
            Some(page.to_vec())
        } else {
            None
        };
        pages.push(Page { pfn: entry & PFN_MASK, kind, data: page });
    }
    ensure!(data.is_empty(), "{} bytes belong to no page", data.len());
    Ok(pages)
}

fn page_data(pages: &[Page]) -> Result<Vec<u8>> {
    let count = u64::try_from(pages.len())?;
    let entries = pages.iter().map(|page| u64::from(page.kind.nibble()) << 60 | page.pfn);
    let head = std::iter::once(count).chain(entries).flat_map(u64::to_le_bytes);
    let head: Vec<u8> = head.collect();
    let data = pages.iter().filter_map(|page| page.data.as_deref());
    let body: Vec<&[u8]> = std::iter::once(head.as_slice()).chain(data).collect();
    Ok(record(RecordKind::PageData, &body)?)
}
