//! A guest that several workers read from a file is the one that was saved, whatever the order in
//! which they get on; and what is wrong with the file or a worker ends the restore.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "what is not there is to stop the test"
)]

mod common;

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{HOST_FRAMES, WIRING, guest};
use rxl_migrate::error::Error;
use rxl_migrate::fake::{
    FakeDomain, FakePages, FakeToolstack, Host, Rng, Script, Wire, compare, tables,
};
use rxl_migrate::frame::{PageBuf, PageType, Pfn};
use rxl_migrate::hypervisor::{Access, Domain, ForeignPages, LogLevel, PageSlot, StreamIn};
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::{self, Verify, save};
use rxl_migrate::stream::libxc::{PageEntry, RecordKind, StreamHeader, p2m_frames};
use rxl_migrate::stream::link::{LinkSet, Offer, Secret, pass_end_record};
use rxl_migrate::target::file::{Batch, work_on_file};
use rxl_migrate::target::links::{Answer, Ask, Links, Need, Owner};
use rxl_migrate::target::{Outcome, restore, restore_with};

/// Pages that a copy may have more than the guest had when it was suspended: what it gave back
/// meanwhile comes along.
const BALLOONED_PAGES_MAX: u64 = 2000;

/// What happens before a worker reads pages, which begin at this offset.
type Pace = Arc<dyn Fn(u64) -> io::Result<()> + Send + Sync>;

fn at_once() -> Pace {
    Arc::new(|_| Ok(()))
}

/// The file, as a worker reads it.
struct Paced {
    file: Wire,
    before: Pace,
}

impl StreamIn<FakePages> for Paced {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        StreamIn::<FakePages>::read_exact(&mut self.file, buf)
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        (self.before)(self.file.position as u64)?;
        self.file.read_pages(pages, slots)
    }

    fn go_to(&mut self, offset: u64) -> io::Result<()> {
        StreamIn::<FakePages>::go_to(&mut self.file, offset)
    }
}

/// What has been handed out.
type Given = Arc<Mutex<Vec<Batch>>>;

/// Where each of these begins.
fn offsets(given: &[Batch]) -> Vec<u64> {
    given.iter().map(|batch| batch.offset).collect()
}

/// Threads in the place of processes.
struct Readers {
    answers: Vec<Sender<Answer>>,
    asked: Receiver<Need>,
    threads: Vec<JoinHandle<()>>,
    given: Given,
    /// First questions of workers: all are ready before anything is read.
    first: VecDeque<Need>,
}

struct Socket {
    worker: u8,
    asked: Sender<Need>,
    answers: Receiver<Answer>,
}

impl Owner for Socket {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        let need = Need::Ask(self.worker, ask.clone());
        self.asked.send(need).map_err(|_| io::Error::from(ErrorKind::BrokenPipe))?;
        self.answers.recv().map_err(|_| ErrorKind::UnexpectedEof.into())
    }
}

impl Readers {
    fn start(count: u8, domain: &FakeDomain, file: &Wire, before: &Pace) -> Readers {
        let (asks, asked) = channel();
        let (mut all_answers, mut threads) = (Vec::new(), Vec::new());
        for worker in 0..count {
            let (sender, answers) = channel();
            let mut socket = Socket { worker, asked: asks.clone(), answers };
            let mut file = Paced { file: file.clone(), before: Arc::clone(before) };
            let domain = domain.clone();
            all_answers.push(sender);
            threads.push(thread::spawn(move || {
                let ended = work_on_file(&domain, &mut file, &mut socket);
                let why = ended.err().map_or("the end".into(), |error| error.chain());
                let _ = socket.asked.send(Need::Ended(worker, why));
            }));
        }
        let first = (0..count).map(|_| asked.recv().unwrap()).collect();
        Readers { answers: all_answers, asked, threads, given: Arc::default(), first }
    }
}

impl Links for Readers {
    fn readers(&self) -> u8 {
        u8::try_from(self.threads.len()).unwrap()
    }

