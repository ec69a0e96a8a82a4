//! Reads the records that the [`Machine`] allows and applies those that concern either guest.

use std::marker::PhantomData;

use crate::error::{Error, Result};
use crate::frame::{DomId, PageBuf};
use crate::hypervisor::{CpuPolicy, LogLevel, StreamIn, TargetDomain, Toolstack};
use crate::report::Event as Report;
use crate::stream::FormatError;
use crate::stream::libxc::{
    GuestKind, RECORD_HEADER_BYTES, ReadKind, RecordHeader, RecordKind, StreamHeader,
    parse_tsc_info,
};
use crate::stream::link::{self, Offer};
use crate::target::crew::Crew;
use crate::target::guest::Guest;
use crate::target::hvm::Hvm;
use crate::target::links::Links;
use crate::target::machine::{Action, Event, Machine};
use crate::target::pages::{self, Placer, Verification};
use crate::target::pv::Pv;
use crate::target::verify::Verifier;

/// Bytes of a `xen_cpuid_leaf_t`.
const CPUID_LEAF_BYTES: usize = 24;
/// Bytes of a `xen_msr_entry_t`.
const MSR_ENTRY_BYTES: usize = 16;
/// Bytes that are read at a time where they are not wanted.
const SKIP_BYTES: usize = 4096;

/// What the toolstack has set up around the new domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The guest's event channel to xenstore.
    pub store_evtchn: u32,
    /// Where xenstore runs.
    pub store_domid: DomId,
    /// The guest's event channel to its console.
    pub console_evtchn: u32,
    /// Where the console's backend runs.
    pub console_domid: DomId,
}

/// What the toolstack has to know of the restored domain. Frames are gfns (HVM) or mfns (PV),
/// all ones where the stream named none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Frame of xenstore's ring.
    pub store_frame: u64,
    /// Frame of the console's ring.
    pub console_frame: u64,
}

/// Fills `domain`, which is new and empty, from the libxc stream that begins at `input`, and reads
/// nothing past its end.
///
/// # Errors
/// Anything that [`Error`] names but [`Error::NotSuspended`]. After an error the domain is
/// worthless. Pages that differ after a VERIFY record are logged and are no error, as stock has it;
/// one that differs from its digest is.
pub fn restore<D, I, T>(
    domain: &D,
    input: &mut I,
    toolstack: &mut T,
    options: &Options,
) -> Result<Outcome>
where
    D: TargetDomain,
    I: StreamIn<D::Pages>,
    T: Toolstack,
{
    restore_with(domain, input, toolstack, None, options)
}

/// The same as [`restore`]; if the stream offers links, `links` opens them. If it is a file, and
/// `links` has workers that read it, they do so.
///
/// # Errors
/// As [`restore`].
pub fn restore_with<'a, D, I, T>(
    domain: &D,
    input: &'a mut I,
    toolstack: &mut T,
    links: Option<Box<dyn Links + 'a>>,
    options: &Options,
) -> Result<Outcome>
where
    D: TargetDomain,
    I: StreamIn<D::Pages>,
    T: Toolstack,
{
    let crew = Crew::new(links);
    let mut reader = Reader::new(input);
    let header = StreamHeader::parse(reader.array("could not read the stream's header")?)?;
    let info = domain.info()?;
    let made_for = if info.hvm { GuestKind::Hvm } else { GuestKind::Pv };
    if header.guest != made_for {
        let (stream, domain) = (header.guest.describe(), made_for.describe());
        return Err(FormatError::WrongGuest { stream, domain }.into());
    }
    log_start(toolstack, &header);
    let outcome = match header.guest {
        GuestKind::Pv => {
            let guest = Pv::new(domain, info)?;
            Receiver::new(domain, &mut reader, toolstack, guest, crew).run(&header, options)
        }
        GuestKind::Hvm => {
            let guest = Hvm::new(domain);
            Receiver::new(domain, &mut reader, toolstack, guest, crew).run(&header, options)
        }
    }?;
    log_end(toolstack, options, &outcome);
    toolstack.event(&Report::Finished { bytes: reader.bytes });
    Ok(outcome)
}

/// Stock's words.
fn log_start<T: Toolstack>(toolstack: &mut T, header: &StreamHeader) {
    let guest = match header.guest {
        GuestKind::Pv => "x86 PV",
        GuestKind::Hvm => "x86 HVM",
    };
    let origin = match header.xen {
        (0, _) => ", converted from legacy stream format".to_owned(),
        (major, minor) => format!(" from Xen {major}.{minor}"),
    };
    toolstack.log(LogLevel::Info, &format!("Found {guest} domain{origin}"));
    toolstack.log(LogLevel::Info, "Restoring domain");
}

