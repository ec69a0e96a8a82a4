//! Makes records of pages of which less is sent than they are, for one link.
//!
//! What a page was when it was sent last is known by its digest, and of pages that are sent again
//! by a copy. Both are good only as long as that *is* what the receiver has before it reads the
//! next record of this link: nobody else has sent the page since, and this link has lost nothing
//! (it would be no more). Whoever hands out batches says which runs of pages the worker has taken
//! over from others ([`Reducer::forget_run`]); what went as it was, with the guest writing it
//! meanwhile, is not known either.
//!
//! A page is copied once, and the copy is looked at, remembered and sent.
//!
//! What it is not: when that pays (`effort`), the record (`stream::reduced`), or who has which
//! pages (`shares`).

use std::fmt;
use std::time::Duration;

use crate::counters::LeftOut;
use crate::error::Result;
use crate::frame::{PAGE_SIZE, PageBuf, Pfn};
use crate::source::effort::{Effort, Level, Try};
use crate::source::shares::RUN_PAGES;
use crate::stream::libxc::PageEntry;
use crate::stream::packed::{ZstdPacker, pack};
use crate::stream::reduced::{self, Agreed, Builder, Reduce, Reduced};

/// Digests that are kept by all links together: of 1 GiB of pages. 24 bytes for each, 6 MiB.
const DIGESTS_MAX: usize = 1 << 18;
/// Copies that they keep, of pages that were sent more than once: 16 MiB.
const COPIES_MAX: usize = 1 << 12;
/// Bytes of pages after which a record ends: a connection has as much on its way while the next is
/// made.
const RECORD_BYTES: usize = 512 << 10;
/// What has changed of a page has to be shorter than this, or the page goes as it is.
const DELTA_BYTES_MAX: usize = PAGE_SIZE * 3 / 4;
/// Pages of a batch that are looked at to find out whether to look at all.
pub(super) const SAMPLES: usize = 8;

/// A clock that never goes back.
pub type Clock<'a> = Box<dyn Fn() -> Duration + 'a>;

/// What a worker may leave out of what it sends, and the clock that says what that costs.
pub struct Reducing<'a> {
    /// What the other end knows.
    pub agreed: Agreed,
    /// When it began is of no matter.
    pub clock: Clock<'a>,
    /// For how long who works has waited for a processor so far; it stands still where that is
    /// not known.
    pub queued: Clock<'a>,
}

impl fmt::Debug for Reducing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reducing").field(&self.agreed.reduce).finish()
    }
}

impl Reducing<'_> {
    /// Nothing may be left out.
    #[must_use]
    pub fn nothing() -> Self {
        Reducing::timeless(Agreed::default())
    }

    /// For tests: nothing takes any time.
    #[must_use]
    pub fn timeless(agreed: Agreed) -> Self {
        let stands = || Duration::ZERO;
        Reducing { agreed, clock: Box::new(stands), queued: Box::new(stands) }
    }
}

/// Makes records for one link.
pub(super) struct Reducer<'a> {
    agreed: Agreed,
    clock: Clock<'a>,
    queued: Clock<'a>,
    effort: Effort,
    known: Known,
    builder: Builder,
    /// What is done with the pages of this batch.
    level: Level,
    looked: Duration,
    pages: usize,
    zeros: usize,
    /// What was done with pages beside looking, and how many bytes all that has saved.
    tried: Duration,
    saved: usize,
    /// What comes of a page.
    packed: Vec<u8>,
    dense: Vec<u8>,
    zstd: ZstdPacker,
    differs: Box<PageBuf>,
    pub(super) left_out: LeftOut,
}

