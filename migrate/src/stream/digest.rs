//! Digests of pages, by which two rxl ends see that a guest has arrived as it was.
//!
//! ```text
//!   stream:  headers  VERIFY_BY_DIGESTS  …static data…  page data  state records  END
//!                                                                ▲
//!   stream or links, after the last pass:  DIGESTS: n × (entry, digest of its page)
//! ```
//!
//! The sender says at the start that digests will come, in a record that must be understood: a
//! stock receiver refuses the stream before it has any memory of it. Digests are a pass of their
//! own ([`super::link`]), after the last with pages, while the guest is suspended. A page table of
//! a PV guest is digested as it is sent, with pfns; the receiver turns its mfns back into pfns.
//!
//! The digest is XXH3 with 128 bits. It is to find what hardware and programs do by mistake, where
//! two different pages have the same digest once in 2^128; it is no proof against somebody who
//! wants that, and whoever could change pages on their way could change digests as well. A
//! cryptographic one would take several times as long, and all of it is pause.

use twox_hash::XxHash3_128;

use crate::frame::PageBuf;
use crate::hypervisor::BATCH_PAGES_MAX;
use crate::stream::FormatError;
use crate::stream::libxc::{self, PageEntry, RecordKind};

/// Bytes of a digest.
const DIGEST_BYTES: usize = 16;
/// Bytes of an entry and its digest.
const PAIR_BYTES: usize = 8 + DIGEST_BYTES;
/// Longest body of a record: a batch.
pub const DIGESTS_BYTES_MAX: usize = BATCH_PAGES_MAX * PAIR_BYTES;

/// What a page's content comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageDigest([u8; DIGEST_BYTES]);

impl PageDigest {
    /// The digest of `page`.
    #[must_use]
    pub fn of(page: &PageBuf) -> PageDigest {
        PageDigest(XxHash3_128::oneshot(&page.0).to_le_bytes())
    }
}

/// The record that says that digests will come.
///
/// # Errors
/// None that can happen: it has no body.
pub fn verify_record() -> Result<Vec<u8>, FormatError> {
    libxc::record(RecordKind::RxlVerify, &[])
}

/// The record of the digests of some pages, at most [`BATCH_PAGES_MAX`], all with data.
///
/// # Errors
/// As [`verify_record`]: a batch is short enough.
pub fn record(pages: &[(PageEntry, PageDigest)]) -> Result<Vec<u8>, FormatError> {
    let mut body = Vec::with_capacity(pages.len() * PAIR_BYTES);
    for (entry, PageDigest(digest)) in pages {
        body.extend_from_slice(&entry.encode().to_le_bytes());
        body.extend_from_slice(digest);
    }
    libxc::record(RecordKind::RxlDigests, &[&body])
}

/// Reads the body of [`record`].
///
/// # Errors
/// It is none: too long, not whole pairs, or an entry of a page that has no data.
pub fn parse(body: &[u8]) -> Result<Vec<(PageEntry, PageDigest)>, FormatError> {
    let kind = RecordKind::RxlDigests.code();
    let (pairs, rest) = body.as_chunks::<PAIR_BYTES>();
    if !rest.is_empty() || body.len() > DIGESTS_BYTES_MAX {
        let (length, why) = (body.len(), "not the digests of a batch");
        return Err(FormatError::Length { kind, length, why });
    }
    let page = |[a, b, c, d, e, f, g, h, digest @ ..]: &[u8; PAIR_BYTES]| {
        let entry = PageEntry::parse(u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]))?;
        let why = "is of a page without data";
        match entry.kind.has_data() {
            true => Ok((entry, PageDigest(*digest))),
            false => Err(FormatError::PageEntry { entry: entry.encode(), why }),
        }
    };
    pairs.iter().map(page).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::{PageType, Pfn};
    use crate::stream::libxc::RECORD_HEADER_BYTES;

    fn entry(pfn: u64, kind: PageType) -> PageEntry {
        PageEntry { pfn: Pfn(pfn), kind }
    }

    #[test]
    fn the_records_are_these_bytes() {
        assert_eq!(verify_record().unwrap(), [6, 0, 0x58, 0x52, 0, 0, 0, 0]);
        let zero = PageDigest::of(&PageBuf::zeroed());
        let table = entry(7, PageType::Table { level: 1, pinned: false });
        let bytes = record(&[(table, zero)]).unwrap();
        let golden = [
            &[7, 0, 0x58, 0x52, 24, 0, 0, 0][..],
            &[7, 0, 0, 0, 0, 0, 0, 0x10],
            // XXH3_128bits of 4096 zeros, seed 0, by the reference implementation.
            &0x3ee8_dc4f_9e7e_e495_93d7_6fe1_48c6_89ba_u128.to_le_bytes(),
        ];
        assert_eq!(bytes, golden.concat());
    }

    #[test]
    fn what_is_no_batch_of_digests_is_refused() {
        assert!(matches!(parse(&[0; 23]), Err(FormatError::Length { .. })));
        let long = vec![0; DIGESTS_BYTES_MAX + PAIR_BYTES];
        assert!(matches!(parse(&long), Err(FormatError::Length { .. })));
        let hole = record(&[(entry(1, PageType::Invalid), PageDigest([0; 16]))]).unwrap();
        let body = &hole[RECORD_HEADER_BYTES..];
        assert!(matches!(parse(body), Err(FormatError::PageEntry { .. })));
        assert_eq!(parse(&[]), Ok(vec![]));
    }

    proptest! {
        #[test]
        fn digests_are_read_as_they_were_written_and_tell_pages_apart(
            pages in prop::collection::vec((0_u64..1 << 40, any::<u8>()), 0..40),
            byte in 0_usize..4096,
        ) {
            let digest = |fill: u8| PageDigest::of(&PageBuf([fill; 4096]));
            let pages: Vec<_> = pages
                .iter()
                .map(|(pfn, fill)| (entry(*pfn, PageType::Normal), digest(*fill)))
                .collect();
            let bytes = record(&pages).unwrap();
            prop_assert_eq!(parse(&bytes[RECORD_HEADER_BYTES..]).unwrap(), pages);
            let mut changed = PageBuf([1; 4096]);
            changed.0[byte] ^= 0x40;
            prop_assert_ne!(PageDigest::of(&changed), digest(1));
        }
    }
}
