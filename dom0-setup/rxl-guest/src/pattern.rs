//! What a page holds, as a function of (seed, page, version): any page can be verified at any
//! time, and a page of another place or an earlier version is never taken for the right one.

/// 64-bit words in a page.
pub(crate) const PAGE_WORDS: usize = 512;

/// Kinds of content, which differ in how well they compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// All zero until first rewritten; then the first word tells page and version, the rest is
    /// zero.
    Zero,
    /// Pseudo-random bits: incompressible.
    Random,
    /// Words of a small dictionary: compressible about as text is.
    Text,
}

const DICTIONARY: [&[u8; 8]; 16] = [
    b"the page",
    b" of this",
    b" domain ",
    b"migrates",
    b" between",
    b" hosts. ",
    b"and then",
    b" it runs",
    b" again, ",
    b"without ",
    b"loss of ",
    b"a single",
    b" byte or",
    b" a long ",
    b"pause. I",
    b"t stays ",
];

impl Content {
    /// The kind of that name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "zero" => Some(Self::Zero),
            "random" => Some(Self::Random),
            "text" => Some(Self::Text),
            _ => None,
        }
    }

    /// The words of a page, in order.
    pub(crate) fn words(self, seed: u64, page: u64, version: u32) -> PageWords {
        // Each input goes through the mixer, so that neighbours have unrelated streams.
        let tag = mix(mix(mix(seed) ^ page) ^ u64::from(version));
        PageWords { content: self, version, state: tag, index: 0 }
    }
}

/// Iterator over the words of one page.
#[derive(Clone, Debug)]
pub(crate) struct PageWords {
    content: Content,
    version: u32,
    state: u64,
    index: usize,
}

impl Iterator for PageWords {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.index == PAGE_WORDS {
            return None;
        }
        let is_first = self.index == 0;
        self.index += 1;
        Some(match self.content {
            Content::Zero if is_first && self.version > 0 => self.state,
            Content::Zero => 0,
            Content::Random => self.next_random(),
            // The first word makes the page unique: text alone repeats now and then.
            Content::Text if is_first => self.state,
            Content::Text => {
                let choice = usize::try_from(self.next_random() >> 60).unwrap_or(0);
                u64::from_le_bytes(*DICTIONARY.get(choice).copied().unwrap_or(b"????????"))
            }
        })
    }
}

impl PageWords {
    /// One step of xorshift64: cheap, which counts in an emulated machine.
    fn next_random(&mut self) -> u64 {
        let mut x = self.state;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.state = x;
        x
    }
}

/// A bijective mixer (the finaliser of splitmix64); never gives 0 for what it is used on here in
/// practice, and the `| 1` keeps xorshift out of its fixed point.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(content: Content, page: u64, version: u32) -> Vec<u64> {
        content.words(7, page, version).collect()
    }

    #[test]
    fn test_words_fill_exactly_one_page() {
        for content in [Content::Zero, Content::Random, Content::Text] {
            assert_eq!(page(content, 3, 4).len(), PAGE_WORDS);
        }
    }

    #[test]
    fn test_words_other_page_or_version_differs() {
        for content in [Content::Zero, Content::Random, Content::Text] {
            assert_eq!(page(content, 3, 4), page(content, 3, 4));
            assert_ne!(page(content, 3, 4), page(content, 3, 5));
            assert_ne!(page(content, 3, 4), page(content, 4, 4));
        }
    }

    #[test]
    fn test_words_zero_content_is_zero_before_first_write() {
        assert!(page(Content::Zero, 9, 0).iter().all(|&word| word == 0));
        assert_eq!(page(Content::Zero, 9, 1).iter().filter(|&&word| word != 0).count(), 1);
    }

    #[test]
    fn test_words_text_is_ascii_after_tag() {
        let bytes = page(Content::Text, 1, 0).into_iter().skip(1).flat_map(u64::to_le_bytes);
        assert!(bytes.into_iter().all(|byte| byte.is_ascii_graphic() || byte == b' '));
    }
}
