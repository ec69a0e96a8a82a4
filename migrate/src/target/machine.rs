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
//!           [an offer of links]         [ends of passes, lost links]
//!           [that digests will come]    [digests]
//! ```
//!
//! Streams of version 2 have no STATIC_DATA_END: there the first X86_PV_P2M_FRAMES (PV) or
//! PAGE_DATA (HVM) stands for it. X86_TSC_INFO may come in any phase.
//!
//! Specified in Xen's `docs/specs/libxc-migration-stream.pandoc`, "Layout". Records of Remus and
//! COLO (checkpoints) are unknown here and mandatory, so they end a restore.

use crate::error::{Error, Result};
use crate::stream::FormatError;
use crate::stream::digest::DIGESTS_BYTES_MAX;
use crate::stream::libxc::{GuestKind, ReadKind, RecordHeader, RecordKind, StreamHeader};
use crate::stream::link::OFFER_BYTES_MAX;
use crate::stream::reduced::REDUCED_BYTES_MAX;
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
    /// Read digests and compare them with what has been placed.
    Digests {
        /// Bytes of the record's body.
        length: usize,
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
    offer: bool,
    compare: bool,
    /// Digests will come.
    verify: bool,
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
            offer: false,
            compare: false,
            verify: false,
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
            RecordKind::Verify | RecordKind::RxlVerify => {
                (State::AwaitingRecord, Action::ReadHeader)
            }
            RecordKind::RxlDigests => (State::Applying, Action::Digests { length }),
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
            RecordKind::End
            | RecordKind::Verify
            | RecordKind::StaticDataEnd
            | RecordKind::RxlVerify => 0,
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
            RecordKind::RxlOffer => OFFER_BYTES_MAX,
            RecordKind::RxlReduced => REDUCED_BYTES_MAX,
            RecordKind::RxlPass | RecordKind::RxlLinkLost => 8,
            RecordKind::RxlPassEnd => 16,
            RecordKind::RxlDigests => DIGESTS_BYTES_MAX,
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
            RecordKind::RxlOffer => {
                require(phase == Phase::Static, kind, "comes after the static data")?;
                require(!self.offer, kind, "comes twice")?;
                self.offer = true;
            }
            RecordKind::RxlPassEnd | RecordKind::RxlLinkLost => {
                self.require_memory(kind)?;
                require(self.offer, kind, "comes without an offer of links")?;
            }
            RecordKind::RxlPass | RecordKind::RxlReduced => {
                require(false, kind, "is for links only")?;
            }
            RecordKind::RxlVerify => {
                require(phase == Phase::Static, kind, "comes after the static data")?;
                require(!self.verify, kind, "comes twice")?;
                self.verify = true;
            }
            RecordKind::RxlDigests => {
                self.require_memory(kind)?;
                require(self.has_space(), kind, "comes before X86_PV_P2M_FRAMES")?;
                require(self.verify, kind, "comes without a word that it will")?;
            }
            RecordKind::End => require(phase == Phase::State, kind, "comes before the state")?,
        }
        Ok(())
    }

    fn require_memory(&self, kind: RecordKind) -> Result<(), FormatError> {
        require(self.phase > Phase::Static, kind, "comes before the end of static data")?;
        require(self.phase < Phase::State, kind, "comes after the state")
    }

    /// Whether page data may come now.
    pub(super) fn takes_pages(&self) -> bool {
        self.phase == Phase::Memory && self.has_space()
    }

    /// Whether it is known which pfns there can be.
    fn has_space(&self) -> bool {
        self.guest == GuestKind::Hvm || self.p2m
    }
}

