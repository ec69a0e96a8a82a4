//! A PV guest's own structures, which the sender reads: shared info, p2m (list or tree), page
//! tables, vCPU contexts, all of them while they change.
//!
//! An input chooses a guest, then changes words of its memory, some before the save and some
//! while it goes on. Where frame numbers are needed the changes name pages of the guest. There may
//! be workers, on the stream and on links ([`crate::senders`]).

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use rxl_migrate::Error;
use rxl_migrate::fake::{
    FakeDomain, FakeToolstack, Host, HvmSpec, P2mKind, PvSpec, WIRING, compare,
};
use rxl_migrate::frame::{Mfn, PAGE_SHIFT, Pfn};
use rxl_migrate::hypervisor::{Access, Domain, ForeignPages, LogLevel, SourceDomain, Toolstack};
use rxl_migrate::report::Event;
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::workers::Workers;
use rxl_migrate::source::{Options, Verify, save_with};
use rxl_migrate::target::restore_with;
use rxl_migrate::x86::pv::{PTE_FRAME_MASK, context, get_u64, shared_info};

use crate::assert_told;
use crate::input::Input;
use crate::receivers::Receivers;
use crate::senders::{Out, Plan, Senders};
use crate::ways::{Stream, Wires};

/// pfns of the guest, at most.
const PAGES: u64 = 140;
const FRAMES: u64 = 240;
/// Batches after which the save is cancelled: a guest may claim a large p2m, and then it takes
/// long as it has to.
const ASKS_MAX: u32 = 24;
/// The same with workers, which have smaller batches and news of their own.
const ASKS_WITH_WORKERS_MAX: u32 = 400;

/// Bits of the first byte.
mod flag {
    pub(super) const TREE: u8 = 1;
    pub(super) const LONG_TAIL: u8 = 2;
    pub(super) const LIVE: u8 = 4;
    pub(super) const VERIFY: u8 = 8;
    /// What is saved goes on to a receiver.
    pub(super) const RESTORE: u8 = 16;
    /// The guest maps a page of somebody else's for good.
    pub(super) const GRANT: u8 = 32;
    /// The save is cancelled early.
    pub(super) const CANCEL: u8 = 64;
    /// There are workers, as the bits of the next byte say.
    pub(super) const WORKERS: u8 = 128;
}

/// Bits of the byte about workers; after it comes how many bytes say what they do, and those.
mod staff {
    /// So many on the stream.
    pub(super) const ON_STREAM: u8 = 3;
    /// So many links, times four.
    pub(super) const LINKS: u8 = 12;
    /// The receiver confirms what is so.
    pub(super) const HONEST: u8 = 16;
    /// It is an HVM guest.
    pub(super) const HVM: u8 = 32;
}

/// Calls that may be told to fail, by the second byte; 0 and what is past the list is none.
const CALLS: [&str; 9] = [
    "",
    "map",
    "map_m2p",
    "log_dirty_on",
    "log_dirty_clean",
    "log_dirty_off",
    "page_types",
    "vcpu",
    "cpu_policy",
];
const EIO: i32 = 5;

/// Kinds of changes.
mod change {
    /// The rest of the changes are for later.
    pub(super) const PAUSE: u8 = 0;
    /// A word of a page.
    pub(super) const WORD: u8 = 1;
    /// A word becomes the machine frame of a page.
    pub(super) const FRAME: u8 = 2;
    /// A word becomes an entry for a page.
    pub(super) const ENTRY: u8 = 3;
    /// A word goes up or down.
    pub(super) const ADD: u8 = 4;
    /// A word of a vCPU's context.
    pub(super) const VCPU: u8 = 5;
    /// The same, and it becomes an entry for a page.
    pub(super) const VCPU_ENTRY: u8 = 6;
    /// Words of a page become what the first of them is.
    pub(super) const REPEAT: u8 = 7;
    pub(super) const KINDS: u8 = 8;
}

/// The guest and libxl, both of which follow the input.
struct Hostile<'a> {
    domain: &'a FakeDomain,
    input: RefCell<Input<'a>>,
    /// Machine frames that matter most: shared info, then the p2m and the tables that lead to it.
    anchors: Vec<u64>,
    pages: Vec<u64>,
    asked: Cell<u32>,
    asks_max: u32,
    /// It did something that no good guest does.
    changed: Cell<bool>,
}

