//! Workers that send, as the process that saves sees them: each runs the engine's own
//! [`rxl_migrate::source::workers::work`], as a coroutine. An input says who is done when, which
//! links come in, break or lose their worker, and what the receiver confirms.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::rc::Rc;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use rxl_migrate::Error;
use rxl_migrate::fake::{FakeDomain, FakePages, Wire};
use rxl_migrate::hypervisor::{PagePiece, StreamOut};
use rxl_migrate::source::Reducing;
use rxl_migrate::source::workers::{
    Confirmed, Employer, MESSAGE_BYTES_MAX, News, Reply, Request, WorkerId, Workers, work,
};
use rxl_migrate::stream::link::{Confirmations, Offer, Secret};
use rxl_migrate::stream::reduced::Agreed;

use crate::AGREED;
use crate::input::Owned;
use crate::{assert_told, passed_on};

/// Bytes of a worker's stack.
const STACK_BYTES: usize = 1 << 20;
/// Requests that a worker may have: its socket has room for so many of the longest.
const REQUESTS_MAX: usize = 8;
/// Bytes of a link that arrive before it breaks, for each of a choice.
const BREAK_BYTES: usize = 600;

/// What the workers are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// So many send to the stream.
    pub(crate) on_stream: u8,
    /// So many links are offered.
    pub(crate) links: u8,
    /// The receiver confirms what it has, and nothing else.
    pub(crate) honest: bool,
}

/// What the input says of workers.
type Choices = Rc<RefCell<Owned>>;

/// What is sent, by anybody.
#[derive(Clone, Debug, Default)]
pub(crate) struct Out(pub(crate) Rc<RefCell<Wire>>);

impl StreamOut<FakePages> for Out {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.borrow_mut().write_all(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        self.0.borrow_mut().write_pages(head, pieces)
    }
}

impl Confirmed for Out {
    fn confirmed(&mut self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn wait_confirmed(&mut self, _records: u64) -> io::Result<()> {
        Ok(())
    }
}

/// A link, and what the receiver says on it.
struct Link {
    out: Out,
    /// `Some` if the receiver may say anything.
    says: Option<Choices>,
    heard: Confirmations,
    confirmed: u64,
    /// What has arrived for certain.
    arrived: Rc<Cell<usize>>,
}

impl StreamOut<FakePages> for Link {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        self.out.write_pages(head, pieces)
    }
}

impl Confirmed for Link {
    fn confirmed(&mut self) -> io::Result<u64> {
        let Some(says) = &self.says else { return Ok(self.confirmed) };
        says.borrow_mut().take(|input| match input.u8() {
            255 => Err(ErrorKind::ConnectionReset.into()),
            count => {
                self.heard.take(input.bytes(count.into()));
                Ok(self.heard.records())
            }
        })
    }

    /// An honest receiver has all by now, if the link holds.
    fn wait_confirmed(&mut self, records: u64) -> io::Result<()> {
        if self.says.is_none() {
            let wire = self.out.0.borrow();
            let is_broken = wire.breaks_at.is_some_and(|limit| wire.bytes.len() >= limit);
            if is_broken {
                return Err(ErrorKind::ConnectionReset.into());
            }
            self.confirmed = records;
            self.arrived.set(wire.bytes.len());
            return Ok(());
        }
        while self.confirmed()? < records {
            if self.says.as_ref().is_none_or(|says| says.borrow().is_empty()) {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }
}

/// A worker's end of its socket: it is left whenever it wants a request.
struct Socket<'a> {
    yielder: &'a Yielder<Option<Request>, Option<Reply>>,
    reply: Cell<Option<Reply>>,
}

impl<O> Employer<O> for Socket<'_> {
    fn next(&mut self, _way: &mut O) -> io::Result<Option<Request>> {
        Ok(self.yielder.suspend(self.reply.take()))
    }

    fn next_at_hand(&mut self) -> io::Result<Option<Request>> {
        Ok(None)
    }

    fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        self.reply.set(Some(reply.clone()));
        Ok(())
    }
}

type Running = Coroutine<Option<Request>, Option<Reply>, String, DefaultStack>;

/// One worker.
struct Worker {
    running: Running,
    requests: VecDeque<Request>,
    /// Its link, to be broken, and what has arrived of it.
    link: Option<(Out, Rc<Cell<usize>>)>,
}

impl Worker {
    fn start<O>(
        domain: &FakeDomain,
        mut out: O,
        link: Option<(Out, Rc<Cell<usize>>)>,
    ) -> Result<Worker, String>
    where
        O: StreamOut<FakePages> + Confirmed + 'static,
    {
        let domain = domain.clone();
        // Nothing is left out of the stream.
        let agreed = if link.is_some() { AGREED } else { Agreed::default() };
        let stack = DefaultStack::new(STACK_BYTES).expect("a stack");
        let running = Coroutine::with_stack(stack, move |yielder: &Yielder<_, _>, _| {
            let mut socket = Socket { yielder, reply: Cell::default() };
            let reducing = Reducing::timeless(agreed);
            match work(&domain, &mut out, &mut socket, reducing) {
                Ok(()) => String::new(),
                Err(error) => {
                    assert!(!matches!(error, Error::Machine { .. } | Error::Format(_)), "{error}");
                    assert_told(&error);
                    error.chain()
                }
            }
        });
        let mut worker = Worker { running, requests: VecDeque::new(), link };
        match worker.resume(None) {
            Ok(_) => Ok(worker),
            Err(why) => Err(why),
        }
    }

    fn resume(&mut self, request: Option<Request>) -> Result<Option<Reply>, String> {
        match self.running.resume(request) {
            CoroutineResult::Yield(reply) => Ok(reply),
            CoroutineResult::Return(why) => Err(why),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.running.done() && !std::thread::panicking() {
            let _ = self.resume(None);
        }
    }
}

/// All of them.
pub(crate) struct Senders {
    domain: FakeDomain,
    plan: Plan,
    stream: Out,
    /// The receiver has been told of links.
    offered: Cell<bool>,
    /// What has been sent over each link that has come in.
    pub(crate) links: Rc<RefCell<Vec<Out>>>,
    choices: Choices,
    workers: BTreeMap<WorkerId, Worker>,
    next: WorkerId,
    news: VecDeque<News>,
    /// Workers that have ended, of which there is no news yet.
    gone: VecDeque<WorkerId>,
}

impl Senders {
    pub(crate) fn new(domain: &FakeDomain, plan: Plan, stream: &Out, choices: &[u8]) -> Senders {
        let mut senders = Senders {
            domain: domain.clone(),
            plan,
            stream: stream.clone(),
            offered: Cell::new(false),
            links: Rc::default(),
            choices: Rc::new(RefCell::new(Owned::new(choices))),
            workers: BTreeMap::new(),
            next: 0,
            news: VecDeque::new(),
            gone: VecDeque::new(),
        };
        for _ in 0..plan.on_stream {
            let worker = Worker::start(domain, senders.stream.clone(), None);
            senders.employ(worker, None);
        }
        senders
    }

    fn employ(&mut self, worker: Result<Worker, String>, link: Option<u8>) {
        let id = self.next;
        self.next += 1;
        self.news.push_back(News::Joined(id, link));
        match worker {
            Ok(worker) => drop(self.workers.insert(id, worker)),
            Err(why) => self.news.push_back(News::Ended(id, why)),
        }
    }

    /// A link comes in, if one may still: whether one has.
    fn join(&mut self) -> bool {
        let link = u8::try_from(self.links.borrow().len()).unwrap_or(u8::MAX);
        if link >= self.plan.links || !self.offered.get() {
            return false;
        }
        let out = Out::default();
        self.links.borrow_mut().push(out.clone());
        let says = (!self.plan.honest).then(|| Rc::clone(&self.choices));
        let (heard, arrived) = (Confirmations::default(), Rc::<Cell<usize>>::default());
        let (to, confirmed) = (out.clone(), 0);
        let way = Link { out: to, says, heard, confirmed, arrived: Rc::clone(&arrived) };
        let worker = Worker::start(&self.domain, way, Some((out, arrived)));
        self.employ(worker, Some(link));
        true
    }