impl<'a> Reducer<'a> {
    /// `None`: nothing may be left out.
    pub(super) fn new(reducing: Reducing<'a>) -> Option<Reducer<'a>> {
        let Reducing { agreed, clock, queued } = reducing;
        (!agreed.reduce.is_none()).then(|| Reducer {
            agreed,
            clock,
            queued,
            effort: Effort::new(agreed.reduce.has(Reduce::ALWAYS)),
            known: Known::of(agreed.links),
            builder: Builder::default(),
            level: Level::Nothing,
            looked: Duration::ZERO,
            pages: 0,
            zeros: 0,
            tried: Duration::ZERO,
            saved: 0,
            packed: Vec::new(),
            dense: Vec::new(),
            zstd: ZstdPacker::default(),
            differs: PageBuf::zeroed(),
            left_out: LeftOut::default(),
        })
    }

    /// Now.
    pub(super) fn now(&self) -> Duration {
        (self.clock)()
    }

    /// Something was written since `from`, and had to wait or not.
    pub(super) fn note_written(&mut self, from: Duration, waited: bool, bytes: usize) {
        self.effort.note_written((from, self.now()), waited, bytes);
    }

    /// Whether the pages of the next batch are to be looked at. `sample` reads one of [`SAMPLES`].
    pub(super) fn begin(&mut self, mut sample: impl FnMut(usize, &mut PageBuf)) -> bool {
        let kinds = self.agreed.reduce;
        self.effort.note_queued(self.now(), (self.queued)());
        self.level = self.effort.level();
        if self.level == Level::Nothing && kinds.has(Reduce::ZERO) {
            let from = self.now();
            let zeros = (0..SAMPLES).filter(|index| {
                sample(*index, &mut self.differs);
                is_zero(&self.differs)
            });
            let zeros = zeros.count();
            let cost = self.now().saturating_sub(from);
            self.effort.note_looked(Level::Zeros, cost, SAMPLES, zeros);
            if self.effort.zeros_pay() {
                self.level = Level::Zeros;
            }
        }
        let remembers = kinds.has(Reduce::SAME) || kinds.has(Reduce::DELTA);
        let compresses = kinds.has(Reduce::COMPRESS) || kinds.has(Reduce::ZSTD);
        if self.level == Level::All && !remembers && !compresses {
            self.level = Level::Zeros;
        }
        (self.looked, self.pages, self.zeros) = (Duration::ZERO, 0, 0);
        (self.tried, self.saved) = (Duration::ZERO, 0);
        match self.level {
            Level::Nothing => false,
            Level::Zeros => kinds.has(Reduce::ZERO),
            Level::All => true,
        }
    }

    /// All pages of the batch have been added.
    pub(super) fn end(&mut self) {
        if self.pages > 0 {
            self.effort.note_looked(self.level, self.looked, self.pages, self.zeros);
            if self.level == Level::All {
                self.effort.note_all(self.looked + self.tried, self.pages, self.saved);
            }
        }
    }

    /// Nothing is known any more of what the receiver has of a page.
    pub(super) fn forget(&mut self, pfn: Pfn) {
        self.known.forget(pfn);
    }

    /// The same of a whole run.
    pub(super) fn forget_run(&mut self, run: u64) {
        if self.known.is_empty() {
            return;
        }
        let first = run.saturating_mul(RUN_PAGES);
        (first..first.saturating_add(RUN_PAGES)).for_each(|pfn| self.known.forget(Pfn(pfn)));
    }

    /// Adds a page, whose content was copied since `from`; `again`: it was sent before. A record
    /// that is to be written first, if there is one.
    pub(super) fn add(
        &mut self,
        entry: PageEntry,
        page: &PageBuf,
        again: bool,
        from: Duration,
    ) -> Result<Option<Vec<u8>>> {
        let Reducer { agreed, effort, known, builder, differs, clock, left_out, .. } = self;
        let (packed, dense) = (&mut self.packed, &mut self.dense);
        let (kinds, pfn) = (agreed.reduce, entry.pfn);
        let mut form = None;
        let mut digest = None;
        if kinds.has(Reduce::ZERO) && is_zero(page) {
            form = Some(Reduced::Zero);
            self.zeros += 1;
        } else if self.level == Level::All && (kinds.has(Reduce::SAME) || kinds.has(Reduce::DELTA))
        {
            let now = agreed.digest(page);
            let is_same = kinds.has(Reduce::SAME) && known.digest(pfn) == Some(now);
            form = is_same.then_some(Reduced::Same(now));
            digest = Some(now);
        }
        self.pages += 1;
        let looked = clock();
        self.looked += looked.saturating_sub(from);
        if form.is_none()
            && let Some(digest) = digest.and_then(|_| known.digest(pfn))
            && let Some(copy) = known.copy(pfn).filter(|_| kinds.has(Reduce::DELTA))
            && effort.wants(Try::Delta)
        {
            let from = clock();
            differs.0 = page.0;
            reduced::xor(differs, copy);
            form = pack(differs, packed)
                .filter(|bytes| bytes.len() < DELTA_BYTES_MAX)
                .map(|bytes| Reduced::Delta(digest, bytes));
            let saved = form.map_or(0, |form| PAGE_SIZE - form.len());
            let cost = clock().saturating_sub(from);
            effort.note_tried(Try::Delta, cost, saved);
            self.tried += cost;
        }
        let from = clock();
        match digest.filter(|_| !matches!(form, Some(Reduced::Same(_)))) {
            Some(digest) => known.remember(pfn, digest, page, again && kinds.has(Reduce::DELTA)),
            None if form.is_some_and(|form| matches!(form, Reduced::Same(_))) => {}
            None => known.forget(pfn),
        }
        let remembered = clock();
        self.looked += remembered.saturating_sub(from);
        if form.is_none() && self.level == Level::All {
            let lz4 = kinds.has(Reduce::COMPRESS).then_some(Try::Pack);
            let zstd = kinds.has(Reduce::ZSTD).then_some(Try::Zstd);
            let (mut from, mut best) = (remembered, (Try::Pack, PAGE_SIZE));
            for what in effort.compressions([lz4, zstd]).into_iter().flatten() {
                let shorter = match what {
                    Try::Zstd => self.zstd.pack(page, dense),
                    Try::Pack | Try::Delta => pack(page, packed),
                };
                let (length, done) = (shorter.map_or(PAGE_SIZE, <[u8]>::len), clock());
                let cost = done.saturating_sub(from);
                effort.note_tried(what, cost, PAGE_SIZE - length);
                self.tried += cost;
                from = done;
                if length < best.1 {
                    best = (what, length);
                }
            }
            form = match best {
                (_, PAGE_SIZE) => None,
                (Try::Zstd, length) => dense.get(..length).map(Reduced::Zstd),
                (_, length) => packed.get(..length).map(Reduced::Packed),
            };
        }
        let form = form.unwrap_or(Reduced::Whole(page));
        left_out.note(&form);
        self.saved += PAGE_SIZE.saturating_sub(form.len());
        let mut full = None;
        if builder.bytes() >= RECORD_BYTES {
            full = Some(builder.take()?);
        }
        if !builder.add(entry, form) {
            full = Some(builder.take()?);
            // There is room now.
            let _ = builder.add(entry, form);
        }
        Ok(full)
    }

    /// The last record of a batch, if there is one.
    pub(super) fn take(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(if self.builder.is_empty() { None } else { Some(self.builder.take()?) })
    }
}

fn is_zero(page: &PageBuf) -> bool {
    // As fast as memory can be compared; most pages that are none say so in their first bytes.
    page.words().take(8).all(|word| word == 0) && page.0 == [0; PAGE_SIZE]
}

/// What the receiver has of pages, as far as that is known: each slot has the latest of those
/// that share it.
#[derive(Debug)]
struct Known {
    digests_max: usize,
    copies_max: usize,
    /// Pfn and one more; 0: nothing. Empty until there is something.
    pfns: Vec<u64>,
    digests: Vec<u128>,
    /// Copies, each of the page with this digest.
    copies: Vec<Option<(Pfn, Box<PageBuf>)>>,
}

fn slot(pfn: Pfn, slots: usize) -> usize {
    pfn.index().unwrap_or(0) % slots
}

impl Known {
    /// What one of `links` links may know.
    fn of(links: u8) -> Known {
        let links = usize::from(links.max(1));
        let (digests_max, copies_max) = (DIGESTS_MAX / links, COPIES_MAX / links);
        let (pfns, digests, copies) = (Vec::new(), Vec::new(), Vec::new());
        Known { digests_max, copies_max, pfns, digests, copies }
    }

