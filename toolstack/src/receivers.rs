//! The receiver's workers, which place pages in the guest's memory: each opens a link to the sender
//! and takes what comes over it; or, if the stream is a file, each reads parts of it.
//!
//! What they say is [`rxl_migrate::target::links`]'s; to one with a link there is a first message
//! with the offer, because a secret is not for a command line.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rxl_migrate::frame::DomId;
use rxl_migrate::stream::link::Offer;
use rxl_migrate::target::file::work_on_file;
use rxl_migrate::target::links::{Answer, Ask, Links, Need, Owner, work};
use serde::{Deserialize, Serialize};

use crate::doorman::{WELCOME_TIME, open_link};
use crate::messages;
use crate::worker::{Mode, Worker, become_worker};
use crate::xc::{FileAt, Heartbeat, LiveDomain, ReceivingLink, SealedIn};

/// The first argument of a worker's command line: then comes the domain's number.
pub const ARGUMENT: &str = "--restore-worker";
/// What comes then for one whose standard output is the file to be read.
const FILE: &str = "file";

/// What a worker is told first.
#[derive(Debug, Serialize, Deserialize)]
struct Assignment {
    offer: Offer,
    link: u8,
}

/// The workers of this process. Dropping it ends them.
#[derive(Debug)]
pub struct Openers<'a> {
    program: OsString,
    domain: DomId,
    stream: BorrowedFd<'a>,
    workers: BTreeMap<u8, Worker>,
    /// How many of them there were for a file.
    readers: u8,
    needs: VecDeque<Need>,
}

