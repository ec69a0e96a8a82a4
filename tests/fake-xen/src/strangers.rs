//! Strangers at the sender's door while a guest moves over links, and somebody who listens.
//!
//! The stream is held back until they are there; they know the addresses that the sender listens
//! at, and one has stolen a hello, which goes over the network in the clear. What they must not
//! come to is in [`Besieged`]; the offer itself is the test's alone.
//!
//! Listening takes a packet socket, and so root.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{process, thread};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, recv, socket, sockopt};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rxl_migrate::fake::WIRING;
use rxl_migrate::frame::PageBuf;
use rxl_migrate::stream::libxc::{RECORD_HEADER_BYTES, RecordKind, StreamHeader};
use rxl_migrate::stream::link::{HELLO_BYTES, Offer, hello};
use rxl_migrate::stream::reduced::Reduce;

use crate::migration::{Migration, Rig, compared, joined};

/// Strangers that come, as long as somebody listens.
const STRANGERS: usize = 2000;
/// So many of them come before the receiver hears of the offer; the others meanwhile.
const FIRST: usize = 1000;
/// Between two pieces of the stream until then, so that not all memory is in it.
const HELD_UP: Duration = Duration::from_millis(2);
/// How long a stranger waits to be heard: who listens accepts a few at a time.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(200);
/// Between two bytes that a slow stranger sends.
const SLOW: Duration = Duration::from_millis(20);
/// What the guest's pages are full of. It is this process's own: who listens hears others too.
static MARK: LazyLock<[u8; 8]> = LazyLock::new(|| {
    let mut mark = *b"Xguest!X";
    mark.iter_mut().skip(1).zip(process::id().to_le_bytes()).for_each(|(to, byte)| *to = byte);
    mark
});
/// Bytes of a packet between two places at which the mark is looked for.
const STRIDE: usize = 1024;
const ETH_P_ALL: u16 = 3;
const PIECE_BYTES: usize = 64 << 10;

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Besieged {
    /// Strangers that were connected for a while.
    pub strangers: usize,
    /// Whether the stolen hello was answered: then a stranger had a connection to one worker.
    pub stolen: bool,
    /// Bytes that went over the stream.
    pub over_stream: usize,
    /// The most that the sender's processes had resident, in KiB.
    pub peak_kib: u64,
    /// Packets that were looked into, and those with the guest's memory in them.
    pub packets: usize,
    /// See `packets`.
    pub in_clear: usize,
}

impl Rig {
    /// Moves a guest over links as `migration` says, with strangers at the door or without.
    ///
    /// # Errors
    /// The migration fails, the copy differs, or nothing can be listened to.
    pub fn besieged(&self, migration: &Migration, strangers: bool) -> Result<Besieged> {
        allow_files()?;
        let source = migration.source()?;
        let page = marked();
        source.domain.fill(|_| Some(page.clone()));
        let target = migration.target(&source.domain)?;
        let (save_end, from) = UnixStream::pair().context("Cannot make a socket")?;
        let (to, restore_end) = UnixStream::pair().context("Cannot make a socket")?;
        let (over, tap) = (&AtomicBool::new(false), tap()?);
        let (saved, restored, siege, heard) = thread::scope(|scope| {
            let heard = scope.spawn(move || listen(&tap, over));
            let siege = scope.spawn(move || carry(from, to, strangers, over));
            let helper = self.helper_of(migration, migration.to, &target, "none");
            let restore = scope.spawn(move || helper.restore(restore_end.into(), &WIRING));
            let helper = self.helper_of(migration, migration.from, &source, "none");
            let saved = helper.save(save_end.into(), false);
            let restored = joined(restore);
            over.store(true, Ordering::Relaxed);
            (saved, restored, joined(siege), joined(heard))
        });
        let (saved, restored) = (saved?, restored?);
        let (Siege { strangers, stolen, over_stream }, (packets, in_clear)) = (siege?, heard?);
        ensure!(saved.succeeded(), "saving: {}", saved.describe());
        let differences = compared(migration, &source, &target, &restored)?;
        ensure!(differences.is_empty(), "the copy differs: {differences:?}");
        source.check_left_behind()?;
        target.check_left_behind()?;
        let peak_kib = saved.used.peak_kib;
        Ok(Besieged { strangers, stolen, over_stream, peak_kib, packets, in_clear })
    }
}

/// Lets this process have as many descriptors as it may: each stranger is one.
fn allow_files() -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = Rlimit { current: maximum, maximum };
    setrlimit(Resource::Nofile, most).context("Cannot have more descriptors")
}

fn marked() -> Box<PageBuf> {
    let mut page = PageBuf::zeroed();
    page.0.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = *MARK);
    page
}

struct Siege {
    strangers: usize,
    stolen: bool,
    over_stream: usize,
}

/// Carries the stream. Once the offer is in it, it is held back until strangers are there.
fn carry(
    mut from: UnixStream,
    mut to: UnixStream,
    strangers: bool,
    over: &AtomicBool,
) -> Result<Siege> {
    let (mut begun, mut held, mut over_stream) = (!strangers, Vec::new(), 0);
    let ready = &AtomicBool::new(false);
    thread::scope(|scope| {
        let mut crowd = None;
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = from.read(&mut piece).context("Cannot read the stream")?;
            let got = piece.get(..count).unwrap_or_default();
            over_stream += count;
            held.extend_from_slice(got);
            if !begun && let Some(offer) = offer(&held)? {
                crowd = Some(scope.spawn(move || besiege(&offer, ready, over)));
                begun = true;
            }
            let may_go = !strangers || ready.load(Ordering::Relaxed);
            // Who restores says itself why it reads no more.
            let broken = (may_go || count == 0) && to.write_all(&held).is_err();
            if broken || count == 0 {
                break;
            }
            if may_go {
                held.clear();
            } else {
                thread::sleep(HELD_UP);
            }
        }
        drop(to);
        let (strangers, stolen) = crowd.map_or(Ok((0, false)), joined)?;
        Ok(Siege { strangers, stolen, over_stream })
    })
}

