//! A bitmap over a guest's pfns: one bit a page, in the layout of the log-dirty hypercall
//! (`XEN_DOMCTL_shadow_op`: bit n of little-endian 64-bit words is pfn n).

use std::ops::Range;

use crate::frame::Pfn;

/// What is looked at in one go, a line of the cache.
const LINE_BYTES: usize = 64;
const LINE_WORDS: usize = LINE_BYTES / 8;

/// Bits for pfns `0..len`. The bits past `len` in the last word are always clear.
#[derive(Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    len: u64,
    /// Number of bits set, so that nobody has to go through a large bitmap for it.
    count: u64,
}

impl PageBitmap {
    /// All clear, for pfns `0..len`.
    #[must_use]
    pub fn new(len: u64) -> PageBitmap {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX);
        PageBitmap { words: vec![0; words], len, count: 0 }
    }

    /// Number of pfns covered (not of bits set).
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it covers no pfn at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sets the bit of `pfn`; a pfn outside is left alone.
    pub fn set(&mut self, pfn: Pfn) {
        if pfn.0 < self.len
            && let Some(word) = index(pfn).and_then(|index| self.words.get_mut(index))
        {
            self.count += join(word, bit(pfn));
        }
    }

    /// Clears the bit of `pfn`.
    pub fn clear(&mut self, pfn: Pfn) {
        if let Some(word) = index(pfn).and_then(|index| self.words.get_mut(index)) {
            self.count -= u64::from(*word & bit(pfn) != 0);
            *word &= !bit(pfn);
        }
    }

    /// The bit of `pfn`; false outside.
    #[must_use]
    pub fn get(&self, pfn: Pfn) -> bool {
        let word = index(pfn).and_then(|index| self.words.get(index));
        word.is_some_and(|word| word & bit(pfn) != 0)
    }

    /// Number of bits set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Sets every bit.
    pub fn set_all(&mut self) {
        self.words.fill(u64::MAX);
        self.count = 64 * self.words.len() as u64;
        self.clear_tail();
    }

    /// Clears every bit.
    pub fn clear_all(&mut self) {
        if self.count > 0 {
            self.words.fill(0);
            self.count = 0;
        }
    }

    /// Takes over all bits of `other`, as far as they are covered, and leaves it clear.
    pub fn take(&mut self, other: &mut PageBitmap) {
        if other.count > 0 {
            let words = self.words.iter_mut().zip(&other.words);
            self.count += words.map(|(word, add)| join(word, *add)).sum::<u64>();
            self.clear_tail();
            other.clear_all();
        }
    }

    /// Grows to cover `0..len`, the new bits clear. Never shrinks.
    pub fn grow(&mut self, len: u64) {
        if len > self.len {
            self.words.resize(usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX), 0);
            self.len = len;
        }
    }

    /// Sets every bit that is set in the little-endian bytes of a hypercall buffer; missing bytes
    /// are 0.
    pub fn add_le_bytes(&mut self, bytes: &[u8]) {
        for (words, bytes) in self.words.chunks_mut(LINE_WORDS).zip(bytes.chunks(LINE_BYTES)) {
            // Most of a late pass is clear, and costs no more than to be read.
            if bytes.iter().fold(0, |all, byte| all | byte) == 0 {
                continue;
            }
            let (whole, rest) = bytes.as_chunks::<8>();
            let mut last = [0; 8];
            last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            let added = whole.iter().chain([&last]).map(|word| u64::from_le_bytes(*word));
            self.count +=
                words.iter_mut().zip(added).map(|(word, add)| join(word, add)).sum::<u64>();
        }
        self.clear_tail();
    }

    /// The set pfns in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.iter_in(0..self.len)
    }

    /// The set pfns of `range`, in ascending order.
    pub fn iter_in(&self, range: Range<u64>) -> impl Iterator<Item = Pfn> + use<'_> {
        let first = range.start / 64;
        let words = self.words_set(first..range.end.div_ceil(64));
        words
            .flat_map(move |(index, word)| {
                let before = if index == first { (1 << (range.start % 64)) - 1 } else { 0 };
                let some = |w: u64| (w != 0).then_some(w);
                std::iter::successors(some(word & !before), move |w| some(w & (w - 1)))
                    .map(move |w| Pfn(index * 64 + u64::from(w.trailing_zeros())))
            })
            .take_while(move |pfn| pfn.0 < range.end)
    }

    /// Those of the words `range` that are not clear, with their numbers: word n has the bits of
    /// pfns `64 * n..64 * (n + 1)`.
    pub fn words_set(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + use<'_> {
        let bound = |word: u64| usize::try_from(word).unwrap_or(usize::MAX).min(self.words.len());
        let words = self.words.get(bound(range.start)..bound(range.end)).unwrap_or_default();
        // Most words of a late pass are clear: they are left out before anything is done for them.
        let words = words.iter().zip(range.start..).filter(|(word, _)| **word != 0);
        words.map(|(word, index)| (index, *word))
    }

    fn clear_tail(&mut self) {
        if !self.len.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            let beyond = u64::MAX << (self.len % 64);
            self.count -= u64::from((*last & beyond).count_ones());
            *last &= !beyond;
        }
    }
}