impl Hostile<'_> {
    /// The page that the next two bytes name.
    fn page(&self) -> u64 {
        let index = usize::from(self.input.borrow_mut().u16());
        let all = self.anchors.iter().chain(&self.pages);
        all.clone().nth(index.checked_rem(all.count()).unwrap_or(0)).copied().unwrap_or(0)
    }

    fn word(&self, mfn: u64, slot: usize) -> u64 {
        let page = self.domain.map(&[mfn], Access::Read);
        page.map_or(0, |page| page.read_u64(slot % 512))
    }

    /// Changes what the input says, up to the next pause.
    fn act(&self) {
        while !self.input.borrow().is_empty() {
            let kind = self.input.borrow_mut().u8() % change::KINDS;
            if kind == change::PAUSE {
                return;
            }
            self.changed.set(true);
            if matches!(kind, change::VCPU | change::VCPU_ENTRY) {
                self.change_vcpu(kind);
                continue;
            }
            let mfn = self.page();
            let slot = usize::from(self.input.borrow_mut().u16());
            let word = match kind {
                change::WORD => self.input.borrow_mut().u64(),
                change::FRAME => self.page(),
                change::ENTRY => self.entry(),
                change::ADD => {
                    let by = self.input.borrow_mut().u8().cast_signed();
                    self.word(mfn, slot).wrapping_add_signed(by.into())
                }
                _ => self.word(mfn, slot),
            };
            let count = if kind == change::REPEAT { self.input.borrow_mut().u8() } else { 1 };
            for slot in (slot..).take(count.into()) {
                self.domain.poke(Mfn(mfn), slot, word);
            }
        }
    }

    fn entry(&self) -> u64 {
        let mfn = self.page();
        mfn << PAGE_SHIFT | u64::from(self.input.borrow_mut().u8())
    }

    fn change_vcpu(&self, kind: u8) {
        let mut input = self.input.borrow_mut();
        let (vcpu, slot, word) = (input.u8() % 3, input.u16() % 646, input.u64());
        drop(input);
        let word = if kind == change::VCPU { word } else { self.entry() };
        self.domain.poke_vcpu(vcpu.into(), 8 * usize::from(slot), word);
    }
}

