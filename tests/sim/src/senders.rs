//! The save helper's workers: the product's code for them, in processes of the simulation.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::time::Duration;

use rxl_migrate::fake::{FakeDomain, FakePages};
use rxl_migrate::hypervisor::StreamOut;
use rxl_migrate::source::Reducing;
use rxl_migrate::source::workers::{
    Confirmed, Employer, News, Reply, Request, WorkerId, Workers, work,
};
use rxl_migrate::stream::link::Offer;
use rxl_migrate::stream::reduced::Agreed;

use crate::door::Doorman;
use crate::helper::{Out, Stepped};
use crate::link::{SendingLink, Watch};
use crate::pipe::{End, PipeId};
use crate::plant::Plant;
use crate::process::Process;
use crate::worker::{Socket, Worker};
use crate::world::{Cond, Role};

/// How long to wait at most while a connection may have to be closed.
const TICK: u64 = 1_000;

/// The right to write to the stream, which one process has at a time: a lock that the kernel frees
/// when its holder ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn(usize);

impl Turn {
    fn new(process: &Process<'_>) -> Turn {
        let mut world = process.world();
        world.turns.push(None);
        Turn(world.turns.len() - 1)
    }

    pub(crate) fn take(self, process: &Process<'_>) -> io::Result<()> {
        process.step();
        while !process.holds(Cond::Free(self.0)) {
            if process.holds(Cond::Terminated) {
                return Err(ErrorKind::Interrupted.into());
            }
            process.wait([Cond::Free(self.0), Cond::Terminated, Cond::Never, Cond::Never]);
        }
        process.world().turns[self.0] = Some(process.id());
        Ok(())
    }

    pub(crate) fn give(self, process: &Process<'_>) {
        process.step();
        process.world().turns[self.0] = None;
    }
}

/// The workers of a save helper. Dropping it ends them.
pub(crate) struct Pool<'a, 'b> {
    process: &'a Process<'b>,
    domain: FakeDomain,
    turn: Turn,
    doorman: Option<Doorman<'a, 'b>>,
    workers: BTreeMap<WorkerId, Worker<'a, 'b>>,
    /// The number of the next one.
    next: WorkerId,
    news: VecDeque<News>,
}

impl<'a, 'b> Pool<'a, 'b> {
    /// Starts those that the plan has, if it has any.
    pub(crate) fn start(
        process: &'a Process<'b>,
        domain: &FakeDomain,
        stream: PipeId,
    ) -> Option<Pool<'a, 'b>> {
        let ways = process.world().plan.ways.clone();
        if !ways.any() {
            return None;
        }
        let links = ways.links.len() as u8;
        let doorman = (links > 0).then(|| Doorman::open(process, links));
        let (domain, turn) = (domain.clone(), Turn::new(process));
        let (workers, news) = (BTreeMap::new(), VecDeque::new());
        let mut pool = Pool { process, domain, turn, doorman, workers, next: 0, news };
        for _ in 0..ways.stream_workers {
            let domain = pool.domain.clone();
            let ends = [(stream, End::Write)];
            let worker = Worker::start(process, Role::SaveWorker, &ends, move |p, socket| {
                let employed = Employed { process: p, socket, watch: None };
                serve(domain, Out::shared(p, stream, turn), employed, Agreed::default());
            });
            pool.employ(worker, None);
        }
        Some(pool)
    }

    /// What the helper needs to write to the stream too.
    pub(crate) fn turn(&self) -> Turn {
        self.turn
    }

    fn employ(&mut self, worker: Worker<'a, 'b>, link: Option<u8>) {
        self.workers.insert(self.next, worker);
        self.news.push_back(News::Joined(self.next, link));
        self.next += 1;
    }

