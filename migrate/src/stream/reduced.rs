//! Pages of which less is sent than they are: what two rxl ends agree on for their links, and the
//! record that carries such pages.
//!
//! ```text
//!   u32 pages (at most 1024)   u32 0
//!   u64 per page: its entry, as in page data; ordinary memory, by ascending pfn
//!   u16 per page: its form in bits 15..13, its bytes in bits 12..0; zeros up to a multiple of 8
//!   the pages' bytes, one after the other
//! ```
//!
//! Every page is for itself, so that no more than a page is ever unpacked at a time. What refers to
//! content that the receiver has (SAME, DELTA) begins with 64 bits of that content's digest: a
//! receiver that has something else says so, instead of making a page that nobody had.
//!
//! What it is not: who decides which form a page has (`source::reduce`, `source::effort`), or where
//! it goes (`target::reduced`). Nobody else's format: both ends are rxl's.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::frame::{PAGE_SIZE, PageBuf, PageType};
use crate::hypervisor::BATCH_PAGES_MAX;
use crate::stream::FormatError;
use crate::stream::libxc::{self, PageEntry, RecordKind, le_u64s};
use crate::stream::packed::{ZstdUnpacker, unpack};

/// Longest body: all entries, and a MiB of pages.
pub const REDUCED_BYTES_MAX: usize = 8 + (8 + 2) * BATCH_PAGES_MAX + (1 << 20);
/// Bytes of a digest before what refers to content that the receiver has.
const CHECK_BYTES: usize = 8;
/// The bytes of a page in the word about it.
const LENGTH_MASK: u16 = 0x1fff;

/// What may be left out of what is sent over a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reduce(u8);

impl Reduce {
    /// Nothing.
    pub const NONE: Reduce = Reduce(0);
    /// The content of pages that are all zeros.
    pub const ZERO: Reduce = Reduce(1);
    /// Pages whose content is what was sent of them last.
    pub const SAME: Reduce = Reduce(2);
    /// What LZ4 takes out.
    pub const COMPRESS: Reduce = Reduce(4);
    /// What is the same in a page as in what was sent of it last.
    pub const DELTA: Reduce = Reduce(8);
    /// What Zstandard takes out.
    pub const ZSTD: Reduce = Reduce(16);
    /// All of them.
    pub const ALL: Reduce = Reduce(31);
    /// Not a kind: all that are there are tried on every page, whatever that costs. It is the
    /// sender's own business.
    pub const ALWAYS: Reduce = Reduce(128);

    const NAMES: [(Reduce, &str); 6] = [
        (Reduce::ZERO, "zero"),
        (Reduce::SAME, "same"),
        (Reduce::COMPRESS, "compress"),
        (Reduce::DELTA, "delta"),
        (Reduce::ZSTD, "zstd"),
        (Reduce::ALWAYS, "always"),
    ];

    /// Whether all of `other` is in it.
    #[must_use]
    pub fn has(self, other: Reduce) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in both.
    #[must_use]
    pub fn and(self, other: Reduce) -> Reduce {
        Reduce(self.0 & other.0)
    }

    /// What is in either.
    #[must_use]
    pub fn or(self, other: Reduce) -> Reduce {
        Reduce(self.0 | other.0)
    }

    /// Whether nothing may be left out.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.and(Reduce::ALL) == Reduce::NONE
    }

    /// As in a hello.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Of a hello: kinds that this program knows.
    #[must_use]
    pub fn from_bits(bits: u8) -> Reduce {
        Reduce(bits).and(Reduce::ALL)
    }
}

impl fmt::Display for Reduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Reduce::NAMES.iter().filter(|(kind, _)| self.has(*kind));
        let names: Vec<&str> = names.map(|(_, name)| *name).collect();
        f.write_str(if names.is_empty() { "none" } else { return f.write_str(&names.join(",")) })
    }
}

/// Not a list of kinds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all, none, or of zero, same, compress, delta, zstd and always, with commas; not \"{0}\"")]
pub struct UnknownReduce(String);

impl FromStr for Reduce {
    type Err = UnknownReduce;

    fn from_str(text: &str) -> Result<Reduce, UnknownReduce> {
        text.split(',').try_fold(Reduce::NONE, |sum, word| {
            let named = Reduce::NAMES.iter().find(|(_, name)| *name == word);
            match (word, named) {
                ("all", _) => Ok(sum.or(Reduce::ALL)),
                ("none", _) if text == "none" => Ok(Reduce::NONE),
                (_, Some((kind, _))) => Ok(sum.or(*kind)),
                _ => Err(UnknownReduce(text.to_owned())),
            }
        })
    }
}

