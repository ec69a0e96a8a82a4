//! What a process has done for a migration, in numbers that can be added up: hypercalls, mappings,
//! time. Whoever does it counts (`toolstack`); here is only what is counted.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::frame::PAGE_SIZE;
use crate::stream::reduced::Reduced;

/// Counts of one process, or of several. Times are nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Hypercalls by the name of the operation, those that a mapping takes in the kernel left out.
    pub hypercalls: BTreeMap<String, u64>,
    /// Mappings of guest memory that were made.
    pub mappings: u64,
    /// Pages that they had.
    pub mapped_pages: u64,
    /// Those of them that rxl's kernel module mapped; the others are privcmd's.
    pub module_pages: u64,
    /// Pages that were sent from mappings that had been made for earlier batches.
    pub kept_pages: u64,
    /// Time that making mappings took.
    pub map_ns: u64,
    /// Time that removing them took.
    pub unmap_ns: u64,
    /// Time in which there was something to send and the way to the receiver, or others on it, had
    /// to be waited for.
    pub stalled_ns: u64,
    /// What was left out of what was sent.
    #[serde(skip_serializing_if = "LeftOut::is_nothing")]
    pub left_out: LeftOut,
}

/// Pages of which less was sent than they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeftOut {
    /// Of zeros: nothing.
    pub zero: Saved,
    /// The same as before: a digest.
    pub same: Saved,
    /// Compressed by LZ4.
    pub compress: Saved,
    /// What has changed.
    pub delta: Saved,
    /// Compressed by Zstandard.
    pub zstd: Saved,
}

/// What something has saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Pages.
    pub pages: u64,
    /// Bytes that were not sent of them.
    pub bytes: u64,
}

impl LeftOut {
    /// Whether all was sent.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == LeftOut::default()
    }

    /// A page is sent so.
    pub(crate) fn note(&mut self, page: &Reduced<'_>) {
        let saved = match page {
            Reduced::Zero => &mut self.zero,
            Reduced::Same(_) => &mut self.same,
            Reduced::Packed(_) => &mut self.compress,
            Reduced::Delta(..) => &mut self.delta,
            Reduced::Zstd(_) => &mut self.zstd,
            Reduced::Whole(_) => return,
        };
        saved.pages += 1;
        saved.bytes += (PAGE_SIZE - page.len()) as u64;
    }

    /// What was saved, by what: its name in the report and on the command line.
    #[must_use]
    pub fn by_kind(&self) -> [(&'static str, Saved); 5] {
        let LeftOut { zero, same, compress, delta, zstd } = *self;
        [("zero", zero), ("same", same), ("compress", compress), ("delta", delta), ("zstd", zstd)]
    }

    fn add(&mut self, other: &LeftOut) {
        for (sum, add) in [
            (&mut self.zero, other.zero),
            (&mut self.same, other.same),
            (&mut self.compress, other.compress),
            (&mut self.delta, other.delta),
            (&mut self.zstd, other.zstd),
        ] {
            sum.pages = sum.pages.saturating_add(add.pages);
            sum.bytes = sum.bytes.saturating_add(add.bytes);
        }
    }
}

impl AddAssign<&Counters> for Counters {
    fn add_assign(&mut self, other: &Counters) {
        self.left_out.add(&other.left_out);
        for (op, count) in &other.hypercalls {
            let sum = self.hypercalls.entry(op.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
        for (sum, add) in [
            (&mut self.mappings, other.mappings),
            (&mut self.mapped_pages, other.mapped_pages),
            (&mut self.module_pages, other.module_pages),
            (&mut self.kept_pages, other.kept_pages),
            (&mut self.map_ns, other.map_ns),
            (&mut self.unmap_ns, other.unmap_ns),
            (&mut self.stalled_ns, other.stalled_ns),
        ] {
            *sum = sum.saturating_add(add);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_and_do_not_wrap() {
        let one = |op: &str, count| Counters {
            hypercalls: BTreeMap::from([(op.to_owned(), count)]),
            mappings: count,
            ..Counters::default()
        };
        let mut sum = one("a", u64::MAX);
        sum += &one("a", 1);
        sum += &one("b", 2);
        assert_eq!(sum.hypercalls, BTreeMap::from([("a".into(), u64::MAX), ("b".into(), 2)]));
        assert_eq!(sum.mappings, u64::MAX);
    }
}