/// Which word has the bit of `pfn`.
fn index(pfn: Pfn) -> Option<usize> {
    usize::try_from(pfn.0 / 64).ok()
}

/// The bit of `pfn` in its word.
fn bit(pfn: Pfn) -> u64 {
    1 << (pfn.0 % 64)
}

/// Sets the bits of `add` in `word`; how many of them were clear.
fn join(word: &mut u64, add: u64) -> u64 {
    let new = add & !*word;
    *word |= add;
    new.count_ones().into()
}

impl std::fmt::Debug for PageBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageBitmap({} of {})", self.count(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_full_bitmap_has_no_bit_past_its_length() {
        for len in [0, 1, 63, 64, 65, 1000] {
            let map = full(len);
            assert_eq!(map.count(), len);
            assert_eq!(map.iter().last(), len.checked_sub(1).map(Pfn));
        }
    }

    fn full(len: u64) -> PageBitmap {
        let mut map = PageBitmap::new(len);
        map.set_all();
        map
    }

    fn with(len: u64, pfns: &[u64]) -> PageBitmap {
        let mut map = PageBitmap::new(len);
        pfns.iter().for_each(|pfn| map.set(Pfn(*pfn)));
        map
    }

    fn pfns(map: &PageBitmap) -> BTreeSet<u64> {
        map.iter().map(|pfn| pfn.0).collect()
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_set_of_numbers(
            len in 1_u64..300,
            ops in prop::collection::vec((0_u64..320, any::<bool>()), 0..200),
            from in 0_u64..320, to in 0_u64..400,
        ) {
            let mut map = PageBitmap::new(len);
            let mut model = BTreeSet::new();
            for (pfn, set) in ops {
                if set {
                    map.set(Pfn(pfn));
                    if pfn < len { model.insert(pfn); }
                } else {
                    map.clear(Pfn(pfn));
                    model.remove(&pfn);
                }
            }
            prop_assert_eq!(map.iter().map(|p| p.0).collect::<Vec<_>>(),
                            model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(map.count(), model.len() as u64);
            prop_assert!((0..320).all(|p| map.get(Pfn(p)) == model.contains(&p)));
            let part = map.iter_in(from..to).map(|p| p.0);
            prop_assert!(part.eq(model.iter().copied().filter(|p| (from..to).contains(p))));
            prop_assert!(map.words_set(0..9).all(|(_, word)| word != 0));
        }

        #[test]
        fn bytes_of_the_hypercall_are_bit_n_for_pfn_n(
            bytes in prop::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..400),
            len in 1_u64..4000,
            before in prop::collection::vec(0_u64..4000, 0..20),
        ) {
            let mut map = with(len, &before);
            let mut expected = pfns(&map);
            map.add_le_bytes(&bytes);
            let byte = |p: u64| bytes.get((p / 8) as usize).copied().unwrap_or(0);
            expected.extend((0..len).filter(|p| byte(*p) >> (p % 8) & 1 == 1));
            prop_assert_eq!(map.count(), expected.len() as u64);
            prop_assert_eq!(pfns(&map), expected);
        }

        #[test]
        fn what_is_taken_over_is_in_one_bitmap_and_no_more_in_the_other(
            lens in (1_u64..300, 1_u64..300),
            one in prop::collection::vec(0_u64..300, 0..40),
            other in prop::collection::vec(0_u64..300, 0..40),
        ) {
            let (mut one, mut other) = (with(lens.0, &one), with(lens.1, &other));
            let mut expected = pfns(&one);
            expected.extend(pfns(&other).iter().filter(|pfn| **pfn < lens.0));
            one.take(&mut other);
            prop_assert_eq!(one.count(), expected.len() as u64);
            prop_assert_eq!(pfns(&one), expected);
            prop_assert!(other == PageBitmap::new(lens.1));
        }
    }
}
