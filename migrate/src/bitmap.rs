//! A bitmap over a guest's pfns: one bit a page, in the layout of the log-dirty hypercall
//! (`XEN_DOMCTL_shadow_op`: bit n of little-endian 64-bit words is pfn n).

use crate::frame::Pfn;

/// Bits for pfns `0..len`. The bits past `len` in the last word are always clear.
#[derive(Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    len: u64,
}

impl PageBitmap {
    /// All clear, for pfns `0..len`.
    #[must_use]
    pub fn new(len: u64) -> PageBitmap {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX);
        PageBitmap { words: vec![0; words], len }
    }

    /// All set, for pfns `0..len`.
    #[must_use]
    pub fn full(len: u64) -> PageBitmap {
        let mut map = PageBitmap::new(len);
        map.words.fill(u64::MAX);
        map.clear_tail();
        map
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
            && let Some(word) = self.word_mut(pfn)
        {
            *word |= 1 << (pfn.0 % 64);
        }
    }

    /// Clears the bit of `pfn`.
    pub fn clear(&mut self, pfn: Pfn) {
        if let Some(word) = self.word_mut(pfn) {
            *word &= !(1 << (pfn.0 % 64));
        }
    }

    /// The bit of `pfn`; false outside.
    #[must_use]
    pub fn get(&self, pfn: Pfn) -> bool {
        let word = usize::try_from(pfn.0 / 64).ok().and_then(|i| self.words.get(i));
        word.is_some_and(|w| w >> (pfn.0 % 64) & 1 == 1)
    }

    /// Number of bits set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Clears every bit.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Sets every bit that is set in `other`, as far as it is covered.
    pub fn union(&mut self, other: &PageBitmap) {
        for (word, add) in self.words.iter_mut().zip(&other.words) {
            *word |= add;
        }
        self.clear_tail();
    }

    /// Grows to cover `0..len`, the new bits clear. Never shrinks.
    pub fn grow(&mut self, len: u64) {
        if len > self.len {
            self.words.resize(usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX), 0);
            self.len = len;
        }
    }

    /// Replaces the content by the little-endian bytes of a hypercall buffer; missing bytes are 0.
    pub fn load_le_bytes(&mut self, bytes: &[u8]) {
        let (whole, rest) = bytes.as_chunks::<8>();
        let known = whole.len().min(self.words.len());
        let (words, others) = self.words.split_at_mut(known);
        words.iter_mut().zip(whole).for_each(|(word, le)| *word = u64::from_le_bytes(*le));
        others.fill(0);
        if let Some(word) = others.first_mut() {
            let mut le = [0; 8];
            le.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            *word = u64::from_le_bytes(le);
        }
        self.clear_tail();
    }

    /// The set pfns in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        // Most words of a late pass are clear: they are left out before anything is done for them.
        let words = self.words.iter().zip(0_u64..).filter(|(word, _)| **word != 0);
        words.flat_map(|(&word, index)| {
            std::iter::successors(Some(word), |w| {
                let rest = w & (w - 1);
                (rest != 0).then_some(rest)
            })
            .map(move |w| Pfn(index * 64 + u64::from(w.trailing_zeros())))
        })
    }

    fn word_mut(&mut self, pfn: Pfn) -> Option<&mut u64> {
        usize::try_from(pfn.0 / 64).ok().and_then(|i| self.words.get_mut(i))
    }

    fn clear_tail(&mut self) {
        if !self.len.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (self.len % 64)) - 1;
        }
    }
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
            let map = PageBitmap::full(len);
            assert_eq!(map.count(), len);
            assert_eq!(map.iter().last(), len.checked_sub(1).map(Pfn));
        }
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_set_of_numbers(
            len in 1_u64..300,
            ops in prop::collection::vec((0_u64..320, any::<bool>()), 0..200),
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
        }

        #[test]
        fn bytes_of_the_hypercall_are_bit_n_for_pfn_n(
            bytes in prop::collection::vec(any::<u8>(), 0..40), len in 1_u64..400,
        ) {
            let mut map = PageBitmap::full(len);
            map.load_le_bytes(&bytes);
            let byte = |p: u64| bytes.get((p / 8) as usize).copied().unwrap_or(0);
            let expected = |p: u64| p < len && byte(p) >> (p % 8) & 1 == 1;
            prop_assert!((0..400).all(|p| map.get(Pfn(p)) == expected(p)));
            prop_assert_eq!(map.count(), (0..400).filter(|p| expected(*p)).count() as u64);
        }
    }
}