fn require(good: bool, kind: RecordKind, why: &'static str) -> Result<(), FormatError> {
    if good { Ok(()) } else { Err(FormatError::Order { kind: kind.code(), why }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use RecordKind as K;
    use proptest::prelude::*;

    const PV_HEAD: [K; 3] = [K::X86PvInfo, K::X86CpuidPolicy, K::StaticDataEnd];

    /// The actions that a stream of these records leads to, empty where that is possible.
    fn run(guest: GuestKind, version: u32, kinds: &[K]) -> Result<Vec<Action>> {
        let mut machine = Machine::new(&StreamHeader { version, guest, xen: (4, 17) });
        let mut kinds = kinds.iter();
        let mut actions = Vec::new();
        let mut event = Event::Begin;
        loop {
            let action = machine.step(event)?;
            event = match action {
                Action::ReadHeader => match kinds.next() {
                    Some(kind) => {
                        Event::Record(RecordHeader { kind: ReadKind::Known(*kind), length: 0 })
                    }
                    None => return Ok(actions),
                },
                action => {
                    actions.push(action);
                    Event::Done
                }
            };
            if action == Action::Complete {
                assert_eq!(kinds.next(), None, "records after the end");
                return Ok(actions);
            }
        }
    }

    fn refusal(guest: GuestKind, version: u32, kinds: &[K]) -> (u32, &'static str) {
        match run(guest, version, kinds) {
            Err(Error::Format(FormatError::Order { kind, why })) => (kind, why),
            other => panic!("{kinds:?}: {other:?}"),
        }
    }

    #[test]
    fn a_pv_stream_of_either_version_ends_its_static_data_before_its_p2m() {
        let body = |kind| Action::Body { kind, length: 0 };
        let memory = [K::X86PvP2mFrames, K::PageData, K::X86TscInfo, K::SharedInfo];
        let end = [K::X86PvVcpuBasic, K::X86PvVcpuXsave, K::End];
        let then = [
            Action::EndStaticData,
            body(K::X86PvP2mFrames),
            Action::Pages { length: 0, compare: false },
            body(K::X86TscInfo),
            body(K::SharedInfo),
            body(K::X86PvVcpuBasic),
            body(K::X86PvVcpuXsave),
            Action::Complete,
        ];
        let v3 = run(GuestKind::Pv, 3, &[&PV_HEAD[..], &memory, &end].concat()).unwrap();
        assert_eq!(v3, [&[body(K::X86PvInfo), body(K::X86CpuidPolicy)][..], &then].concat());
        let v2 = run(GuestKind::Pv, 2, &[&[K::X86PvInfo][..], &memory, &end].concat()).unwrap();
        assert_eq!(v2, [&[body(K::X86PvInfo)][..], &then].concat());
    }

    #[test]
    fn an_hvm_stream_may_have_context_and_parameters_in_either_order() {
        for state in [[K::HvmContext, K::HvmParams], [K::HvmParams, K::HvmContext]] {
            let memory = [K::StaticDataEnd, K::PageData, K::PageData];
            let v3 = run(GuestKind::Hvm, 3, &[&memory[..], &state, &[K::End]].concat()).unwrap();
            let v2 = run(GuestKind::Hvm, 2, &[&memory[1..], &state, &[K::End]].concat()).unwrap();
            assert_eq!(v3, v2);
            assert_eq!(v3.iter().filter(|a| **a == Action::EndStaticData).count(), 1);
        }
    }

    #[test]
    fn pages_after_a_verify_record_are_compared() {
        let kinds = [K::StaticDataEnd, K::PageData, K::Verify, K::PageData];
        let actions = run(GuestKind::Hvm, 3, &kinds).unwrap();
        let compare = |compare| Action::Pages { length: 0, compare };
        assert_eq!(actions, [Action::EndStaticData, compare(false), compare(true)]);
    }

    #[test]
    fn a_record_where_it_may_not_be_is_refused() {
        use GuestKind::{Hvm, Pv};
        let pv = |more: &[K]| [&PV_HEAD[..], more].concat();
        let early = "comes before the end of static data";
        for (guest, version, kinds, why) in [
            (Hvm, 3, vec![K::PageData], early),
            (Pv, 3, vec![K::X86PvInfo, K::X86PvP2mFrames], early),
            (Hvm, 3, vec![K::HvmParams], early),
            (Hvm, 2, vec![K::HvmContext], early),
            (Pv, 2, vec![K::X86PvInfo, K::PageData], early),
            (Hvm, 3, vec![K::StaticDataEnd, K::StaticDataEnd], "comes twice"),
            (Hvm, 3, vec![K::X86MsrPolicy, K::X86MsrPolicy], "comes twice"),
            (Pv, 3, vec![K::X86PvInfo, K::X86PvInfo], "comes twice"),
            (Pv, 3, pv(&[K::X86PvInfo]), "comes after the static data"),
            (Hvm, 3, vec![K::StaticDataEnd, K::X86CpuidPolicy], "comes after the static data"),
            (Pv, 3, vec![K::StaticDataEnd, K::X86PvP2mFrames], "comes before X86_PV_INFO"),
            (Pv, 2, vec![K::X86PvP2mFrames], "comes before X86_PV_INFO"),
            (Pv, 3, pv(&[K::PageData]), "comes before X86_PV_P2M_FRAMES"),
            (Pv, 3, pv(&[K::X86PvVcpuBasic]), "comes before the memory"),
            (Pv, 3, pv(&[K::X86PvP2mFrames, K::SharedInfo, K::PageData]), "comes after the state"),
            (Hvm, 3, vec![K::StaticDataEnd, K::HvmContext, K::Verify], "comes after the state"),
            (Hvm, 3, vec![K::StaticDataEnd, K::PageData, K::End], "comes before the state"),
            (Hvm, 3, vec![K::End], "comes before the state"),
            (Hvm, 3, vec![K::StaticDataEnd, K::RxlDigests], "comes without a word that it will"),
            (Hvm, 3, vec![K::StaticDataEnd, K::RxlVerify], "comes after the static data"),
            (Hvm, 3, vec![K::X86PvInfo], "is for PV guests only"),
            (Hvm, 3, vec![K::StaticDataEnd, K::SharedInfo], "is for PV guests only"),
            (Pv, 3, pv(&[K::HvmContext]), "is for HVM guests only"),
        ] {
            let last = kinds.last().unwrap().code();
            assert_eq!(refusal(guest, version, &kinds), (last, why), "{guest:?} {kinds:?}");
        }
    }

    #[test]
    fn a_record_that_is_too_long_for_its_kind_is_refused_before_it_is_read() {
        for kind in RecordKind::ALL {
            let guest = match kind {
                K::HvmContext | K::HvmParams => GuestKind::Hvm,
                _ => GuestKind::Pv,
            };
            let mut machine = Machine::new(&StreamHeader { version: 3, guest, xen: (4, 17) });
            machine.step(Event::Begin).unwrap();
            let header = RecordHeader { kind: ReadKind::Known(kind), length: (128 << 20) - 7 };
            let refused = machine.step(Event::Record(header));
            let too_long = matches!(refused, Err(Error::Format(FormatError::Length { .. })));
            assert_eq!(too_long, kind != K::PageData, "{kind:?}");
        }
    }

    #[test]
    fn an_event_that_answers_nothing_is_refused() {
        let header = StreamHeader { version: 3, guest: GuestKind::Hvm, xen: (4, 17) };
        let mut machine = Machine::new(&header);
        assert!(matches!(machine.step(Event::Done), Err(Error::Machine { .. })));
        assert_eq!(machine.step(Event::Begin).unwrap(), Action::ReadHeader);
        assert!(matches!(machine.step(Event::Begin), Err(Error::Machine { .. })));
    }

    proptest! {
        #[test]
        fn in_any_stream_the_static_data_end_once_and_before_all_memory(
            hvm: bool, version in 2_u32..=3,
            kinds in prop::collection::vec(prop::sample::select(&RecordKind::ALL[..]), 0..12),
        ) {
            // The property is about what is let through, so what is refused is left out.
            let guest = if hvm { GuestKind::Hvm } else { GuestKind::Pv };
            let mut good = Vec::new();
            for kind in kinds {
                good.push(kind);
                if run(guest, version, &good).is_err() {
                    good.pop();
                } else if kind == K::End {
                    break;
                }
            }
            let actions = run(guest, version, &good).unwrap();
            let end = actions.iter().position(|a| *a == Action::EndStaticData);
            let ends = actions.iter().filter(|a| **a == Action::EndStaticData).count();
            prop_assert_eq!(ends, usize::from(end.is_some()));
            for (index, action) in actions.iter().enumerate() {
                let of_memory = matches!(
                    action, Action::Pages { .. } | Action::Digests { .. } | Action::Complete)
                    || matches!(action, Action::Body { kind: K::X86PvP2mFrames, .. });
                prop_assert!(!of_memory || end.is_some_and(|end| end < index));
            }
        }
    }
}