    fn open(&mut self, _offer: &Offer) {
        panic!("a link of a file is opened");
    }

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        if let Some(need) = self.first.pop_front() {
            return Ok(need);
        }
        match stream {
            true => Ok(self.asked.try_recv().unwrap_or(Need::Stream)),
            false => Ok(self.asked.recv_timeout(Duration::from_secs(60)).unwrap()),
        }
    }

    fn answer(&mut self, worker: u8, answer: &Answer) -> io::Result<()> {
        if let Answer::Place(batch) = answer {
            self.given.lock().unwrap().push(batch.clone());
        }
        let sent = self.answers[usize::from(worker)].send(answer.clone());
        sent.map_err(|_| ErrorKind::BrokenPipe.into())
    }

    fn dismiss(&mut self, _worker: u8) {
        panic!("a worker on a file is dismissed for a link");
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.answers.clear();
        self.threads.drain(..).for_each(|thread| assert!(thread.join().is_ok()));
    }
}

/// What came of a restore.
struct Restored {
    outcome: Result<Outcome, Error>,
    toolstack: FakeToolstack,
    given: Vec<Batch>,
}

/// Restores `file` into `domain` by so many workers.
fn restored(domain: &FakeDomain, file: &mut Wire, count: u8, before: &Pace) -> Restored {
    let mut toolstack = FakeToolstack::new(domain);
    let readers = Readers::start(count, domain, file, before);
    let given = Arc::clone(&readers.given);
    let outcome = restore_with(domain, file, &mut toolstack, Some(Box::new(readers)), &WIRING);
    assert_eq!(domain.host().mapped_pages(), 0, "a worker holds guest memory");
    let given = given.lock().unwrap().clone();
    Restored { outcome, toolstack, given }
}

fn small_target(hvm: bool) -> FakeDomain {
    Host::new(48, 7).create(hvm, 32, 2)
}

fn finished(script: Script) -> Script {
    if script.hvm { script.finish_hvm() } else { script.finish_pv() }
}

/// Where a page-data record's first page is that would come next, of `count` pages.
fn next_page(script: &mut Script, count: usize) -> u64 {
    script.rewind();
    (script.bytes.len() + 16 + 8 * count) as u64
}

fn normal(pfn: u64, byte: u8) -> (u64, PageType, Box<PageBuf>) {
    (pfn, PageType::Normal, Box::new(PageBuf([byte; 4096])))
}

/// Page `pfn` of a restored domain.
fn first_byte(domain: &FakeDomain, pfn: u64) -> u8 {
    let mut page = PageBuf::zeroed();
    let mfn = domain.populated_with(Pfn(pfn)).unwrap().0;
    let frame = if domain.info().unwrap().hvm { pfn } else { mfn };
    domain.map(&[frame], Access::Read).unwrap().read_page(0, &mut page);
    page.0[0]
}

/// The worker that has the older content of page 4 is slow: it waits until page 8 is placed, which
/// comes later, and then some more.
#[test]
fn a_page_that_comes_again_waits_for_a_slow_worker_and_others_do_not() {
    for mut script in [Script::pv(), Script::hvm()] {
        let slow = next_page(&mut script, 2);
        script.pages(&[normal(3 + u64::from(!script.hvm), 0x77), normal(12, 0x77)]);
        let other = next_page(&mut script, 1);
        script.pages(&[normal(8, 0x88)]);
        let again = next_page(&mut script, 2);
        script.pages(&[normal(7, 0x99), normal(12, 0x99)]);
        let script = finished(script);

        let begun = Arc::new(Mutex::new(Vec::new()));
        let before: Pace = {
            let begun = Arc::clone(&begun);
            Arc::new(move |offset| {
                let end = Instant::now() + Duration::from_secs(20);
                while offset == slow && !begun.lock().unwrap().contains(&other) {
                    assert!(Instant::now() < end, "nobody goes on meanwhile");
                    thread::sleep(Duration::from_millis(1));
                }
                if offset == slow {
                    thread::sleep(Duration::from_millis(50));
                }
                begun.lock().unwrap().push(offset);
                Ok(())
            })
        };
        let domain = small_target(script.hvm);
        restored(&domain, &mut script.wire(), 3, &before).outcome.unwrap();
        let bytes = [7, 8, 12].map(|pfn| first_byte(&domain, pfn));
        assert_eq!(bytes, [0x99, 0x88, 0x99]);
        let mut order = begun.lock().unwrap().clone();
        order.retain(|offset| [slow, other, again].contains(offset));
        assert_eq!(order, [other, slow, again]);
    }
}

