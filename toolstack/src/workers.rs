//! Worker processes of the save helper: they map and send batches, so that the kernel's lock on
//! one address space does not keep all cores but one waiting.
//!
//! All workers share one end of a sequenced-packet socket, so that each request goes to whichever
//! is free, and the stream, which whoever writes a batch has to itself: it takes the *turn*, a
//! semaphore of the kernel (eventfd(2)), for as long as it writes. While one writes, the others
//! map. (A ring between mappers and one writer would do the same with one more copy.)
//!
//! A worker ends with the save helper, however that ends. What they say is
//! [`rxl_migrate::source::workers`]'s.

use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{ForeignPages, PagePiece, StreamOut};
use rxl_migrate::source::workers::{Employer, MESSAGE_BYTES_MAX, Reply, Request, Workers};

use crate::abort;

/// The first argument of a worker's command line: then come the domain's number and the turn's.
pub const ARGUMENT: &str = "--save-worker";
/// Most workers.
pub const WORKERS_MAX: u8 = 64;
/// Requests for each worker: one that it works on, one for when it is done.
const REQUESTS_PER_WORKER: usize = 2;

/// The right to write to the stream, which one process has at a time.
#[derive(Clone, Debug)]
pub struct Turn(Arc<OwnedFd>);

impl Turn {
    fn new() -> io::Result<Turn> {
        Ok(Turn(Arc::new(eventfd(1, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC)?)))
    }

    /// The turn that this process was handed as a descriptor.
    #[must_use]
    pub fn inherited(descriptor: OwnedFd) -> Turn {
        Turn(Arc::new(descriptor))
    }

    fn take(&self) -> io::Result<()> {
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&*self.0, &mut count) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) if !abort::requested() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn give(&self) -> io::Result<()> {
        rustix::io::write(&*self.0, &1_u64.to_ne_bytes())?;
        Ok(())
    }
}

/// A stream that several processes write, piece by piece.
#[derive(Debug)]
pub struct SharedOut<O> {
    out: O,
    /// `None`: nobody else writes.
    turn: Option<Turn>,
}

impl<O> SharedOut<O> {
    /// Writes to `out` when it has the turn, if there is one.
    pub fn new(out: O, turn: Option<Turn>) -> SharedOut<O> {
        SharedOut { out, turn }
    }

    fn in_turn(&mut self, write: impl FnOnce(&mut O) -> io::Result<()>) -> io::Result<()> {
        let Some(turn) = &self.turn else { return write(&mut self.out) };
        turn.take()?;
        // After an error the stream is worthless, and nobody gets the turn any more.
        write(&mut self.out)?;
        turn.give()
    }
}

impl<P: ForeignPages, O: StreamOut<P>> StreamOut<P> for SharedOut<O> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.in_turn(|out| out.write_all(bytes))
    }

    fn write_pages(&mut self, head: &[u8], pages: &P, pieces: &[PagePiece<'_>]) -> io::Result<()> {
        self.in_turn(|out| out.write_pages(head, pages, pieces))
    }
}

/// The workers of this process. Dropping it kills them.
#[derive(Debug)]
pub struct Pool {
    socket: OwnedFd,
    turn: Turn,
    workers: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    child: Child,
    /// Readable once it has ended.
    end: OwnedFd,
}

impl Pool {
    /// Starts `count` workers, each `program` with the arguments of [`ARGUMENT`], which send
    /// pages of `domain` to `stream`. To be called while there is one thread.
    ///
    /// # Errors
    /// The system's.
    pub fn start(
        program: &OsStr,
        count: u8,
        domain: DomId,
        stream: BorrowedFd<'_>,
    ) -> io::Result<Pool> {
        let (socket, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // Nobody may wait for room: who has nothing to read would wait for ever.
        let room = 2 * MESSAGE_BYTES_MAX * REQUESTS_PER_WORKER * usize::from(count);
        for end in [&socket, &theirs] {
            sockopt::set_socket_send_buffer_size_force(end, room)
                .or_else(|_| sockopt::set_socket_send_buffer_size(end, room))?;
        }
        let mut pool = Pool { socket, turn: Turn::new()?, workers: Vec::new() };
        let turn = pool.turn.0.clone();
        fcntl_setfd(&turn, FdFlags::empty())?;
        for _ in 0..count {
            let child = Command::new(program)
                .arg(ARGUMENT)
                .args([domain.to_string(), turn.as_raw_fd().to_string()])
                .stdin(theirs.try_clone()?)
                .stdout(stream.try_clone_to_owned()?)
                .spawn()?;
            let end = pidfd_open(pid_of(&child)?, PidfdFlags::empty());
            pool.workers.push(Worker { child, end: end? });
        }
        fcntl_setfd(&turn, FdFlags::CLOEXEC)?;
        Ok(pool)
    }

    /// What this process needs to write to the stream too.
    #[must_use]
    pub fn turn(&self) -> Turn {
        self.turn.clone()
    }

    /// The error that says that this worker has ended.
    fn ended(&mut self, index: usize) -> io::Error {
        let Some(worker) = self.workers.get_mut(index) else { return ErrorKind::NotFound.into() };
        match worker.child.wait() {
            Ok(status) => {
                io::Error::other(format!("worker {} has ended ({status})", worker.child.id()))
            }
            Err(error) => error,
        }
    }

    /// Waits until there is a message (`None`), or a worker has ended: which one.
    fn wait_for_any(&self) -> io::Result<Option<usize>> {
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let ends = self.workers.iter().map(|worker| worker.end.as_fd());
        let mut all: Vec<PollFd<'_>> =
            std::iter::once(self.socket.as_fd()).chain(ends).map(readable).collect();
        loop {
            match poll(&mut all, None) {
                Ok(_) => {}
                Err(Errno::INTR) if !abort::requested() => continue,
                Err(error) => return Err(error.into()),
            }
            let mut ready = all.iter().map(|one| !one.revents().is_empty());
            if ready.next() == Some(true) {
                return Ok(None);
            }
            if let Some(index) = ready.position(|ended| ended) {
                return Ok(Some(index));
            }
        }
    }
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| Errno::SRCH.into())
}

