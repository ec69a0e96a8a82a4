//! A page made shorter, and back: by LZ4, which takes little time, and by Zstandard (RFC 8878),
//! which takes a few times as long and leaves less of text and the like.
//!
//! Each page is for itself: what is packed is one LZ4 block, or one frame of Zstandard.
//!
//! What it is not: whether that pays (`source::effort`), or the record that packed pages are in
//! ([`super::reduced`]).

use std::fmt;

use zstd::bulk::{Compressor, Decompressor};

use crate::frame::{PAGE_SIZE, PageBuf};

/// What is not shorter than this is not worth it.
const PACKED_BYTES_MAX: usize = PAGE_SIZE - 9;
/// The fastest of Zstandard's common levels. Of words, the only content that was compared, level 3
/// leaves 945 bytes of a page instead of 1038, in the same time.
const ZSTD_LEVEL: i32 = 1;

/// Compresses `page` by LZ4 into `into`, if that makes it shorter: how much of `into` that is.
pub fn pack<'a>(page: &PageBuf, into: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    into.resize(lz4_flex::block::get_maximum_output_size(PAGE_SIZE), 0);
    let length = lz4_flex::block::compress_into(&page.0, into).ok()?;
    into.get(..length).filter(|packed| packed.len() <= PACKED_BYTES_MAX)
}

/// Makes `page` of what [`pack`] made of it. `false`: it is something else.
#[must_use]
pub fn unpack(packed: &[u8], page: &mut PageBuf) -> bool {
    matches!(lz4_flex::block::decompress_into(packed, &mut page.0), Ok(PAGE_SIZE))
}

/// Compresses pages by Zstandard, with what that takes: about 240 KiB, from the first page on.
#[derive(Default)]
pub struct ZstdPacker(Option<Compressor<'static>>);

impl ZstdPacker {
    /// As [`pack`]. Where there is no memory for it nothing is made shorter.
    pub fn pack<'a>(&mut self, page: &PageBuf, into: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        if self.0.is_none() {
            self.0 = Compressor::new(ZSTD_LEVEL).ok();
        }
        into.resize(PACKED_BYTES_MAX, 0);
        let length = self.0.as_mut()?.compress_to_buffer(&page.0, into.as_mut_slice()).ok()?;
        into.get(..length)
    }
}

impl fmt::Debug for ZstdPacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ZstdPacker").field(&self.0.is_some()).finish()
    }
}

/// Makes pages of what [`ZstdPacker`] made of them. It takes no memory for what a frame says of its
/// size: all goes straight into the page.
#[derive(Default)]
pub struct ZstdUnpacker(Option<Decompressor<'static>>);

impl ZstdUnpacker {
    /// `false`: it is something else, or there is no memory for it.
    #[must_use]
    pub fn unpack(&mut self, packed: &[u8], page: &mut PageBuf) -> bool {
        if self.0.is_none() {
            self.0 = Decompressor::new().ok();
        }
        let Some(unpacker) = &mut self.0 else { return false };
        matches!(unpacker.decompress_to_buffer(packed, page.0.as_mut_slice()), Ok(PAGE_SIZE))
    }
}

impl fmt::Debug for ZstdUnpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ZstdUnpacker").field(&self.0.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(at: usize, byte: u8) -> PageBuf {
        let mut page = PageBuf([9; PAGE_SIZE]);
        page.0.iter_mut().step_by(64).zip(0_u8..).for_each(|(byte, n)| *byte = n);
        page.0[at] = byte;
        page
    }

    #[test]
    fn what_cannot_be_made_shorter_is_left() {
        let mut noise = PageBuf::zeroed();
        let mut word = 1_u64;
        for chunk in noise.0.as_chunks_mut::<8>().0 {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            *chunk = (word ^ word >> 29).to_le_bytes();
        }
        assert_eq!(pack(&noise, &mut Vec::new()), None);
        assert_eq!(ZstdPacker::default().pack(&noise, &mut Vec::new()), None);
    }

    #[test]
    fn a_frame_of_more_or_less_than_a_page_is_refused() {
        let mut unpacker = ZstdUnpacker::default();
        for length in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 64 << 20] {
            let frame = zstd::bulk::compress(&vec![3; length], 1).unwrap();
            assert!(!unpacker.unpack(&frame, &mut PageBuf::zeroed()), "{length}");
        }
        let frame = zstd::bulk::compress(&[3; PAGE_SIZE], 1).unwrap();
        let mut page = PageBuf::zeroed();
        assert!(unpacker.unpack(&frame, &mut page) && page.0 == [3; PAGE_SIZE]);
    }

    proptest! {
        #[test]
        fn a_packed_page_is_that_page_or_refused(
            at in 0_usize..4096, byte: u8, cut in 0_usize..4096, flip: u8,
        ) {
            let (now, mut packer, mut packed) = (page(at, byte), ZstdPacker::default(), Vec::new());
            let mut unpacker = ZstdUnpacker::default();
            let check = |bytes: &[u8], unpack: &mut dyn FnMut(&[u8], &mut PageBuf) -> bool| {
                let (mut bytes, mut out) = (bytes.to_vec(), PageBuf::zeroed());
                let cut = cut % bytes.len();
                bytes[cut] ^= flip;
                let done = unpack(&bytes, &mut out);
                flip != 0 || (done && out.0 == now.0)
            };
            prop_assert!(check(pack(&now, &mut packed).unwrap(), &mut unpack));
            let bytes = packer.pack(&now, &mut packed).unwrap();
            prop_assert!(check(bytes, &mut |bytes, page| unpacker.unpack(bytes, page)));
        }
    }
}