    fn is_empty(&self) -> bool {
        self.pfns.is_empty()
    }

    fn digest(&self, pfn: Pfn) -> Option<u128> {
        let slot = slot(pfn, self.digests_max);
        let known = self.pfns.get(slot).is_some_and(|known| *known == pfn.0.wrapping_add(1));
        self.digests.get(slot).copied().filter(|_| known)
    }

    /// What the digest is of, if there is a copy of it.
    fn copy(&self, pfn: Pfn) -> Option<&PageBuf> {
        let copy = self.copies.get(slot(pfn, self.copies_max))?.as_ref();
        copy.filter(|(of, _)| *of == pfn).map(|(_, page)| page.as_ref())
    }

    fn remember(&mut self, pfn: Pfn, digest: u128, page: &PageBuf, copy: bool) {
        if self.pfns.is_empty() {
            self.pfns = vec![0; self.digests_max];
            self.digests = vec![0; self.digests_max];
        }
        self.forget(pfn);
        let index = slot(pfn, self.digests_max);
        if let (Some(known), Some(known_digest)) =
            (self.pfns.get_mut(index), self.digests.get_mut(index))
        {
            (*known, *known_digest) = (pfn.0.wrapping_add(1), digest);
        }
        if copy {
            if self.copies.is_empty() {
                self.copies.resize_with(self.copies_max, || None);
            }
            if let Some(there) = self.copies.get_mut(slot(pfn, self.copies_max)) {
                let (of, content) = there.get_or_insert_with(|| (pfn, PageBuf::zeroed()));
                *of = pfn;
                content.0 = page.0;
            }
        }
    }

