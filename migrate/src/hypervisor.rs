//! What the engine needs of a hypervisor, a toolstack and a stream: traits only.
//!
//! `toolstack` implements them for this host's Xen; `fake` models them in memory for tests.
//! Nothing here says how a request reaches Xen: the numbers of hypercalls and the layouts
//! of their structures belong to the implementor. Layouts that are also *stream* formats (vCPU
//! contexts, CPU policy arrays, HVM context) pass through as bytes.
//!
//! Frames are `u64`: pfns of an HVM/PVH guest, mfns of a PV guest (see [`crate::frame`]).

use std::io;
use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::counters::Counters;
use crate::frame::{DomId, PageBuf, PageType, Pfn};
use crate::report::Event;
use crate::x86::cpuid::Feature;

/// Most frames that one [`SourceDomain::page_types`] call takes (Xen answers `E2BIG` beyond).
pub const BATCH_PAGES_MAX: usize = 1024;

/// A request that Xen or the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{op} failed")]
pub struct HvError {
    /// The request in the words of Xen's interface, e.g. `XEN_DOMCTL_getdomaininfo`.
    pub op: &'static str,
    /// The errno that came back.
    #[source]
    pub source: io::Error,
}

/// Result of a request to the hypervisor.
pub type HvResult<T> = Result<T, HvError>;

/// A domain as `XEN_DOMCTL_getdomaininfo` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Translated guest (HVM or PVH); false is PV.
    pub hvm: bool,
    /// Paused by a toolstack (not: blocked, not: shut down).
    pub paused: bool,
    /// `Some(reason)` once shut down; 2 is suspend.
    pub shutdown: Option<u8>,
    /// Being torn down.
    pub dying: bool,
    /// Pages the domain owns.
    pub total_pages: u64,
    /// Machine frame of the shared info page.
    pub shared_info_mfn: u64,
    /// Highest vCPU number, online or not.
    pub max_vcpu_id: u32,
}

/// `SHUTDOWN_suspend` of `xen/include/public/sched.h`.
pub const SHUTDOWN_SUSPEND: u8 = 2;

/// How a mapping may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Guest frames mapped into this process, in the order in which they were asked for.
///
/// The guest (or Xen) may write them at any time, so there is no way to borrow their bytes:
/// every access copies. A page that is inspected is copied once and the copy inspected.
/// Dropping it unmaps. An index past the end reads as zeros and ignores writes.
pub trait ForeignPages {
    /// Number of pages.
    fn page_count(&self) -> usize;
    /// Copies page `index` out.
    fn read_page(&self, index: usize, into: &mut PageBuf);
    /// Copies `from` into page `index`.
    fn write_page(&self, index: usize, from: &PageBuf);
    /// One aligned little-endian word: `index` counts 64-bit words from the start of the mapping.
    fn read_u64(&self, index: usize) -> u64;
}

/// One page to send: where its bytes come from.
#[derive(Debug)]
pub enum PagePiece<'a, P> {
    /// A page of a mapping, by its index, sent as it is at that moment.
    Mapped(&'a P, usize),
    /// A private copy (a normalised page table).
    Copied(&'a PageBuf),
}

/// One page to receive: where its bytes go.
#[derive(Debug)]
pub enum PageSlot<'a> {
    /// Straight into page `index` of the mapping.
    Mapped(usize),
    /// Into a private copy (a page table still to be localised).
    Copied(&'a mut PageBuf),
}

/// The outgoing stream.
pub trait StreamOut<P: ForeignPages> {
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// What the descriptor says; after an error the stream is worthless.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Writes `head`, then a page for each piece, as one sequence of bytes.
    ///
    /// # Errors
    /// As [`StreamOut::write_all`].
    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, P>]) -> io::Result<()>;
    /// Nanoseconds in which it was waited for, so far.
    fn stalled_ns(&self) -> u64 {
        0
    }
}

