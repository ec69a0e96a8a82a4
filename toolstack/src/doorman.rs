//! Where links come in: the sender listens at its addresses, and lets in who knows the secret.
//!
//! Anybody can connect to a port. What has not shown its token yet costs a descriptor and a few
//! bytes, for [`HELLO_TIME`] at most, and no more than [`PENDING_MAX`] of them; each token is good
//! once. Once all links are there, or the migration is over, nobody listens any more.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rxl_migrate::stream::link::{
    HELLO_BYTES, LinkSet, Offer, Secret, Token, check_hello, hello, is_same,
};
use rxl_migrate::stream::reduced::{Agreed, Reduce};

use crate::tls::Identity;

/// Connections that may be there without having said who they are.
const PENDING_MAX: usize = 16;
/// How long they may take to say it.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// How long the sender may take to answer: until links are there its one process sends as well, and
/// looks at the door between two batches, each of which may be 4 MiB through a slow ssh.
pub(crate) const WELCOME_TIME: Duration = Duration::from_secs(30);

/// Lets links in.
#[derive(Debug)]
pub struct Doorman {
    offer: Offer,
    /// What encrypts links, if anything does.
    identity: Option<Identity>,
    listeners: Vec<TcpListener>,
    pending: Vec<Pending>,
    taken: LinkSet,
}

/// A connection whose hello is not complete.
#[derive(Debug)]
struct Pending {
    socket: OwnedFd,
    hello: [u8; HELLO_BYTES],
    length: usize,
    until: Instant,
}

impl Doorman {
    /// Listens at `addresses`, at ports that the system chooses, for `links` links, which are
    /// encrypted or not, and over which `reduce` may be left out of pages. An address at which one
    /// cannot listen is left out.
    ///
    /// # Errors
    /// There is none at which one can, or no secret to be had.
    pub fn open(
        addresses: &[IpAddr],
        links: u8,
        encrypted: bool,
        reduce: Reduce,
    ) -> io::Result<Doorman> {
        let mut listeners = Vec::new();
        let mut failure = None;
        for address in addresses {
            match listen(*address) {
                Ok(listener) => listeners.push(listener),
                Err(error) => failure = Some(error),
            }
        }
        let places: Vec<SocketAddr> =
            listeners.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
        if places.is_empty() {
            return Err(failure.unwrap_or_else(|| ErrorKind::AddrNotAvailable.into()));
        }
        let identity = encrypted.then(Identity::new).transpose()?;
        let mut offer = Offer::new(links, Secret::new(random()?), places);
        offer.certificate = identity.as_ref().map(Identity::fingerprint);
        offer.reduce = reduce;
        let (pending, taken) = (Vec::new(), LinkSet::default());
        Ok(Doorman { offer, identity, listeners, pending, taken })
    }

    /// What encrypts links, if anything does.
    #[must_use]
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// What the receiver has to be told.
    #[must_use]
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// What to wait for; when one of them can be read, [`Doorman::attend`].
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let listeners = self.listeners.iter().map(AsFd::as_fd);
        listeners.chain(self.pending.iter().map(|pending| pending.socket.as_fd()))
    }

    /// Lets in who can be let in: each link's number, what holds for it, and its connection. Does
    /// not wait.
    pub fn attend(&mut self) -> Vec<(u8, Agreed, OwnedFd)> {
        let mut come = Vec::new();
        for listener in 0..self.listeners.len() {
            self.accept(listener);
            // Before the next one's connections take the place of these.
            come.extend(self.hear());
        }
        if self.taken.iter().count() >= usize::from(self.offer.links) {
            self.listeners.clear();
            self.pending.clear();
        }
        come
    }

    fn accept(&mut self, listener: usize) {
        // No more at a time than there is room for: whoever floods does not keep rxl busy.
        for _ in 0..PENDING_MAX {
            let accepted = self.listeners.get(listener).map(TcpListener::accept);
            let Some(Ok((stream, _))) = accepted else { break };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.pending.len() >= PENDING_MAX {
                // The one that has been silent for longest.
                self.pending.remove(0);
            }
            let until = Instant::now() + HELLO_TIME;
            let hello = [0; HELLO_BYTES];
            self.pending.push(Pending { socket: stream.into(), hello, length: 0, until });
        }
    }

    /// Reads what those have said who are there, and lets in or turns away who has said all.
    fn hear(&mut self) -> Vec<(u8, Agreed, OwnedFd)> {
        let mut come = Vec::new();
        let mut still = Vec::new();
        for mut pending in std::mem::take(&mut self.pending) {
            match pending.read() {
                Ok(true) => come.extend(self.let_in(pending)),
                Ok(false) if pending.until > Instant::now() => still.push(pending),
                Ok(false) | Err(_) => tracing::debug!("a connection that said nothing is closed"),
            }
        }
        self.pending = still;
        come
    }

    fn let_in(&mut self, pending: Pending) -> Option<(u8, Agreed, OwnedFd)> {
        let good = check_hello(&self.offer.secret, &pending.hello);
        let good = good.filter(|(link, _)| *link < self.offer.links && !self.taken.contains(*link));
        let Some((link, reduce)) = good else {
            tracing::warn!("a connection that does not know the secret is refused");
            return None;
        };
        let welcome = self.offer.secret.welcome_token(link);
        // Nothing has been sent on it before, so there is room for all of it.
        let sent = rustix::net::send(&pending.socket, &welcome, SendFlags::NOSIGNAL);
        if !matches!(sent, Ok(count) if count == welcome.len()) {
            return None;
        }
        self.taken.insert(link);
        Some((link, self.offer.agreed(reduce), pending.socket))
    }
}

