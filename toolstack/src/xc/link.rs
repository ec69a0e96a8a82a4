//! The two ends of a link: a TCP connection that carries page data one way and confirmations the
//! other ([`rxl_migrate::stream::link`]).
//!
//! The receiver sends a confirmation for each record that it has applied, and repeats the last one
//! whenever it has waited for [`HEARTBEAT`]: for bytes, or for the process that restores. So
//! a sender that must wait, because the connection takes no more, can tell a peer that is busy
//! from one that is gone, which TCP alone cannot (it knows neither a peer that reads nothing, nor,
//! for many minutes, one that is cut off). After [`SILENCE_MAX`] without a byte it gives the link
//! up, and what was not confirmed goes another way. So it does if it hears of the receiver and
//! nothing gets on: after [`STALL_MAX`], or [`TURN_MAX`] where the receiver may wait for others.
//!
//! # Safety
//! One call of `setsockopt` with a number.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};
use rxl_migrate::hypervisor::{PagePiece, PageSlot, StreamIn, StreamOut};
use rxl_migrate::source::workers::Confirmed;
use rxl_migrate::stream::link::{CONFIRMATION_BYTES, Confirmations, Unconfirmed};
use rxl_migrate::target::links::LinkIn;

use super::foreign::Mapping;
use super::stream::{Direction, FdIn, FdOut, Wait};
use crate::abort;
use crate::rate::Rate;
use crate::tls::Tls;

/// How often a receiver that waits says that it is there.
const HEARTBEAT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// How long a sender waits for a word of the receiver. It is part of the pause if a link is cut
/// off during the last pass, and must be long for a busy host to be silent.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// How long it waits for page data to be confirmed, or for the connection to take some of it.
const STALL_MAX: Duration = Duration::from_secs(30);
/// How long it waits for the receiver to begin a pass, which needs that all other links are through
/// with the one before: those that are not must have been given up meanwhile.
const TURN_MAX: Duration = Duration::from_secs(120);
/// Bytes that a connection may hold without having sent them. With more, a slow link would take
/// batches that another could have sent meanwhile; with less, it could run dry between two writes.
const UNSENT_BYTES_MAX: libc::c_int = 256 << 10;

/// The sender's end. What is written to it at a time is one record.
#[derive(Debug)]
pub struct SendingLink {
    out: FdOut<OwnedFd, Listening>,
}

/// What the sender has heard.
#[derive(Debug)]
pub(super) struct Listening {
    confirmed: Confirmations,
    heard: Instant,
    /// When something was confirmed.
    got_on: Instant,
    /// Time spent waiting.
    pub(super) stalled: Duration,
}

impl SendingLink {
    /// Over the connection `socket`, which is made non-blocking.
    ///
    /// # Errors
    /// The system's.
    pub fn new(socket: OwnedFd) -> io::Result<SendingLink> {
        prepare(socket.as_fd())?;
        Ok(SendingLink { out: FdOut { fd: socket, waiting: Listening::new() } })
    }
}

/// Sets the options of a connection that is to be a link.
pub(super) fn prepare(socket: BorrowedFd<'_>) -> io::Result<()> {
    rustix::io::ioctl_fionbio(socket, true)?;
    sockopt::set_tcp_nodelay(socket, true)?;
    limit_unsent(socket)
}

/// Keeps what waits in the socket's buffer short, whatever its size is tuned to.
fn limit_unsent(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_number(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, &UNSENT_BYTES_MAX)
}

/// Has the kernel send no faster than `rate` over a TCP connection. Kernels before 5.0 know of no
/// more than 4 GB/s.
///
/// # Errors
/// The system's.
pub fn limit_rate(socket: BorrowedFd<'_>, rate: Rate) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &rate.bytes_per_s())
}

/// A number that a socket's option may be.
trait Number: Copy {}
impl Number for libc::c_int {}
impl Number for u64 {}

