//! The save helper's processes: the product's engine and its end of the helper's protocol, over
//! the modelled Xen. Each hypercall, and each write or read that would block, is a moment at which
//! others go on and at which the process can be killed.

use std::cell::RefCell;
use std::io;

use rxl_migrate::bitmap::PageBitmap;
use rxl_migrate::error::Error;
use rxl_migrate::fake::{FakeDomain, FakePages, fill_pages, put_pages};
use rxl_migrate::frame::{DomId, PageType, Pfn};
use rxl_migrate::helper::{Callbacks, EventSink, HelperChannel};
use rxl_migrate::hypervisor::{
    Access, CpuCap, CpuPolicy, Domain, DomainInfo, HvResult, PagePiece, PageSlot, PolicyError,
    SourceDomain, StreamIn, StreamOut, TargetDomain, TscInfo, VcpuState,
};
use rxl_migrate::report::Event;
use rxl_migrate::source::Verify;
use rxl_migrate::source::workers::{Confirmed, Workers};
use rxl_migrate::target::links::Links;
use rxl_migrate::{source, target};

use crate::liar::{LyingLinks, LyingWorkers};
use crate::machine::WIRING;
use crate::pipe::PipeId;
use crate::plant::{Plant, Reorder, on_its_way};
use crate::process::{File, Process};
use crate::receivers::Openers;
use crate::senders::{Pool, Turn};
use crate::world::{Cond, now, terminated};

/// What libxl answers in a plain save and in a plain restore.
const SAVE_CALLBACKS: Callbacks = Callbacks(0x88);
const RESTORE_CALLBACKS: Callbacks = Callbacks(0x300);
const EIO: i32 = 5;

/// `--save-domain`.
pub(crate) fn save(
    process: &Process<'_>,
    domain: FakeDomain,
    stream: PipeId,
    replies: PipeId,
    messages: PipeId,
    verify: Verify,
) {
    let plant = process.world().plan.plant;
    let replies = File { process, pipe: replies };
    let messages = File { process, pipe: messages };
    let mut channel =
        HelperChannel::new(replies, messages, domain.domid(), SAVE_CALLBACKS, terminated, now);
    let reorder = (plant == Some(Plant::PassesOverlap)).then(Reorder::default);
    channel = channel.with_events(event_sink(process, reorder.as_ref()));
    if plant != Some(Plant::GuardIsNotTold) {
        let world = process.shared_world();
        channel = channel.with_notice(Box::new(move || {
            world.borrow_mut().guard_told = true;
            Ok(())
        }));
    }
    let policy = process.world().plan.policy;
    let options = source::Options { live: true, verify, policy };
    let workers = Pool::start(process, &domain, stream);
    let turn = workers.as_ref().map(Pool::turn);
    let mut out = Out { process, stream, reorder, turn };
    let workers = workers.map(|pool| match plant {
        Some(plant) => Box::new(LyingWorkers::new(pool, plant)) as Box<dyn Workers + '_>,
        None => Box::new(pool),
    });
    let domain = Stepped::new(process, domain);
    let saved = source::save_with(&domain, &mut out, &mut channel, workers, &options);
    if let Err(error) = &saved {
        if matches!(error, Error::PauseTooLong { .. }) {
            process.world().facts.coverage.count("policy: given up");
        }
        process.world().trace.say(|| format!("the save fails: {}", error.chain()));
    }
    let _ = channel.complete(if saved.is_ok() { 0 } else { -1 }, errno_of(saved.err().as_ref()));
}

/// What rxl's process hears of the engine.
fn event_sink(process: &Process<'_>, reorder: Option<&Reorder>) -> EventSink {
    let (world, events) = (process.shared_world(), process.world().events.clone());
    let mut watch = reorder.map(Reorder::watch);
    Box::new(move |event| {
        if let Some(watch) = &mut watch {
            watch(event);
        }
        match event {
            Event::LinkJoined { .. } => world.borrow_mut().facts.coverage.count("links: one used"),
            Event::LinkLost { .. } => world.borrow_mut().facts.coverage.count("links: one lost"),
            _ => {}
        }
        if matches!(event, Event::SuspendAsked | Event::Suspended) {
            events.borrow_mut().push(event.clone());
        }
    })
}

