//! The ends of links that are not rxl's: they say anything, and go away at last.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;

use rxl_migrate::fake::{FakeDomain, FakePages, FakeToolstack, Rng, Wire};
use rxl_migrate::hypervisor::{PagePiece, StreamOut};
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::workers::{
    Confirmed, Employer, News, Reply, Request, WorkerId, Workers, work,
};
use rxl_migrate::source::{Options, Reducing, Verify, save_with};
use rxl_migrate::stream::FormatError;
use rxl_migrate::stream::link::{
    LinkSet, Offer, Secret, hello, link_lost_record, pass_end_record, pass_record,
};
use rxl_migrate::stream::reduced::Reduce;

use crate::door::{Connection, Doorman, call};
use crate::peer::damage;
use crate::pipe::{End, PipeId};
use crate::process::Process;
use crate::world::{Cond, Role};

/// Where the hostile sender listens.
const PORT: u16 = 3_999;
/// What an end does at most before it goes.
const ACTS_MAX: u64 = 40;

/// Starts the receiver's ends.
pub(crate) fn receive(process: &Process<'_>) {
    let links = process.world().plan.ways.links.len() as u8;
    for link in 0..links {
        let body = move |p: &Process<'_>| drop(lie_as_receiver(p, link));
        process.world().spawn(Role::RestoreWorker, &[], Box::new(body));
    }
}

fn lie_as_receiver(process: &Process<'_>, link: u8) -> io::Result<()> {
    let mut rng = Rng::new(process.world().rng.next());
    let offer = (0..200).find_map(|_| {
        process.sleep(20);
        process.world().doors.first().map(|door| door.offer.clone())
    });
    let Some(offer) = offer else { return Ok(()) };
    let Connection { there, back, .. } = call(process, &offer, link)?;
    process.world().facts.coverage.count("links: a lying receiver");
    let mut greeting = hello(&offer.secret, link, offer.known()).to_vec();
    if rng.one_in(8) {
        damage(&mut greeting, &mut rng);
    }
    process.write(back, &greeting)?;
    let (mut bytes, mut records) = ([0; 4096], 0);
    for _ in 0..rng.below(ACTS_MAX) {
        match rng.below(8) {
            0 => process.sleep([1, 300, 3_000, 20_000][rng.index(4)]),
            1..=4 => {
                let until = Cond::At(process.world().now + 2_000);
                process.wait([Cond::Readable(there), until, Cond::Never, Cond::Never]);
                if let Some(read) = process.try_read(there, &mut bytes) {
                    records += u64::from(read? > 0);
                }
            }
            _ => {
                let word = [0, 1, records, records + 1_000, u64::MAX, rng.next()][rng.index(6)];
                let word = word.to_le_bytes();
                let length = if rng.one_in(6) { rng.index(8) } else { 8 };
                process.write(back, word.get(..length.max(1)).unwrap_or_default())?;
            }
        }
    }
    Ok(())
}

/// What the sender's end of a stream with links says: the stream, and what goes over each link,
/// more or less.
pub(crate) struct Lies {
    pub(crate) stream: Vec<u8>,
    offer: Offer,
    links: Vec<Vec<u8>>,
}

/// Makes them up of what the product says.
pub(crate) fn make_up(guest: &FakeDomain, links: u8, rng: &mut Rng) -> Lies {
    let secret = rng.bytes(32).try_into().unwrap_or([0; 32]);
    let address = SocketAddr::from(([192, 0, 2, 1], PORT));
    let mut offer = Offer::new(links, Secret::new(secret), vec![address]);
    offer.reduce = Reduce::ALL;
    let mut wires = vec![Wire::default(); usize::from(links)];
    let joined = (0..links).map(|link| News::Joined(link.into(), Some(link)));
    let workers = InMemory { guest, offer: &offer, wires: &mut wires, news: joined.collect() };
    let verify = if rng.one_in(3) { Verify::Digests } else { Verify::No };
    let (mut wire, options) =
        (Wire::default(), Options { live: rng.one_in(2), verify, policy: Policy::Stock });
    let mut toolstack = FakeToolstack::new(guest);
    let _ = save_with(guest, &mut wire, &mut toolstack, Some(Box::new(workers)), &options);
    let mut stream = wire.bytes;
    let mut links: Vec<Vec<u8>> = wires.into_iter().map(|wire| wire.bytes).collect();
    for (bytes, start) in links.iter_mut().map(|link| (link, 0)).chain([(&mut stream, 24)]) {
        for _ in 0..rng.below(3) {
            insert(bytes, start, rng);
        }
        if rng.one_in(6) {
            damage(bytes, rng);
        }
    }
    Lies { stream, offer, links }
}