impl Pending {
    /// Reads what has come of the hello. `true`: it is complete.
    fn read(&mut self) -> io::Result<bool> {
        let rest = self.hello.get_mut(self.length..).unwrap_or_default();
        match rustix::net::recv(&self.socket, rest, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(ErrorKind::UnexpectedEof.into()),
            Ok((count, _)) => {
                self.length += count;
                Ok(self.length >= HELLO_BYTES)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn listen(address: IpAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((address, 0))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        done += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

/// Opens link `link` to one of `addresses`, the first that answers as it should.
///
/// # Errors
/// None does; the last one's reason.
pub fn open_link(offer: &Offer, link: u8) -> io::Result<OwnedFd> {
    let count = offer.addresses.len();
    let mut failure = ErrorKind::AddrNotAvailable.into();
    // Each link begins at another address, so that all are used if all answer.
    for address in offer.addresses.iter().cycle().skip(usize::from(link)).take(count) {
        match open_link_to(*address, offer, link) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn open_link_to(address: SocketAddr, offer: &Offer, link: u8) -> io::Result<OwnedFd> {
    let mut stream = TcpStream::connect_timeout(&address, HELLO_TIME)?;
    stream.set_read_timeout(Some(WELCOME_TIME))?;
    stream.write_all(&hello(&offer.secret, link, offer.known()))?;
    let mut welcome = Token::default();
    stream.read_exact(&mut welcome)?;
    if !is_same(&offer.secret.welcome_token(link), &welcome) {
        return Err(io::Error::new(ErrorKind::PermissionDenied, "the other end is not the sender"));
    }
    stream.set_read_timeout(None)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn wait_for(doorman: &mut Doorman, links: usize) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(20);
        let mut come = Vec::new();
        while come.len() < links {
            assert!(Instant::now() < end, "{come:?}");
            come.extend(doorman.attend().into_iter().map(|(link, ..)| link));
            thread::sleep(Duration::from_millis(1));
        }
        come.sort_unstable();
        come
    }

    #[test]
    fn who_knows_the_secret_is_let_in_once() {
        let mut doorman = Doorman::open(&[HERE, HERE], 3, false, Reduce::ALL).unwrap();
        let offer = doorman.offer().clone();
        assert_eq!(offer.addresses.len(), 2);
        let open = |link| {
            let offer = offer.clone();
            thread::spawn(move || open_link(&offer, link).is_ok())
        };
        let first = open(0);
        assert_eq!(wait_for(&mut doorman, 1), [0]);
        assert!(first.join().unwrap());
        // The same again, and one that was not offered.
        let refused = [open(0), open(3)];
        let good = [open(1), open(2)];
        assert_eq!(wait_for(&mut doorman, 2), [1, 2]);
        assert!(good.into_iter().all(|one| one.join().unwrap()));
        assert!(refused.into_iter().all(|one| !one.join().unwrap()));
        assert_eq!(doorman.descriptors().count(), 0, "somebody listens though all links are there");
    }

    #[test]
    fn a_flood_of_strangers_costs_little_and_does_not_keep_a_link_out() {
        let mut doorman = Doorman::open(&[HERE], 1, true, Reduce::NONE).unwrap();
        let offer = doorman.offer().clone();
        let mut strangers = Vec::new();
        for number in 0..200_u32 {
            let mut stranger = TcpStream::connect(offer.addresses[0]).unwrap();
            // Some say something else, some begin as they should, some say nothing.
            match number % 3 {
                0 => stranger.write_all(&[7; HELLO_BYTES]).unwrap(),
                1 => stranger.write_all(b"rxl-link").unwrap(),
                _ => {}
            }
            strangers.push(stranger);
            assert_eq!(doorman.attend().len(), 0);
            assert!(doorman.pending.len() <= PENDING_MAX);
        }
        let link = thread::spawn(move || open_link(&offer, 0).is_ok());
        assert_eq!(wait_for(&mut doorman, 1), [0]);
        assert!(link.join().unwrap());
        // They are all closed.
        for mut stranger in strangers {
            stranger.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert!(matches!(stranger.read(&mut [0]), Ok(0) | Err(_)));
        }
    }

    #[test]
    fn strangers_at_one_address_do_not_push_away_who_waits_at_another() {
        let mut doorman = Doorman::open(&[HERE, HERE], 1, false, Reduce::NONE).unwrap();
        let offer = doorman.offer().clone();
        let mut link = TcpStream::connect(offer.addresses[0]).unwrap();
        link.write_all(&hello(&offer.secret, 0, offer.known())).unwrap();
        let stranger = |_| TcpStream::connect(offer.addresses[1]).unwrap();
        let strangers: Vec<TcpStream> = (0..2 * PENDING_MAX).map(stranger).collect();
        let come = doorman.attend();
        assert_eq!(come.into_iter().map(|(link, ..)| link).collect::<Vec<_>>(), [0]);
        drop(strangers);
    }

    #[test]
    fn a_receiver_does_not_take_anybody_for_the_sender() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let secret = Secret::new([3; 32]);
        let offer = Offer::new(1, secret, vec![listener.local_addr().unwrap()]);
        let impostor = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[0; 32]).unwrap();
            stream
        });
        assert_eq!(open_link(&offer, 0).unwrap_err().kind(), ErrorKind::PermissionDenied);
        drop(impostor.join().unwrap());
    }
}
