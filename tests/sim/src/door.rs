//! How links come about: a save helper listens, workers of a restore helper call.
//!
//! It is modelled on `toolstack`'s doorman; what is said at the door is the product's.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use rxl_migrate::stream::link::{
    HELLO_BYTES, LinkSet, Offer, Secret, TOKEN_BYTES, check_hello, hello, is_same,
};
use rxl_migrate::stream::reduced::{Agreed, Reduce};

use crate::pipe::{End, PipeId};
use crate::plant::Plant;
use crate::process::Process;
use crate::world::{Cond, ProcId, World};

/// How long anybody waits for a word at the door.
const HELLO_TIME: u64 = 5_000;

/// Where a save helper lets links in.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) owner: ProcId,
    port: u16,
    /// What is offered there.
    pub(crate) offer: Offer,
    /// Those that have called and have not been heard: where to write to, where to read from.
    pub(crate) calls: VecDeque<(PipeId, PipeId)>,
}

/// A link that has been opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection {
    pub(crate) link: u8,
    /// To the target.
    pub(crate) there: PipeId,
    /// To the source.
    pub(crate) back: PipeId,
}

impl World {
    /// Calls at the door `port` for link `link`. `None`: nobody listens there.
    fn call(&mut self, link: u8, port: u16) -> Option<Connection> {
        let index = self.doors.iter().position(|door| door.port == port)?;
        let [there, back] = self.plan.ways.links.get(usize::from(link))?.pipes();
        let (there, back) = (self.new_pipe(there), self.new_pipe(back));
        let connection = Connection { link, there, back };
        self.connections.push(connection);
        let door = &mut self.doors[index];
        door.calls.push_back((there, back));
        let owner = door.owner;
        for end in [(there, End::Write), (back, End::Read)] {
            self.pipe(end.0).open(end.1);
            self.proc(owner).ends.push(end);
        }
        Some(connection)
    }
}

/// Lets links in.
pub(crate) struct Doorman<'a, 'b> {
    process: &'a Process<'b>,
    offer: Offer,
    port: u16,
    pending: Vec<Pending>,
    taken: LinkSet,
}

/// A connection whose hello is not complete.
struct Pending {
    there: PipeId,
    back: PipeId,
    hello: Vec<u8>,
    until: u64,
}

impl<'a, 'b> Doorman<'a, 'b> {
    /// Opens a door for `links` links.
    pub(crate) fn open(process: &'a Process<'b>, links: u8) -> Doorman<'a, 'b> {
        let (port, secret) = {
            let mut world = process.world();
            let secret = world.rng.bytes(32).try_into().unwrap_or([0; 32]);
            // Not one that an earlier helper had.
            (4_000 + world.procs.len() as u16, secret)
        };
        let address = SocketAddr::from(([192, 0, 2, 1], port));
        let mut offer = Offer::new(links, Secret::new(secret), vec![address]);
        offer.reduce = process.world().plan.ways.reduce;
        Doorman::at(process, offer, port)
    }

    /// Opens the door `port` for what `offer` says.
    pub(crate) fn at(process: &'a Process<'b>, offer: Offer, port: u16) -> Doorman<'a, 'b> {
        let calls = VecDeque::new();
        let door = Door { owner: process.id(), port, offer: offer.clone(), calls };
        process.world().doors.push(door);
        Doorman { process, offer, port, pending: Vec::new(), taken: LinkSet::default() }
    }

    pub(crate) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Whether somebody may still come.
    pub(crate) fn is_open(&self) -> bool {
        !self.pending.is_empty() || self.taken.iter().count() < usize::from(self.offer.links)
    }

    /// Lets in who can be let in: each link's number, what holds for it, and its connection. Does
    /// not wait.
    pub(crate) fn attend(&mut self) -> Vec<(u8, Agreed, PipeId, PipeId)> {
        self.accept();
        let mut come = Vec::new();
        for mut pending in std::mem::take(&mut self.pending) {
            let now = self.process.world().now;
            match pending.read(self.process) {
                Ok(true) => come.extend(self.let_in(&pending)),
                Ok(false) if pending.until > now => self.pending.push(pending),
                Ok(false) | Err(_) => self.refuse(&pending),
            }
        }
        if !self.is_open() {
            self.process.world().doors.retain(|door| door.port != self.port);
        }
        come
    }

    fn accept(&mut self) {
        let calls = {
            let mut world = self.process.world();
            let door = world.doors.iter_mut().find(|door| door.port == self.port);
            door.map(|door| std::mem::take(&mut door.calls)).unwrap_or_default()
        };
        for (there, back) in calls {
            let mut world = self.process.world();
            let until = world.now + HELLO_TIME;
            world.proc(self.process.id()).sockets.push(back);
            self.pending.push(Pending { there, back, hello: Vec::new(), until });
        }
    }

