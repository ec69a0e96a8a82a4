//! The two ends of an encrypted link: what [`super::link`] is without encryption.
//!
//! A page is copied once more than there, into the buffer that is encrypted; the kernel cannot
//! encrypt from guest memory, and nobody else may look at it in place.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rxl_migrate::frame::PageBuf;
use rxl_migrate::hypervisor::{ForeignPages, PagePiece, PageSlot, StreamIn, StreamOut};
use rxl_migrate::source::workers::Confirmed;
use rxl_migrate::stream::link::{Fingerprint, TOKEN_BYTES, Token, is_same};
use rxl_migrate::target::links::LinkIn;

use super::foreign::Mapping;
use super::link::{Heartbeat, Idle, Listening, prepare};
use crate::tls::{Identity, Tls};

/// Bytes that are encrypted at a time: few enough to stay in the cache, and 16 of TLS's records.
const PIECE_BYTES: usize = 256 << 10;
/// Reads of confirmations in a row: far more than a receiver has to say at a time.
const READS_MAX: usize = 64;

/// The sender's end. What is written to it at a time is one record.
#[derive(Debug)]
pub struct SealedOut {
    tls: Tls,
    listening: Listening,
    /// What is about to be encrypted.
    piece: Vec<u8>,
}

impl SealedOut {
    /// Over the connection `socket`, whose other end has to show `proof` through it.
    ///
    /// # Errors
    /// The other end is somebody else, or silent; the system's.
    pub fn open(socket: OwnedFd, identity: &Identity, proof: &Token) -> io::Result<SealedOut> {
        prepare(socket.as_fd())?;
        let tls = Tls::server(socket, identity)?;
        let (listening, piece) = (Listening::new(), Vec::with_capacity(PIECE_BYTES));
        let mut link = SealedOut { tls, listening, piece };
        let mut shown = [0; TOKEN_BYTES];
        let mut have = 0;
        let started = Instant::now();
        while let Some(rest) = shown.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match link.tls.receive(rest) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => have += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let unsent =
                        if link.tls.wants_write() { PollFlags::OUT } else { PollFlags::IN };
                    Listening::poll(link.tls.as_fd(), PollFlags::IN | unsent)?;
                    link.listening.check(started)?;
                    match link.tls.flush() {
                        Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                        _ => {}
                    }
                }
                Err(error) => return Err(error),
            }
        }
        if !is_same(proof, &shown) {
            let why = "the other end is not the receiver";
            return Err(io::Error::new(ErrorKind::PermissionDenied, why));
        }
        Ok(link)
    }

    /// Encrypts and sends what has been gathered.
    fn send_piece(&mut self) -> io::Result<()> {
        self.tls.put(&self.piece)?;
        self.piece.clear();
        let started = Instant::now();
        loop {
            match self.tls.flush() {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let waiting = Instant::now();
                    Listening::poll(self.tls.as_fd(), PollFlags::IN | PollFlags::OUT)?;
                    self.listening.stalled += waiting.elapsed();
                    self.hear()?;
                    self.listening.check(started)?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn gather(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = PIECE_BYTES - self.piece.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.piece.extend_from_slice(now);
            bytes = later;
            if self.piece.len() == PIECE_BYTES {
                self.send_piece()?;
            }
        }
        Ok(())
    }

    /// Takes what confirmations have come, if they are not very many; as [`super::link`] does.
    fn hear(&mut self) -> io::Result<()> {
        let mut bytes = [0; 512];
        // What has been decrypted is not seen by whoever waits for the socket.
        for _ in 0..READS_MAX {
            match self.tls.receive(&mut bytes) {
                Ok(0) => return Err(ErrorKind::ConnectionReset.into()),
                Ok(count) => self.listening.take(bytes.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl StreamOut<Mapping> for SealedOut {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.listening.note_sent(bytes);
        self.gather(bytes)?;
        self.send_piece()
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, Mapping>]) -> io::Result<()> {
        self.listening.note_sent(head);
        self.gather(head)?;
        let mut page = PageBuf::zeroed();
        for piece in pieces {
            match piece {
                PagePiece::Mapped(pages, index) => {
                    // A page outside reads as zeros, which is not to be sent.
                    pages.address(*index)?;
                    pages.read_page(*index, &mut page);
                    self.gather(&page.0)?;
                }
                PagePiece::Copied(copy) => self.gather(&copy.0)?,
            }
        }
        self.send_piece()
    }

    fn stalled_ns(&self) -> u64 {
        self.listening.stalled_ns()
    }
}

impl Confirmed for SealedOut {
    fn confirmed(&mut self) -> io::Result<u64> {
        self.hear()?;
        Ok(self.listening.confirmed())
    }

    fn wait_confirmed(&mut self, records: u64) -> io::Result<()> {
        let started = Instant::now();
        while self.confirmed()? < records {
            Listening::poll(self.tls.as_fd(), PollFlags::IN)?;
            self.hear()?;
            self.listening.check(started)?;
        }
        Ok(())
    }
}

impl Idle for SealedOut {
    fn wait_for(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let started = Instant::now();
        while !Listening::poll_beside(self.tls.as_fd(), socket)? {
            self.hear()?;
            self.listening.check(started)?;
        }
        Ok(())
    }
}

/// The receiver's end.
#[derive(Debug)]
pub struct SealedIn {
    tls: Rc<RefCell<Tls>>,
    heartbeat: Heartbeat,
}

impl SealedIn {
    /// Over the connection `socket`, whose other end has to have the certificate `trusted`; then
    /// shows `proof`.
    ///
    /// # Errors
    /// The other end is somebody else, or silent for longer than `patience`; the system's.
    pub fn open(
        socket: OwnedFd,
        trusted: Fingerprint,
        proof: &Token,
        patience: Duration,
    ) -> io::Result<SealedIn> {
        prepare(socket.as_fd())?;
        let mut tls = Tls::client(socket, trusted)?;
        tls.put(proof)?;
        let started = Instant::now();
        // The proof leaves only once the other end has shown its certificate.
        while let Err(error) = shake_hands(&mut tls) {
            if error.kind() != ErrorKind::WouldBlock {
                return Err(error);
            }
            let wanted = if tls.wants_write() { PollFlags::OUT } else { PollFlags::IN };
            Listening::poll(tls.as_fd(), wanted)?;
            if started.elapsed() > patience {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        let tls = Rc::new(RefCell::new(tls));
        let heartbeat = Heartbeat::sealed(Rc::clone(&tls));
        Ok(SealedIn { tls, heartbeat })
    }

    /// For whoever else makes this process wait.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }
}

/// Goes on with the handshake; `Ok` once both sides are done with it.
fn shake_hands(tls: &mut Tls) -> io::Result<()> {
    while tls.is_handshaking() {
        tls.flush()?;
        tls.advance()?;
    }
    tls.flush()
}

impl StreamIn<Mapping> for SealedIn {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            // Not borrowed while it waits: the heartbeat speaks meanwhile.
            let result = self.tls.borrow_mut().receive(rest);
            match result {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_pages(&mut self, pages: &Mapping, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        let mut page = PageBuf::zeroed();
        for slot in slots {
            match slot {
                PageSlot::Mapped(index) => {
                    pages.address(*index)?;
                    self.read_exact(&mut page.0)?;
                    pages.write_page(*index, &page);
                }
                PageSlot::Copied(copy) => self.read_exact(&mut copy.0)?,
            }
        }
        Ok(())
    }
}

impl SealedIn {
    fn wait(&self) -> io::Result<()> {
        let socket = self.tls.borrow().as_fd().try_clone_to_owned()?;
        self.heartbeat.wait_for(socket.as_fd(), PollFlags::IN)
    }
}

impl LinkIn<Mapping> for SealedIn {
    fn confirm(&mut self, records: u64) -> io::Result<()> {
        self.heartbeat.confirm(records)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours.into(), listener.accept().unwrap().0.into())
    }

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn pages_go_through_and_are_confirmed_and_nobody_reads_them_on_the_way() {
        let identity = Identity::new().unwrap();
        let trusted = identity.fingerprint();
        let (ours, theirs) = pair();
        let receiver = thread::spawn(move || {
            let mut link = SealedIn::open(theirs, trusted, &[5; 32], PATIENCE).unwrap();
            let mut bytes = vec![0; 8 << 20];
            link.read_exact(&mut bytes).unwrap();
            link.confirm(1).unwrap();
            let pages = Mapping::plain(&[0, 1], true);
            let mut copy = PageBuf::zeroed();
            let mut slots = [PageSlot::Mapped(1), PageSlot::Copied(&mut copy)];
            link.read_pages(&pages, &mut slots).unwrap();
            link.confirm(2).unwrap();
            // Until the sender has ended.
            assert!(link.read_exact(&mut [0]).is_err());
            (bytes.iter().all(|byte| *byte == 7), pages.read_u64(512), copy.0[0])
        });
        let mut link = SealedOut::open(ours, &identity, &[5; 32]).unwrap();
        link.write_all(&vec![7; 8 << 20]).unwrap();
        link.wait_confirmed(1).unwrap();
        let pages = Mapping::plain(&[0], true);
        pages.write_page(0, &PageBuf([3; 4096]));
        let copy = PageBuf([9; 4096]);
        link.write_pages(&[], &[PagePiece::Mapped(&pages, 0), PagePiece::Copied(&copy)]).unwrap();
        link.wait_confirmed(2).unwrap();
        assert!(link.write_pages(&[], &[PagePiece::Mapped(&pages, 1)]).is_err());
        drop(link);
        assert_eq!(receiver.join().unwrap(), (true, 0x0303_0303_0303_0303, 9));
    }

    #[test]
    fn an_impostor_at_either_end_is_refused() {
        let (real, other) = (Identity::new().unwrap(), Identity::new().unwrap());
        let trusted = real.fingerprint();
        let (ours, theirs) = pair();
        let impostor = thread::spawn(move || SealedOut::open(ours, &other, &[5; 32]).is_err());
        let refused = SealedIn::open(theirs, trusted, &[5; 32], PATIENCE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
        assert!(impostor.join().unwrap());

        let (ours, theirs) = pair();
        let impostor =
            thread::spawn(move || drop(SealedIn::open(theirs, trusted, &[6; 32], PATIENCE)));
        let refused = SealedOut::open(ours, &real, &[5; 32]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
        impostor.join().unwrap();
    }
}
