//! A guest that several workers send arrives as it was, in whatever order they are done.

#![allow(clippy::unwrap_used, reason = "what is not there is to stop the test")]

use std::io::{self, ErrorKind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rxl_migrate::error::Error;
use rxl_migrate::fake::{
    FakeDomain, FakePages, FakeToolstack, Host, HvmSpec, P2mKind, PvSpec, Wire, compare,
};
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{Domain, PagePiece, StreamOut};
use rxl_migrate::source::workers::{Employer, Reply, Request, Workers, work};
use rxl_migrate::source::{self, save_with};
use rxl_migrate::target::{Options, restore};

const LIVE: source::Options = source::Options { live: true, verify: false };
const WIRING: Options = Options {
    store_evtchn: 17,
    store_domid: DomId(0),
    console_evtchn: 18,
    console_domid: DomId(3),
};
const HOST_FRAMES: u64 = 8192;

/// A stream that several threads write, a batch at a time.
#[derive(Clone, Default)]
struct SharedWire(Arc<Mutex<Wire>>);

impl StreamOut<FakePages> for SharedWire {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().write_all(bytes)
    }

    fn write_pages(
        &mut self,
        head: &[u8],
        pages: &FakePages,
        pieces: &[PagePiece<'_>],
    ) -> io::Result<()> {
        self.0.lock().unwrap().write_pages(head, pages, pieces)
    }
}

/// Threads in the place of processes, which end when their requests do.
struct Crew {
    requests: Option<Sender<Request>>,
    replies: Receiver<Reply>,
    threads: Vec<JoinHandle<()>>,
}

/// One of them. It leaves after so many requests, with the last one unanswered.
struct Worker {
    requests: Arc<Mutex<Receiver<Request>>>,
    replies: Sender<Reply>,
    leaves_after: Option<u32>,
}

impl Crew {
    fn start(count: usize, domain: &FakeDomain, out: &SharedWire, leaves: Option<u32>) -> Crew {
        let (sender, requests) = channel();
        let requests = Arc::new(Mutex::new(requests));
        let (results, replies) = channel();
        let threads = (0..count).map(|_| {
            let (domain, mut out) = (domain.clone(), out.clone());
            let requests = Arc::clone(&requests);
            let mut worker = Worker { requests, replies: results.clone(), leaves_after: leaves };
            thread::spawn(move || {
                let done = work(&domain, &mut out, &mut worker);
                assert!(done.is_ok() || leaves.is_some(), "{done:?}");
            })
        });
        Crew { requests: Some(sender), threads: threads.collect(), replies }
    }
}

impl Workers for Crew {
    fn depth(&self) -> usize {
        2 * self.threads.len()
    }

    fn submit(&mut self, request: &Request) -> io::Result<()> {
        let sender = self.requests.as_ref().unwrap();
        sender.send(request.clone()).map_err(|_| ErrorKind::BrokenPipe.into())
    }

    fn collect(&mut self) -> io::Result<Reply> {
        self.replies.recv().map_err(|_| ErrorKind::UnexpectedEof.into())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.requests = None;
        for thread in self.threads.drain(..) {
            assert!(thread.join().is_ok() || thread::panicking());
        }
    }
}

impl Employer for Worker {
    fn next(&mut self) -> io::Result<Option<Request>> {
        let request = self.requests.lock().unwrap().recv().ok();
        if let Some(left) = &mut self.leaves_after {
            *left = left.checked_sub(1).ok_or(ErrorKind::Interrupted)?;
        }
        Ok(request)
    }

    fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        self.replies.send(reply.clone()).map_err(|_| ErrorKind::BrokenPipe.into())
    }
}

/// Moves a guest that writes, with so many workers; says in what the copy differs.
fn moved(source: &FakeDomain, count: usize, seed: u64) -> Vec<String> {
    let mut out = SharedWire::default();
    let workers = Box::new(Crew::start(count, source, &out, None));
    let mut toolstack = FakeToolstack::new(source);
    let saved = save_with(source, &mut out, &mut toolstack, Some(workers), &LIVE).unwrap();
    let mut wire = out.0.lock().unwrap().clone();
    assert_eq!(saved.bytes, wire.bytes.len() as u64);
    let info = source.info().unwrap();
    let host = Host::new(HOST_FRAMES, seed ^ 0x5eed);
    let target = host.create(info.hvm, info.total_pages + 600, info.max_vcpu_id + 1);
    let outcome = restore(&target, &mut wire, &mut FakeToolstack::new(&target), &WIRING).unwrap();
    compare(source, &target, &WIRING, &outcome)
}

#[test]
fn a_guest_that_writes_arrives_as_it_was_when_it_was_suspended() {
    for seed in 0..4 {
        for count in [1, 2, 5] {
            let host = Host::new(HOST_FRAMES, seed);
            let source = HvmSpec { pages: 6000, seed }.build(&host);
            host.run_guests(7);
            assert_eq!(moved(&source, count, seed), [""; 0], "HVM, {count} workers, {seed}");

            let host = Host::new(HOST_FRAMES, seed);
            let p2m = if seed % 2 == 0 { P2mKind::Linear } else { P2mKind::Tree };
            let spec = PvSpec {
                pages: 5000,
                one_hole_in: 20,
                p2m,
                long_tail: false,
                vcpus: 3,
                processes: 3,
                seed,
            };
            let source = spec.build(&host);
            host.run_guests(50);
            assert_eq!(moved(&source, count, seed), [""; 0], "PV, {count} workers, {seed}");
        }
    }
}

/// What a worker cannot send, and workers that are gone, end the save; the guest is as it was.
#[test]
fn a_worker_that_fails_ends_the_save_and_log_dirty() {
    let source = HvmSpec { pages: 6000, seed: 1 }.build(&Host::new(HOST_FRAMES, 1));
    for leaves in [Some(0), Some(1), None] {
        let mut out = SharedWire::default();
        out.0.lock().unwrap().breaks_at = leaves.is_none().then_some(1 << 20);
        let workers = Box::new(Crew::start(2, &source, &out, leaves));
        let mut toolstack = FakeToolstack::new(&source);
        let saved = save_with(&source, &mut out, &mut toolstack, Some(workers), &LIVE);
        match (saved, leaves) {
            (Err(Error::Worker { .. }), Some(_)) => {}
            (Err(Error::Batch(why)), None) => assert!(why.contains("broken pipe"), "{why}"),
            other => panic!("{other:?}"),
        }
        assert!(!source.is_logging() && source.is_running());
    }
}
