//! Both ends of a migration as threads of one process: the stream and links are queues of bytes
//! that a test can cut; workers are threads in the place of processes.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "what is not there is to stop the test"
)]
#![allow(
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    reason = "each test uses a part"
)]

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use rxl_migrate::fake::WIRING;
use rxl_migrate::fake::{
    FakeDomain, FakePages, Host, HvmSpec, P2mKind, PvSpec, fill_pages, put_pages,
};
use rxl_migrate::hypervisor::{PagePiece, PageSlot, StreamIn, StreamOut};
use rxl_migrate::source::workers::{
    Confirmed, Employer, News, Reply, Request, WorkerId, Workers, work,
};
use rxl_migrate::source::{Pass, Reducing};
use rxl_migrate::stream::link::{Offer, Secret};
use rxl_migrate::stream::reduced::Reduce;
use rxl_migrate::target::links::{self, Answer, Ask, LinkIn, Links, Need, Owner};

/// Frames of a host that has room for any guest here.
pub const HOST_FRAMES: u64 = 8192;

/// A guest that runs, of either kind.
pub fn guest(seed: u64) -> FakeDomain {
    let host = Host::new(HOST_FRAMES, seed);
    if seed.is_multiple_of(2) {
        let guest = HvmSpec { pages: 5000, seed }.build(&host);
        host.run_guests(7);
        return guest;
    }
    let p2m = if seed % 4 == 1 { P2mKind::Linear } else { P2mKind::Tree };
    let (one_hole_in, long_tail) = (20, false);
    let (vcpus, processes) = (3, 3);
    let spec = PvSpec { pages: 4000, one_hole_in, p2m, long_tail, vcpus, processes, seed };
    let guest = spec.build(&host);
    host.run_guests(50);
    guest
}

/// Bytes from one thread to another.
#[derive(Clone)]
pub struct Pipe(Arc<(Mutex<Bytes>, Condvar)>);

struct Bytes {
    queue: VecDeque<u8>,
    room: usize,
    /// Bytes that still get through; after them it is broken for both ends.
    left: Option<usize>,
    closed: bool,
}

impl Pipe {
    /// Room for so many bytes, and broken after so many.
    pub fn new(room: usize, breaks_after: Option<usize>) -> Pipe {
        let bytes = Bytes { queue: VecDeque::new(), room, left: breaks_after, closed: false };
        Pipe(Arc::new((Mutex::new(bytes), Condvar::new())))
    }

    pub fn close(&self) {
        self.0.0.lock().unwrap().closed = true;
        self.0.1.notify_all();
    }

    pub fn is_readable(&self) -> bool {
        let bytes = self.0.0.lock().unwrap();
        bytes.closed || !bytes.queue.is_empty()
    }

    /// Whether nothing is on its way.
    fn is_empty(&self) -> bool {
        self.0.0.lock().unwrap().queue.is_empty()
    }

    fn write(&self, mut from: &[u8]) -> io::Result<()> {
        let (bytes, changed) = &*self.0;
        let mut bytes = bytes.lock().unwrap();
        while !from.is_empty() {
            if bytes.closed {
                return Err(ErrorKind::BrokenPipe.into());
            }
            if bytes.left == Some(0) {
                bytes.closed = true;
                bytes.queue.clear();
                changed.notify_all();
                return Err(ErrorKind::BrokenPipe.into());
            }
            let room = bytes.room - bytes.queue.len();
            if room == 0 {
                bytes = changed.wait(bytes).unwrap();
                continue;
            }
            let count = from.len().min(room).min(bytes.left.unwrap_or(usize::MAX));
            let (now, later) = from.split_at(count);
            bytes.queue.extend(now);
            bytes.left = bytes.left.map(|left| left - count);
            from = later;
            changed.notify_all();
        }
        Ok(())
    }