/// What both ends of a link know before the first page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// What may be left out.
    pub reduce: Reduce,
    /// Goes into all digests, so that nobody can make pages of equal digest on purpose.
    pub seed: u64,
    /// How many links there may be: the memory of a sender for what is known is divided among them.
    pub links: u8,
}

impl Agreed {
    /// What a page's content is known by: 128 bits.
    #[must_use]
    pub fn digest(&self, page: &PageBuf) -> u128 {
        XxHash3_128::oneshot_with_seed(self.seed, &page.0)
    }
}

/// What of a digest goes before what refers to its content.
#[allow(clippy::cast_possible_truncation, reason = "the other half stays here")]
fn check(digest: u128) -> [u8; CHECK_BYTES] {
    (digest as u64).to_le_bytes()
}

/// How a page is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Form {
    Zero = 0,
    Same = 1,
    Whole = 2,
    Packed = 3,
    Delta = 4,
    Zstd = 5,
}

/// A page as it is sent.
#[derive(Clone, Copy, Debug)]
pub enum Reduced<'a> {
    /// All zeros.
    Zero,
    /// As the receiver has it, which is content of this digest.
    Same(u128),
    /// As it is.
    Whole(&'a PageBuf),
    /// Compressed by LZ4 (a block).
    Packed(&'a [u8]),
    /// What differs from what the receiver has, which is content of this digest: both XORed, and
    /// compressed by LZ4.
    Delta(u128, &'a [u8]),
    /// Compressed by Zstandard (a frame).
    Zstd(&'a [u8]),
}

impl Reduced<'_> {
    /// Bytes of it.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Reduced::Zero => 0,
            Reduced::Same(_) => CHECK_BYTES,
            Reduced::Whole(_) => PAGE_SIZE,
            Reduced::Packed(bytes) | Reduced::Zstd(bytes) => bytes.len(),
            Reduced::Delta(_, bytes) => CHECK_BYTES + bytes.len(),
        }
    }

    /// Whether that is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A record in the making.
#[derive(Debug, Default)]
pub struct Builder {
    entries: Vec<PageEntry>,
    words: Vec<u16>,
    bytes: Vec<u8>,
}

impl Builder {
    /// Adds a page, if there is room for it and it comes after those that are there. `false`:
    /// there is none.
    #[must_use]
    pub fn add(&mut self, entry: PageEntry, page: Reduced<'_>) -> bool {
        let after = self.entries.last().is_none_or(|last| last.pfn < entry.pfn);
        let room = self.bytes.len() + page.len() <= REDUCED_BYTES_MAX - 8 - 10 * BATCH_PAGES_MAX;
        if !after || !room || self.entries.len() >= BATCH_PAGES_MAX {
            return false;
        }
        let form = match page {
            Reduced::Zero => Form::Zero,
            Reduced::Same(digest) => {
                self.bytes.extend(check(digest));
                Form::Same
            }
            Reduced::Whole(content) => {
                self.bytes.extend_from_slice(&content.0);
                Form::Whole
            }
            Reduced::Packed(packed) => {
                self.bytes.extend_from_slice(packed);
                Form::Packed
            }
            Reduced::Delta(digest, packed) => {
                self.bytes.extend(check(digest));
                self.bytes.extend_from_slice(packed);
                Form::Delta
            }
            Reduced::Zstd(packed) => {
                self.bytes.extend_from_slice(packed);
                Form::Zstd
            }
        };
        let length = u16::try_from(page.len()).unwrap_or(LENGTH_MASK) & LENGTH_MASK;
        self.words.push((form as u16) << 13 | length);
        self.entries.push(entry);
        true
    }

    /// Bytes of the pages so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The record, and what it has taken up begins anew.
    ///
    /// # Errors
    /// None that can happen: it is not that long.
    pub fn take(&mut self) -> Result<Vec<u8>, FormatError> {
        let count = (self.entries.len() as u64).to_le_bytes();
        let entries: Vec<u8> =
            self.entries.iter().flat_map(|entry| entry.encode().to_le_bytes()).collect();
        let mut words: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        words.resize(words.len().next_multiple_of(8), 0);
        let record =
            libxc::record(RecordKind::RxlReduced, &[&count, &entries, &words, &self.bytes])?;
        self.entries.clear();
        self.words.clear();
        self.bytes.clear();
        Ok(record)
    }
}

/// Pages of a record that was read.
#[derive(Debug, PartialEq, Eq)]
pub struct Parsed<'a> {
    /// Which pages.
    pub entries: Vec<PageEntry>,
    /// How each is sent, and its bytes.
    items: Vec<(Form, &'a [u8])>,
}

fn content(why: &'static str) -> FormatError {
    FormatError::Content { kind: RecordKind::RxlReduced.code(), why }
}

/// Reads the body of a record.
///
/// # Errors
/// It is none.
pub fn parse(body: &[u8]) -> Result<Parsed<'_>, FormatError> {
    let short = || content("shorter than its count of pages");
    let (count, rest) = body.split_first_chunk().ok_or_else(short)?;
    let count = usize::try_from(u64::from_le_bytes(*count)).unwrap_or(usize::MAX);
    if count == 0 || count > BATCH_PAGES_MAX {
        return Err(content("no page in it, or too many"));
    }
    let (entries, rest) = rest.split_at_checked(8 * count).ok_or_else(short)?;
    let (words, mut rest) =
        rest.split_at_checked((2 * count).next_multiple_of(8)).ok_or_else(short)?;
    let entries: Vec<PageEntry> =
        le_u64s(entries).map(PageEntry::parse).collect::<Result<_, _>>()?;
    if entries.iter().any(|entry| entry.kind != PageType::Normal) {
        return Err(content("a page that is no ordinary memory"));
    }
    if !entries.is_sorted_by(|a, b| a.pfn < b.pfn) {
        return Err(content("pages that are not in order"));
    }
    let mut items = Vec::with_capacity(count);
    for word in words.as_chunks().0.iter().take(count).map(|word| u16::from_le_bytes(*word)) {
        let length = usize::from(word & LENGTH_MASK);
        let (form, least, most) = match word >> 13 {
            0 => (Form::Zero, 0, 0),
            1 => (Form::Same, CHECK_BYTES, CHECK_BYTES),
            2 => (Form::Whole, PAGE_SIZE, PAGE_SIZE),
            3 => (Form::Packed, 1, PAGE_SIZE - 1),
            4 => (Form::Delta, CHECK_BYTES + 1, PAGE_SIZE - 1),
            5 => (Form::Zstd, 1, PAGE_SIZE - 1),
            _ => return Err(content("a form that nobody knows")),
        };
        if !(least..=most).contains(&length) {
            return Err(content("a length that its form cannot have"));
        }
        let (bytes, others) = rest.split_at_checked(length).ok_or_else(short)?;
        items.push((form, bytes));
        rest = others;
    }
    if !rest.is_empty() {
        return Err(content("more bytes than its pages have"));
    }
    Ok(Parsed { entries, items })
}

