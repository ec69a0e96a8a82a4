//! The sender's workers: they map and send batches, so that the kernel's lock on one address space
//! does not keep all cores but one waiting.
//!
//! Workers of the stream share it: whoever writes a batch takes the *turn*, a lock of the kernel
//! (flock(2)), for as long as it writes; one that is killed does not keep it. While one writes, the
//! others map. (A ring between mappers and one writer would do the same with one more copy.) A
//! worker of a link has it to itself, and is started when the link comes in ([`crate::doorman`]).
//!
//! What they say is [`rxl_migrate::source::workers`]'s; who gets which batch is decided there.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{self, FlockOperation, MemfdFlags, OFlags, flock, memfd_create, open};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rxl_migrate::frame::{DomId, PAGE_SIZE};
use rxl_migrate::hypervisor::{ForeignPages, PagePiece, StreamOut};
use rxl_migrate::source::Reducing;
use rxl_migrate::source::workers::{
    Confirmed, Employer, News, Reply, Request, WorkerId, Workers, work,
};
use rxl_migrate::stream::link::{Offer, Token};
use rxl_migrate::stream::reduced::Agreed;
use serde::{Deserialize, Serialize};

use crate::abort;
use crate::doorman::Doorman;
use crate::messages;
use crate::rate::Rate;
use crate::tls::Identity;
use crate::worker::{Mode, Worker, become_worker};
use crate::xc::{FdOut, Idle, LiveDomain, SealedOut, SendingLink, limit_rate};

/// The first argument of a worker's command line: then come the domain's number, and either the
/// turn's and the rate in Mbit/s if there is one, or [`LINK`].
pub const ARGUMENT: &str = "--save-worker";
/// In the place of a turn: standard output is a link.
const LINK: &str = "link";
/// Most workers of the stream.
pub const WORKERS_MAX: u8 = 64;
/// How long to wait at most: a connection may have to be closed, a signal may have been missed.
const TICK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Not at all.
const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// The right to write to the stream, which one worker has at a time. Each has its own.
#[derive(Debug)]
pub struct Turn(OwnedFd);

impl Turn {
    fn new() -> io::Result<Turn> {
        Ok(Turn(memfd_create("turn", MemfdFlags::CLOEXEC)?))
    }

