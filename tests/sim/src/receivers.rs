//! The restore helper's workers: the product's code for them, in processes of the simulation.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};

use rxl_migrate::error::Result;
use rxl_migrate::fake::FakeDomain;
use rxl_migrate::stream::link::Offer;
use rxl_migrate::target::links::{Answer, Ask, Links, Need, Owner, work};

use crate::door::{known, open_link};
use crate::helper::Stepped;
use crate::link::{Heartbeat, ReceivingLink};
use crate::pipe::PipeId;
use crate::process::Process;
use crate::worker::{Socket, Worker};
use crate::world::{Cond, Role};

/// The workers of a restore helper. Dropping it ends them.
pub(crate) struct Openers<'a, 'b> {
    process: &'a Process<'b>,
    domain: FakeDomain,
    stream: PipeId,
    workers: BTreeMap<u8, Worker<'a, 'b>>,
    needs: VecDeque<Need>,
}

impl<'a, 'b> Openers<'a, 'b> {
    pub(crate) fn new(process: &'a Process<'b>, domain: &FakeDomain, stream: PipeId) -> Self {
        let (workers, needs) = (BTreeMap::new(), VecDeque::new());
        Openers { process, domain: domain.clone(), stream, workers, needs }
    }

    /// Waits, and notes what is needed. `stream`: for the stream, too, which comes last; without
    /// it, the end of the stream is an error.
    fn poll(&mut self, stream: bool) -> io::Result<()> {
        let on_stream = if stream { Cond::Readable(self.stream) } else { Cond::Over(self.stream) };
        self.process.wait([Cond::Sockets, on_stream, Cond::Never, Cond::Never]);
        let holds = |cond| self.process.holds(cond);
        let sockets = self.workers.iter().map(|(link, worker)| (*link, worker.socket.input));
        let ready: Vec<u8> = sockets
            .filter(|(_, socket)| holds(Cond::Readable(*socket)))
            .map(|(link, _)| link)
            .collect();
        let on_stream = holds(on_stream);
        ready.into_iter().try_for_each(|link| self.hear(link))?;
        match (stream, on_stream) {
            (true, true) => self.needs.push_back(Need::Stream),
            (false, true) if self.needs.is_empty() => return Err(ErrorKind::UnexpectedEof.into()),
            _ => {}
        }
        Ok(())
    }

    fn hear(&mut self, link: u8) -> io::Result<()> {
        let Some(worker) = self.workers.get(&link) else { return Ok(()) };
        self.needs.push_back(match worker.socket.receive::<Ask>(self.process)? {
            Some(ask) => Need::Ask(link, ask),
            None => {
                worker.reap();
                self.workers.remove(&link);
                Need::Ended(link, "the worker has ended".into())
            }
        });
        Ok(())
    }
}

impl Links for Openers<'_, '_> {
    fn open(&mut self, offer: &Offer) {
        for link in 0..offer.links {
            let domain = self.domain.clone();
            let worker = Worker::start(self.process, Role::RestoreWorker, &[], move |p, socket| {
                if let Err(error) = run(p, domain, socket) {
                    p.world().trace.say(|| format!("link {link} fails: {}", error.chain()));
                }
            });
            // A worker that is gone already is heard of later.
            let _ = worker.socket.send(self.process, &(offer, link));
            self.workers.insert(link, worker);
        }
    }

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        loop {
            // What was noted of the stream is not true any more.
            if !stream {
                self.needs.retain(|need| *need != Need::Stream);
            }
            if let Some(need) = self.needs.pop_front() {
                return Ok(need);
            }
            if !stream && self.workers.is_empty() {
                return Err(io::Error::other("all workers have ended"));
            }
            self.poll(stream)?;
        }
    }

    fn answer(&mut self, link: u8, answer: &Answer) -> io::Result<()> {
        let worker = self.workers.get(&link).ok_or(ErrorKind::NotFound)?;
        worker.socket.send(self.process, answer)
    }

    fn dismiss(&mut self, link: u8) {
        self.workers.remove(&link);
        self.needs.retain(|need| match need {
            Need::Ask(of, _) | Need::Ended(of, _) => *of != link,
            Need::Stream => true,
        });
    }
}

/// A worker's end of the socket.
struct Asking<'a, 'b> {
    socket: Socket,
    heartbeat: Heartbeat<'a, 'b>,
}

impl Owner for Asking<'_, '_> {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        self.socket.send(self.heartbeat.process, ask)?;
        self.heartbeat.wait_readable(self.socket.input)?;
        self.socket.receive(self.heartbeat.process)?.ok_or(ErrorKind::UnexpectedEof.into())
    }
}

/// What a worker does: opens the link that it is told, and places what comes over it.
fn run(process: &Process<'_>, domain: FakeDomain, socket: Socket) -> Result<()> {
    let failed = |source| rxl_migrate::Error::Worker { what: "opening a link", source };
    let told = socket.receive::<(Offer, u8)>(process).map_err(failed)?;
    let Some((offer, link)) = told else { return Ok(()) };
    let connection = open_link(process, &offer, link).map_err(failed)?;
    let plan = process.world().plan.ways.links.get(usize::from(link)).cloned();
    let hangs_at = plan.and_then(|plan| plan.hangs_at);
    let mut input = ReceivingLink::new(process, connection.there, connection.back, hangs_at);
    let mut owner = Asking { socket, heartbeat: input.heartbeat() };
    let agreed = offer.agreed(known(process, &offer));
    work(&Stepped::new(process, domain), &mut input, &mut owner, agreed)
}