/// Puts a record about links where a record may begin.
fn insert(bytes: &mut Vec<u8>, start: usize, rng: &mut Rng) {
    let mut places = vec![start];
    while let Some(at) = places.last().copied() {
        let Some(header) = bytes.get(at..at + 8) else { break };
        let length = header.iter().skip(4).rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        places.push(at + 8 + length.next_multiple_of(8));
    }
    let at = places[rng.index(places.len())].min(bytes.len());
    let number = [0, 1, 2, 5, u32::MAX][rng.index(5)];
    let record: Result<Vec<u8>, FormatError> = match rng.below(4) {
        0 => pass_record(number),
        1 => pass_end_record(number, LinkSet(rng.next())),
        2 => link_lost_record(number as u8),
        // One that was there already.
        _ => {
            let from = rng.index(places.len());
            let part = places.get(from..=from + 1).and_then(|p| bytes.get(p[0]..p[1]));
            Ok(part.unwrap_or_default().to_vec())
        }
    };
    bytes.splice(at..at, record.unwrap_or_default());
}

/// Workers of links that lead nowhere, and confirm all at once.
struct InMemory<'a> {
    guest: &'a FakeDomain,
    offer: &'a Offer,
    wires: &'a mut [Wire],
    news: VecDeque<News>,
}

/// One request, and what came of it.
struct Once(Option<Request>, Option<Reply>);

struct Nowhere<'a>(&'a mut Wire);

impl Workers for InMemory<'_> {
    fn offer(&self) -> Option<Offer> {
        Some(self.offer.clone())
    }

    fn submit(&mut self, worker: WorkerId, request: &Request) -> io::Result<()> {
        let mut once = Once(Some(request.clone()), None);
        let agreed = self.offer.agreed(self.offer.known());
        let reducing = Reducing::timeless(agreed);
        let _ = work(self.guest, &mut Nowhere(&mut self.wires[worker]), &mut once, reducing);
        self.news.push_back(match once.1 {
            Some(reply) => News::Reply(worker, Reply { confirmed: reply.sent, ..reply }),
            None => News::Ended(worker, "it has failed".into()),
        });
        Ok(())
    }

    fn news(&mut self, _wait: bool) -> io::Result<Option<News>> {
        Ok(self.news.pop_front())
    }

    fn dismiss(&mut self, _worker: WorkerId) {}
}

impl<O> Employer<O> for Once {
    fn next(&mut self, _way: &mut O) -> io::Result<Option<Request>> {
        Ok(self.0.take())
    }

    fn next_at_hand(&mut self) -> io::Result<Option<Request>> {
        Ok(None)
    }

    fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        self.1 = Some(reply.clone());
        Ok(())
    }
}

impl StreamOut<FakePages> for Nowhere<'_> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        self.0.write_pages(head, pieces)
    }
}

impl Confirmed for Nowhere<'_> {
    fn confirmed(&mut self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn wait_confirmed(&mut self, _records: u64) -> io::Result<()> {
        Ok(())
    }
}

impl Lies {
    /// Starts a process that lets links in, and tells each of them its part.
    pub(crate) fn tell(&mut self, process: &Process<'_>) {
        let (offer, links) = (self.offer.clone(), std::mem::take(&mut self.links));
        let keep = move |p: &Process<'_>| keep_door(p, offer, links);
        process.world().spawn(Role::SaveWorker, &[], Box::new(keep));
    }
}

fn keep_door(process: &Process<'_>, offer: Offer, mut links: Vec<Vec<u8>>) {
    let mut doorman = Doorman::at(process, offer, PORT);
    for _ in 0..400 {
        process.sleep(50);
        for (link, _, there, back) in doorman.attend() {
            process.world().facts.coverage.count("links: a lying sender");
            let bytes = links.get_mut(usize::from(link)).map(std::mem::take).unwrap_or_default();
            let ends = [(there, End::Write), (back, End::Read)];
            let tell = move |p: &Process<'_>| drop(lie_as_sender(p, there, &bytes));
            process.world().spawn(Role::SaveWorker, &ends, Box::new(tell));
            ends.into_iter().for_each(|(pipe, end)| process.close(pipe, end));
        }
        if !doorman.is_open() {
            return;
        }
    }
}

fn lie_as_sender(process: &Process<'_>, there: PipeId, bytes: &[u8]) -> io::Result<()> {
    let mut rng = Rng::new(process.world().rng.next());
    let mut left = bytes;
    while !left.is_empty() {
        if rng.one_in(20) {
            process.sleep([1, 300, 6_000][rng.index(3)]);
        }
        // It does not stay for ever where nobody reads.
        let until = Cond::At(process.world().now + 20_000);
        process.wait([Cond::Writable(there), until, Cond::Never, Cond::Never]);
        let Some(count) = process.try_write(there, left) else { return Ok(()) };
        left = left.get(count?..).unwrap_or_default();
    }
    process.sleep([0, 1_000, 70_000][rng.index(3)]);
    Ok(())
}
