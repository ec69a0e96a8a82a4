//! Which record may come when, without reading any of it.
//!
//! ```text
//!   Begin ─► ReadHeader ◄───────────────────────────────────────────────┐ Done
//!               │ Record(header)                                         │
//!               ├─ body within the limit of its kind ─► Body ────────────┤
//!               ├─ page data ─────────────────────────► Pages ───────────┤
//!               ├─ unknown, optional ─────────────────► Skip ────────────┤
//!               ├─ end of static data ────────────────► EndStaticData ───┤
//!               └─ END ─► Complete
//!
//!   phase:  static ──STATIC_DATA_END──► memory ──vCPU, HVM or shared info──► state ──END──►
//!           PV: X86_PV_INFO             PV: X86_PV_P2M_FRAMES, then pages
//!           CPU policies                [VERIFY, then pages to compare]
//! ```
//!
//! Streams of version 2 have no STATIC_DATA_END: there the first X86_PV_P2M_FRAMES (PV) or
//! PAGE_DATA (HVM) stands for it. X86_TSC_INFO may come in any phase.
//!
//! Specified in Xen's `docs/specs/libxc-migration-stream.pandoc`, "Layout". Records of Remus and
//! COLO (checkpoints) are unknown here and mandatory, so they end a restore.

use crate::error::{Error, Result};
use crate::stream::FormatError;
use crate::stream::libxc::{GuestKind, ReadKind, RecordHeader, RecordKind, StreamHeader};
use crate::x86::pv::VCPU_CONTEXT_BYTES;

/// A frame for each 512 pfns, for the 2^32 pfns that the record can express, after its range.
const P2M_FRAMES_BYTES_MAX: usize = 8 + 8 * (1 << 23);
/// A vCPU's save records are below 16 KiB (of which the xsave area is most): 1024 vCPUs.
const HVM_CONTEXT_BYTES_MAX: usize = 1024 * (16 << 10);
/// Xen knows 39 parameters; this is 256, after their count.
const HVM_PARAMS_BYTES_MAX: usize = 8 + 16 * 256;
/// Xen's policies serialise to fewer than 100 leaves and 10 MSRs; this is 2730 and 4096.
const POLICY_BYTES_MAX: usize = 64 << 10;
/// After the vCPU's number: 11 KiB of xsave area with all that is architected (AMX is 8 KiB of
/// it), or 4096 MSRs where Xen has fewer than 10.
const VCPU_BYTES_MAX: usize = 8 + (64 << 10);

/// What the driver is to do; it answers with [`Event::Done`] unless another event is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the next record's header → [`Event::Record`].
    ReadHeader,
    /// Pass over a record that need not be understood.
    Skip {
        /// Its type.
        code: u32,
        /// Bytes of its body.
        length: usize,
    },
    /// Apply the static data and tell the toolstack. Nothing is to be read.
    EndStaticData,
    /// Read the body, which is within the limit of its kind, and apply or keep it.
    Body {
        /// What it is; never one of the kinds that have an action of their own.
        kind: RecordKind,
        /// Bytes of its body.
        length: usize,
    },
    /// Read page data and place it, or compare it with what has been placed.
    Pages {
        /// Bytes of the record's body.
        length: usize,
        /// Compare.
        compare: bool,
    },
    /// The stream is over: load the state. No event follows.
    Complete,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Go: the stream's own headers have been read.
    Begin,
    /// A record's header has been read.
    Record(RecordHeader),
    /// The action succeeded.
    Done,
}

impl Event {
    fn name(self) -> &'static str {
        match self {
            Event::Begin => "begin",
            Event::Record(_) => "a record",
            Event::Done => "done",
        }
    }
}

/// What the machine waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    AwaitingRecord,
    Applying,
    /// The end of static data was implied by this record, which comes next.
    ApplyingStaticData(Option<RecordHeader>),
    Over,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Idle => "idle",
            State::AwaitingRecord => "awaiting a record",
            State::Applying => "applying a record",
            State::ApplyingStaticData(_) => "applying the static data",
            State::Over => "over",
        }
    }
}