/// The offer, if the stream's beginning has it: it is the first record.
fn offer(stream: &[u8]) -> Result<Option<Offer>> {
    let Some(record) = stream.get(StreamHeader::BYTES..) else {
        return Ok(None);
    };
    let word = |offset: usize| {
        let bytes = record.get(offset..).and_then(|bytes| bytes.first_chunk());
        bytes.map(|bytes| u32::from_le_bytes(*bytes))
    };
    let (Some(kind), Some(length)) = (word(0), word(4)) else { return Ok(None) };
    ensure!(kind == RecordKind::RxlOffer.code(), "the stream begins with a record {kind:#x}");
    let body = record.get(RECORD_HEADER_BYTES..).and_then(|body| body.get(..length as usize));
    body.map_or(Ok(None), |body| Offer::parse(body).context("the offer"))
}

/// Strangers come, and stay until it is `over`. `ready`: the first of them are there. How many
/// were connected, and whether the stolen hello was answered.
fn besiege(offer: &Offer, ready: &AtomicBool, over: &AtomicBool) -> Result<(usize, bool)> {
    let first = *offer.addresses.first().context("an offer without an address")?;
    let stolen = steal(offer, first);
    let (mut crowd, mut next) = (Vec::new(), 0);
    for (number, address) in offer.addresses.iter().cycle().take(STRANGERS).enumerate() {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let mut stranger = match TcpStream::connect_timeout(address, CONNECT_TIMEOUT) {
            Ok(stranger) => stranger,
            // All links are there, and nobody listens any more.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => break,
            Err(_) => continue,
        };
        // A third says something, a third begins well, a third says nothing.
        let _ = match number % 3 {
            0 => stranger.write_all(&[7; HELLO_BYTES]),
            1 => stranger.write_all(b"rxl-link"),
            _ => Ok(()),
        };
        crowd.push(stranger);
        ready.fetch_or(crowd.len() >= FIRST, Ordering::Relaxed);
    }
    ready.store(true, Ordering::Relaxed);
    while !over.load(Ordering::Relaxed) {
        next = (next + 1) % crowd.len().max(1);
        if let Some(stranger) = crowd.get_mut(next) {
            let _ = stranger.write(&[0]);
        }
        thread::sleep(SLOW);
    }
    Ok((crowd.len(), stolen))
}

/// Shows the hello of the first link, as somebody who has seen it, and then nonsense: whether it
/// was welcome. The connection is left open until the sender has seen that.
fn steal(offer: &Offer, address: SocketAddr) -> bool {
    let Ok(mut thief) = TcpStream::connect_timeout(&address, Duration::from_secs(5)) else {
        return false;
    };
    let (mut answer, mut more) = ([0; 32], [0; 4096]);
    let shown = thief
        .write_all(&hello(&offer.secret, 0, Reduce::NONE))
        .and_then(|()| thief.set_read_timeout(Some(Duration::from_secs(10))))
        .and_then(|()| thief.read_exact(&mut answer))
        .and_then(|()| thief.write_all(&[0x16; 512]));
    // Its end, after what it says of the nonsense.
    while shown.is_ok() && thief.read(&mut more).is_ok_and(|count| count > 0) {}
    shown.is_ok()
}

/// A socket on which all packets of this machine are seen.
fn tap() -> Result<OwnedFd> {
    let all = NonZeroU32::new(u32::from(ETH_P_ALL.to_be())).map(Protocol::from_raw);
    let tap = socket(AddressFamily::PACKET, SocketType::RAW, all);
    let tap = tap.context("Cannot listen to the network (only root can)")?;
    sockopt::set_socket_recv_buffer_size_force(&tap, 64 << 20).context("a large buffer")?;
    Ok(tap)
}

/// Packets that were seen until it is `over`, and those with the mark in them.
fn listen(tap: &OwnedFd, over: &AtomicBool) -> Result<(usize, usize)> {
    let tick = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let (mut packets, mut marked, mut packet) = (0, 0, vec![0; 128 << 10]);
    loop {
        let mut fds = [PollFd::new(tap, PollFlags::IN)];
        if poll(&mut fds, Some(&tick)).context("waiting for packets")? == 0 {
            if over.load(Ordering::Relaxed) {
                return Ok((packets, marked));
            }
            continue;
        }
        let (count, _) = recv(tap, &mut packet[..], RecvFlags::DONTWAIT).context("a packet")?;
        packets += 1;
        marked += usize::from(is_marked(packet.get(..count).unwrap_or_default()));
    }
}

/// Whether the mark is at one of the places that are looked at.
fn is_marked(packet: &[u8]) -> bool {
    let window = 2 * MARK.len() - 1;
    let mut places = packet.windows(window).step_by(STRIDE);
    places.any(|place| place.windows(MARK.len()).any(|word| word == *MARK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_wherever_a_packet_begins() {
        let page = marked();
        assert!((0..8).all(|offset| is_marked(&page.0[offset..])));
        assert!(!is_marked(&[0; 4096]) && !is_marked(&MARK[..]));
    }
}