    fn forget(&mut self, pfn: Pfn) {
        if let Some(known) = self.pfns.get_mut(slot(pfn, self.digests_max))
            && *known == pfn.0.wrapping_add(1)
        {
            *known = 0;
        }
        if let Some(Some((of, _))) = self.copies.get_mut(slot(pfn, self.copies_max))
            && *of == pfn
        {
            *of = Pfn(u64::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::PageType;
    use crate::stream::libxc::{RECORD_HEADER_BYTES, RecordHeader};

    fn reducer(reduce: Reduce) -> Reducer<'static> {
        let agreed = Agreed { reduce: reduce.or(Reduce::ALWAYS), seed: 3, links: 1 };
        Reducer::new(Reducing::timeless(agreed)).unwrap()
    }

    /// Sends a page: how many bytes that takes, and what the receiver has afterwards.
    fn send(reducer: &mut Reducer<'_>, pfn: u64, now: &PageBuf, had: &mut PageBuf) -> usize {
        assert!(reducer.begin(|_, _| panic!("nobody has to find out")));
        let entry = PageEntry { pfn: Pfn(pfn), kind: PageType::Normal };
        assert!(reducer.add(entry, now, true, Duration::ZERO).unwrap().is_none());
        reducer.end();
        let record = reducer.take().unwrap().unwrap();
        let header = RecordHeader::parse(*record.first_chunk().unwrap()).unwrap();
        let body = &record[RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + header.length];
        let before = had.clone();
        let read = |_: usize, into: &mut PageBuf| into.0 = before.0;
        let parsed = reduced::parse(body).unwrap();
        parsed.unpack(&reducer.agreed, read, |_, page| had.0 = page.0).unwrap();
        assert!(had.0 == now.0);
        body.len() - 24
    }

    fn noise(seed: u8) -> PageBuf {
        let mut word = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(seed);
        let mut page = PageBuf([0; PAGE_SIZE]);
        for chunk in page.0.as_chunks_mut::<8>().0 {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            *chunk = (word ^ word >> 29).to_le_bytes();
        }
        page
    }

    /// Letters of which some are frequent, in no order.
    fn words() -> PageBuf {
        let mut page = noise(3);
        page.0.iter_mut().for_each(|byte| *byte = b"eeeeee  "[usize::from(*byte % 8)]);
        page
    }

    #[test]
    fn what_is_known_of_a_page_is_left_out() {
        let (mut all, mut had) = (reducer(Reduce::ALL), noise(0));
        let mut now = noise(1);
        assert_eq!(send(&mut all, 7, &now, &mut had), PAGE_SIZE);
        assert_eq!(send(&mut all, 7, &now, &mut had), 8, "the same");
        now.0[100] ^= 1;
        assert!(send(&mut all, 7, &now, &mut had) < 100, "a byte has changed");
        assert_eq!(send(&mut all, 7, &PageBuf([0; PAGE_SIZE]), &mut had), 0);
        assert_eq!(send(&mut all, 7, &now, &mut had), PAGE_SIZE, "a page of zeros is not kept");
        let words = words();
        let dense = send(&mut all, 8, &words, &mut had);
        assert_eq!(all.left_out.by_kind().map(|(_, saved)| saved.pages), [1, 1, 0, 1, 1]);
        let mut lz4 = reducer(Reduce::COMPRESS);
        let packed = send(&mut lz4, 8, &words, &mut had);
        assert!(dense < 1500 && dense < packed && packed < PAGE_SIZE, "{dense}, {packed}");
        assert_eq!(lz4.left_out.compress.pages, 1);
    }

    #[test]
    fn what_others_have_sent_since_is_not_known() {
        let (mut all, mut had) = (reducer(Reduce::ALL), noise(0));
        let now = noise(1);
        let forgets: [fn(&mut Reducer<'_>); 2] =
            [|all| all.forget(Pfn(70)), |all| all.forget_run(1)];
        for forget in forgets {
            send(&mut all, 70, &now, &mut had);
            assert_eq!(send(&mut all, 70, &now, &mut had), 8);
            forget(&mut all);
            had = noise(5);
            assert_eq!(send(&mut all, 70, &now, &mut had), PAGE_SIZE);
        }
        all.forget_run(0);
        assert_eq!(send(&mut all, 70, &now, &mut had), 8, "another run");
        // Two pages that share a slot.
        let other = 70 + DIGESTS_MAX as u64;
        assert_eq!(send(&mut all, other, &now, &mut noise(6)), PAGE_SIZE);
        assert_eq!(send(&mut all, 70, &now, &mut had), PAGE_SIZE);
    }

    #[test]
    fn many_links_know_no_more_together_than_one_alone() {
        let all = Known::of(64);
        assert!(64 * all.digests_max <= DIGESTS_MAX && 64 * all.copies_max <= COPIES_MAX);
        assert!(all.digests_max > 0 && all.copies_max > 0);
        let agreed = Agreed { reduce: Reduce::ALL, seed: 3, links: u8::MAX };
        let mut all = Reducer::new(Reducing::timeless(agreed)).unwrap();
        // Each pair shares a slot of the digests.
        let mut had = noise(0);
        for pfn in [7, 7 + all.known.digests_max as u64, 7] {
            assert_eq!(send(&mut all, pfn, &noise(1), &mut had), PAGE_SIZE);
        }
    }

    #[test]
    fn each_kind_can_be_left_out_of_it() {
        let (zero, now) = (PageBuf([0; PAGE_SIZE]), noise(1));
        let mut changed = noise(1);
        changed.0[3] ^= 7;
        for (kind, expected) in [
            (Reduce::ZERO, [0, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE]),
            (Reduce::SAME, [PAGE_SIZE, PAGE_SIZE, 8, PAGE_SIZE]),
            (Reduce::ZSTD, [16, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE]),
            (Reduce::COMPRESS, [32, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE]),
            (Reduce::DELTA, [PAGE_SIZE, PAGE_SIZE, 40, 40]),
        ] {
            let (mut one, mut had) = (reducer(kind), noise(0));
            for (page, expected) in [&zero, &now, &now, &changed].into_iter().zip(expected) {
                let bytes = send(&mut one, 7, page, &mut had);
                let close = bytes.abs_diff(expected) < 32 && (bytes == 8) == (expected == 8);
                assert!(close, "{kind}: {bytes} bytes instead of about {expected}");
            }
        }
    }
}
