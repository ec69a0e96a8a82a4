//! Does what [`super::machine`] decides.

use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::error::{Error, Result, chain};
use crate::frame::PAGE_SIZE;
use crate::hypervisor::{
    CpuCap, DomainInfo, LogLevel, SHUTDOWN_SUSPEND, SourceDomain, StreamOut, Toolstack,
};
use crate::report;
use crate::source::batch::{BatchSender, Space};
use crate::source::hvm;
use crate::source::machine::{Action, Event, Machine, PageSet, Verify};
use crate::source::pass::PassSender;
use crate::source::precopy::{Policy, Seen};
use crate::source::workers::Workers;
use crate::stream::digest;
use crate::stream::libxc::{self, GuestKind, RecordKind, StreamHeader};

/// How to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Options {
    /// Keep the guest running during most of it.
    pub live: bool,
    /// How the receiver compares the memory at the end.
    pub verify: Verify,
    /// When to suspend a guest that runs.
    pub policy: Policy,
}

/// A complete save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the stream.
    pub bytes: u64,
}

/// Writes `domain` to `out`. On success it is suspended. On failure it runs on, unless it had
/// been suspended already; resuming it is the toolstack's decision. Log-dirty is off either way.
///
/// # Errors
/// The first thing that went wrong.
pub fn save<D, O, T>(
    domain: &D,
    out: &mut O,
    toolstack: &mut T,
    options: &Options,
) -> Result<Summary>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
    T: Toolstack,
{
    save_with(domain, out, toolstack, None, options)
}

/// The same as [`save`]; `workers`, if there are any, send the memory, to the same stream or over
/// links of their own.
///
/// # Errors
/// The first thing that went wrong.
pub fn save_with<'a, D, O, T>(
    domain: &'a D,
    out: &'a mut O,
    toolstack: &'a mut T,
    workers: Option<Box<dyn Workers + 'a>>,
    options: &Options,
) -> Result<Summary>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
    T: Toolstack,
{
    let result = open(domain, out, toolstack, workers).and_then(|driver| driver.run(options));
    match &result {
        Ok(summary) => toolstack.event(&report::Event::Finished { bytes: summary.bytes }),
        Err(error) => toolstack.event(&report::Event::Failed { why: chain(error) }),
    }
    result
}

struct Driver<'a, D: SourceDomain, O, T> {
    info: DomainInfo,
    sender: PassSender<'a, D, O, T>,
    /// The state records, once they have been made.
    state: Option<Vec<u8>>,
    /// What the next pass has to send, and, while it is under way, what it sends.
    pending: PageBitmap,
    log_dirty: bool,
    qemu_log_dirty: bool,
    /// How much processor time the guest may have otherwise, while it is slowed.
    cap: Option<CpuCap>,
    clock: Clock,
}

/// So many pages of the first pass of which nothing is sent take as long as one of which all is.
const LEFT_OUT_PAGES: u64 = 64;

/// What the toolstack's clock said, and the bytes of then.
#[derive(Default)]
struct Clock {
    began: Duration,
    pass_began: Duration,
    bytes_before: u64,
    page_bytes_before: u64,
}

/// Looks at the domain and makes ready; nothing is switched on yet.
fn open<'a, D, O, T>(
    domain: &'a D,
    out: &'a mut O,
    toolstack: &'a mut T,
    workers: Option<Box<dyn Workers + 'a>>,
) -> Result<Driver<'a, D, O, T>>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
    T: Toolstack,
{
    let info = domain.info()?;
    let kind = if info.hvm { "x86 HVM" } else { "x86 PV" };
    toolstack.log(LogLevel::Info, &format!("Saving domain {}, type {kind}", domain.domid()));
    let space = Space::open(domain, &info)?;
    let p2m_pages = space.pages();
    toolstack.event(&report::Event::Started {
        pid: std::process::id(),
        hvm: info.hvm,
        total_pages: info.total_pages,
        p2m_pages,
    });
    let batches = BatchSender::new(domain, out, space);
    let sender = PassSender::new(info.total_pages, batches, toolstack, workers);
    let pending = PageBitmap::new(p2m_pages);
    let clock = Clock { began: sender.toolstack.now(), ..Clock::default() };
    let (log_dirty, qemu_log_dirty) = (false, false);
    Ok(Driver { info, sender, state: None, pending, log_dirty, qemu_log_dirty, cap: None, clock })
}