/// The incoming stream. It never takes more bytes from the descriptor than it was asked for:
/// whoever owns the descriptor reads on from the very next byte.
pub trait StreamIn<P: ForeignPages> {
    /// Fills `buf`.
    ///
    /// # Errors
    /// `UnexpectedEof` where the stream ends before; else what the descriptor says.
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()>;
    /// Fills every slot with one page.
    ///
    /// # Errors
    /// As [`StreamIn::read_exact`].
    fn read_pages(&mut self, pages: &P, slots: &mut [PageSlot<'_>]) -> io::Result<()>;
    /// Where in its file the next byte is.
    ///
    /// # Errors
    /// It is not in a file; else what the descriptor says.
    fn position(&mut self) -> io::Result<u64> {
        Err(io::ErrorKind::NotSeekable.into())
    }
    /// Goes to byte `offset` of its file.
    ///
    /// # Errors
    /// `UnexpectedEof` where the file ends before; else as [`StreamIn::position`].
    fn go_to(&mut self, _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::NotSeekable.into())
    }
}

/// What sender and receiver ask of one domain.
pub trait Domain {
    /// A mapping made by [`Domain::map`].
    type Pages: ForeignPages;

    /// Its number.
    fn domid(&self) -> DomId;
    /// `XENVER_version`: major, minor.
    ///
    /// # Errors
    /// The hypercall's.
    fn xen_version(&self) -> HvResult<(u32, u32)>;
    /// State and size.
    ///
    /// # Errors
    /// The hypercall's, `ESRCH` where the domain is gone.
    fn info(&self) -> HvResult<DomainInfo>;
    /// Highest pfn that the guest's physmap ever held (`XENMEM_maximum_gpfn`).
    ///
    /// # Errors
    /// The hypercall's.
    fn maximum_gpfn(&self) -> HvResult<u64>;
    /// 64 or 32 (`XEN_DOMCTL_get_address_size`; PV).
    ///
    /// # Errors
    /// The hypercall's.
    fn address_bits(&self) -> HvResult<u32>;
    /// Maps `frames`; a frame may occur more than once. All or nothing: the first frame that
    /// cannot be mapped is the error.
    ///
    /// # Errors
    /// The mapping's.
    fn map(&self, frames: &[u64], access: Access) -> HvResult<Self::Pages>;
    /// The machine-to-physical table, read only: entry n, a `u64`, is the pfn of mfn n in
    /// whatever domain owns it. Covers mfns `0..512 * page_count`.
    ///
    /// # Errors
    /// The hypercalls' and the mapping's.
    fn map_m2p(&self) -> HvResult<Self::Pages>;
    /// What has been done for this domain so far, by this handle of it.
    fn counters(&self) -> Counters {
        Counters::default()
    }
    /// All memory has been sent, or is there. What is mapped may stay so from now on, if this
    /// process ends soon: the guest waits, and a mapping that goes with its process costs less.
    fn leave_mapped(&self) {}
}

/// TSC mode and offsets (`XEN_DOMCTL_gettscinfo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TscInfo {
    /// `XEN_CPUID_TSC_MODE`-style mode: 0 default, 1 always emulate, 2 never.
    pub mode: u32,
    /// Frequency in kHz.
    pub khz: u32,
    /// Guest time passed, in nanoseconds.
    pub nsec: u64,
    /// Count of restores.
    pub incarnation: u32,
}

/// CPUID leaves and MSRs that the guest was promised, in the layouts of
/// `xen_cpuid_leaf_t` (24 bytes each) and `xen_msr_entry_t` (16 bytes each).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CpuPolicy {
    /// n × 24 bytes.
    pub leaves: Vec<u8>,
    /// n × 16 bytes.
    pub msrs: Vec<u8>,
}

/// One vCPU's state in the layouts of the domctls; empty where Xen has none.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct VcpuState {
    /// `vcpu_guest_context_t` (5168 bytes, 64-bit): frames are mfns here.
    pub basic: Vec<u8>,
    /// `xen_domctl_ext_vcpucontext`.
    pub extended: Vec<u8>,
    /// The xsave area of `getvcpuextstate`.
    pub xsave: Vec<u8>,
    /// n × 16 bytes of `xen_domctl_vcpu_msr`.
    pub msrs: Vec<u8>,
}

impl std::fmt::Debug for VcpuState {
    /// Registers of a guest do not belong in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState")
            .field("basic", &self.basic.len())
            .field("extended", &self.extended.len())
            .field("xsave", &self.xsave.len())
            .field("msrs", &self.msrs.len())
            .finish()
    }
}

/// How much processor time a domain may have, in percent of one processor; 0: as much as there is.
/// A parameter of the hypervisor's scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuCap(pub u16);

