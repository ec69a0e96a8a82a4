//! Counts events in a trace that Xen's `xentrace` wrote.
//!
//! A record is a word (event in bits 0 to 27, number of further words in 28 to 30, and whether a
//! time stamp of two words follows in 31), then the time stamp and the further words. Specified in
//! `xen/include/public/trace.h`.

use std::path::Path;

use serde_json::json;

use crate::Result;

/// `TRC_PV_HYPERCALL_V2`; the number of the hypercall is in bits 0 to 19 of its first word.
const HYPERCALL: u32 = 0x0020_100d;
/// `TRC_PV_PTWR_EMULATION`: a write to a page table that Xen had to do.
const PAGE_TABLE_WRITE: u32 = 0x0020_100b;
/// Set in an event of a 64-bit guest whose form depends on that.
const FLAG_64: u32 = 0x100;

/// Hypercalls that change page tables: `mmu_update`, `update_va_mapping`, `mmuext_op`.
const PAGE_TABLE_CALLS: [u32; 3] = [1, 14, 26];

/// What is counted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Hypercalls that change page tables.
    hypercalls: u64,
    /// Page-table writes that trapped.
    traps: u64,
}

/// Prints the counts of a trace file as a line of JSON.
pub(crate) fn print(file: &Path) -> Result<()> {
    let trace = std::fs::read(file)?;
    let words = trace.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
    let counts = count(words);
    let line = json!({ "hypercalls": counts.hypercalls, "traps": counts.traps });
    crate::print(&line)
}

fn count(mut words: impl Iterator<Item = u32>) -> Counts {
    let mut counts = Counts::default();
    while let Some(head) = words.next() {
        if head >> 31 == 1 {
            words.by_ref().take(2).for_each(drop);
        }
        let extra: Vec<u32> = words.by_ref().take((head >> 28 & 7) as usize).collect();
        match head & 0x0fff_ffff & !FLAG_64 {
            PAGE_TABLE_WRITE => counts.traps += 1,
            HYPERCALL => {
                let number = extra.first().map(|word| word & 0xf_ffff);
                counts.hypercalls +=
                    u64::from(number.is_some_and(|number| PAGE_TABLE_CALLS.contains(&number)));
            }
            _ => {}
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_record_are_not_taken_for_records() {
        let stamped = 1 << 31;
        let trace = [
            // A hypercall with a time stamp whose words look like records.
            HYPERCALL | stamped | 1 << 28,
            PAGE_TABLE_WRITE,
            HYPERCALL,
            1,
            // Another one, that changes no page table.
            HYPERCALL | 1 << 28,
            29,
            PAGE_TABLE_WRITE | FLAG_64 | stamped | 3 << 28,
            0,
            0,
            PAGE_TABLE_WRITE,
            0,
            0,
        ];
        assert_eq!(count(trace.into_iter()), Counts { hypercalls: 1, traps: 1 });
    }
}