    fn read(&self, into: &mut [u8]) -> io::Result<()> {
        let (bytes, changed) = &*self.0;
        let mut bytes = bytes.lock().unwrap();
        while bytes.queue.len() < into.len() && !bytes.closed && bytes.queue.len() < bytes.room {
            bytes = changed.wait(bytes).unwrap();
        }
        let count = into.len().min(bytes.queue.len());
        let (now, rest) = into.split_at_mut(count);
        now.iter_mut().zip(bytes.queue.drain(..count)).for_each(|(to, byte)| *to = byte);
        let closed = bytes.closed;
        changed.notify_all();
        drop(bytes);
        match rest {
            [] => Ok(()),
            _ if closed => Err(ErrorKind::UnexpectedEof.into()),
            rest => self.read(rest),
        }
    }
}

impl StreamOut<FakePages> for Pipe {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        put_pages(head, pieces, |bytes| self.write(bytes))
    }
}

impl StreamIn<FakePages> for Pipe {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.read(buf)
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        fill_pages(pages, slots, |page| self.read(page))
    }
}

/// A link: pages one way, confirmations the other.
#[derive(Clone)]
pub struct Link {
    pub data: Pipe,
    confirmed: Arc<(Mutex<u64>, Condvar)>,
}

impl Link {
    pub fn new(breaks_after: Option<usize>) -> Link {
        Link { data: Pipe::new(64 << 10, breaks_after), confirmed: Arc::default() }
    }
}

impl StreamOut<FakePages> for Link {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        self.data.write_pages(head, pieces)
    }
}

impl Confirmed for Link {
    fn confirmed(&mut self) -> io::Result<u64> {
        Ok(*self.confirmed.0.lock().unwrap())
    }

    fn wait_confirmed(&mut self, records: u64) -> io::Result<()> {
        let mut confirmed = self.confirmed.0.lock().unwrap();
        while *confirmed < records {
            if self.data.0.0.lock().unwrap().closed {
                return Err(ErrorKind::ConnectionReset.into());
            }
            let wait = Duration::from_millis(5);
            confirmed = self.confirmed.1.wait_timeout(confirmed, wait).unwrap().0;
        }
        Ok(())
    }
}

impl StreamIn<FakePages> for Link {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.data.read_exact(buf)
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        self.data.read_pages(pages, slots)
    }
}

impl LinkIn<FakePages> for Link {
    fn confirm(&mut self, records: u64) -> io::Result<()> {
        *self.confirmed.0.lock().unwrap() = records;
        self.confirmed.1.notify_all();
        Ok(())
    }
}

/// A stream that several threads write, a batch at a time.
#[derive(Clone)]
pub struct Shared<O>(pub Arc<Mutex<O>>);

impl<O: StreamOut<FakePages>> StreamOut<FakePages> for Shared<O> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().write_all(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        self.0.lock().unwrap().write_pages(head, pieces)
    }
}

impl<O> Confirmed for Shared<O> {
    fn confirmed(&mut self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn wait_confirmed(&mut self, _records: u64) -> io::Result<()> {
        Ok(())
    }
}

enum Said {
    Reply(WorkerId, Reply),
    Ended(WorkerId, String),
    Joined(u8),
}

/// The sender's workers.
pub struct Senders {
    domain: FakeDomain,
    pub offer: Option<Offer>,
    /// What is offered to be left out.
    pub reduce: Reduce,
    /// There is no news until it has been asked for so often; the next time it is waited for.
    pub late: Option<u32>,
    /// Whether the last pass has begun.
    in_last_pass: bool,
    links: BTreeMap<u8, Link>,
    requests: BTreeMap<WorkerId, (Sender<Request>, Option<Link>)>,
    threads: Vec<JoinHandle<()>>,
    said: (Sender<Said>, Receiver<Said>),
    started: VecDeque<News>,
    next: WorkerId,
}

struct SendingThread {
    id: WorkerId,
    requests: Receiver<Request>,
    said: Sender<Said>,
    /// It leaves after so many requests, with the last one unanswered.
    leaves_after: Option<u32>,
}

impl<O> Employer<O> for SendingThread {
    fn next(&mut self, _way: &mut O) -> io::Result<Option<Request>> {
        let request = self.requests.recv().ok();
        if let Some(left) = &mut self.leaves_after {
            *left = left.checked_sub(1).ok_or(ErrorKind::Interrupted)?;
        }
        Ok(request)
    }