/// The only worker does not place its first batch before a second one waits for it.
#[test]
fn a_worker_has_its_next_batch_before_it_is_done() {
    for mut script in [Script::pv(), Script::hvm()] {
        script.rewind();
        script.pages(&[normal(7, 0x77)]);
        script.pages(&[normal(8, 0x88)]);
        let script = finished(script);
        let domain = small_target(script.hvm);
        let mut file = script.wire();
        let wait: Arc<Mutex<Option<Given>>> = Arc::default();
        let before: Pace = {
            let wait = Arc::clone(&wait);
            Arc::new(move |_| {
                let first = wait.lock().unwrap().take();
                let end = Instant::now() + Duration::from_secs(20);
                while first.as_ref().is_some_and(|given| given.lock().unwrap().len() < 2) {
                    assert!(Instant::now() < end, "there is none");
                    thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            })
        };
        let readers = Readers::start(1, &domain, &file, &before);
        *wait.lock().unwrap() = Some(Arc::clone(&readers.given));
        let mut toolstack = FakeToolstack::new(&domain);
        let links = Some(Box::new(readers) as Box<dyn Links>);
        restore_with(&domain, &mut file, &mut toolstack, links, &WIRING).unwrap();
        assert_eq!([7, 8].map(|pfn| first_byte(&domain, pfn)), [0x77, 0x88]);
    }
}

/// So workers need not ask for it. A batch is cut before it refers to too much for a message.
#[test]
fn what_page_tables_refer_to_comes_with_their_batch() {
    let mut script = Script::pv();
    script.rewind();
    script.record(RecordKind::X86PvP2mFrames, &p2m_frames(Pfn(63), &[Pfn(9)]).unwrap());
    let first = next_page(&mut script, 11);
    let entries: Vec<(usize, u64)> = (0..512).map(|slot| (slot, 4 + slot as u64 % 2)).collect();
    let kind = PageType::Table { level: 1, pinned: false };
    script.pages(&(16..27).map(|pfn| (pfn, kind, tables(&entries))).collect::<Vec<_>>());
    let domain = small_target(false);
    let restored = restored(&domain, &mut finished(script).wire(), 2, &at_once());
    restored.outcome.unwrap();
    let referred = |batch: &Batch| batch.referred.iter().map(|pfn| pfn.0).collect::<Vec<u64>>();
    let all: Vec<_> = restored.given.iter().map(|batch| (batch.offset, referred(batch))).collect();
    assert_eq!(all[0].1, [2, 3, 10]);
    assert_eq!(all[all.len() - 2..], [(first, vec![4, 5]), (first + 8 * 4096, vec![4, 5])]);
}

/// Its workers take between no time and a millisecond for a batch.
#[test]
fn a_guest_that_wrote_arrives_as_it_was_and_not_a_byte_more_is_taken() {
    for seed in 0..8 {
        let (source, mut file) = (guest(seed), Wire::default());
        let verify = if seed % 3 == 0 { Verify::Again } else { Verify::No };
        let options = source::Options { live: true, verify, policy: Policy::Stock };
        save(&source, &mut file, &mut FakeToolstack::new(&source), &options).unwrap();
        file.bytes.extend(b"libxl reads on here");
        let info = source.info().unwrap();
        let target = Host::new(HOST_FRAMES, seed ^ 0x5eed).create(
            info.hvm,
            info.total_pages + BALLOONED_PAGES_MAX,
            info.max_vcpu_id + 1,
        );
        let rng = Mutex::new(Rng::new(seed));
        let before: Pace = Arc::new(move |_| {
            let pause = rng.lock().unwrap().below(1000);
            thread::sleep(Duration::from_micros(pause));
            Ok(())
        });
        let Restored { outcome, toolstack, given } = restored(&target, &mut file, 4, &before);
        assert_eq!(compare(&source, &target, &WIRING, &outcome.unwrap()), [""; 0], "{seed}");
        assert_eq!(&file.bytes[file.position..], b"libxl reads on here");
        assert_eq!(toolstack.lines(LogLevel::Error), [""; 0], "{seed}");
        assert!(given.is_sorted_by_key(|batch| batch.offset) && given.len() > 4, "{seed}");
    }
}

#[test]
fn pages_that_differ_after_a_verify_record_are_told() {
    let mut script = Script::hvm();
    script.rewind();
    script.record(RecordKind::Verify, &[]);
    script.pages(&[normal(0, 0x11), normal(2, 0x77)]);
    let script = script.finish_hvm();
    let domain = small_target(true);
    let Restored { outcome, toolstack, .. } = restored(&domain, &mut script.wire(), 2, &at_once());
    outcome.unwrap();
    assert_eq!(toolstack.lines(LogLevel::Error)[0], "verify: pfn 0x2 differs");
}

#[test]
fn a_file_that_is_cut_is_refused_as_a_stream_is() {
    let mut rng = Rng::new(1);
    for script in [Script::pv(), Script::hvm()] {
        for _ in 0..50 {
            let mut file = script.wire();
            file.bytes.truncate(rng.index(script.bytes.len()));
            let mut alone = file.clone();
            let why = restored(&small_target(script.hvm), &mut file, 2, &at_once()).outcome;
            let domain = small_target(script.hvm);
            let toolstack = &mut FakeToolstack::new(&domain);
            let wanted = restore(&domain, &mut alone, toolstack, &WIRING).unwrap_err();
            assert_eq!(why.unwrap_err().chain(), wanted.chain());
        }
    }
}

#[test]
fn a_worker_that_fails_ends_the_restore_and_says_why() {
    let fails: Pace = Arc::new(|_| Err(io::Error::from_raw_os_error(5)));
    for script in [Script::pv(), Script::hvm()] {
        let domain = small_target(script.hvm);
        let error = restored(&domain, &mut script.wire(), 2, &fails).outcome.unwrap_err();
        let why = "a worker failed: could not read page data from the stream: Input/output error";
        assert!(error.chain().starts_with(why), "{}", error.chain());
    }
}

/// Workers that end as soon as they have a batch, as killed ones do.
struct Killed;

impl Links for Killed {
    fn readers(&self) -> u8 {
        1
    }

    fn open(&mut self, _offer: &Offer) {}

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        if stream { Ok(Need::Stream) } else { Ok(Need::Ended(0, "it was killed".into())) }
    }

    fn answer(&mut self, _worker: u8, _answer: &Answer) -> io::Result<()> {
        Ok(())
    }

    fn dismiss(&mut self, _worker: u8) {}
}

