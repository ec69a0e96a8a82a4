//! What the receiver asks of either kind of guest, and what placing pages needs of it.

use crate::error::Result;
use crate::frame::{PageBuf, PageType, Pfn};
use crate::stream::libxc::{PageEntry, RecordKind};
use crate::target::driver::{Options, Outcome};

/// Where the pages of a batch are, and those that its page tables refer to.
pub(super) trait Frames {
    /// The frames of pfns that were prepared with data.
    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>>;
    /// Turns the pfns of page tables into frames.
    fn localise(&mut self, tables: &mut [&mut PageBuf]) -> Result<()>;
}

/// What is known of the memory of a guest that is being received: in this process, or asked of
/// the one that knows it ([`crate::target::links`]).
pub(super) trait Memory: Frames {
    /// Refuses entries that the guest cannot have, gives memory to those that need some, and
    /// remembers their types.
    fn prepare(&mut self, entries: &[PageEntry]) -> Result<()>;
    /// The frames of any pfns, as far as they have memory.
    fn look(&mut self, pfns: &[Pfn]) -> Result<Vec<Option<u64>>>;
}

impl<G: Guest> Frames for G {
    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>> {
        Guest::frames(self, pfns)
    }

    fn localise(&mut self, tables: &mut [&mut PageBuf]) -> Result<()> {
        Guest::localise(self, tables)
    }
}

impl<G: Guest> Memory for G {
    fn prepare(&mut self, entries: &[PageEntry]) -> Result<()> {
        entries.iter().try_for_each(|entry| self.check(entry))?;
        let needy = entries.iter().filter(|entry| entry.kind.needs_memory());
        self.populate(needy.map(|entry| entry.pfn))?;
        entries.iter().for_each(|entry| self.set_type(entry.pfn, entry.kind));
        Ok(())
    }

    fn look(&mut self, pfns: &[Pfn]) -> Result<Vec<Option<u64>>> {
        Ok(pfns.iter().map(|pfn| self.frame(*pfn)).collect())
    }
}

/// A guest that is being received.
pub(super) trait Guest {
    /// Refuses an entry of page data that this guest cannot have.
    fn check(&self, entry: &PageEntry) -> Result<()>;
    /// Gives memory to those of `pfns` that have none.
    fn populate(&mut self, pfns: impl Iterator<Item = Pfn>) -> Result<()>;
    /// The frame of `pfn`, as the hypervisor maps it, if it has memory.
    fn frame(&self, pfn: Pfn) -> Option<u64>;
    /// Remembers the type of a pfn; the last one counts.
    fn set_type(&mut self, pfn: Pfn, kind: PageType);
    /// The frames of `pfns`, which have memory, as the hypervisor maps them.
    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>>;
    /// Frames for the pfns that a page table refers to. A table may refer to pages that have not
    /// come yet; they get their memory now.
    fn resolve(&mut self, pfns: &[Pfn]) -> Result<Vec<u64>>;
    /// Turns the pfns of page tables into frames.
    fn localise(&mut self, tables: &mut [&mut PageBuf]) -> Result<()>;
    /// Applies a record of this kind of guest, or keeps it for the end.
    fn record(&mut self, kind: RecordKind, body: Vec<u8>) -> Result<()>;
    /// Loads what was kept, after the last record.
    fn complete(&mut self, options: &Options) -> Result<Outcome>;
}
