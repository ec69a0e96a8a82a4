//! HVM and PVH guests: pfns are frames; parameters on arrival, the context at the end.

use crate::error::{Error, Result};
use crate::frame::{INVALID_FRAME, PageBuf, PageType, Pfn};
use crate::hypervisor::{Access, ForeignPages, TargetDomain};
use crate::stream::FormatError;
use crate::stream::libxc::{PageEntry, RecordKind, parse_hvm_params};
use crate::target::driver::{Options, Outcome};
use crate::target::guest::Guest;
use crate::target::memory::{self, HVM_PFN_END, NO_MEMORY, Populated, Space};
use crate::x86::hvm::{
    BUFIOREQ_PFN, CONSOLE_EVTCHN, CONSOLE_PFN, IOREQ_PFN, PAE_ENABLED, STORE_EVTCHN, STORE_PFN,
};

/// A translated guest that is being received.
pub(super) struct Hvm<'a, D> {
    domain: &'a D,
    populated: Populated,
    /// Kept until all parameters are set, which it depends on.
    context: Option<Vec<u8>>,
    store_frame: u64,
    console_frame: u64,
}

impl<'a, D: TargetDomain> Hvm<'a, D> {
    pub(super) fn new(domain: &'a D) -> Self {
        Hvm {
            domain,
            populated: Populated::default(),
            context: None,
            store_frame: INVALID_FRAME,
            console_frame: INVALID_FRAME,
        }
    }

    fn set_params(&mut self, body: &[u8]) -> Result<()> {
        for (index, value) in parse_hvm_params(body)? {
            let Ok(index) = u32::try_from(index) else {
                return Err(content("an index that no parameter has"));
            };
            match index {
                PAE_ENABLED => continue,
                STORE_PFN => self.store_frame = value,
                CONSOLE_PFN => self.console_frame = value,
                _ => {}
            }
            if matches!(index, STORE_PFN | CONSOLE_PFN | IOREQ_PFN | BUFIOREQ_PFN) {
                self.clear(Pfn(value))?;
            }
            self.domain.set_hvm_param(index, value)?;
        }
        Ok(())
    }

    /// Zeroes a page that is shared with a backend, which starts afresh.
    fn clear(&self, pfn: Pfn) -> Result<()> {
        let frame = self.populated.frame(pfn).ok_or(content(NO_MEMORY))?;
        let page = self.domain.map(&[frame], Access::ReadWrite)?;
        page.write_page(0, &PageBuf::zeroed());
        Ok(())
    }
}

impl<D: TargetDomain> Guest for Hvm<'_, D> {
    fn check(&self, entry: &PageEntry) -> Result<()> {
        let why = if entry.pfn.0 >= HVM_PFN_END {
            "is beyond what a guest can address"
        } else if entry.kind.table_level().is_some() {
            "is a page table, which only a PV guest has"
        } else {
            return Ok(());
        };
        Err(FormatError::PageEntry { entry: entry.encode(), why }.into())
    }

    fn populate(&mut self, pfns: impl Iterator<Item = Pfn>) -> Result<()> {
        memory::populate(self.domain, &mut self.populated, pfns)
    }

    fn frame(&self, pfn: Pfn) -> Option<u64> {
        self.populated.frame(pfn)
    }

    fn set_type(&mut self, _pfn: Pfn, _kind: PageType) {}

    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>> {
        memory::frames(&self.populated, pfns)
    }

    /// There are no tables: `check` refuses them.
    fn resolve(&mut self, pfns: &[Pfn]) -> Result<Vec<u64>> {
        match pfns {
            [] => Ok(Vec::new()),
            _ => Err(Error::Unsupported("only a PV guest has page tables of its own")),
        }
    }

    /// There are none.
    fn localise(&mut self, _tables: &mut [&mut PageBuf]) -> Result<()> {
        Ok(())
    }

    fn record(&mut self, kind: RecordKind, body: Vec<u8>) -> Result<()> {
        match kind {
            RecordKind::HvmParams => self.set_params(&body)?,
            RecordKind::HvmContext => self.context = Some(body),
            other => return Err(FormatError::UnknownRecord(other.code()).into()),
        }
        Ok(())
    }

    fn complete(&mut self, options: &Options) -> Result<Outcome> {
        let context = self.context.take().ok_or(FormatError::Order {
            kind: RecordKind::End.code(),
            why: "comes without an HVM_CONTEXT before it",
        })?;
        self.domain.set_hvm_param(STORE_EVTCHN, options.store_evtchn.into())?;
        self.domain.set_hvm_param(CONSOLE_EVTCHN, options.console_evtchn.into())?;
        self.domain.set_hvm_context(&context)?;
        self.domain.seed_grants(
            (self.console_frame, options.console_domid),
            (self.store_frame, options.store_domid),
        )?;
        Ok(Outcome { store_frame: self.store_frame, console_frame: self.console_frame })
    }
}

fn content(why: &'static str) -> Error {
    FormatError::Content { kind: RecordKind::HvmParams.code(), why }.into()
}