    /// Who is to leave takes one request at a time.
    fn next_at_hand(&mut self) -> io::Result<Option<Request>> {
        Ok(if self.leaves_after.is_some() { None } else { self.requests.try_recv().ok() })
    }

    fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        let said = Said::Reply(self.id, reply.clone());
        self.said.send(said).map_err(|_| ErrorKind::BrokenPipe.into())
    }
}

impl Senders {
    pub fn new(domain: &FakeDomain) -> Senders {
        Senders {
            domain: domain.clone(),
            offer: None,
            reduce: Reduce::ALL.or(Reduce::ALWAYS),
            late: None,
            in_last_pass: false,
            links: BTreeMap::new(),
            requests: BTreeMap::new(),
            threads: Vec::new(),
            said: channel(),
            started: VecDeque::new(),
            next: 0,
        }
    }

    /// Adds a worker that sends to `out`.
    pub fn employ<O>(&mut self, mut out: O, link: Option<u8>, leaves_after: Option<u32>)
    where
        O: StreamOut<FakePages> + Confirmed + Send + Clone + 'static,
    {
        let (sender, requests) = channel();
        let id = self.next;
        self.next += 1;
        let (domain, said) = (self.domain.clone(), self.said.0.clone());
        // Nothing is left out of the stream.
        let offer = self.offer.as_ref().filter(|_| link.is_some());
        let agreed = offer.map(|offer| offer.agreed(offer.known())).unwrap_or_default();
        let mut worker = SendingThread { id, requests, said, leaves_after };
        self.threads.push(thread::spawn(move || {
            let reducing = Reducing::timeless(agreed);
            let ended = work(&domain, &mut out, &mut worker, reducing);
            let why = ended.err().map_or("no reason".into(), |error| error.chain());
            let _ = worker.said.send(Said::Ended(id, why));
        }));
        let way = link.and_then(|link| self.links.get(&link).cloned());
        self.requests.insert(id, (sender, way));
        self.started.push_back(News::Joined(id, link));
    }

    /// Offers these links. What comes back lets the receiver's side join.
    pub fn offer(&mut self, links: &[Link]) -> impl Fn(u8) + Send + 'static + use<> {
        let count = u8::try_from(links.len()).unwrap();
        let mut offer = Offer::new(count, Secret::new([5; 32]), Vec::new());
        offer.reduce = self.reduce;
        self.offer = Some(offer);
        self.links = (0..).zip(links.iter().cloned()).collect();
        let said = self.said.0.clone();
        move |link| {
            let _ = said.send(Said::Joined(link));
        }
    }

    fn understand(&mut self, said: Said) -> Option<News> {
        match said {
            Said::Reply(id, reply) => {
                self.requests.contains_key(&id).then_some(News::Reply(id, reply))
            }
            Said::Ended(id, why) => self.requests.contains_key(&id).then_some(News::Ended(id, why)),
            Said::Joined(link) => {
                let way = self.links.get(&link).unwrap().clone();
                self.employ(way, Some(link), None);
                self.started.pop_back()
            }
        }
    }
}

impl Workers for Senders {
    fn offer(&self) -> Option<Offer> {
        self.offer.clone()
    }

    fn submit(&mut self, worker: WorkerId, request: &Request) -> io::Result<()> {
        let is_last = matches!(request, Request::Batch { pass: Pass { last: true, .. }, .. });
        if is_last && !std::mem::replace(&mut self.in_last_pass, true) {
            // The guest would have to wait for it.
            let empty = self.links.values().all(|link| link.data.is_empty());
            assert!(empty, "links still carry earlier passes when the guest has been suspended");
        }
        let (requests, _) = self.requests.get(&worker).unwrap();
        requests.send(request.clone()).map_err(|_| ErrorKind::BrokenPipe.into())
    }