fn set_number<N: Number>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    number: &N,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(number)).unwrap_or_default();
    let (fd, number) = (socket.as_raw_fd(), ptr::from_ref(number).cast());
    // SAFETY: the pointer is to a number of this length, which the kernel only reads.
    let result = unsafe { libc::setsockopt(fd, level, option, number, length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Listening {
    pub(super) fn new() -> Listening {
        let (confirmed, now) = (Confirmations::default(), Instant::now());
        Listening { confirmed, heard: now, got_on: now, stalled: Duration::ZERO }
    }

    /// Notes that the record that begins with `head` is about to be sent.
    pub(super) fn note_sent(&mut self, head: &[u8]) {
        self.confirmed.note_sent(head);
    }

    /// Records that are confirmed.
    pub(super) fn confirmed(&self) -> u64 {
        self.confirmed.records()
    }

    pub(super) fn stalled_ns(&self) -> u64 {
        u64::try_from(self.stalled.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Waits for `wanted`, but not longer than between two heartbeats. What has come true is
    /// returned.
    pub(super) fn poll(socket: BorrowedFd<'_>, wanted: PollFlags) -> io::Result<PollFlags> {
        let mut one = [PollFd::from_borrowed_fd(socket, wanted)];
        match poll(&mut one, Some(&HEARTBEAT)) {
            Ok(_) => Ok(one.first().map_or(PollFlags::empty(), PollFd::revents)),
            Err(Errno::INTR) if !abort::requested() => Ok(PollFlags::empty()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until `link` or `other` can be read, but not longer than between two heartbeats.
    /// `true`: `other` can.
    pub(super) fn poll_beside(link: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
        let mut both = [other, link].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut both, Some(&HEARTBEAT)) {
            Ok(_) => Ok(both.first().is_some_and(|other| !other.revents().is_empty())),
            Err(Errno::INTR) if !abort::requested() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the link is of use still: neither has the receiver been silent for too long, nor
    /// has what it has to confirm been waiting for too long, since `started` at least, when the
    /// connection had taken something.
    pub(super) fn check(&self, started: Instant) -> io::Result<()> {
        self.check_at(started, Instant::now())
    }

    fn check_at(&self, started: Instant, now: Instant) -> io::Result<()> {
        let since = |last: Instant| now.saturating_duration_since(last.max(started));
        let too_late = |why| Err(io::Error::new(ErrorKind::TimedOut, why));
        if since(self.heard) > SILENCE_MAX {
            return too_late(format!("nothing was heard of the receiver for {SILENCE_MAX:?}"));
        }
        let limit = match self.confirmed.next() {
            None => return Ok(()),
            Some(Unconfirmed::Data) => STALL_MAX,
            Some(Unconfirmed::Pass) => TURN_MAX,
        };
        if since(self.got_on) > limit {
            return too_late(format!("the receiver has not got on for {limit:?}"));
        }
        Ok(())
    }

    /// Takes some of what has come: however much a receiver says, it does not keep the sender
    /// busy. Does not wait.
    fn hear(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut bytes = [0; 64 * CONFIRMATION_BYTES];
        match rustix::net::recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(ErrorKind::ConnectionReset.into()),
            Ok((count, _)) => {
                self.take(bytes.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes bytes that have come.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.heard = Instant::now();
        if self.confirmed.take(bytes) {
            self.got_on = self.heard;
        }
    }

    /// Waits for `wanted`, and hears what comes meanwhile. `true`: it is there.
    fn wait_for(
        &mut self,
        socket: BorrowedFd<'_>,
        wanted: PollFlags,
        started: Instant,
    ) -> io::Result<bool> {
        let ready = Listening::poll(socket, PollFlags::IN | wanted)?;
        self.hear(socket)?;
        self.check(started)?;
        Ok(ready.intersects(wanted))
    }
}

impl Wait for Listening {
    fn wait(&mut self, fd: BorrowedFd<'_>, to: Direction) -> io::Result<()> {
        let started = Instant::now();
        while !self.wait_for(fd, to.readiness(), started)? {}
        self.stalled += started.elapsed();
        Ok(())
    }
}

impl StreamOut<Mapping> for SendingLink {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.waiting.note_sent(bytes);
        self.out.write_all(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, Mapping>]) -> io::Result<()> {
        self.out.waiting.note_sent(head);
        self.out.write_pages(head, pieces)
    }

    fn stalled_ns(&self) -> u64 {
        self.out.waiting.stalled_ns()
    }
}

impl Confirmed for SendingLink {
    fn confirmed(&mut self) -> io::Result<u64> {
        self.out.waiting.hear(self.out.fd.as_fd())?;
        Ok(self.out.waiting.confirmed())
    }

    fn wait_confirmed(&mut self, records: u64) -> io::Result<()> {
        let started = Instant::now();
        while self.confirmed()? < records {
            self.out.waiting.wait_for(self.out.fd.as_fd(), PollFlags::IN, started)?;
        }
        Ok(())
    }
}

/// A way to the receiver while there is nothing to send.
pub trait Idle {
    /// Waits until `socket` can be read.
    ///
    /// # Errors
    /// The system's; the way is broken, or the receiver has been silent for too long.
    fn wait_for(&mut self, socket: BorrowedFd<'_>) -> io::Result<()>;
}

impl Idle for SendingLink {
    fn wait_for(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let started = Instant::now();
        while !Listening::poll_beside(self.out.fd.as_fd(), socket)? {
            self.out.waiting.hear(self.out.fd.as_fd())?;
            self.out.waiting.check(started)?;
        }
        Ok(())
    }
}

/// The receiver's end.
#[derive(Debug)]
pub struct ReceivingLink {
    input: FdIn<Rc<OwnedFd>, Heartbeat>,
}

/// What the receiver says, and repeats while it waits.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    voice: Voice,
    said: Rc<RefCell<Said>>,
}

/// How it is said.
#[derive(Clone, Debug)]
enum Voice {
    Plain(Rc<OwnedFd>),
    Sealed(Rc<RefCell<Tls>>),
}

#[derive(Debug, Default)]
struct Said {
    confirmed: u64,
    /// The rest of a confirmation that the connection did not take.
    unsent: Vec<u8>,
    /// When it was said last.
    at: Option<Instant>,
}

impl Said {
    /// Whether it is time to say it again.
    fn is_old(&self) -> bool {
        let heartbeat = Duration::from_secs(HEARTBEAT.tv_sec.unsigned_abs());
        self.at.is_none_or(|at| at.elapsed() >= heartbeat)
    }
}

impl ReceivingLink {
    /// Over the connection `socket`, which is made non-blocking.
    ///
    /// # Errors
    /// The system's.
    pub fn new(socket: OwnedFd) -> io::Result<ReceivingLink> {
        prepare(socket.as_fd())?;
        let socket = Rc::new(socket);
        let voice = Voice::Plain(Rc::clone(&socket));
        let heartbeat = Heartbeat { voice, said: Rc::default() };
        Ok(ReceivingLink { input: FdIn { fd: socket, waiting: heartbeat } })
    }

    /// For whoever else makes this process wait.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        self.input.waiting.clone()
    }
}

impl Heartbeat {
    /// Of an encrypted link.
    pub(super) fn sealed(tls: Rc<RefCell<Tls>>) -> Heartbeat {
        Heartbeat { voice: Voice::Sealed(tls), said: Rc::default() }
    }

    /// Says that so many records are applied.
    pub(super) fn confirm(&self, records: u64) -> io::Result<()> {
        self.said.borrow_mut().confirmed = records;
        self.beat()
    }

    /// Waits until `fd` is ready for `wanted`, and shows signs of life meanwhile.
    ///
    /// # Errors
    /// The system's; the link is broken.
    pub fn wait_for(&self, fd: BorrowedFd<'_>, wanted: PollFlags) -> io::Result<()> {
        loop {
            match poll(&mut [PollFd::from_borrowed_fd(fd, wanted)], Some(&HEARTBEAT)) {
                Ok(0) => self.beat()?,
                // Bytes that trickle in are no reason to be silent.
                Ok(_) if self.said.borrow().is_old() => return self.beat(),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Says how much is confirmed, as far as the connection takes it.
    fn beat(&self) -> io::Result<()> {
        let mut said = self.said.borrow_mut();
        said.at = Some(Instant::now());
        let word = said.confirmed.to_le_bytes();
        let sent = match &self.voice {
            Voice::Plain(socket) => {
                if said.unsent.is_empty() {
                    said.unsent = word.to_vec();
                }
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let sent = rustix::net::send(&**socket, &said.unsent, flags);
                sent.map(|count| drop(said.unsent.drain(..count))).map_err(io::Error::from)
            }
            Voice::Sealed(tls) => {
                let mut tls = tls.borrow_mut();
                if !tls.wants_write() {
                    tls.put(&word)?;
                }
                tls.flush()
            }
        };
        match sent {
            // A sender that does not listen hears it later.
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            result => result,
        }
    }
}

impl Wait for Heartbeat {
    fn wait(&mut self, fd: BorrowedFd<'_>, to: Direction) -> io::Result<()> {
        self.wait_for(fd, to.readiness())
    }
}

impl StreamIn<Mapping> for ReceivingLink {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.input.read_exact(buf)
    }

    fn read_pages(&mut self, pages: &Mapping, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        self.input.read_pages(pages, slots)
    }
}

impl LinkIn<Mapping> for ReceivingLink {
    fn confirm(&mut self, records: u64) -> io::Result<()> {
        self.input.waiting.confirm(records)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use rxl_migrate::frame::{PAGE_SIZE, PageBuf};
    use rxl_migrate::stream::libxc::page_data_head;
    use rxl_migrate::stream::link::pass_record;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours.into(), listener.accept().unwrap().0.into())
    }

    #[test]
    fn the_kernel_sends_no_faster_than_it_may() {
        let (ours, theirs) = pair();
        // 32 MB/s, of which it lets the first ten packets go at once: 640 KiB at most.
        limit_rate(ours.as_fd(), Rate::of_mbit(256).unwrap()).unwrap();
        let (mut ours, mut theirs) = (TcpStream::from(ours), TcpStream::from(theirs));
        let started = Instant::now();
        let sender = thread::spawn(move || ours.write_all(&vec![7; 8 << 20]).unwrap());
        assert_eq!(io::copy(&mut theirs, &mut io::sink()).unwrap(), 8 << 20);
        sender.join().unwrap();
        assert!(started.elapsed() >= Duration::from_millis(100));
    }

    #[test]
    fn what_is_applied_is_confirmed_and_waited_for() {
        let (ours, theirs) = pair();
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        let receiver = thread::spawn(move || {
            let mut link = ReceivingLink::new(theirs).unwrap();
            let mut page = PageBuf::zeroed();
            for record in 1..=3 {
                link.read_exact(&mut page.0).unwrap();
                assert!(page.0.iter().all(|byte| u64::from(*byte) == record));
                link.confirm(record).unwrap();
            }
            is_done.recv().unwrap_err();
        });
        let mut link = SendingLink::new(ours).unwrap();
        for byte in 1..=3 {
            link.write_all(&[byte; PAGE_SIZE]).unwrap();
        }
        link.wait_confirmed(3).unwrap();
        assert_eq!(link.confirmed().unwrap(), 3);
        drop(done);
        receiver.join().unwrap();
        assert!(link.wait_confirmed(4).is_err());
    }

    /// More than the buffers of both sides take; the receiver reads after more than a heartbeat.
    #[test]
    fn a_receiver_that_is_busy_is_waited_for() {
        let (ours, theirs) = pair();
        let receiver = thread::spawn(move || {
            let mut link = ReceivingLink::new(theirs).unwrap();
            let (nothing, _writer) = io::pipe().unwrap();
            let heartbeat = link.heartbeat();
            let deaf = Instant::now();
            while deaf.elapsed() < SILENCE_MAX + Duration::from_secs(2) {
                let timer = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
                poll(&mut [PollFd::new(&nothing, PollFlags::IN)], Some(&timer)).unwrap();
                heartbeat.beat().unwrap();
            }
            let mut bytes = vec![0; 64 << 20];
            link.read_exact(&mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 9));
        });
        let mut link = SendingLink::new(ours).unwrap();
        link.write_all(&vec![9; 64 << 20]).unwrap();
        receiver.join().unwrap();
    }

    #[test]
    fn a_receiver_that_is_silent_is_given_up() {
        let (ours, _theirs) = pair();
        let mut link = SendingLink::new(ours).unwrap();
        let started = Instant::now();
        let error = link.write_all(&vec![9; 64 << 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(started.elapsed() > SILENCE_MAX);
    }

    /// Its heartbeats come. What waits for others may wait longer.
    #[test]
    fn a_receiver_that_does_not_get_on_is_given_up() {
        let started = Instant::now();
        let mut listening = Listening::new();
        let refuses = |listening: &mut Listening, after: Duration| {
            let now = started + after;
            listening.heard = now;
            listening.check_at(started, now).is_err()
        };
        let second = Duration::from_secs(1);
        assert!(!refuses(&mut listening, 2 * TURN_MAX), "nothing is on its way");
        listening.note_sent(&pass_record(0).unwrap());
        listening.note_sent(&page_data_head(&[]).unwrap());
        listening.got_on = started;
        assert!(!refuses(&mut listening, TURN_MAX - second));
        assert!(refuses(&mut listening, TURN_MAX + second));
        listening.take(&1_u64.to_le_bytes());
        listening.got_on = started + TURN_MAX;
        assert!(!refuses(&mut listening, TURN_MAX + STALL_MAX - second));
        assert!(refuses(&mut listening, TURN_MAX + STALL_MAX + second));
        let now = started + TURN_MAX + STALL_MAX + second;
        assert!(listening.check_at(now - second, now).is_ok(), "the connection has taken some");
    }

    /// It does so for as long as it is listened to.
    #[test]
    fn a_receiver_that_says_very_much_does_not_keep_the_sender_busy() {
        let (ours, theirs) = pair();
        let mut link = SendingLink::new(ours).unwrap();
        let talker = thread::spawn(move || {
            let words = [0; 1 << 16];
            while rustix::io::write(&theirs, &words).is_ok() {}
        });
        (0..1000).for_each(|_| assert_eq!(link.confirmed().unwrap(), 0));
        drop(link);
        talker.join().unwrap();
    }

    /// Nothing is to be sent, so nothing else would tell.
    #[test]
    fn a_link_that_idles_is_watched() {
        let (asked, asks) = pair();
        let (ours, theirs) = pair();
        let mut link = SendingLink::new(ours).unwrap();
        let started = Instant::now();
        let error = link.wait_for(asked.as_fd()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(started.elapsed() > SILENCE_MAX);
        rustix::io::write(&theirs, &7_u64.to_le_bytes()).unwrap();
        rustix::io::write(&asks, b"x").unwrap();
        link.wait_for(asked.as_fd()).unwrap();
        rustix::io::read(&asked, &mut [0]).unwrap();
        drop(theirs);
        assert_eq!(link.wait_for(asked.as_fd()).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(link.out.waiting.confirmed(), 7);
    }

    /// Every byte comes before it is time for a heartbeat.
    #[test]
    fn a_receiver_says_that_it_is_there_while_bytes_trickle_in() {
        let (ours, theirs) = pair();
        let receiver = thread::spawn(move || {
            let mut link = ReceivingLink::new(theirs).unwrap();
            link.read_exact(&mut [0; 16]).unwrap();
        });
        for _ in 0..16 {
            rustix::io::write(&ours, &[1]).unwrap();
            thread::sleep(Duration::from_millis(200));
        }
        receiver.join().unwrap();
        let mut said = [0; 64];
        assert!(rustix::io::read(&ours, &mut said).unwrap() >= 2 * CONFIRMATION_BYTES);
    }
}