impl<D, O, T> Driver<'_, D, O, T>
where
    D: SourceDomain,
    O: StreamOut<D::Pages>,
    T: Toolstack,
{
    fn run(mut self, options: &Options) -> Result<Summary> {
        let mut machine = Machine::new(options.live, self.info.hvm, options.verify, options.policy);
        let mut event = Event::Begin;
        let mut failure = None;
        loop {
            let action = machine.step(event).inspect_err(|_| self.cleanup())?;
            if let (Event::Dirty(_), Action::SendPass { last: false, .. }) = (event, action) {
                self.expect(machine.expected_pause());
            }
            if let Action::Finish { complete } = action {
                return match failure {
                    None if complete => Ok(Summary { bytes: self.sender.bytes }),
                    Some(error) => Err(error),
                    None => Err(Error::Aborted),
                };
            }
            event = self.act(action, options).unwrap_or_else(|error| {
                failure = Some(error);
                Event::Failed
            });
        }
    }

    fn act(&mut self, action: Action, options: &Options) -> Result<Event> {
        if self.sender.toolstack.aborted() && action != Action::Cleanup {
            return Err(Error::Aborted);
        }
        match action {
            Action::QemuLogDirtyOn => self.qemu_log_dirty_on()?,
            Action::LogDirtyOn => {
                // Set first: a failure half way may have left it on.
                self.log_dirty = true;
                self.sender.batches.domain.log_dirty_on()?;
            }
            Action::WriteHead => self.write_head(options)?,
            Action::SendPass { pass, set, last } => self.send_pass(pass, set, last)?,
            Action::ReadDirty { last } => return self.read_dirty(last),
            Action::Throttle { percent } => self.throttle(percent),
            Action::Suspend { expected } => self.suspend(expected)?,
            Action::GiveUp { pause } => return Err(Error::PauseTooLong { pause }),
            Action::WriteVerify => {
                let record = libxc::record(RecordKind::Verify, &[])?;
                self.sender.write_record(&record, "writing the verify record")?;
            }
            Action::SendDigests { pass } => self.send_digests(pass)?,
            Action::WriteTail => {
                self.write_tail()?;
                self.sender.batches.domain.leave_mapped();
                self.sender.tell_work();
            }
            Action::Cleanup => self.cleanup(),
            Action::Finish { .. } => {}
        }
        Ok(Event::Done)
    }

    fn qemu_log_dirty_on(&mut self) -> Result<()> {
        self.qemu_log_dirty = true;
        self.sender.toolstack.qemu_log_dirty(true).map_err(|source| Error::Toolstack {
            what: "switch the device model's dirty logging on",
            source,
        })
    }

    fn write_head(&mut self, options: &Options) -> Result<()> {
        let domain = self.sender.batches.domain;
        let guest = if self.info.hvm { GuestKind::Hvm } else { GuestKind::Pv };
        let header = StreamHeader { version: libxc::VERSION, guest, xen: domain.xen_version()? };
        let mut head = header.to_bytes().to_vec();
        if options.verify == Verify::Digests {
            head.extend(digest::verify_record()?);
        }
        // What is sent again to be compared has to come after all else, over the stream.
        if options.verify != Verify::Again {
            head.extend(self.sender.offer().unwrap_or_default());
        }
        if guest == GuestKind::Pv {
            head.extend(libxc::record(RecordKind::X86PvInfo, &[&libxc::PV_INFO_64BIT])?);
        }
        let policy = domain.cpu_policy()?;
        for (kind, body) in
            [(RecordKind::X86CpuidPolicy, &policy.leaves), (RecordKind::X86MsrPolicy, &policy.msrs)]
        {
            if !body.is_empty() {
                head.extend(libxc::record(kind, &[body])?);
            }
        }
        head.extend(libxc::record(RecordKind::StaticDataEnd, &[])?);
        if let Space::Pv(map) = &self.sender.batches.space {
            head.extend(map.start_record()?);
        }
        self.sender.write_record(&head, "writing the head of the stream")
    }

    fn send_pass(&mut self, pass: u32, set: PageSet, last: bool) -> Result<()> {
        self.clock.pass_began = self.sender.toolstack.now();
        self.clock.bytes_before = self.sender.bytes;
        self.clock.page_bytes_before = self.sender.page_bytes;
        if set == PageSet::All {
            self.pending.set_all();
        }
        if last {
            self.sender.add_due(&mut self.pending);
        }
        self.check_unmoved()?;
        let (info, state) = (&self.info, &mut self.state);
        self.sender.send(pass, &mut self.pending, last, &mut |batches| {
            if last && state.is_none() {
                *state = Some(state_records(batches.domain, &batches.space, info)?);
            }
            Ok(())
        })?;
        self.check_unmoved()?;
        if last {
            self.sender.toolstack.event(&report::Event::MemorySent);
        } else {
            // In a large guest that takes a while, for which no suspended guest should wait.
            self.pending.clear_all();
        }
        Ok(())
    }

    /// Sends the digests of all that the receiver has.
    fn send_digests(&mut self, pass: u32) -> Result<()> {
        let pages = self.sender.send_digests(pass, &mut self.pending)?;
        self.check_unmoved()?;
        self.sender.toolstack.event(&report::Event::Verified { pages });
        Ok(())
    }

    /// A PV guest that replaced its p2m would be read through a stale mapping.
    fn check_unmoved(&self) -> Result<()> {
        match &self.sender.batches.space {
            Space::Pv(map) => map.check_unmoved(),
            Space::Translated { .. } => Ok(()),
        }
    }

    fn read_dirty(&mut self, last: bool) -> Result<Event> {
        let began = self.sender.toolstack.now();
        self.sender.batches.domain.log_dirty_clean(&mut self.pending, last)?;
        self.pending.take(&mut self.sender.again);
        let pages = self.pending.count();
        self.sender.toolstack.event(&report::Event::Dirty { pages });
        let now = self.sender.toolstack.now();
        Ok(Event::Dirty(Seen {
            left: pages.saturating_mul(PAGE_SIZE as u64),
            sent: self.sent_in_pass(),
            took: began.saturating_sub(self.clock.pass_began),
            reading: now.saturating_sub(began),
            elapsed: now.saturating_sub(self.clock.began),
        }))
    }

    /// What a rate is to be made of. The pages of a later pass are much like those that are left
    /// for the pause, whatever is left out of them. Those of the first may be zeros for the most
    /// part, which take little time and say little.
    fn sent_in_pass(&self) -> u64 {
        let bytes = self.sender.bytes.saturating_sub(self.clock.bytes_before);
        let pages = self.sender.page_bytes.saturating_sub(self.clock.page_bytes_before);
        let is_first = self.clock.page_bytes_before == 0;
        bytes.max(if is_first { pages / LEFT_OUT_PAGES } else { pages })
    }

    /// Tells what the policy expects.
    fn expect(&mut self, pause: Option<Duration>) {
        if let Some(pause) = pause {
            let ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            self.sender.toolstack.event(&report::Event::PauseExpected { ms });
        }
    }

    fn suspend(&mut self, expected: Option<Duration>) -> Result<()> {
        self.expect(expected);
        let toolstack = &mut *self.sender.toolstack;
        toolstack.event(&report::Event::SuspendAsked);
        let suspended = toolstack
            .suspend()
            .map_err(|source| Error::Toolstack { what: "suspend the guest", source })?;
        // The hypervisor's word counts, not the toolstack's.
        self.info = self.sender.batches.domain.info()?;
        if !suspended || self.info.shutdown != Some(SHUTDOWN_SUSPEND) {
            return Err(Error::NotSuspended);
        }
        self.sender.toolstack.event(&report::Event::Suspended);
        // Wherever it goes on, it does so at its own speed.
        self.restore_speed();
        Ok(())
    }

    /// Slows the guest. A scheduler that cannot is no reason to fail.
    fn throttle(&mut self, percent: u8) {
        let domain = self.sender.batches.domain;
        let vcpus = self.info.max_vcpu_id.saturating_add(1);
        let slowed = self.cap.map_or_else(|| domain.cpu_cap(), Ok).and_then(|cap| {
            // Set first: a failure half way may have changed it.
            self.cap = Some(cap);
            domain.set_cpu_cap(cap.part(percent, vcpus))
        });
        let toolstack = &mut *self.sender.toolstack;
        match slowed {
            Ok(()) => {
                let text = format!(
                    "The guest writes too fast: it has {percent} % of its processors until it is \
                     suspended"
                );
                toolstack.log(LogLevel::Warn, &text);
                toolstack.event(&report::Event::Throttled { percent });
            }
            Err(error) => {
                let text = format!("The guest cannot be slowed: {}", chain(&error));
                toolstack.log(LogLevel::Warn, &text);
            }
        }
    }

    fn restore_speed(&mut self) {
        if let Some(cap) = self.cap.take()
            && let Err(error) = self.sender.batches.domain.set_cpu_cap(cap)
        {
            let text = format!(
                "Failed to give the guest its processors back ({}): xl sched-credit2 -d {} -c {}",
                chain(&error),
                self.sender.batches.domain.domid(),
                cap.0
            );
            self.sender.toolstack.log(LogLevel::Error, &text);
        }
    }

    fn write_tail(&mut self) -> Result<()> {
        let batches = &self.sender.batches;
        let made = self.state.take().map_or_else(
            || state_records(batches.domain, &batches.space, &self.info),
            Ok::<_, Error>,
        );
        self.sender.write_record(&made?, "writing the state of the guest")
    }

    /// Switches off what was switched on. What fails here is told, and changes nothing: the
    /// stream is complete, or has failed for a better reason.
    fn cleanup(&mut self) {
        self.restore_speed();
        if std::mem::take(&mut self.log_dirty)
            && let Err(error) = self.sender.batches.domain.log_dirty_off()
        {
            let text = format!("Failed to switch log-dirty off: {}", chain(&error));
            self.sender.toolstack.log(LogLevel::Error, &text);
        }
        if std::mem::take(&mut self.qemu_log_dirty)
            && let Err(error) = self.sender.toolstack.qemu_log_dirty(false)
        {
            let text = format!("Failed to switch the device model's dirty logging off: {error}");
            self.sender.toolstack.log(LogLevel::Error, &text);
        }
    }
}

/// All records after the memory of the guest, which is suspended.
fn state_records<D: SourceDomain>(
    domain: &D,
    space: &Space<D::Pages>,
    info: &DomainInfo,
) -> Result<Vec<u8>> {
    let tsc = libxc::tsc_info(&domain.tsc_info()?);
    let mut tail = libxc::record(RecordKind::X86TscInfo, &[&tsc])?;
    let records = match space {
        Space::Translated { .. } => hvm::state_records(domain)?,
        Space::Pv(map) => map.state_records(domain, info)?,
    };
    tail.extend(records.into_iter().flatten());
    tail.extend(libxc::record(RecordKind::End, &[])?);
    Ok(tail)
}