impl Parsed<'_> {
    /// Makes the pages: `place` is given the number of each with its content, but for those that
    /// are as the receiver has them. `read` reads what it has.
    ///
    /// # Errors
    /// Something cannot be unpacked, or refers to content that the receiver does not have.
    pub fn unpack(
        &self,
        agreed: &Agreed,
        read: impl Fn(usize, &mut PageBuf),
        mut place: impl FnMut(usize, &PageBuf),
    ) -> Result<(), FormatError> {
        let (mut page, mut had) = (PageBuf::zeroed(), PageBuf::zeroed());
        let mut zstd = ZstdUnpacker::default();
        for (index, (form, bytes)) in self.items.iter().enumerate() {
            let packed = match form {
                Form::Zero => {
                    page.0.fill(0);
                    place(index, &page);
                    continue;
                }
                Form::Whole => {
                    page.0.copy_from_slice(bytes);
                    place(index, &page);
                    continue;
                }
                Form::Packed | Form::Zstd => bytes,
                Form::Same | Form::Delta => {
                    let (wanted, rest) = bytes.split_at(CHECK_BYTES.min(bytes.len()));
                    read(index, &mut had);
                    if check(agreed.digest(&had)) != wanted {
                        return Err(content("refers to content that is not here"));
                    }
                    if *form == Form::Same {
                        continue;
                    }
                    rest
                }
            };
            let unpacked = match form {
                Form::Zstd => zstd.unpack(packed, &mut page),
                _ => unpack(packed, &mut page),
            };
            if !unpacked {
                return Err(content("bytes that are not a packed page"));
            }
            if *form == Form::Delta {
                xor(&mut page, &had);
            }
            place(index, &page);
        }
        Ok(())
    }
}