impl<'a> Openers<'a> {
    /// None yet. `program` is the one that has [`run`] behind [`ARGUMENT`]; `stream` is what is
    /// waited for beside the workers.
    #[must_use]
    pub fn new(program: OsString, domain: DomId, stream: BorrowedFd<'a>) -> Openers<'a> {
        let (workers, needs) = (BTreeMap::new(), VecDeque::new());
        Openers { program, domain, stream, workers, readers: 0, needs }
    }

    /// Starts `count` workers that read the stream, which is a file, each from where it is told. To
    /// be called while there is one thread.
    ///
    /// # Errors
    /// The system's.
    pub fn read_file(&mut self, count: u8, mode: Mode) -> io::Result<()> {
        for number in 0..count {
            let worker = self.reader(mode, self.stream.try_clone_to_owned()?)?;
            self.workers.insert(number, worker);
        }
        self.readers = count;
        Ok(())
    }

    fn reader(&self, mode: Mode, file: OwnedFd) -> io::Result<Worker> {
        let domain = self.domain;
        match mode {
            Mode::Process => {
                let args = [ARGUMENT, &domain.to_string(), FILE];
                Worker::process(&self.program, &args, Stdio::from(file))
            }
            Mode::Thread => Worker::thread(move |socket| {
                // Whoever restores has been told, or wants no more.
                if let Err(error) = place_from_file(domain, file, &socket) {
                    tracing::debug!("a worker has ended: {}", error.chain());
                }
            }),
        }
    }

    fn start(&self, offer: &Offer, link: u8) -> io::Result<Worker> {
        let args = [ARGUMENT, &self.domain.to_string()];
        let worker = Worker::process(&self.program, &args, Stdio::null())?;
        messages::send(worker.socket(), &Assignment { offer: offer.clone(), link })?;
        Ok(worker)
    }

    /// Waits, and notes what is needed. `stream`: for the stream, too, which comes last; without
    /// it, the end of the stream is an error.
    fn poll(&mut self, stream: bool) -> io::Result<()> {
        let of_stream = if stream { PollFlags::IN } else { PollFlags::RDHUP };
        let mut all: Vec<PollFd<'_>> = self
            .workers
            .values()
            .map(|worker| (worker.socket(), PollFlags::IN))
            .chain([(self.stream, of_stream)])
            .map(|(fd, events)| PollFd::from_borrowed_fd(fd, events))
            .collect();
        match poll(&mut all, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = all.iter().map(|one| !one.revents().is_empty()).collect();
        let (workers, on_stream) = ready.split_at(self.workers.len());
        let links = self.workers.keys().zip(workers).filter(|(_, ready)| **ready);
        for link in links.map(|(link, _)| *link).collect::<Vec<u8>>() {
            self.hear(link)?;
        }
        match (stream, on_stream.contains(&true)) {
            (true, true) => self.needs.push_back(Need::Stream),
            // What workers have said meanwhile may be all that was waited for.
            (false, true) if self.needs.is_empty() => return Err(ErrorKind::UnexpectedEof.into()),
            _ => {}
        }
        Ok(())
    }

    fn hear(&mut self, link: u8) -> io::Result<()> {
        let Some(worker) = self.workers.get_mut(&link) else { return Ok(()) };
        self.needs.push_back(match messages::receive::<Ask>(worker.socket())? {
            Some(ask) => Need::Ask(link, ask),
            None => {
                let why = worker.why_ended();
                self.workers.remove(&link);
                Need::Ended(link, why)
            }
        });
        Ok(())
    }
}

impl Links for Openers<'_> {
    fn readers(&self) -> u8 {
        self.readers
    }

    fn open(&mut self, offer: &Offer) {
        for link in 0..offer.links {
            match self.start(offer, link) {
                Ok(worker) => {
                    self.workers.insert(link, worker);
                }
                Err(error) => tracing::warn!(link, %error, "no worker for a link"),
            }
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
        messages::send(worker.socket(), answer)
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
struct Socket<F> {
    socket: F,
    /// For the other end of a link.
    heartbeat: Option<Heartbeat>,
}

impl<F: AsFd> Owner for Socket<F> {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        messages::send(self.socket.as_fd(), ask)?;
        if let Some(heartbeat) = &self.heartbeat {
            heartbeat.wait_for(self.socket.as_fd(), PollFlags::IN)?;
        }
        messages::receive(self.socket.as_fd())?.ok_or(ErrorKind::UnexpectedEof.into())
    }
}

/// Places what it is told of `file`, until whoever has the other end of `socket` wants no more.
fn place_from_file(domain: DomId, file: impl AsFd, socket: impl AsFd) -> rxl_migrate::Result<()> {
    let mut owner = Socket { socket, heartbeat: None };
    let domain = LiveDomain::open(domain).inspect_err(|error| {
        // If it cannot be told, there is nobody who could act on it.
        let _ = owner.ask(&Ask::Failed(error.to_string()));
    })?;
    work_on_file(&domain, &mut FileAt::new(file), &mut owner)
}

/// What a process does that was started with [`ARGUMENT`] and `args` after it: opens the link that
/// it is told, and places what comes over it until it ends; or places what it is told of a file.
///
/// # Errors
/// The arguments are not those of a worker; the link cannot be opened; whatever ends it early.
pub fn run(args: &[&str]) -> rxl_migrate::Result<()> {
    let failed = |what| move |source| rxl_migrate::Error::Worker { what, source };
    become_worker().map_err(failed("becoming a worker"))?;
    let domain = args.first().and_then(|text| text.parse().ok()).map(DomId);
    let domain = domain.ok_or(rxl_migrate::Error::Unsupported("a worker without a domain"))?;
    let stdin = io::stdin();
    if args.get(1) == Some(&FILE) {
        return place_from_file(domain, io::stdout(), stdin);
    }
    let assignment = messages::receive::<Assignment>(stdin.as_fd());
    let Some(Assignment { offer, link }) = assignment.map_err(failed("being told what to do"))?
    else {
        return Ok(());
    };
    let failed = failed("opening a connection to the sender");
    let connection = open_link(&offer, link).map_err(failed)?;
    let domain = LiveDomain::open(domain)?;
    let agreed = offer.agreed(offer.known());
    let socket = stdin.as_fd();
    match offer.certificate {
        None => {
            let mut link = ReceivingLink::new(connection).map_err(failed)?;
            let heartbeat = Some(link.heartbeat());
            work(&domain, &mut link, &mut Socket { socket, heartbeat }, agreed)
        }
        Some(trusted) => {
            let proof = offer.secret.proof_token(link);
            let link = SealedIn::open(connection, trusted, &proof, WELCOME_TIME);
            let mut link = link.map_err(failed)?;
            let heartbeat = Some(link.heartbeat());
            work(&domain, &mut link, &mut Socket { socket, heartbeat }, agreed)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// One worker, whose link brings nothing; after a while it asks for pass 7.
    fn with_worker(stream: BorrowedFd<'_>, asks: bool) -> Openers<'_> {
        let mut openers = Openers::new("false".into(), DomId(1), stream);
        let worker = Worker::thread(move |socket| {
            thread::sleep(Duration::from_millis(50));
            if asks {
                messages::send(socket.as_fd(), &Ask::Pass(7)).unwrap();
            }
            assert_eq!(messages::receive::<Answer>(socket.as_fd()).unwrap(), None);
        });
        openers.workers.insert(0, worker.unwrap());
        openers
    }

    fn streams() -> [(OwnedFd, OwnedFd); 2] {
        let (reader, writer) = io::pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        [(reader.into(), writer.into()), (ours.into(), theirs.into())]
    }

    /// TCP would tell only after many minutes that a sender's host is gone with all its links.
    #[test]
    fn a_sender_that_is_gone_is_not_waited_for() {
        for (reader, writer) in streams() {
            rustix::io::write(&writer, b"the start of a record").unwrap();
            let mut openers = with_worker(reader.as_fd(), false);
            drop(writer);
            assert_eq!(openers.wait(false).unwrap_err().kind(), ErrorKind::UnexpectedEof);
            assert_eq!(openers.wait(true).unwrap(), Need::Stream);
        }
    }

    #[test]
    fn what_comes_over_the_stream_does_not_disturb_who_waits_for_workers() {
        for (reader, writer) in streams() {
            rustix::io::write(&writer, b"a record").unwrap();
            let mut openers = with_worker(reader.as_fd(), true);
            assert_eq!(openers.wait(false).unwrap(), Need::Ask(0, Ask::Pass(7)));
        }
    }

    #[test]
    fn a_worker_on_a_file_that_ends_is_missed() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("stream", flags).unwrap();
        let mut openers = Openers::new("false".into(), DomId(1), file.as_fd());
        openers.read_file(1, Mode::Process).unwrap();
        assert_eq!(openers.readers(), 1);
        let Need::Ended(0, why) = openers.wait(false).unwrap() else { panic!() };
        assert!(why.contains("has ended (exit status: 1)"), "{why}");
        assert!(openers.wait(false).is_err());
    }
}