impl CpuCap {
    /// `percent` of what this allows a domain of `vcpus`; at least something.
    #[must_use]
    pub fn part(self, percent: u8, vcpus: u32) -> CpuCap {
        let all = match self.0 {
            0 => u64::from(vcpus) * 100,
            cap => u64::from(cap),
        };
        let part = (all * u64::from(percent) / 100).max(1);
        CpuCap(u16::try_from(part).unwrap_or(u16::MAX - 1))
    }
}

/// What the sender asks of its domain.
pub trait SourceDomain: Domain {
    /// Switches log-dirty on, taking it away from VRAM tracking if that holds it.
    ///
    /// # Errors
    /// The hypercall's: `EINVAL` for a PV guest says that the hypervisor has no shadow paging,
    /// or that the guest has PCI devices.
    fn log_dirty_on(&self) -> HvResult<()>;
    /// Switches log-dirty off. Harmless where it is off.
    ///
    /// # Errors
    /// The hypercall's.
    fn log_dirty_off(&self) -> HvResult<()>;
    /// Moves the dirty bits since the last call (or since on) into `bitmap`, which covers the
    /// whole p2m; what is set there stays set. `last` also marks what Xen and the device model
    /// have mapped.
    ///
    /// # Errors
    /// The hypercall's.
    fn log_dirty_clean(&self, bitmap: &mut PageBitmap, last: bool) -> HvResult<()>;
    /// [`Domain::map`] will be asked for just these frames, to be read, after something else has
    /// been sent: it may begin with that. What was announced before and has not been asked for will
    /// not be.
    fn map_ahead(&self, _frames: &[u64]) {}
    /// Types of up to [`BATCH_PAGES_MAX`] frames, in order.
    ///
    /// # Errors
    /// The hypercall's, or a type that nobody knows (`EINVAL`).
    fn page_types(&self, frames: &[u64]) -> HvResult<Vec<PageType>>;
    /// TSC state.
    ///
    /// # Errors
    /// The hypercall's.
    fn tsc_info(&self) -> HvResult<TscInfo>;
    /// CPU policy.
    ///
    /// # Errors
    /// The hypercall's.
    fn cpu_policy(&self) -> HvResult<CpuPolicy>;
    /// The HVM save records (HVM, PVH).
    ///
    /// # Errors
    /// The hypercall's.
    fn hvm_context(&self) -> HvResult<Vec<u8>>;
    /// One HVM parameter.
    ///
    /// # Errors
    /// The hypercall's.
    fn hvm_param(&self, index: u32) -> HvResult<u64>;
    /// A PV vCPU's state; `None` where the vCPU is offline.
    ///
    /// # Errors
    /// The hypercalls'.
    fn vcpu(&self, id: u32) -> HvResult<Option<VcpuState>>;
    /// How much processor time it may have.
    ///
    /// # Errors
    /// The hypercall's: `EINVAL` where the scheduler knows no such limit.
    fn cpu_cap(&self) -> HvResult<CpuCap>;
    /// Lets it have so much from now on.
    ///
    /// # Errors
    /// As [`SourceDomain::cpu_cap`].
    fn set_cpu_cap(&self, cap: CpuCap) -> HvResult<()>;
}

/// Why a CPU policy cannot be had here.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// This host's CPU, Xen or settings lack what the guest was promised.
    #[error("this host cannot give the guest the CPU it had: {}", place(*leaf, *subleaf, *msr))]
    Refused {
        /// CPUID leaf at fault, or all ones.
        leaf: u32,
        /// CPUID subleaf at fault, or all ones.
        subleaf: u32,
        /// MSR at fault, or all ones.
        msr: u32,
    },
    /// Xen took the policy, but without a feature that the guest may be using.
    #[error(
        "this host cannot give the guest the CPU it had: {0} is missing here; move it to a host \
         that has that, or start it anew without it (cpuid= in its configuration)"
    )]
    Lost(Feature),
    /// The request failed otherwise.
    #[error(transparent)]
    Hv(#[from] HvError),
}

/// What a policy was refused for.
fn place(leaf: u32, subleaf: u32, msr: u32) -> String {
    match (leaf, subleaf) {
        (u32::MAX, _) => format!("MSR {msr:#x}"),
        (leaf, u32::MAX) => format!("CPUID leaf {leaf:#x}"),
        (leaf, subleaf) => format!("CPUID leaf {leaf:#x} subleaf {subleaf}"),
    }
}