impl Workers for Pool {
    fn depth(&self) -> usize {
        REQUESTS_PER_WORKER * self.workers.len()
    }

    fn submit(&mut self, request: &Request) -> io::Result<()> {
        send(self.socket.as_fd(), &serde_json::to_vec(request)?)
    }

    fn collect(&mut self) -> io::Result<Reply> {
        if let Some(index) = self.wait_for_any()? {
            return Err(self.ended(index));
        }
        match receive(self.socket.as_fd())? {
            Some(message) => Ok(serde_json::from_slice(&message)?),
            // All have.
            None => Err(self.ended(0)),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            // One that has ended is waited for all the same.
            let _ = worker.child.kill();
            let _ = worker.child.wait();
        }
    }
}

/// A worker's end of the socket: its standard input.
#[derive(Debug)]
pub struct Socket<F>(pub F);

impl<F: AsFd> Employer for Socket<F> {
    fn next(&mut self) -> io::Result<Option<Request>> {
        let message = receive(self.0.as_fd())?;
        message.map(|bytes| Ok(serde_json::from_slice(&bytes)?)).transpose()
    }

    fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        send(self.0.as_fd(), &serde_json::to_vec(reply)?)
    }
}

/// Makes this process a worker's: it dies with its parent, and only its parent ends it.
///
/// # Errors
/// The system's.
pub fn become_worker() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    abort::ignore_terminal()
}

fn send(socket: BorrowedFd<'_>, message: &[u8]) -> io::Result<()> {
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(ErrorKind::InvalidInput.into());
    }
    loop {
        match rustix::net::send(socket, message, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) if !abort::requested() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The next message; `None`: the other end is closed.
fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut message = vec![0; MESSAGE_BYTES_MAX];
    let length = loop {
        match rustix::net::recv(socket, &mut message[..], RecvFlags::empty()) {
            Ok((length, _)) => break length,
            Err(Errno::INTR) if !abort::requested() => {}
            Err(error) => return Err(error.into()),
        }
    };
    message.truncate(length);
    Ok((length > 0).then_some(message))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread;

    use rxl_migrate::frame::Pfn;
    use rxl_migrate::source::Outcome;

    use super::*;

    #[test]
    fn messages_arrive_whole_and_the_end_is_the_end() {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        // As long as they get.
        let batch: Vec<Pfn> = (0..1024).map(|n| Pfn((1 << 52) - n)).collect();
        let request = Request { batch: batch.clone(), last: true };
        send(ours.as_fd(), &serde_json::to_vec(&request).unwrap()).unwrap();
        let mut socket = Socket(theirs.as_fd());
        assert_eq!(socket.next().unwrap(), Some(request));
        let reply: Reply = Ok(Outcome { sent: batch, ..Outcome::default() });
        socket.reply(&reply).unwrap();
        let message = receive(ours.as_fd()).unwrap().unwrap();
        assert_eq!(serde_json::from_slice::<Reply>(&message).unwrap(), reply);
        drop(ours);
        assert_eq!(socket.next().unwrap(), None);
    }

    #[test]
    fn a_worker_that_ends_is_missed() {
        let (_reader, writer) = io::pipe().unwrap();
        let mut pool = Pool::start(OsStr::new("false"), 2, DomId(1), writer.as_fd()).unwrap();
        let error = pool.collect().unwrap_err().to_string();
        assert!(error.contains("has ended (exit status: 1)"), "{error}");
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
                let mut out = SharedOut::new(crowd.clone(), Some(turn.clone()));
                thread::spawn(move || (0..500).try_for_each(|_| out.in_turn(|c| c.write())))
            })
            .collect();
        for writer in writers {
            writer.join().unwrap().unwrap();
        }
    }
}