/// How far the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Static,
    Memory,
    State,
}

/// The receiver's state.
#[derive(Debug)]
pub struct Machine {
    state: State,
    phase: Phase,
    guest: GuestKind,
    version: u32,
    pv_info: bool,
    cpuid: bool,
    msrs: bool,
    p2m: bool,
    compare: bool,
}

impl Machine {
    /// A restore of the stream that begins with `header`.
    #[must_use]
    pub fn new(header: &StreamHeader) -> Machine {
        Machine {
            state: State::Idle,
            phase: Phase::Static,
            guest: header.guest,
            version: header.version,
            pv_info: false,
            cpuid: false,
            msrs: false,
            p2m: false,
            compare: false,
        }
    }

    /// What to do after `event`.
    ///
    /// # Errors
    /// [`Error::Format`] for a record that may not come here or is longer than its kind may be,
    /// after which the stream is worthless; [`Error::Machine`] for an event that answers no
    /// action.
    pub fn step(&mut self, event: Event) -> Result<Action> {
        let (state, action) = match (self.state, event) {
            (State::Idle, Event::Begin)
            | (State::Applying | State::ApplyingStaticData(None), Event::Done) => {
                (State::AwaitingRecord, Action::ReadHeader)
            }
            (State::ApplyingStaticData(Some(header)), Event::Done)
            | (State::AwaitingRecord, Event::Record(header)) => self.record(header)?,
            (state, event) => {
                return Err(Error::Machine { state: state.name(), event: event.name() });
            }
        };
        self.state = state;
        Ok(action)
    }

    fn record(&mut self, header: RecordHeader) -> Result<(State, Action), FormatError> {
        let length = header.length;
        let kind = match header.kind {
            ReadKind::Known(kind) => kind,
            ReadKind::Optional(code) => {
                return Ok((State::Applying, Action::Skip { code, length }));
            }
        };
        if self.implies_end_of_static_data(kind) {
            self.phase = Phase::Memory;
            return Ok((State::ApplyingStaticData(Some(header)), Action::EndStaticData));
        }
        self.check_length(kind, length)?;
        self.check_guest(kind)?;
        self.check_order(kind)?;
        Ok(match kind {
            RecordKind::End => (State::Over, Action::Complete),
            RecordKind::StaticDataEnd => (State::ApplyingStaticData(None), Action::EndStaticData),
            RecordKind::Verify => (State::AwaitingRecord, Action::ReadHeader),
            RecordKind::PageData => {
                (State::Applying, Action::Pages { length, compare: self.compare })
            }
            kind => (State::Applying, Action::Body { kind, length }),
        })
    }

    fn implies_end_of_static_data(&self, kind: RecordKind) -> bool {
        let first_of_memory = match self.guest {
            GuestKind::Pv => RecordKind::X86PvP2mFrames,
            GuestKind::Hvm => RecordKind::PageData,
        };
        self.version == 2 && self.phase == Phase::Static && kind == first_of_memory
    }

    fn check_length(&self, kind: RecordKind, length: usize) -> Result<(), FormatError> {
        let max = match kind {
            RecordKind::End | RecordKind::Verify | RecordKind::StaticDataEnd => 0,
            // Bounded by any record's limit, and not read whole.
            RecordKind::PageData => usize::MAX,
            RecordKind::X86PvInfo => 8,
            RecordKind::X86PvP2mFrames => P2M_FRAMES_BYTES_MAX,
            RecordKind::X86PvVcpuBasic => 8 + VCPU_CONTEXT_BYTES,
            RecordKind::X86PvVcpuExtended
            | RecordKind::X86PvVcpuXsave
            | RecordKind::X86PvVcpuMsrs => VCPU_BYTES_MAX,
            RecordKind::SharedInfo => crate::frame::PAGE_SIZE,
            RecordKind::X86TscInfo => 24,
            RecordKind::HvmContext => HVM_CONTEXT_BYTES_MAX,
            RecordKind::HvmParams => HVM_PARAMS_BYTES_MAX,
            RecordKind::X86CpuidPolicy | RecordKind::X86MsrPolicy => POLICY_BYTES_MAX,
        };
        if length > max {
            let why = "longer than a record of its kind may be";
            return Err(FormatError::Length { kind: kind.code(), length, why });
        }
        Ok(())
    }