impl Toolstack for Hostile<'_> {
    fn suspend(&mut self) -> io::Result<bool> {
        self.act();
        self.domain.suspend();
        Ok(true)
    }

    fn qemu_log_dirty(&mut self, _on: bool) -> io::Result<()> {
        Ok(())
    }

    fn static_data_done(&mut self, _cpuid: bool, _msr: bool) -> io::Result<()> {
        Ok(())
    }

    fn log(&mut self, _level: LogLevel, text: &str) {
        assert!(!text.is_empty());
    }

    fn progress(&mut self, what: &str, done: u64, total: u64) {
        assert!(!what.is_empty() && done <= total);
        self.act();
    }

    fn event(&mut self, event: &Event) {
        assert!(!format!("{event:?}").is_empty());
    }

    fn aborted(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.asked.get() > self.asks_max
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

/// Frames of the p2m and of the tables that lead to it, of an address space, and of start info.
fn anchors(domain: &FakeDomain) -> Vec<u64> {
    let shared = domain.info().expect("a domain").shared_info_mfn;
    let word = |mfn: u64, slot: usize| {
        domain.map(&[mfn], Access::Read).map_or(0, |page| page.read_u64(slot))
    };
    let below = |mfn, slot| (word(mfn, slot) & PTE_FRAME_MASK) >> PAGE_SHIFT;
    let top = word(shared, shared_info::FRAME_LIST_LIST / 8);
    let mid = word(top, 0);
    let cr3 = word(shared, shared_info::P2M_CR3 / 8) >> PAGE_SHIFT;
    let level3 = below(cr3, 402);
    let level2 = below(level3, 0);
    let level1 = below(level2, 0);
    let basic = domain.vcpu(0).ok().flatten().map(|vcpu| vcpu.basic).unwrap_or_default();
    let own = get_u64(&basic, context::CR3).unwrap_or(0) >> PAGE_SHIFT;
    let (own3, start) = (below(own, 0), get_u64(&basic, context::START_INFO).unwrap_or(0));
    let (own2, own1) = (below(own3, 0), below(below(own3, 0), 0));
    let leaf = if top == 0 { below(level1, 0) } else { word(mid, 0) };
    let all = [shared, top, mid, leaf, cr3, level3, level2, level1, own, own3, own2, own1, start];
    all.into_iter().filter(|mfn| *mfn != 0).collect()
}

pub(crate) fn run(bytes: &[u8]) {
    let _ = arrives(bytes);
}

/// The guest of an input.
fn guest(flags: u8, hvm: bool) -> FakeDomain {
    let has = |flag| flags & flag != 0;
    let host = Host::new(FRAMES, 3);
    if hvm {
        return HvmSpec { pages: PAGES, seed: 5 }.build(&host);
    }
    let spec = PvSpec {
        pages: PAGES,
        one_hole_in: 20,
        p2m: if has(flag::TREE) { P2mKind::Tree } else { P2mKind::Linear },
        long_tail: has(flag::LONG_TAIL),
        vcpus: 3,
        processes: 2,
        seed: 5,
    };
    let domain = spec.build(&host);
    if has(flag::GRANT) {
        domain.hold_grant();
    }
    domain
}

/// Whether the guest of an input is saved, and then received if that is asked for.
fn arrives(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let (flags, call, succeed) = (input.u8(), usize::from(input.u8()), input.u8());
    let has = |flag| flags & flag != 0;
    let staff = if has(flag::WORKERS) { input.u8() } else { 0 };
    let choices = if has(flag::WORKERS) { input.u16() } else { 0 };
    let choices = input.bytes(choices.into());
    let domain = guest(flags, staff & staff::HVM != 0);
    let host = domain.host();
    let anchors = if staff & staff::HVM == 0 { anchors(&domain) } else { Vec::new() };
    // The model's guest makes ready as a good one does; from then on the input decides.
    domain.suspend();
    domain.take_over();
    if let Some(call) = CALLS.get(call) {
        host.fail(call, u64::from(succeed), EIO);
    }
    let pages = (0..PAGES).filter_map(|pfn| Some(domain.populated_with(Pfn(pfn))?.0)).collect();
    let asks_max = if has(flag::WORKERS) { ASKS_WITH_WORKERS_MAX } else { ASKS_MAX };
    let asks_max = if has(flag::CANCEL) { u32::from(succeed) } else { asks_max };
    let (input, asked, changed) = (RefCell::new(input), Cell::new(0), Cell::new(false));
    let mut toolstack =
        Hostile { domain: &domain, input, anchors, pages, asked, asks_max, changed };
    toolstack.act();

    let mut out = Out::default();
    let plan = Plan {
        on_stream: staff & staff::ON_STREAM,
        links: (staff & staff::LINKS) / 4,
        honest: staff & staff::HONEST != 0,
    };
    let senders = has(flag::WORKERS).then(|| Senders::new(&domain, plan, &out, choices));
    let links = senders.as_ref().map(|senders| Rc::clone(&senders.links)).unwrap_or_default();
    let workers = senders.map(|senders| Box::new(senders) as Box<dyn Workers>);
    let verify = match (has(flag::VERIFY), has(flag::LIVE)) {
        (false, _) => Verify::No,
        (true, false) => Verify::Again,
        (true, true) => Verify::Digests,
    };
    let options = Options { live: has(flag::LIVE), verify, policy: Policy::Stock };
    let result = save_with(&domain, &mut out, &mut toolstack, workers, &options);
    host.heal();
    assert_eq!(host.mapped_pages(), 0, "pages are still mapped");
    let ways: Vec<Vec<u8>> =
        std::iter::once(&out).chain(&*links.borrow()).map(|way| way.0.take().bytes).collect();
    match result {
        Ok(summary) => {
            let stream = ways.first().map_or(0, Vec::len) as u64;
            assert!(summary.bytes == stream || (ways.len() > 1 && summary.bytes > stream));
            let is_good = !toolstack.changed.get() && (plan.honest || ways.len() == 1);
            // The same guest, as it was when nobody had taken it over.
            let twin = guest(flags, staff & staff::HVM != 0);
            twin.suspend();
            !has(flag::RESTORE) || receive(&twin, ways, is_good)
        }
        Err(error) => {
            assert!(!matches!(error, Error::Machine { .. } | Error::Format(_)), "{error}");
            assert_told(&error);
            false
        }
    }
}

/// A receiver takes what such a guest became, or says why not. A guest and a receiver that are
/// `good` arrive as they were.
fn receive(guest: &FakeDomain, ways: Vec<Vec<u8>>, good: bool) -> bool {
    let host = Host::new(FRAMES, 4);
    let domain = host.create(guest.info().expect("a domain").hvm, PAGES + 40, 3);
    let source = Rc::new(RefCell::new(Wires::new(ways, 0)));
    let links = Box::new(Receivers::new(&domain, &source));
    let (mut stream, mut toolstack) = (Stream::new(&source), FakeToolstack::new(&domain));
    let restored = restore_with(&domain, &mut stream, &mut toolstack, Some(links), &WIRING);
    assert_eq!(host.mapped_pages(), 0, "pages are still mapped");
    match &restored {
        Ok(outcome) if good => assert_eq!(compare(guest, &domain, &WIRING, outcome), [""; 0]),
        Ok(_) => {}
        Err(error) => {
            assert!(!good && !matches!(error, Error::Machine { .. }), "{}", error.chain());
            assert_told(error);
        }
    }
    restored.is_ok()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let word = |page: u16, offset: usize, word: u64| {
        let slot = u16::try_from(offset / 8).unwrap_or_default();
        let head = [page, slot].map(u16::to_le_bytes).concat();
        [&[change::WORD][..], &head, &word.to_le_bytes()].concat()
    };
    let vcpu = |offset: usize, word: u64| {
        let slot = u16::try_from(offset / 8).unwrap_or_default();
        [&[change::VCPU, 0][..], &slot.to_le_bytes(), &word.to_le_bytes()].concat()
    };
    let live = flag::LIVE | flag::RESTORE;
    let mut seeds = vec![
        vec![flag::RESTORE, 0, 0],
        vec![flag::TREE | flag::LONG_TAIL | flag::VERIFY | flag::RESTORE, 0, 0],
        vec![live | flag::LONG_TAIL, 0, 0],
        vec![live | flag::GRANT, 0, 0],
        vec![live | flag::CANCEL, 0, 9],
    ];
    // The shared info page is the first anchor.
    for (offset, value) in [
        (shared_info::MAX_PFN, 0),
        (shared_info::MAX_PFN, 1 << 20),
        (shared_info::MAX_PFN, 1 << 32),
        (shared_info::P2M_VADDR, 0xffff_8000_0000_0000),
        (shared_info::P2M_VADDR, 1),
        (shared_info::P2M_CR3, 1 << 40),
        (shared_info::FRAME_LIST_LIST, u64::MAX),
    ] {
        let change = word(0, offset, value);
        seeds.push([&[flag::RESTORE, 0, 0][..], &change].concat());
        seeds.push([&[flag::TREE | flag::RESTORE, 0, 0][..], &change].concat());
    }
    let generation = word(0, shared_info::P2M_GENERATION, 9);
    seeds.push([&[live, 0, 0, 0][..], &generation].concat());
    for (offset, value) in [
        (context::GDT_ENTRIES, 7169),
        (context::GDT_FRAMES, 1),
        (context::CR3, 5 << 12),
        (context::CR1, 0),
        (context::START_INFO, 0),
    ] {
        seeds.push([&[flag::RESTORE, 0, 0][..], &vcpu(offset, value)].concat());
    }
    // An entry of a table becomes a superpage, a foreign frame, another page; while it goes on.
    for page in 1..9 {
        for value in [0x83, 1 << 40 | 1, 77 << 12 | 1] {
            seeds.push([&[live, 0, 0, 0, 0][..], &word(page, 8, value)].concat());
        }
    }
    for call in 1..9 {
        seeds.push(vec![live, call, 1]);
    }
    seeds.extend(with_workers(&generation));
    seeds
}

/// Kinds of what happens among workers, in the low bits; the others say to which.
mod happens {
    pub(super) const DONE: u8 = 1;
    pub(super) const JOINS: u8 = 4;
    pub(super) const KILLED: u8 = 5;
    /// After so many bytes, which come next.
    pub(super) const BREAKS: u8 = 6;
}

/// Workers on the stream and on links, of all kinds; the first ten mean no harm.
fn with_workers(change: &[u8]) -> Vec<Vec<u8>> {
    use happens::{BREAKS, DONE, JOINS, KILLED};
    let all = flag::LIVE | flag::RESTORE | flag::WORKERS;
    let one = |flags, (on_stream, links, more): (u8, u8, u8), choices: &[u8], rest: &[u8]| {
        let count = u16::try_from(choices.len()).unwrap_or_default().to_le_bytes();
        [&[flags, 0, 0, on_stream | links << 2 | more][..], &count, choices, rest].concat()
    };
    let (honest, hvm) = (staff::HONEST, staff::HONEST | staff::HVM);
    let second = 1 << 3;
    let two = [JOINS, JOINS];
    let mut seeds = vec![
        one(all, (2, 0, honest), &[], &[]),
        one(all, (3, 0, hvm), &[DONE, DONE | second, DONE | second, DONE], &[]),
        one(all | flag::VERIFY, (1, 1, honest), &[], &[]),
        one(all, (0, 1, honest), &[JOINS], &[]),
        one(all, (0, 2, hvm), &two, &[]),
        one(all | flag::TREE, (1, 3, honest), &[0, DONE, 0, JOINS, JOINS, DONE, JOINS], &[]),
        one(all, (0, 3, honest), &[JOINS, JOINS, JOINS, BREAKS, 40, BREAKS | second, 90], &[]),
        one(all, (0, 2, hvm), &[JOINS, JOINS, BREAKS, 100, DONE, BREAKS | second, 200], &[]),
        one(all, (0, 2, honest), &[JOINS, JOINS, DONE, DONE, KILLED], &[]),
        one(
            all,
            (0, 2, hvm),
            &[JOINS, JOINS, 1, 9, 1, 9, 1, 9, BREAKS, 0, BREAKS | second, 1],
            &[],
        ),
        // A worker of the stream is lost, pages vanish, a call fails, it takes too long.
        one(all, (2, 0, honest), &[DONE, KILLED], &[]),
        one(all, (0, 2, honest), &two, &[&[0, 0, 0][..], change].concat()),
        one(all | flag::GRANT, (0, 2, honest), &two, &[]),
        vec![all, 1, 9, honest | 2, 0, 0],
        vec![all, 6, 2, honest | 2 << 2, 2, 0, JOINS, JOINS],
        vec![all | flag::CANCEL, 0, 9, honest | 2 << 2, 2, 0, JOINS, JOINS],
    ];
    // A receiver that confirms too early, too late, never, or in pieces.
    let word = |word: u64| [&[8][..], &word.to_le_bytes()].concat();
    let says = [
        word(u64::MAX),
        vec![3, 1, 0, 0, 5, 0, 0, 0, 0, 0],
        [word(2), word(1), word(0), word(9)].concat(),
        vec![0; 40],
        vec![255],
    ];
    for says in says {
        seeds.push(one(all, (0, 1, 0), &[&[JOINS, DONE][..], &says].concat(), &[]));
        let says = [&[JOINS, JOINS, BREAKS, 90, DONE][..], &says, &[DONE | second], &says].concat();
        seeds.push(one(all, (0, 2, staff::HVM), &says, &[]));
    }
    // While it goes on, a page becomes something else.
    for page in 1..9 {
        let becomes = [&[0, 0, change::FRAME, page, 0, 8, 0][..], &[40, 0]].concat();
        seeds.push(one(all, (0, 2, honest), &two, &becomes));
    }
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_means_no_harm_arrives() {
        for flags in [0, flag::TREE, flag::LIVE, flag::LIVE | flag::TREE | flag::VERIFY] {
            assert!(arrives(&[flags | flag::RESTORE, 0, 0]), "{flags:#x}");
        }
        for seed in with_workers(&[]).iter().take(10) {
            assert!(arrives(seed), "{seed:?}");
        }
    }
}