    fn let_in(&mut self, pending: &Pending) -> Option<(u8, Agreed, PipeId, PipeId)> {
        let hello = pending.hello.as_slice().try_into().ok()?;
        let good = check_hello(&self.offer.secret, hello);
        let good = good.filter(|(link, _)| *link < self.offer.links && !self.taken.contains(*link));
        let welcome = good.map(|(link, _)| self.offer.secret.welcome_token(link));
        let sent = welcome.and_then(|welcome| {
            let mut world = self.process.world();
            let now = world.now;
            // Nothing has been sent on it before, so there is room for all of it.
            world.pipe(pending.there).write(&welcome, now)
        });
        match (good, sent) {
            (Some((link, reduce)), Some(Ok(TOKEN_BYTES))) => {
                self.taken.insert(link);
                self.forget(pending);
                let unasked = self.process.world().plan.plant == Some(Plant::ReducedUnasked);
                let reduce = if unasked { Reduce::ALL } else { reduce };
                Some((link, self.offer.agreed(reduce), pending.there, pending.back))
            }
            _ => {
                self.refuse(pending);
                None
            }
        }
    }

    fn forget(&self, pending: &Pending) {
        let mut world = self.process.world();
        world.proc(self.process.id()).sockets.retain(|pipe| *pipe != pending.back);
    }

    fn refuse(&self, pending: &Pending) {
        self.process.world().facts.coverage.count("links: a caller refused");
        self.forget(pending);
        self.process.close(pending.there, End::Write);
        self.process.close(pending.back, End::Read);
    }
}

impl Pending {
    /// Reads what has come of the hello. `true`: it is complete.
    fn read(&mut self, process: &Process<'_>) -> io::Result<bool> {
        let mut rest = vec![0; HELLO_BYTES - self.hello.len()];
        match process.try_read(self.back, &mut rest) {
            None => Ok(false),
            Some(Ok(0)) => Err(ErrorKind::UnexpectedEof.into()),
            Some(Ok(count)) => {
                self.hello.extend(rest.iter().take(count));
                Ok(self.hello.len() == HELLO_BYTES)
            }
            Some(Err(error)) => Err(error),
        }
    }
}

/// What a receiver can do without; an older one knows nothing of that.
pub(crate) fn known(process: &Process<'_>, offer: &Offer) -> Reduce {
    let older = process.world().plan.ways.older_receiver;
    if older { Reduce::NONE } else { offer.known() }
}

/// Opens link `link` to the sender, whose welcome is `expected` if anything is.
pub(crate) fn open_link(process: &Process<'_>, offer: &Offer, link: u8) -> io::Result<Connection> {
    let connection = call(process, offer, link)?;
    write_all(process, connection.back, &hello(&offer.secret, link, known(process, offer)))?;
    let until = process.world().now + HELLO_TIME;
    let mut welcome = Vec::new();
    while welcome.len() < TOKEN_BYTES {
        let mut rest = vec![0; TOKEN_BYTES - welcome.len()];
        match process.try_read(connection.there, &mut rest) {
            Some(Ok(0)) => return Err(ErrorKind::UnexpectedEof.into()),
            Some(Ok(count)) => welcome.extend(rest.iter().take(count)),
            Some(Err(error)) => return Err(error),
            None if process.holds(Cond::At(until)) => return Err(ErrorKind::TimedOut.into()),
            None => {
                let there = Cond::Readable(connection.there);
                process.wait([there, Cond::At(until), Cond::Never, Cond::Never]);
            }
        }
    }
    if is_same(&offer.secret.welcome_token(link), &welcome) {
        Ok(connection)
    } else {
        Err(ErrorKind::PermissionDenied.into())
    }
}

/// A connection to the sender that nothing has been said on.
pub(crate) fn call(process: &Process<'_>, offer: &Offer, link: u8) -> io::Result<Connection> {
    let plan = |process: &Process<'_>| {
        let world = process.world();
        let plan = world.plan.ways.links.get(usize::from(link));
        plan.and_then(|plan| Some((plan.opens_after?, plan.latency)))
    };
    if let Some((delay, latency)) = plan(process) {
        process.sleep(delay + 2 * latency);
    }
    if plan(process).is_none() {
        process.world().facts.coverage.count("links: one that never comes");
        process.sleep(HELLO_TIME);
        return Err(ErrorKind::TimedOut.into());
    }
    let port = offer.addresses.first().map_or(0, SocketAddr::port);
    let connection = process.world().call(link, port).ok_or(ErrorKind::ConnectionRefused)?;
    process.open(connection.there, End::Read);
    process.open(connection.back, End::Write);
    Ok(connection)
}

fn write_all(process: &Process<'_>, pipe: PipeId, bytes: &[u8]) -> io::Result<()> {
    let mut left = bytes;
    while !left.is_empty() {
        let count = process.write(pipe, left)?;
        left = left.get(count..).unwrap_or_default();
    }
    Ok(())
}