/// `page` becomes what differs from `other`, and back.
pub fn xor(page: &mut PageBuf, other: &PageBuf) {
    let (words, others) = (page.0.as_chunks_mut::<8>().0, other.0.as_chunks::<8>().0);
    for (word, other) in words.iter_mut().zip(others) {
        *word = (u64::from_ne_bytes(*word) ^ u64::from_ne_bytes(*other)).to_ne_bytes();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Pfn;
    use crate::stream::packed::{ZstdPacker, pack};

    const AGREED: Agreed = Agreed { reduce: Reduce::ALL, seed: 7, links: 1 };

    fn normal(pfn: u64) -> PageEntry {
        PageEntry { pfn: Pfn(pfn), kind: PageType::Normal }
    }

    /// The pages that the record leads to, where the receiver has `had` of all.
    fn unpacked(body: &[u8], had: &PageBuf) -> Result<Vec<(usize, PageBuf)>, FormatError> {
        let mut pages = Vec::new();
        let read = |_: usize, into: &mut PageBuf| into.0 = had.0;
        parse(body)?.unpack(&AGREED, read, |index, page| pages.push((index, page.clone())))?;
        Ok(pages)
    }

    fn page(seed: u8) -> PageBuf {
        let mut page = PageBuf([seed; PAGE_SIZE]);
        page.0.iter_mut().step_by(64).zip(0_u8..).for_each(|(byte, n)| *byte = n);
        page
    }

    /// One page of each form.
    fn record(had: &PageBuf, now: &PageBuf) -> Vec<u8> {
        let (mut packed, mut delta, mut dense) = (Vec::new(), Vec::new(), Vec::new());
        let mut differs = now.clone();
        xor(&mut differs, had);
        let forms = [
            Reduced::Zero,
            Reduced::Same(AGREED.digest(had)),
            Reduced::Whole(now),
            Reduced::Packed(pack(now, &mut packed).unwrap()),
            Reduced::Delta(AGREED.digest(had), pack(&differs, &mut delta).unwrap()),
            Reduced::Zstd(ZstdPacker::default().pack(now, &mut dense).unwrap()),
        ];
        let mut builder = Builder::default();
        for (pfn, form) in (5..).zip(forms) {
            assert!(builder.add(normal(pfn), form));
        }
        builder.take().unwrap()
    }

    #[test]
    fn a_page_of_each_form_arrives_as_it_was() {
        let (had, now) = (page(1), page(2));
        let record = record(&had, &now);
        let header = libxc::RecordHeader::parse(*record.first_chunk().unwrap()).unwrap();
        let body = &record[8..8 + header.length];
        let pages = unpacked(body, &had).unwrap();
        let zero = PageBuf([0; PAGE_SIZE]);
        let expected = [(0, &zero), (2, &now), (3, &now), (4, &now), (5, &now)];
        assert_eq!(pages.len(), expected.len());
        for ((index, page), (wanted, content)) in pages.iter().zip(expected) {
            assert!(*index == wanted && page.0 == content.0, "page {index}");
        }
        let other = unpacked(body, &page(3));
        assert_eq!(other.unwrap_err(), content("refers to content that is not here"));
    }

    #[test]
    fn what_is_not_such_a_record_is_refused() {
        let (had, now) = (page(1), page(2));
        let good = record(&had, &now)[8..].to_vec();
        let change = |at: usize, to: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + to.len()].copy_from_slice(to);
            unpacked(&bytes, &had).unwrap_err()
        };
        assert_eq!(change(0, &[0]), content("no page in it, or too many"));
        assert_eq!(change(0, &1025_u64.to_le_bytes()), content("no page in it, or too many"));
        assert_eq!(change(8, &[6]), content("pages that are not in order"));
        assert_eq!(change(15, &[0x10]), content("a page that is no ordinary memory"));
        assert_eq!(change(57, &[0xe0]), content("a form that nobody knows"));
        assert_eq!(change(56, &[1]), content("a length that its form cannot have"));
        assert_eq!(unpacked(&good[..good.len() - 8], &had).unwrap_err(), {
            content("shorter than its count of pages")
        });
        assert!(unpacked(&[], &had).is_err() && unpacked(&[1; 20], &had).is_err());
    }

    #[test]
    fn pages_that_do_not_fit_are_not_taken() {
        let (mut builder, whole) = (Builder::default(), page(1));
        let mut added = 0;
        while builder.add(normal(added), Reduced::Whole(&whole)) {
            added += 1;
        }
        assert_eq!(added, 256);
        assert!(!builder.add(normal(3), Reduced::Zero), "not in order");
        assert!(builder.take().unwrap().len() - 8 <= REDUCED_BYTES_MAX && builder.is_empty());
        for pfn in 0..1024 {
            assert!(builder.add(normal(pfn), Reduced::Zero));
        }
        assert!(!builder.add(normal(1024), Reduced::Zero));
    }

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for text in ["none", "zero", "zero,same,compress,delta,zstd", "compress,always"] {
            assert_eq!(text.parse::<Reduce>().unwrap().to_string(), text);
        }
        assert_eq!("all".parse(), Ok(Reduce::ALL));
        assert_eq!("all,always".parse(), Ok(Reduce::ALL.or(Reduce::ALWAYS)));
        for text in ["", "zeros", "none,zero", "zero,", "zero, same"] {
            assert!(text.parse::<Reduce>().is_err(), "{text}");
        }
        assert_eq!(Reduce::from_bits(0xff), Reduce::ALL);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = unpacked(&bytes, &page(1));
        }
    }
}