/// `--restore-domain`.
pub(crate) fn restore(
    process: &Process<'_>,
    domain: FakeDomain,
    stream: PipeId,
    replies: PipeId,
    messages: PipeId,
) {
    let replies = File { process, pipe: replies };
    let messages = File { process, pipe: messages };
    let mut channel =
        HelperChannel::new(replies, messages, domain.domid(), RESTORE_CALLBACKS, terminated, now);
    let links = Openers::new(process, &domain, stream);
    let plant = process.world().plan.plant;
    let links: Box<dyn Links + '_> = match plant {
        Some(plant) => Box::new(LyingLinks::new(links, plant)),
        None => Box::new(links),
    };
    let domain = Stepped::new(process, domain);
    let mut input = In { process, stream };
    let restored = target::restore_with(&domain, &mut input, &mut channel, Some(links), &WIRING);
    if let Err(error) = &restored {
        process.world().trace.say(|| format!("the restore fails: {}", error.chain()));
        process.world().facts.coverage.count("restore failed in the engine");
    }
    let (store, console) = restored.as_ref().map_or((0, 0), |o| (o.store_frame, o.console_frame));
    if channel.restore_results(store, console).is_ok() {
        let retval = if restored.is_ok() { 0 } else { -1 };
        let _ = channel.complete(retval, errno_of(restored.err().as_ref()));
    }
}

fn errno_of(error: Option<&Error>) -> i32 {
    if error.is_some() { EIO } else { 0 }
}

/// The outgoing stream.
pub(crate) struct Out<'a, 'b> {
    process: &'a Process<'b>,
    stream: PipeId,
    reorder: Option<Reorder>,
    /// `None`: nobody else writes.
    turn: Option<Turn>,
}

impl<'a, 'b> Out<'a, 'b> {
    /// A stream that others write, too.
    pub(crate) fn shared(process: &'a Process<'b>, stream: PipeId, turn: Turn) -> Self {
        Out { process, stream, reorder: None, turn: Some(turn) }
    }

    fn in_turn(&mut self, write: impl FnOnce(&mut Self) -> io::Result<()>) -> io::Result<()> {
        let Some(turn) = self.turn else { return write(self) };
        turn.take(self.process)?;
        let written = write(self);
        let kept = self.process.world().plan.plant == Some(Plant::TurnKept) && written.is_err();
        if !kept {
            turn.give(self.process);
        }
        written
    }

    /// As the descriptor does: SIGTERM ends a write that waits, and every later one.
    fn put(&self, bytes: &[u8]) -> io::Result<()> {
        self.process.step();
        let mut left = bytes;
        while !left.is_empty() {
            if self.process.holds(Cond::Terminated) {
                return Err(io::Error::other("the stream was taken away"));
            }
            match self.process.try_write(self.stream, left) {
                Some(done) => left = left.get(done?..).unwrap_or_default(),
                None => self.process.wait([
                    Cond::Writable(self.stream),
                    Cond::Terminated,
                    Cond::Never,
                    Cond::Never,
                ]),
            }
        }
        Ok(())
    }
}

impl StreamOut<FakePages> for Out<'_, '_> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(late) = self.reorder.as_mut().and_then(Reorder::late) {
            self.put(&late)?;
        }
        self.in_turn(|out| out.put(bytes))
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        let Some(reorder) = &mut self.reorder else {
            let plant = self.process.world().plan.plant;
            return self.in_turn(|out| {
                put_pages(head, pieces, |bytes| out.put(&on_its_way(plant, bytes)))
            });
        };
        let mut record = Vec::new();
        put_pages(head, pieces, |bytes| {
            record.extend_from_slice(bytes);
            Ok(())
        })?;
        let records = reorder.pass(record);
        records.iter().try_for_each(|record| self.put(record))
    }
}

/// Nobody confirms what is in the stream: it arrives, or the migration fails.
impl Confirmed for Out<'_, '_> {
    fn confirmed(&mut self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn wait_confirmed(&mut self, _records: u64) -> io::Result<()> {
        Ok(())
    }
}

/// The incoming stream.
struct In<'a, 'b> {
    process: &'a Process<'b>,
    stream: PipeId,
}

impl StreamIn<FakePages> for In<'_, '_> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        io::Read::read_exact(&mut File { process: self.process, pipe: self.stream }, buf)
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        fill_pages(pages, slots, |page| self.read_exact(page))
    }
}

/// A domain whose hypercalls are moments at which others go on.
pub(crate) struct Stepped<'a, 'b> {
    process: &'a Process<'b>,
    domain: FakeDomain,
    plant: Option<Plant>,
    /// What has been mapped ahead.
    ahead: RefCell<Option<(Vec<u64>, HvResult<FakePages>)>>,
}

impl<'a, 'b> Stepped<'a, 'b> {
    pub(crate) fn new(process: &'a Process<'b>, domain: FakeDomain) -> Self {
        let plant = process.world().plan.plant;
        Stepped { process, domain, plant, ahead: RefCell::default() }
    }

    fn then(&self) -> &FakeDomain {
        self.process.step();
        &self.domain
    }
}

