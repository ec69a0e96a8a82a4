//! What the receiver asks of either kind of guest.

use crate::error::Result;
use crate::frame::{PageBuf, PageType, Pfn};
use crate::stream::libxc::{PageEntry, RecordKind};
use crate::target::driver::{Options, Outcome};

/// A guest that is being received.
pub(super) trait Guest {
    /// Refuses an entry of page data that this guest cannot have.
    fn check(&self, entry: &PageEntry) -> Result<()>;
    /// Gives memory to those of `pfns` that have none.
    fn populate(&mut self, pfns: impl Iterator<Item = Pfn>) -> Result<()>;
    /// Remembers the type of a pfn; the last one counts.
    fn set_type(&mut self, pfn: Pfn, kind: PageType);
    /// The frames of `pfns`, which have memory, as the hypervisor maps them.
    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>>;
    /// Turns the pfns of page tables into frames.
    fn localise(&mut self, tables: &mut [&mut PageBuf]) -> Result<()>;
    /// Applies a record of this kind of guest, or keeps it for the end.
    fn record(&mut self, kind: RecordKind, body: Vec<u8>) -> Result<()>;
    /// Loads what was kept, after the last record.
    fn complete(&mut self, options: &Options) -> Result<Outcome>;
}