    /// One of `workers`, by `choice`.
    fn pick(workers: &[WorkerId], choice: u8) -> Option<WorkerId> {
        workers.get(usize::from(choice).checked_rem(workers.len())?).copied()
    }

    /// A worker does its oldest request.
    fn step(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(request) = worker.requests.pop_front() else { return };
        let news = match worker.resume(Some(request)) {
            Ok(reply) => {
                let reply = reply.expect("who is asked for more has answered");
                News::Reply(id, passed_on(&reply, MESSAGE_BYTES_MAX))
            }
            Err(why) => {
                self.workers.remove(&id);
                News::Ended(id, why)
            }
        };
        self.news.push_back(news);
    }

    /// Something happens, as the input says. `false`: nothing, for now.
    fn happens(&mut self, wait: bool) -> bool {
        if let Some(id) = wait.then(|| self.gone.pop_front()).flatten() {
            self.news.push_back(News::Ended(id, "killed".into()));
            return true;
        }
        let all: Vec<WorkerId> = self.workers.keys().copied().collect();
        let has_work = |id: &WorkerId| self.workers.get(id).is_some_and(|w| !w.requests.is_empty());
        let busy: Vec<WorkerId> = all.iter().copied().filter(has_work).collect();
        let (kind, which, more) = self.choices.borrow_mut().take(|input| {
            let byte = input.u8();
            let more = if byte & 7 == 6 { input.u8() } else { 0 };
            (byte & 7, byte >> 3, more)
        });
        match kind {
            0 if !wait => return false,
            4 if self.join() => return true,
            5 => {
                if let Some(id) = Self::pick(&all, which) {
                    self.workers.remove(&id);
                    self.gone.push_back(id);
                    return false;
                }
            }
            6 => {
                let link = Self::pick(&all, which).and_then(|id| self.workers.get(&id));
                if let Some((out, arrived)) = link.and_then(|worker| worker.link.as_ref()) {
                    // What was on its way is lost with it.
                    let mut wire = out.0.borrow_mut();
                    let room = arrived.get() + BREAK_BYTES * usize::from(more);
                    let room = wire.breaks_at.unwrap_or(room).min(room);
                    wire.breaks_at = Some(room);
                    wire.bytes.truncate(room);
                }
            }
            _ => {}
        }
        if let Some(id) = Self::pick(&busy, which) {
            self.step(id);
            return true;
        }
        // Nobody would ever wake up.
        assert!(!wait || self.join(), "it waits, and nobody has anything to do");
        false
    }
}

impl Workers for Senders {
    fn offer(&self) -> Option<Offer> {
        let links = self.plan.links;
        self.offered.set(true);
        (links > 0).then(|| Offer::new(links, Secret::new([7; 32]), Vec::new()))
    }

    fn submit(&mut self, worker: WorkerId, request: &Request) -> io::Result<()> {
        let worker = self.workers.get_mut(&worker).ok_or(ErrorKind::NotFound)?;
        worker.requests.push_back(passed_on(request, MESSAGE_BYTES_MAX));
        assert!(worker.requests.len() <= REQUESTS_MAX, "there is no room for a request");
        Ok(())
    }

    fn news(&mut self, wait: bool) -> io::Result<Option<News>> {
        while self.news.is_empty() && (self.happens(wait) || wait) {}
        Ok(self.news.pop_front())
    }

    fn dismiss(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
        self.gone.retain(|gone| *gone != worker);
        self.news.retain(|news| match news {
            News::Joined(of, _) | News::Reply(of, _) | News::Ended(of, _) => *of != worker,
        });
    }
}