    fn news(&mut self, mut wait: bool) -> io::Result<Option<News>> {
        match self.late.as_mut().map(|polls| polls.checked_sub(1).map(|left| *polls = left)) {
            Some(Some(())) => return Ok(None),
            Some(None) => wait = self.late.take().is_some(),
            None => {}
        }
        loop {
            if let Some(news) = self.started.pop_front() {
                return Ok(Some(news));
            }
            let said = if wait { self.said.1.recv().ok() } else { self.said.1.try_recv().ok() };
            let Some(said) = said else { return Ok(None) };
            if let Some(news) = self.understand(said) {
                return Ok(Some(news));
            }
        }
    }

    fn dismiss(&mut self, worker: WorkerId) {
        if let Some((_, Some(link))) = self.requests.remove(&worker) {
            link.data.close();
        }
    }
}

impl Drop for Senders {
    fn drop(&mut self) {
        for (_, (_, link)) in std::mem::take(&mut self.requests) {
            link.inspect(|link| link.data.close());
        }
        for thread in self.threads.drain(..) {
            assert!(thread.join().is_ok() || thread::panicking());
        }
    }
}

/// The receiver's workers.
pub struct Receivers {
    domain: FakeDomain,
    stream: Pipe,
    links: Vec<Link>,
    joins: Box<dyn Fn(u8) + Send>,
    answers: BTreeMap<u8, Sender<Answer>>,
    threads: BTreeMap<u8, JoinHandle<()>>,
    asks: Sender<(u8, Need)>,
    asked: Receiver<(u8, Need)>,
}

struct ReceivingThread {
    link: u8,
    asked: Sender<(u8, Need)>,
    answers: Receiver<Answer>,
}

impl Owner for ReceivingThread {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        let need = Need::Ask(self.link, ask.clone());
        self.asked.send((self.link, need)).map_err(|_| io::Error::from(ErrorKind::BrokenPipe))?;
        self.answers.recv().map_err(|_| ErrorKind::UnexpectedEof.into())
    }
}

impl Receivers {
    pub fn new(
        domain: &FakeDomain,
        stream: &Pipe,
        links: &[Link],
        joins: impl Fn(u8) + Send + 'static,
    ) -> Receivers {
        let (asks, asked) = channel();
        Receivers {
            domain: domain.clone(),
            stream: stream.clone(),
            links: links.to_vec(),
            joins: Box::new(joins),
            answers: BTreeMap::new(),
            threads: BTreeMap::new(),
            asks,
            asked,
        }
    }
}

impl Links for Receivers {
    fn open(&mut self, offer: &Offer) {
        assert_eq!(usize::from(offer.links), self.links.len());
        for (link, mut way) in (0..).zip(self.links.iter().cloned()) {
            let (sender, answers) = channel();
            let (domain, asked) = (self.domain.clone(), self.asks.clone());
            let agreed = offer.agreed(offer.known());
            let mut worker = ReceivingThread { link, asked, answers };
            self.answers.insert(link, sender);
            let thread = thread::spawn(move || {
                let ended = links::work(&domain, &mut way, &mut worker, agreed);
                way.data.close();
                let why = ended.err().map_or("the end".into(), |error| error.chain());
                let _ = worker.asked.send((link, Need::Ended(link, why)));
            });
            self.threads.insert(link, thread);
            (self.joins)(link);
        }
    }

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        loop {
            if stream && self.stream.is_readable() {
                return Ok(Need::Stream);
            }
            match self.asked.recv_timeout(Duration::from_millis(1)) {
                Ok((link, need)) if self.answers.contains_key(&link) => return Ok(need),
                _ => {}
            }
        }
    }

    fn answer(&mut self, link: u8, answer: &Answer) -> io::Result<()> {
        let answers = self.answers.get(&link).ok_or(ErrorKind::NotFound)?;
        answers.send(answer.clone()).map_err(|_| ErrorKind::BrokenPipe.into())
    }

    fn dismiss(&mut self, link: u8) {
        self.answers.remove(&link);
        if let Some(thread) = self.threads.remove(&link) {
            self.links[usize::from(link)].data.close();
            assert!(thread.join().is_ok());
        }
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        let links: Vec<u8> = self.threads.keys().copied().collect();
        links.into_iter().for_each(|link| self.dismiss(link));
    }
}