/// What the receiver asks of its domain, which is empty and paused at first.
pub trait TargetDomain: Domain {
    /// Gives memory to each of `pfns` (each the first of `2^order` consecutive ones), in order,
    /// as long as there is some. The frames of those that have it now come back: the mfns for PV,
    /// the pfns themselves else. Fewer than were asked for: the next one cannot be had.
    ///
    /// # Errors
    /// The hypercall's; then none of them has memory, or the domain is worthless.
    fn populate(&self, pfns: &[Pfn], order: u32) -> HvResult<Vec<u64>>;
    /// Sets CPUID leaves and MSRs.
    ///
    /// # Errors
    /// [`PolicyError::Refused`] and [`PolicyError::Lost`] name what this host cannot give.
    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), PolicyError>;
    /// Sets the TSC state.
    ///
    /// # Errors
    /// The hypercall's.
    fn set_tsc_info(&self, tsc: &TscInfo) -> HvResult<()>;
    /// Loads HVM save records.
    ///
    /// # Errors
    /// The hypercall's.
    fn set_hvm_context(&self, context: &[u8]) -> HvResult<()>;
    /// Sets one HVM parameter.
    ///
    /// # Errors
    /// The hypercall's.
    fn set_hvm_param(&self, index: u32, value: u64) -> HvResult<()>;
    /// Sets the width of a PV guest that has no memory yet.
    ///
    /// # Errors
    /// The hypercall's.
    fn set_address_bits(&self, bits: u32) -> HvResult<()>;
    /// Loads a PV vCPU: `basic` first, then those parts that are not empty.
    ///
    /// # Errors
    /// The hypercalls'.
    fn set_vcpu(&self, id: u32, state: &VcpuState) -> HvResult<()>;
    /// Pins page tables, each a level (1 to 4) and an mfn. Xen validates them here.
    ///
    /// # Errors
    /// The hypercall's: a table is not what the stream said.
    fn pin_tables(&self, tables: &[(u8, u64)]) -> HvResult<()>;
    /// Writes the console's and xenstore's entries into the guest's grant table: `(frame of the
    /// ring, domain that may map it)`. A frame of all ones is left out.
    ///
    /// # Errors
    /// The hypercall's.
    fn seed_grants(&self, console: (u64, DomId), xenstore: (u64, DomId)) -> HvResult<()>;
}

/// The toolstack around the engine: libxl, through its helper protocol ([`crate::helper`]).
pub trait Toolstack {
    /// Asks the guest to suspend and waits until it has. `false`: it did not.
    ///
    /// # Errors
    /// The channel to the toolstack broke.
    fn suspend(&mut self) -> io::Result<bool>;
    /// Switches the device model's dirty logging (HVM; libxl makes it a no-op for PVH).
    ///
    /// # Errors
    /// The channel broke, or the toolstack says that it failed.
    fn qemu_log_dirty(&mut self, on: bool) -> io::Result<()>;
    /// The static data has been read; `missing_cpuid`/`missing_msr` say that the stream held no
    /// CPU policy and the toolstack has to make one.
    ///
    /// # Errors
    /// The channel broke, or the toolstack says that it failed.
    fn static_data_done(&mut self, missing_cpuid: bool, missing_msr: bool) -> io::Result<()>;
    /// A line for the user or the log.
    fn log(&mut self, level: LogLevel, text: &str);
    /// `done` of `total` pages of `what`; the implementor thins it out.
    fn progress(&mut self, what: &str, done: u64, total: u64);
    /// Something that the report is made from.
    fn event(&mut self, event: &Event);
    /// Whether the user or the toolstack wants it ended.
    fn aborted(&self) -> bool;
    /// A clock that never goes back; when it began is of no matter.
    fn now(&self) -> Duration;
}

/// Levels of xentoollog (`xentoollog.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// For developers.
    Debug = 1,
    /// For the curious.
    Verbose = 2,
    /// More than most want.
    Detail = 3,
    /// What happens.
    Info = 5,
    /// Something odd.
    Warn = 7,
    /// Something failed.
    Error = 8,
}