    /// Waits for anything, or only looks.
    fn poll(&mut self, wait: bool) -> io::Result<()> {
        let doors = self.doorman.as_ref().is_some_and(Doorman::is_open);
        if wait {
            let tick = self.process.world().now + TICK;
            let tick = if doors { Cond::At(tick) } else { Cond::Never };
            self.process.wait([Cond::Sockets, Cond::Terminated, tick, Cond::Never]);
            if self.process.holds(Cond::Terminated) {
                return Err(ErrorKind::Interrupted.into());
            }
        } else {
            self.process.step();
        }
        let ready: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(_, worker)| self.process.holds(Cond::Readable(worker.socket.input)))
            .map(|(id, _)| *id)
            .collect();
        if doors {
            self.let_in();
        }
        ready.into_iter().try_for_each(|worker| self.hear(worker))
    }

    /// Starts a worker for each link that has come.
    fn let_in(&mut self) {
        let come = self.doorman.as_mut().map(Doorman::attend).unwrap_or_default();
        for (link, agreed, there, back) in come {
            let domain = self.domain.clone();
            let ends = [(there, End::Write), (back, End::Read)];
            let worker = Worker::start(self.process, Role::SaveWorker, &ends, move |p, socket| {
                let link = SendingLink::new(p, there, back);
                let unwatched = p.world().plan.plant == Some(Plant::IdleLinkUnwatched);
                let watch = (!unwatched).then(|| link.watch());
                let employed = Employed { process: p, socket, watch };
                serve(domain, link, employed, agreed);
            });
            ends.into_iter().for_each(|(pipe, end)| self.process.close(pipe, end));
            self.employ(worker, Some(link));
        }
    }

    fn hear(&mut self, id: WorkerId) -> io::Result<()> {
        let Some(worker) = self.workers.get(&id) else { return Ok(()) };
        self.news.push_back(match worker.socket.receive::<Reply>(self.process)? {
            Some(reply) => News::Reply(id, reply),
            None => {
                worker.reap();
                self.workers.remove(&id);
                News::Ended(id, "the worker has ended".into())
            }
        });
        Ok(())
    }
}

impl Workers for Pool<'_, '_> {
    fn offer(&self) -> Option<Offer> {
        self.doorman.as_ref().map(|doorman| doorman.offer().clone())
    }

    fn submit(&mut self, worker: WorkerId, request: &Request) -> io::Result<()> {
        let worker = self.workers.get(&worker).ok_or(ErrorKind::NotFound)?;
        worker.socket.send(self.process, request)
    }

    fn news(&mut self, wait: bool) -> io::Result<Option<News>> {
        while self.news.is_empty() {
            self.poll(wait)?;
            if !wait {
                break;
            }
        }
        Ok(self.news.pop_front())
    }

    fn dismiss(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
        self.news.retain(|news| match news {
            News::Joined(of, _) | News::Reply(of, _) | News::Ended(of, _) => *of != worker,
        });
    }
}

/// A worker's end of the socket.
struct Employed<'a, 'b> {
    process: &'a Process<'b>,
    socket: Socket,
    /// Its link, if it has one.
    watch: Option<Watch<'a, 'b>>,
}

impl<O> Employer<O> for Employed<'_, '_> {
    fn next(&mut self, _way: &mut O) -> io::Result<Option<Request>> {
        if let Some(watch) = &self.watch {
            watch.wait_for(Cond::Readable(self.socket.input))?;
        }
        self.socket.receive(self.process)
    }

    fn next_at_hand(&mut self) -> io::Result<Option<Request>> {
        match self.process.holds(Cond::Readable(self.socket.input)) {
            true => self.socket.receive(self.process),
            false => Ok(None),
        }
    }

    fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        self.socket.send(self.process, reply)
    }
}

fn serve<O>(domain: FakeDomain, mut out: O, mut employed: Employed<'_, '_>, agreed: Agreed)
where
    O: StreamOut<FakePages> + Confirmed,
{
    let process = employed.process;
    let clock = Box::new(|| Duration::from_millis(process.world().now));
    let reducing = Reducing { agreed, clock, queued: Box::new(|| Duration::ZERO) };
    let domain = Stepped::new(process, domain);
    if let Err(error) = work(&domain, &mut out, &mut employed, reducing) {
        process.world().trace.say(|| format!("a worker fails: {}", error.chain()));
    }
}