impl Domain for Stepped<'_, '_> {
    type Pages = FakePages;

    fn domid(&self) -> DomId {
        self.domain.domid()
    }

    fn xen_version(&self) -> HvResult<(u32, u32)> {
        self.then().xen_version()
    }

    fn info(&self) -> HvResult<DomainInfo> {
        self.then().info()
    }

    fn maximum_gpfn(&self) -> HvResult<u64> {
        self.then().maximum_gpfn()
    }

    fn address_bits(&self) -> HvResult<u32> {
        self.then().address_bits()
    }

    fn map(&self, frames: &[u64], access: Access) -> HvResult<FakePages> {
        if self.plant == Some(Plant::MappingLeaks) && access == Access::Read {
            std::mem::forget(self.domain.map(frames, access)?);
        }
        let ahead = self.ahead.borrow_mut().take_if(|(announced, _)| announced == frames);
        if let Some((_, mapped)) = ahead.filter(|_| access == Access::Read) {
            self.process.world().facts.coverage.count("mapped ahead");
            return mapped;
        }
        self.then().map(frames, access)
    }

    fn map_m2p(&self) -> HvResult<FakePages> {
        self.then().map_m2p()
    }
}

impl SourceDomain for Stepped<'_, '_> {
    /// As the product's: what holds it is made to let go.
    fn log_dirty_on(&self) -> HvResult<()> {
        if self.then().log_dirty_on().is_err() {
            let _ = self.then().log_dirty_off();
            self.then().log_dirty_on()?;
        }
        Ok(())
    }

    fn log_dirty_off(&self) -> HvResult<()> {
        if self.plant == Some(Plant::LogDirtyStaysOn) {
            return Ok(());
        }
        self.then().log_dirty_off()
    }

    fn log_dirty_clean(&self, bitmap: &mut PageBitmap, last: bool) -> HvResult<()> {
        let mut lost = PageBitmap::new(bitmap.len());
        let loses = self.plant == Some(Plant::DirtyBitsLost) && last;
        self.then().log_dirty_clean(if loses { &mut lost } else { bitmap }, last)
    }

    fn cpu_cap(&self) -> HvResult<CpuCap> {
        self.then().cpu_cap()
    }

    fn set_cpu_cap(&self, cap: CpuCap) -> HvResult<()> {
        self.process.world().facts.coverage.count("policy: a guest that is slowed");
        self.then().set_cpu_cap(cap)
    }

    fn map_ahead(&self, frames: &[u64]) {
        self.ahead.replace(Some((frames.to_vec(), self.then().map(frames, Access::Read))));
    }

    fn page_types(&self, frames: &[u64]) -> HvResult<Vec<PageType>> {
        self.then().page_types(frames)
    }

    fn tsc_info(&self) -> HvResult<TscInfo> {
        self.then().tsc_info()
    }

    fn cpu_policy(&self) -> HvResult<CpuPolicy> {
        self.then().cpu_policy()
    }

    fn hvm_context(&self) -> HvResult<Vec<u8>> {
        self.then().hvm_context()
    }

    fn hvm_param(&self, index: u32) -> HvResult<u64> {
        self.then().hvm_param(index)
    }

    fn vcpu(&self, id: u32) -> HvResult<Option<VcpuState>> {
        self.then().vcpu(id)
    }
}

impl TargetDomain for Stepped<'_, '_> {
    fn populate(&self, pfns: &[Pfn], order: u32) -> HvResult<Vec<u64>> {
        self.then().populate(pfns, order)
    }

    fn set_cpu_policy(&self, policy: &CpuPolicy) -> Result<(), PolicyError> {
        self.then().set_cpu_policy(policy)
    }

    fn set_tsc_info(&self, tsc: &TscInfo) -> HvResult<()> {
        self.then().set_tsc_info(tsc)
    }

    fn set_hvm_context(&self, context: &[u8]) -> HvResult<()> {
        self.then().set_hvm_context(context)
    }

    fn set_hvm_param(&self, index: u32, value: u64) -> HvResult<()> {
        self.then().set_hvm_param(index, value)
    }

    fn set_address_bits(&self, bits: u32) -> HvResult<()> {
        self.then().set_address_bits(bits)
    }

    fn set_vcpu(&self, id: u32, state: &VcpuState) -> HvResult<()> {
        self.then().set_vcpu(id, state)
    }

    fn pin_tables(&self, tables: &[(u8, u64)]) -> HvResult<()> {
        self.then().pin_tables(tables)
    }

    fn seed_grants(&self, console: (u64, DomId), xenstore: (u64, DomId)) -> HvResult<()> {
        self.then().seed_grants(console, xenstore)
    }
}
