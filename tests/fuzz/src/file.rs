//! The same libxc stream as a file, which workers restore in any order: what comes of it is what
//! comes of the stream, and they ask for nothing but batches.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use rxl_migrate::fake::{FakeDomain, FakeToolstack, Rng, WIRING, Wire};
use rxl_migrate::frame::{Mfn, PAGE_SHIFT, PageBuf, Pfn, WORDS_PER_PAGE};
use rxl_migrate::hypervisor::{Access, Domain, ForeignPages};
use rxl_migrate::stream::link::Offer;
use rxl_migrate::target::file::{Batch, work_on_file};
use rxl_migrate::target::links::{Answer, Ask, Links, Need, Owner};
use rxl_migrate::target::restore_with;
use rxl_migrate::x86::pv::PTE_FRAME_MASK;

use crate::assert_told;
use crate::restore::{can_be_sent_on, saved};

/// Restores the file `bytes` into `copy`, which is as `domain` was before the same stream was read:
/// that `taken` it or not.
pub(crate) fn check(domain: &FakeDomain, copy: &FakeDomain, bytes: Vec<u8>, taken: bool) {
    let mut file = Wire::new(bytes);
    let workers = Box::new(Workers {
        domain: copy.clone(),
        file: file.clone(),
        rng: Rng::new(file.bytes.len() as u64),
        given: BTreeMap::new(),
        needs: [0, 1].map(|worker| Need::Ask(worker, Ask::Batch)).into(),
    });
    let mut toolstack = FakeToolstack::new(copy);
    let restored = restore_with(copy, &mut file, &mut toolstack, Some(workers), &WIRING);
    assert_eq!(copy.host().mapped_pages(), 0, "pages are still mapped");
    match restored {
        Ok(_) => {
            assert!(taken, "the stream is refused, the file is not");
            assert_eq!(file.position, file.bytes.len(), "it is not behind its end");
            if can_be_sent_on(domain) {
                assert!(saved(domain).bytes == saved(copy).bytes, "it made another guest");
            }
            assert_same_memory(domain, copy);
        }
        Err(error) => {
            assert!(!taken, "the file is refused, the stream is not: {}", error.chain());
            assert_told(&error);
        }
    }
}

/// The workers on a file, whose turn is when somebody waits for them.
struct Workers {
    domain: FakeDomain,
    file: Wire,
    rng: Rng,
    given: BTreeMap<u8, VecDeque<Batch>>,
    needs: VecDeque<Need>,
}

impl Workers {
    /// One of those that have something places the oldest of it, if there is any.
    fn work(&mut self) {
        let batches = self.given.iter_mut().filter(|(_, batches)| !batches.is_empty());
        let mut batches: Vec<_> = batches.collect();
        self.rng.shuffle(&mut batches);
        let Some((worker, batches)) = batches.pop() else { return };
        let mut turn = Turn { batch: batches.pop_front(), failed: None };
        let ended = work_on_file(&self.domain, &mut self.file.clone(), &mut turn);
        assert!(ended.is_err(), "it ended by itself");
        let ask = turn.failed.map_or(Ask::Batch, Ask::Failed);
        self.needs.push_back(Need::Ask(*worker, ask));
    }
}

impl Links for Workers {
    fn readers(&self) -> u8 {
        2
    }

    fn open(&mut self, _offer: &Offer) {
        panic!("a link of a file is opened");
    }

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        if !stream || self.rng.one_in(2) {
            self.work();
        }
        let need = self.needs.pop_front().or(stream.then_some(Need::Stream));
        Ok(need.expect("nobody waits for workers that have nothing to do"))
    }

    fn answer(&mut self, worker: u8, answer: &Answer) -> io::Result<()> {
        let Answer::Place(batch) = answer else { panic!("no batch: {answer:?}") };
        self.given.entry(worker).or_default().push_back(batch.clone());
        Ok(())
    }

    fn dismiss(&mut self, _worker: u8) {
        panic!("a worker on a file is dismissed for a link");
    }
}

/// The owner of a worker that has one batch to place, and is gone then.
struct Turn {
    batch: Option<Batch>,
    failed: Option<String>,
}

impl Owner for Turn {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        match ask {
            Ask::Batch => self.batch.take().map(Answer::Place),
            Ask::Failed(why) => {
                self.failed = Some(why.clone());
                None
            }
            other => panic!("a worker on a file asks: {other:?}"),
        }
        .ok_or(io::ErrorKind::BrokenPipe.into())
    }
}

/// Both have the same pages, but that each may be in another frame. Only of PV guests does the host
/// know them.
fn assert_same_memory(left: &FakeDomain, right: &FakeDomain) {
    let [left, right] = [left, right].map(Memory::of);
    assert!(left.frames.keys().eq(right.frames.keys()), "other pages have memory");
    for ((pfn, one), other) in left.frames.iter().zip(right.frames.values()) {
        let words = left.page(*one).words().collect::<Vec<_>>();
        for (word, there) in words.into_iter().zip(right.page(*other).words()) {
            let same = word == there || left.meaning(word) == right.meaning(there);
            assert!(same, "page {pfn:#x}: {word:#x} and {there:#x}");
        }
    }
}

/// What a domain has in memory.
struct Memory<'a> {
    domain: &'a FakeDomain,
    /// The frame of each page, as it is mapped.
    frames: BTreeMap<u64, u64>,
    /// The page in each frame.
    pages: BTreeMap<u64, u64>,
}

impl<'a> Memory<'a> {
    fn of(domain: &'a FakeDomain) -> Memory<'a> {
        let m2p = domain.map_m2p().expect("its table");
        let entries =
            (0..m2p.page_count() * WORDS_PER_PAGE).map(|mfn| (mfn as u64, m2p.read_u64(mfn)));
        let is_its = |mfn, pfn| domain.populated_with(Pfn(pfn)) == Some(Mfn(mfn));
        let pages = entries.filter(|(mfn, pfn)| is_its(*mfn, *pfn));
        let mut memory = Memory { domain, frames: BTreeMap::new(), pages: pages.collect() };
        memory.frames = memory.pages.iter().map(|(mfn, pfn)| (*pfn, *mfn)).collect();
        memory
    }

    fn page(&self, frame: u64) -> Box<PageBuf> {
        let mut page = PageBuf::zeroed();
        let mapped = self.domain.map(&[frame], Access::Read).expect("a page that it has");
        mapped.read_page(0, &mut page);
        page
    }

    /// What a word says if it names a frame: alone, or with an entry's flags.
    fn meaning(&self, word: u64) -> (u64, u64, bool) {
        let named = |frame| self.pages.get(&frame).copied();
        match (named(word), named((word & PTE_FRAME_MASK) >> PAGE_SHIFT)) {
            (Some(pfn), _) => (pfn, 0, true),
            (_, Some(pfn)) => (pfn, word & !PTE_FRAME_MASK, true),
            _ => (word, 0, false),
        }
    }
}