/// Stock's words.
fn log_end<T: Toolstack>(toolstack: &mut T, options: &Options, outcome: &Outcome) {
    let rings = [
        ("XenStore", outcome.store_frame, options.store_domid, options.store_evtchn),
        ("Console", outcome.console_frame, options.console_domid, options.console_evtchn),
    ];
    toolstack.log(LogLevel::Info, "Restore successful");
    for (name, frame, domid, evtchn) in rings {
        let line = format!("{name}: mfn {frame:#x}, dom {domid}, evt {evtchn}");
        toolstack.log(LogLevel::Info, &line);
    }
}

/// The stream, and how much of it has been read.
pub(super) struct Reader<'a, I, P> {
    pub(super) input: &'a mut I,
    pub(super) bytes: u64,
    pages: PhantomData<fn(P)>,
}

impl<'a, I: StreamIn<P>, P: crate::hypervisor::ForeignPages> Reader<'a, I, P> {
    pub(super) fn new(input: &'a mut I) -> Self {
        Reader { input, bytes: 0, pages: PhantomData }
    }

    /// `N` bytes; `what` says what could not be done if they are not there.
    pub(super) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    /// `length` bytes, which the caller has held against a limit.
    pub(super) fn vec(&mut self, length: usize, what: &'static str) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    /// A body of `length` bytes and the padding after it.
    pub(super) fn body(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut body = self.vec(padded(length), BODY)?;
        body.truncate(length);
        Ok(body)
    }

    fn skip(&mut self, length: usize) -> Result<()> {
        let mut left = padded(length);
        let mut scratch = [0; SKIP_BYTES];
        while let Some(part) = scratch.get_mut(..left.min(SKIP_BYTES)).filter(|p| !p.is_empty()) {
            left -= part.len();
            self.fill(part, BODY)?;
        }
        Ok(())
    }

    /// Leaves out `length` bytes of a stream that is a file; where they begin comes back. `what`
    /// says what could not be done if they are not there.
    pub(super) fn pass_over(&mut self, length: u64, what: &'static str) -> Result<u64> {
        let failed = |source| Error::Stream { what, source };
        let start = self.input.position().map_err(failed)?;
        self.input.go_to(start.saturating_add(length)).map_err(failed)?;
        self.bytes += length;
        Ok(start)
    }

    /// The page at byte `offset` of a stream that is a file, which goes on where it is.
    pub(super) fn page_at(&mut self, offset: u64, what: &'static str) -> Result<Box<PageBuf>> {
        let failed = |source| Error::Stream { what, source };
        let here = self.input.position().map_err(failed)?;
        let mut page = PageBuf::zeroed();
        self.input.go_to(offset).map_err(failed)?;
        self.input.read_exact(&mut page.0).map_err(failed)?;
        self.input.go_to(here).map_err(failed)?;
        Ok(page)
    }

    fn fill(&mut self, bytes: &mut [u8], what: &'static str) -> Result<()> {
        self.input.read_exact(bytes).map_err(|source| Error::Stream { what, source })?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// What could not be done, if the body of a record ends early.
const BODY: &str = "could not read a record from the stream";

fn padded(length: usize) -> usize {
    length.next_multiple_of(8)
}

/// A restore that is under way.
pub(super) struct Receiver<'a, 'b, D: TargetDomain, I, T, G> {
    pub(super) domain: &'a D,
    pub(super) reader: &'a mut Reader<'b, I, D::Pages>,
    pub(super) toolstack: &'a mut T,
    pub(super) guest: G,
    /// Those who place what comes over links, or is in a file.
    crew: Crew<'b>,
    placer: Placer<'a, D>,
    verification: Verification,
    verifier: Verifier<'a, D>,
    cpuid: Option<Vec<u8>>,
    msrs: Option<Vec<u8>>,
}

impl<'a, 'b, D, I, T, G> Receiver<'a, 'b, D, I, T, G>
where
    D: TargetDomain,
    I: StreamIn<D::Pages>,
    T: Toolstack,
    G: Guest,
{
    fn new(
        domain: &'a D,
        reader: &'a mut Reader<'b, I, D::Pages>,
        toolstack: &'a mut T,
        guest: G,
        crew: Crew<'b>,
    ) -> Self {
        Receiver {
            domain,
            reader,
            toolstack,
            guest,
            crew,
            placer: Placer::new(domain),
            verification: Verification::default(),
            verifier: Verifier::new(domain),
            cpuid: None,
            msrs: None,
        }
    }

    fn run(mut self, header: &StreamHeader, options: &Options) -> Result<Outcome> {
        let mut machine = Machine::new(header);
        let mut event = Event::Begin;
        loop {
            let action = machine.step(event)?;
            event = Event::Done;
            match action {
                Action::ReadHeader => {
                    if machine.takes_pages() {
                        self.crew.begin();
                    }
                    event = Event::Record(self.read_header()?);
                }
                Action::Skip { code, length } => {
                    let line = format!("Ignoring optional record {code:#x}");
                    self.toolstack.log(LogLevel::Debug, &line);
                    self.reader.skip(length)?;
                }
                Action::EndStaticData => self.end_static_data()?,
                Action::Body { kind, length } => {
                    let body = self.reader.body(length)?;
                    self.apply(kind, body)?;
                }
                Action::Pages { length, compare } => self.receive_pages(length, compare)?,
                Action::Digests { length } => {
                    let differing = self.verifier.compare(self.reader, &mut self.guest, length)?;
                    self.crew.differing.note(differing);
                }
                Action::Complete => {
                    self.crew.dismiss();
                    self.crew.differing.conclude(self.toolstack)?;
                    self.verification.report(self.toolstack);
                    let outcome = self.guest.complete(options)?;
                    self.domain.leave_mapped();
                    return Ok(outcome);
                }
            }
        }
    }

    fn read_header(&mut self) -> Result<RecordHeader> {
        if self.toolstack.aborted() {
            return Err(Error::Aborted);
        }
        self.crew.serve_until_readable(&mut self.guest)?;
        let what = "could not read a record's header from the stream";
        let header = RecordHeader::parse(self.reader.array::<RECORD_HEADER_BYTES>(what)?)?;
        // What links carry of earlier passes comes before all else of the stream.
        let about_links = [RecordKind::RxlPassEnd, RecordKind::RxlLinkLost].map(ReadKind::Known);
        if !about_links.contains(&header.kind) {
            self.crew.serve_until_complete(&mut self.guest)?;
        }
        if header.kind != ReadKind::Known(RecordKind::PageData) {
            self.crew.serve_until_placed(&mut self.guest)?;
        }
        Ok(header)
    }

    fn apply(&mut self, kind: RecordKind, body: Vec<u8>) -> Result<()> {
        match kind {
            RecordKind::X86CpuidPolicy => {
                self.cpuid = Some(policy_part(kind, body, CPUID_LEAF_BYTES)?);
            }
            RecordKind::X86MsrPolicy => {
                self.msrs = Some(policy_part(kind, body, MSR_ENTRY_BYTES)?);
            }
            RecordKind::RxlOffer => {
                if let Some(offer) = Offer::parse(&body)? {
                    self.crew.open(&offer);
                }
            }
            RecordKind::RxlPassEnd => {
                let (pass, links) = link::parse_pass_end(&body)?;
                self.crew.end_pass(pass, links)?;
            }
            RecordKind::RxlLinkLost => self.crew.lose(link::parse_link_lost(&body)?),
            RecordKind::X86TscInfo => self.domain.set_tsc_info(&parse_tsc_info(&body)?)?,
            kind => self.guest.record(kind, body)?,
        }
        Ok(())
    }

    /// Places the pages of a record, or compares them with what has been placed.
    fn receive_pages(&mut self, length: usize, compare: bool) -> Result<()> {
        let Receiver { placer, reader, guest, verification, toolstack, crew, .. } = self;
        if !compare && crew.reads_file() {
            let give = |batch, guest: &mut G| crew.place(batch, guest);
            return pages::batches_in_file(reader, guest, length, give);
        }
        if !compare {
            return placer.receive(reader, guest, length);
        }
        let bad = placer.compare(reader, guest, length)?;
        bad.into_iter().for_each(|pfn| verification.note(pfn, *toolstack));
        Ok(())
    }

    /// Gives the domain its CPU policy, as far as the stream held one, while it has no memory.
    fn end_static_data(&mut self) -> Result<()> {
        let (missing_cpuid, missing_msr) = (self.cpuid.is_none(), self.msrs.is_none());
        if !(missing_cpuid && missing_msr) {
            let leaves = self.cpuid.take().unwrap_or_default();
            let msrs = self.msrs.take().unwrap_or_default();
            self.domain.set_cpu_policy(&CpuPolicy { leaves, msrs })?;
        }
        let done = self.toolstack.static_data_done(missing_cpuid, missing_msr);
        done.map_err(|source| Error::Toolstack { what: "take note of the static data", source })
    }
}

/// The body of one of the policy records, if it is whole entries.
fn policy_part(kind: RecordKind, body: Vec<u8>, entry_bytes: usize) -> Result<Vec<u8>> {
    if body.is_empty() || !body.len().is_multiple_of(entry_bytes) {
        let (kind, length) = (kind.code(), body.len());
        return Err(FormatError::Length { kind, length, why: "not whole entries" }.into());
    }
    Ok(body)
}
