//! Large blocks in few bytes, so that an input may hold many pages and a change of one byte of it
//! is mostly a change of something that matters.
//!
//! ```text
//!   255                the block's bytes, all of them
//!   n, fill, n times (slot: u16, word: u64)
//!                      bytes `fill`, but 64-bit word number `slot` (of the words that there are)
//! ```

use crate::input::Input;

/// Blocks of at least so many bytes are written this way.
pub(crate) const BLOCK_BYTES_MIN: usize = 512;
/// The tag of a block that is there as it is.
const PLAIN: u8 = 255;

/// Fills `block` from `input`; `None` if that ends before.
pub(crate) fn read(input: &mut Input<'_>, block: &mut [u8]) -> Option<()> {
    if input.is_empty() {
        return None;
    }
    let count = input.u8();
    if count == PLAIN {
        let bytes = input.bytes(block.len());
        (bytes.len() == block.len()).then(|| block.copy_from_slice(bytes))?;
        return Some(());
    }
    block.fill(input.u8());
    for _ in 0..count {
        if input.is_empty() {
            return None;
        }
        let (slot, word) = (usize::from(input.u16()), input.u64());
        let words = block.as_chunks_mut::<8>().0;
        let slot = slot.checked_rem(words.len())?;
        *words.get_mut(slot)? = word.to_le_bytes();
    }
    Some(())
}

/// The bytes that [`read`] makes `block` from.
pub(crate) fn write(block: &[u8]) -> Vec<u8> {
    let (words, tail) = block.as_chunks::<8>();
    let mut counts = [0_usize; 256];
    for byte in block {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count += 1;
        }
    }
    let fill = (0..=255).max_by_key(|byte: &u8| counts.get(usize::from(*byte))).unwrap_or(0);
    let others: Vec<(u16, &[u8; 8])> =
        (0..).zip(words).filter(|(_, word)| **word != [fill; 8]).collect();
    let count = u8::try_from(others.len()).unwrap_or(PLAIN);
    if count == PLAIN || tail.iter().any(|byte| *byte != fill) {
        return [&[PLAIN], block].concat();
    }
    let mut bytes = vec![count, fill];
    for (slot, word) in others {
        bytes.extend(slot.to_le_bytes());
        bytes.extend(word);
    }
    bytes
}