    fn check_guest(&self, kind: RecordKind) -> Result<(), FormatError> {
        let (guest, why) = match kind {
            RecordKind::X86PvInfo
            | RecordKind::X86PvP2mFrames
            | RecordKind::X86PvVcpuBasic
            | RecordKind::X86PvVcpuExtended
            | RecordKind::X86PvVcpuXsave
            | RecordKind::X86PvVcpuMsrs
            | RecordKind::SharedInfo => (GuestKind::Pv, "is for PV guests only"),
            RecordKind::HvmContext | RecordKind::HvmParams => {
                (GuestKind::Hvm, "is for HVM guests only")
            }
            _ => return Ok(()),
        };
        require(self.guest == guest, kind, why)
    }

    /// Whether `kind` may come now; remembers that it came.
    fn check_order(&mut self, kind: RecordKind) -> Result<(), FormatError> {
        let phase = self.phase;
        match kind {
            RecordKind::X86PvInfo => {
                require(phase == Phase::Static, kind, "comes after the static data")?;
                require(!self.pv_info, kind, "comes twice")?;
                self.pv_info = true;
            }
            RecordKind::X86CpuidPolicy | RecordKind::X86MsrPolicy => {
                require(phase == Phase::Static, kind, "comes after the static data")?;
                let cpuid = kind == RecordKind::X86CpuidPolicy;
                let seen = if cpuid { &mut self.cpuid } else { &mut self.msrs };
                require(!*seen, kind, "comes twice")?;
                *seen = true;
            }
            RecordKind::StaticDataEnd => {
                require(phase == Phase::Static, kind, "comes twice")?;
                self.phase = Phase::Memory;
            }
            RecordKind::X86PvP2mFrames => {
                self.require_memory(kind)?;
                require(self.pv_info, kind, "comes before X86_PV_INFO")?;
                self.p2m = true;
            }
            RecordKind::PageData | RecordKind::Verify => {
                self.require_memory(kind)?;
                require(self.has_space(), kind, "comes before X86_PV_P2M_FRAMES")?;
                self.compare |= kind == RecordKind::Verify;
            }
            RecordKind::X86TscInfo => {}
            RecordKind::X86PvVcpuBasic
            | RecordKind::X86PvVcpuExtended
            | RecordKind::X86PvVcpuXsave
            | RecordKind::X86PvVcpuMsrs
            | RecordKind::SharedInfo
            | RecordKind::HvmContext
            | RecordKind::HvmParams => {
                require(phase > Phase::Static, kind, "comes before the end of static data")?;
                require(self.has_space(), kind, "comes before the memory")?;
                self.phase = Phase::State;
            }
            RecordKind::End => require(phase == Phase::State, kind, "comes before the state")?,
        }
        Ok(())
    }

    fn require_memory(&self, kind: RecordKind) -> Result<(), FormatError> {
        require(self.phase > Phase::Static, kind, "comes before the end of static data")?;
        require(self.phase < Phase::State, kind, "comes after the state")
    }

    /// Whether it is known which pfns there can be.
    fn has_space(&self) -> bool {
        self.guest == GuestKind::Hvm || self.p2m
    }
}

fn require(good: bool, kind: RecordKind, why: &'static str) -> Result<(), FormatError> {
    if good { Ok(()) } else { Err(FormatError::Order { kind: kind.code(), why }) }
}