#[test]
fn a_worker_that_is_killed_ends_the_restore() {
    let domain = small_target(true);
    let (mut file, mut toolstack) = (Script::hvm().wire(), FakeToolstack::new(&domain));
    let ended = restore_with(&domain, &mut file, &mut toolstack, Some(Box::new(Killed)), &WIRING);
    assert_eq!(ended.unwrap_err().chain(), "a worker failed: it was killed");
}

/// A file may hold what was sent over links, or tell of them: nobody is at their other end.
#[test]
fn links_that_a_file_offers_are_not_opened_and_pages_that_they_had_are_missed() {
    for links in [LinkSet::default(), LinkSet(1)] {
        let mut script = Script::hvm();
        script.rewind();
        let offer = Offer::new(1, Secret::new([7; 32]), Vec::new()).record().unwrap();
        script.bytes.splice(StreamHeader::BYTES..StreamHeader::BYTES, offer);
        script.bytes.extend(pass_end_record(0, links).unwrap());
        let script = script.finish_hvm();
        let domain = small_target(true);
        let outcome = restored(&domain, &mut script.wire(), 2, &at_once()).outcome;
        let why = outcome.err().map(|error| error.chain());
        let missed = "a worker failed: pages came over links that are not here".to_owned();
        assert_eq!(why, (links != LinkSet::default()).then_some(missed));
    }
}

/// A record of many small batches, and one of more than a batch.
#[test]
fn records_are_cut_into_batches_of_ascending_pfns() {
    let mut script = Script::hvm();
    let entries = [5, 9, 9, 4].map(|pfn| PageEntry { pfn: Pfn(pfn), kind: PageType::Normal });
    let start = next_page(&mut script, entries.len());
    let pages = (1_u8..).zip(&entries).map(|(byte, entry)| normal(entry.pfn.0, byte));
    script.pages(&pages.collect::<Vec<_>>());
    let domain = small_target(true);
    let Restored { outcome, given, .. } =
        restored(&domain, &mut script.finish_hvm().wire(), 2, &at_once());
    outcome.unwrap();
    assert_eq!([4, 5, 9].map(|pfn| first_byte(&domain, pfn)), [4, 1, 3]);
    assert_eq!(offsets(&given)[given.len() - 3..], [start, start + 2 * 4096, start + 3 * 4096]);
}