    /// For another: a lock belongs to what open(2) returned, not to the file.
    fn another(&self) -> io::Result<Turn> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        Ok(Turn(open(path, OFlags::RDWR | OFlags::CLOEXEC, fs::Mode::empty())?))
    }

    fn take(&self) -> io::Result<()> {
        loop {
            match flock(&self.0, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) if !abort::requested() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn give(&self) -> io::Result<()> {
        Ok(flock(&self.0, FlockOperation::Unlock)?)
    }
}

/// A stream that several workers write, piece by piece.
#[derive(Debug)]
pub struct SharedOut<O> {
    out: O,
    /// `None`: nobody else writes.
    turn: Option<Turn>,
    /// What all of them may send.
    rate: Option<Rate>,
    /// Time spent waiting for the turn.
    stalled: Duration,
}

impl<O> SharedOut<O> {
    /// Writes to `out` when it has the turn, if there is one, and no faster than `rate`.
    pub fn new(out: O, turn: Option<Turn>, rate: Option<Rate>) -> SharedOut<O> {
        SharedOut { out, turn, rate, stalled: Duration::ZERO }
    }

    /// Writes `bytes` bytes.
    fn in_turn(
        &mut self,
        bytes: usize,
        write: impl FnOnce(&mut O) -> io::Result<()>,
    ) -> io::Result<()> {
        let asked = Instant::now();
        if let Some(turn) = &self.turn {
            turn.take()?;
        }
        let started = Instant::now();
        self.stalled += started.duration_since(asked);
        // Whoever holds the turn holds up the others as well.
        let written = write(&mut self.out)
            .and_then(|()| self.rate.map_or(Ok(()), |rate| rate.wait(bytes, started)));
        // After an error the stream is worthless. But others may be waiting: they are to find out.
        if let Some(turn) = &self.turn {
            turn.give()?;
        }
        written
    }
}

impl<P: ForeignPages, O: StreamOut<P>> StreamOut<P> for SharedOut<O> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.in_turn(bytes.len(), |out| out.write_all(bytes))
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, P>]) -> io::Result<()> {
        let bytes = head.len() + pieces.len() * PAGE_SIZE;
        self.in_turn(bytes, |out| out.write_pages(head, pieces))
    }

    fn stalled_ns(&self) -> u64 {
        u64::try_from(self.stalled.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Nobody confirms what is in the stream: it arrives, or the migration fails.
impl<O> Confirmed for SharedOut<O> {
    fn confirmed(&mut self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn wait_confirmed(&mut self, _records: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the stream breaks shows when the next batch is written.
impl<O> Idle for SharedOut<O> {
    fn wait_for(&mut self, _socket: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
}

/// Workers to have.
#[derive(Debug)]
pub struct Staff<'a> {
    /// The program that has [`run`] behind [`ARGUMENT`].
    pub program: OsString,
    /// Whose pages are sent.
    pub domain: DomId,
    /// What workers are.
    pub mode: Mode,
    /// How many share the stream; 0: nobody, links only.
    pub count: u8,
    /// The stream.
    pub stream: BorrowedFd<'a>,
    /// Where links come in, if they may.
    pub doorman: Option<Doorman>,
    /// How fast all of them together may send: links by equal shares.
    pub rate: Option<Rate>,
}

/// The workers of this process. Dropping it ends them.
#[derive(Debug)]
pub struct Pool {
    program: OsString,
    domain: DomId,
    mode: Mode,
    turn: Turn,
    doorman: Option<Doorman>,
    rate: Option<Rate>,
    workers: BTreeMap<WorkerId, Worker>,
    /// The number of the next one.
    next: WorkerId,
    news: VecDeque<News>,
}

impl Pool {
    /// Starts the workers of the stream. To be called while there is one thread.
    ///
    /// # Errors
    /// The system's.
    pub fn start(staff: Staff<'_>) -> io::Result<Pool> {
        let Staff { program, domain, mode, count, stream, doorman, rate } = staff;
        let (workers, news) = (BTreeMap::new(), VecDeque::new());
        let turn = Turn::new()?;
        let mut pool = Pool { program, domain, mode, turn, doorman, rate, workers, next: 0, news };
        for _ in 0..count {
            let worker = pool.stream_worker(stream.try_clone_to_owned()?)?;
            pool.employ(worker, None);
        }
        Ok(pool)
    }

    /// What this process needs to write to the stream too.
    ///
    /// # Errors
    /// The system's.
    pub fn turn(&self) -> io::Result<Turn> {
        self.turn.another()
    }

    fn employ(&mut self, worker: Worker, link: Option<u8>) {
        self.workers.insert(self.next, worker);
        self.news.push_back(News::Joined(self.next, link));
        self.next += 1;
    }

    fn stream_worker(&self, stream: OwnedFd) -> io::Result<Worker> {
        let (domain, turn, rate) = (self.domain, &self.turn, self.rate);
        match self.mode {
            Mode::Process => {
                fcntl_setfd(&turn.0, FdFlags::empty())?;
                let (id, number) = (domain.to_string(), turn.0.as_raw_fd().to_string());
                let mbit = rate.map(|rate| rate.mbit().to_string());
                let args: Vec<&str> =
                    [ARGUMENT, &id, &number].into_iter().chain(mbit.as_deref()).collect();
                let worker = Worker::process(&self.program, &args, Stdio::from(stream));
                fcntl_setfd(&turn.0, FdFlags::CLOEXEC)?;
                worker
            }
            Mode::Thread => {
                let turn = turn.another()?;
                Worker::thread(move |socket| {
                    let out = SharedOut::new(FdOut::new(stream), Some(turn), rate);
                    say_if_failed(serve(domain, out, &socket, Agreed::default()));
                })
            }
        }
    }

    fn link_worker(&self, link: u8, agreed: Agreed, connection: OwnedFd) -> io::Result<Worker> {
        let domain = self.domain;
        let doorman = self.doorman.as_ref().ok_or(io::ErrorKind::NotFound)?;
        if let Some(rate) = self.rate {
            limit_rate(connection.as_fd(), rate.share(doorman.offer().links))?;
        }
        let identity = doorman.identity().cloned();
        let proof = doorman.offer().secret.proof_token(link);
        let assignment = Assignment { identity, proof, agreed };
        match self.mode {
            Mode::Process => {
                let args = [ARGUMENT, &domain.to_string(), LINK];
                let worker = Worker::process(&self.program, &args, Stdio::from(connection))?;
                // One that has ended already is heard of as any other is.
                if let Err(error) = messages::send(worker.socket(), &assignment) {
                    tracing::debug!(link, %error, "a worker takes no assignment");
                }
                Ok(worker)
            }
            Mode::Thread => Worker::thread(move |socket| {
                say_if_failed(serve_link(domain, connection, &assignment, &socket));
            }),
        }
    }

    /// Waits for anything, or only looks; whether there was anything.
    fn poll(&mut self, wait: bool) -> io::Result<bool> {
        let doorman = self.doorman.as_ref();
        let doors = doorman.map_or(0, |doorman| doorman.descriptors().count());
        let mut all: Vec<PollFd<'_>> = doorman
            .into_iter()
            .flat_map(Doorman::descriptors)
            .chain(self.workers.values().map(Worker::socket))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut all, Some(if wait { &TICK } else { &NO_WAIT })) {
            Ok(_) => {}
            Err(Errno::INTR) if !abort::requested() => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = all.iter().map(|one| !one.revents().is_empty()).collect();
        let (at_door, at_work) = ready.split_at(doors);
        let workers = self.workers.keys().zip(at_work).filter(|(_, ready)| **ready);
        let workers: Vec<WorkerId> = workers.map(|(worker, _)| *worker).collect();
        if at_door.contains(&true) || (wait && doors > 0) {
            self.let_in();
        }
        for worker in &workers {
            self.hear(*worker)?;
        }
        Ok(!self.news.is_empty())
    }

    /// Starts a worker for each link that has come.
    fn let_in(&mut self) {
        let come = self.doorman.as_mut().map(Doorman::attend).unwrap_or_default();
        for (link, agreed, connection) in come {
            match self.link_worker(link, agreed, connection) {
                Ok(worker) => self.employ(worker, Some(link)),
                Err(error) => tracing::warn!(link, %error, "no worker for a connection"),
            }
        }
    }

    fn hear(&mut self, id: WorkerId) -> io::Result<()> {
        let Some(worker) = self.workers.get_mut(&id) else { return Ok(()) };
        self.news.push_back(match messages::receive::<Reply>(worker.socket())? {
            Some(reply) => News::Reply(id, reply),
            None => {
                let why = worker.why_ended();
                self.workers.remove(&id);
                News::Ended(id, why)
            }
        });
        Ok(())
    }
}

/// All end at once: what they have mapped is removed then, which takes each of them a while.
impl Drop for Pool {
    fn drop(&mut self) {
        self.workers.values_mut().for_each(Worker::end);
    }
}

impl Workers for Pool {
    fn offer(&self) -> Option<Offer> {
        self.doorman.as_ref().map(|doorman| doorman.offer().clone())
    }

    fn submit(&mut self, worker: WorkerId, request: &Request) -> io::Result<()> {
        let worker = self.workers.get(&worker).ok_or(io::ErrorKind::NotFound)?;
        messages::send(worker.socket(), request)
    }

    fn news(&mut self, wait: bool) -> io::Result<Option<News>> {
        while self.news.is_empty() && (self.poll(wait)? || wait) {
            // The signal may have come before the call that it was to end.
            if abort::requested() {
                return Err(io::ErrorKind::Interrupted.into());
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
#[derive(Debug)]
struct Socket<F>(F);

impl<F: AsFd, O: Idle> Employer<O> for Socket<F> {
    fn next(&mut self, way: &mut O) -> io::Result<Option<Request>> {
        way.wait_for(self.0.as_fd())?;
        messages::receive(self.0.as_fd())
    }

    fn next_at_hand(&mut self) -> io::Result<Option<Request>> {
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&NO_WAIT)) {
            // If it is the end, that will be seen again.
            Ok(1..) => messages::receive(self.0.as_fd()),
            Ok(_) | Err(Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        messages::send(self.0.as_fd(), reply)
    }
}

fn serve<O>(domain: DomId, mut out: O, socket: impl AsFd, agreed: Agreed) -> rxl_migrate::Result<()>
where
    O: StreamOut<crate::xc::Mapping> + Confirmed + Idle,
{
    let domain = LiveDomain::open(domain)?;
    let started = Instant::now();
    let clock = Box::new(move || started.elapsed());
    let reducing = Reducing { agreed, clock, queued: Box::new(queued()) };
    work(&domain, &mut out, &mut Socket(socket), reducing)
}

/// For how long this thread has waited for a processor so far: the second number of its
/// `schedstat` (Linux, Documentation/scheduler/sched-stats.rst). It stands still where the kernel
/// does not count that.
fn queued() -> impl Fn() -> Duration {
    let file = File::open("/proc/thread-self/schedstat").ok();
    move || {
        let mut text = [0; 64];
        let count = file.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        let text = text.get(..count).and_then(|text| str::from_utf8(text).ok());
        let waited = text.and_then(|text| text.split_whitespace().nth(1)?.parse().ok());
        Duration::from_nanos(waited.unwrap_or(0))
    }
}

/// What a worker of a link is told first: secrets are not for a command line.
#[derive(Debug, Serialize, Deserialize)]
struct Assignment {
    /// What encrypts the link; `None`: nothing does.
    identity: Option<Identity>,
    /// What the receiver shows through an encrypted link.
    proof: Token,
    /// What may be left out.
    agreed: Agreed,
}

fn serve_link(
    domain: DomId,
    connection: OwnedFd,
    assignment: &Assignment,
    socket: impl AsFd,
) -> rxl_migrate::Result<()> {
    let what = "making a connection usable";
    let failed = |source| rxl_migrate::Error::Worker { what, source };
    let Assignment { identity, proof, agreed } = assignment;
    match identity {
        None => serve(domain, SendingLink::new(connection).map_err(failed)?, socket, *agreed),
        Some(identity) => {
            let out = SealedOut::open(connection, identity, proof).map_err(failed)?;
            serve(domain, out, socket, *agreed)
        }
    }
}

/// The end of the thread is what its owner notices; why goes to the log.
fn say_if_failed(result: rxl_migrate::Result<()>) {
    if let Err(error) = result {
        tracing::warn!("a worker has failed: {}", error.chain());
    }
}

/// What a process does that was started with [`ARGUMENT`] and `args` after it: sends batches until
/// its standard input ends.
///
/// # Errors
/// The arguments are not those of a worker; whatever ends it early.
pub fn run(args: &[&str]) -> rxl_migrate::Result<()> {
    let what = "starting a worker";
    let failed = |source| rxl_migrate::Error::Worker { what, source };
    let wrong = || failed(io::ErrorKind::InvalidInput.into());
    become_worker().map_err(failed)?;
    let [domain, way, rest @ ..] = args else { return Err(wrong()) };
    let domain = DomId(domain.parse().map_err(|_| wrong())?);
    let (stdin, stdout) = (io::stdin(), io::stdout());
    if *way == LINK {
        let connection = stdout.as_fd().try_clone_to_owned().map_err(failed)?;
        return match messages::receive(stdin.as_fd()).map_err(failed)? {
            Some(assignment) => serve_link(domain, connection, &assignment, stdin.as_fd()),
            None => Ok(()),
        };
    }
    let turn = way.parse().map_err(|_| wrong())?;
    let turn = Turn(crate::inherit::descriptor(turn).map_err(failed)?);
    let turn = turn.another().map_err(failed)?;
    let rate = match rest {
        [] => None,
        [mbit] => Some(mbit.parse().map_err(|_| wrong())?),
        _ => return Err(wrong()),
    };
    let out = SharedOut::new(FdOut::new(stdout.as_fd()), Some(turn), rate);
    serve(domain, out, stdin.as_fd(), Agreed::default())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::thread;

    use rxl_migrate::stream::reduced::Reduce;

    use super::*;
    use crate::xc::PIPE_BYTES;

    #[test]
    fn who_waits_for_a_processor_knows_it() {
        let (limit, threads) = (Instant::now() + Duration::from_secs(20), 2 * available());
        let waits = thread::scope(|scope| {
            let spin = || {
                let queued = queued();
                let before = queued();
                while Instant::now() < limit {
                    if queued() > before {
                        return true;
                    }
                }
                false
            };
            let all: Vec<_> = (0..threads).map(|_| scope.spawn(spin)).collect();
            all.into_iter().any(|thread| thread.join().unwrap())
        });
        assert!(waits, "{threads} threads never wait for a processor");
    }

    fn available() -> usize {
        thread::available_parallelism().map_or(1, Into::into)
    }

    #[test]
    fn a_worker_that_ends_is_missed() {
        let (_reader, writer) = io::pipe().unwrap();
        let staff = Staff {
            program: "false".into(),
            domain: DomId(1),
            mode: Mode::Process,
            count: 1,
            stream: writer.as_fd(),
            doorman: None,
            rate: None,
        };
        let mut pool = Pool::start(staff).unwrap();
        assert_eq!(pool.news(true).unwrap(), Some(News::Joined(0, None)));
        let Some(News::Ended(0, why)) = pool.news(true).unwrap() else { panic!() };
        assert!(why.contains("has ended (exit status: 1)"), "{why}");
    }

    #[test]
    fn a_link_that_comes_in_gets_a_worker_and_is_closed_with_it() {
        use std::io::Read;

        let (_reader, writer) = io::pipe().unwrap();
        let doorman =
            Doorman::open(&["127.0.0.1".parse().unwrap()], 1, false, Reduce::ALL).unwrap();
        let staff = Staff {
            program: "cat".into(),
            domain: DomId(1),
            mode: Mode::Process,
            count: 0,
            stream: writer.as_fd(),
            doorman: Some(doorman),
            rate: None,
        };
        let mut pool = Pool::start(staff).unwrap();
        let offer = pool.offer().unwrap();
        assert_eq!(pool.news(false).unwrap(), None);
        let receiver = thread::spawn(move || crate::doorman::open_link(&offer, 0).unwrap());
        let joined = loop {
            if let Some(news @ News::Joined(..)) = pool.news(true).unwrap() {
                break news;
            }
        };
        assert_eq!(joined, News::Joined(0, Some(0)));
        let mut connection = std::net::TcpStream::from(receiver.join().unwrap());
        pool.dismiss(0);
        let mut rest = Vec::new();
        // `cat` has been given arguments that it may complain of, but not there.
        let _ = connection.read_to_end(&mut rest);
        assert_eq!(rest, b"");
    }

    /// Writes nothing, and notices if two do at once.
    #[derive(Clone, Default)]
    struct Crowd(Arc<Mutex<()>>);

    impl Crowd {
        fn write(&self) -> io::Result<()> {
            let alone = self.0.try_lock().map_err(|_| io::Error::other("two write at once"))?;
            thread::yield_now();
            drop(alone);
            Ok(())
        }
    }

    #[test]
    fn who_has_the_turn_writes_alone() {
        let (turn, crowd) = (Turn::new().unwrap(), Crowd::default());
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let mut out = SharedOut::new(crowd.clone(), Some(turn.another().unwrap()), None);
                thread::spawn(move || (0..500).try_for_each(|_| out.in_turn(1, |c| c.write())))
            })
            .collect();
        for writer in writers {
            writer.join().unwrap().unwrap();
        }
    }

    /// Whoever waits for the turn would wait for ever.
    #[test]
    fn a_stream_with_a_rate_takes_its_time_at_least() {
        let mut out = SharedOut::new((), None, Rate::of_mbit(8));
        let started = Instant::now();
        (0..5).for_each(|_| out.in_turn(10_000, |()| Ok(())).unwrap());
        assert!(started.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn who_fails_or_is_killed_does_not_keep_the_turn() {
        let turn = Turn::new().unwrap();
        let out = || SharedOut::new((), Some(turn.another().unwrap()), None);
        assert!(out().in_turn(1, |()| Err(io::ErrorKind::BrokenPipe.into())).is_err());
        let killed = turn.another().unwrap();
        killed.take().unwrap();
        let next = {
            let mut out = out();
            thread::spawn(move || out.in_turn(1, |()| Ok(())))
        };
        // What the kernel does when a process ends.
        drop(killed);
        next.join().unwrap().unwrap();
    }

    /// One writes to a peer that reads nothing, the other waits for its turn.
    #[test]
    fn threads_end_whatever_they_wait_for() {
        let (reader, writer) = io::pipe().unwrap();
        let turn = Turn::new().unwrap();
        let workers = [(); 2].map(|()| {
            let out = FdOut::new(writer.try_clone().unwrap());
            let mut out = SharedOut::new(out, Some(turn.another().unwrap()), None);
            Worker::thread(move |_socket| {
                let bytes = vec![7; 2 * PIPE_BYTES];
                let written = StreamOut::<crate::xc::Mapping>::write_all(&mut out, &bytes);
                assert!(written.is_err());
            })
            .unwrap()
        });
        while rustix::io::ioctl_fionread(&reader).unwrap() < PIPE_BYTES as u64 {
            thread::sleep(Duration::from_millis(1));
        }
        drop(workers);
        assert!(turn.another().unwrap().take().is_ok());
    }
}
