//! A peer that is not rxl: it says anything at any time. It always goes away at last, for there is
//! no limit to how long the product waits for a peer that stays.

use rxl_migrate::fake::{FakeToolstack, Rng, Wire};
use rxl_migrate::source;
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::xl::handshake::Message;
use rxl_migrate::xl::header::Header;

use crate::libxl::{END, HEAD};
use crate::peer_links;
use crate::pipe::{End, PipeId};
use crate::process::Process;
use crate::sender::start_transport;
use crate::world::{Cond, Side};

const MESSAGES: [Message; 5] =
    [Message::Banner, Message::Ready, Message::Go, Message::Report, Message::Destroyed];

/// One that plays the receiver.
pub(crate) fn receive(process: &Process<'_>, input: PipeId, output: PipeId) {
    peer_links::receive(process);
    let mut peer = Peer::new(process, input, output);
    // A good conversation, but each part may be something else.
    let _ = peer.say(Message::Banner)
        && peer.listen()
        && peer.say(Message::Ready)
        && peer.listen()
        && peer.say(Message::Report)
        && peer.say(Message::Destroyed);
    peer.linger();
}

/// One that plays the sender.
pub(crate) fn send(process: &Process<'_>) {
    process.step();
    let mut rng = process.world().rng.clone();
    let (input, output, _) = start_transport(process, crate::receiver::receive);
    let stream = stream(process, &mut rng);
    let mut peer = Peer::new(process, input, output);
    let _ = peer.rng.one_in(4) && peer.say(Message::Go);
    let written = peer.write(&stream);
    let _ = written && peer.listen() && peer.say(Message::Go) && peer.listen();
    let _ = peer.rng.one_in(3) && peer.say(Message::Go);
    peer.linger();
}

/// Header and stream of the guest, more or less.
fn stream(process: &Process<'_>, rng: &mut Rng) -> Vec<u8> {
    let (guest, config) = {
        let mut world = process.world();
        (world.machine(Side::Source).guest().clone(), world.plan.config())
    };
    let links = process.world().plan.ways.links.len() as u8;
    let stream = if links > 0 {
        let mut lies = peer_links::make_up(&guest, links, rng);
        lies.tell(process);
        lies.stream
    } else {
        let mut wire = Wire::default();
        let verify = if rng.one_in(4) { source::Verify::Again } else { source::Verify::No };
        let options = source::Options { live: false, verify, policy: Policy::Stock };
        let _ = source::save(&guest, &mut wire, &mut FakeToolstack::new(&guest), &options);
        wire.bytes
    };
    let header = Header::new(&config).map(|header| header.to_bytes()).unwrap_or_default();
    let mut bytes = [&header[..], &HEAD, &stream, &END].concat();
    // Links have their own.
    for _ in 0..rng.below(if links > 0 { 2 } else { 4 }) {
        damage(&mut bytes, rng);
    }
    bytes
}

pub(crate) fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) {
    if bytes.is_empty() {
        return;
    }
    // Most of a stream is pages, and most of what matters is at its start or its end.
    let near = rng.index(600.min(bytes.len()));
    let at = match rng.below(3) {
        0 => near,
        1 => bytes.len() - 1 - near,
        _ => rng.index(bytes.len()),
    };
    let length = 1 + rng.index(64);
    let end = (at + length).min(bytes.len());
    match rng.below(6) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes.truncate(at),
        2 => drop(bytes.drain(at..end)),
        3 => {
            let part = bytes[at..end].to_vec();
            bytes.splice(at..at, part);
        }
        4 => {
            let noise = rng.bytes(length);
            bytes.splice(at..at, noise);
        }
        _ => {
            let word = [0, u64::MAX, 1 << 31, 1 << 40, rng.next()][rng.index(5)];
            for (to, from) in bytes[at..].iter_mut().zip(word.to_le_bytes()) {
                *to = from;
            }
        }
    }
}

struct Peer<'a, 'b> {
    process: &'a Process<'b>,
    input: PipeId,
    output: PipeId,
    rng: Rng,
}

impl<'a, 'b> Peer<'a, 'b> {
    fn new(process: &'a Process<'b>, input: PipeId, output: PipeId) -> Self {
        let rng = Rng::new(process.world().rng.next());
        Peer { process, input, output, rng }
    }

    /// Says `message`, or something else. `false`: enough.
    fn say(&mut self, message: Message) -> bool {
        let mut bytes = message.text().to_vec();
        if message == Message::Report {
            bytes.push([0, 0, 1, 3, 255][self.rng.index(5)]);
        }
        match self.rng.below(12) {
            0 => bytes = MESSAGES[self.rng.index(5)].text().to_vec(),
            1 => damage(&mut bytes, &mut self.rng),
            2 => bytes = [&bytes[..], &bytes].concat(),
            3 => bytes.clear(),
            4 => {
                let length = self.rng.index(100);
                bytes = self.rng.bytes(length);
            }
            5 => return false,
            _ => {}
        }
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> bool {
        let mut left = bytes;
        while !left.is_empty() {
            match self.process.write(self.output, left) {
                Ok(n) => left = &left[n..],
                Err(_) => return false,
            }
        }
        true
    }

    /// Reads until nothing has come for a while. `false`: the other end is gone.
    fn listen(&mut self) -> bool {
        if self.rng.one_in(8) {
            return true;
        }
        let patience = [10, 3_000, 100_000][self.rng.index(3)];
        let mut buffer = [0; 4096];
        loop {
            let until = self.process.world().now + patience;
            let ready = Cond::Readable(self.input);
            self.process.wait([ready, Cond::At(until), Cond::Never, Cond::Never]);
            if !self.process.holds(ready) {
                return true;
            }
            match self.process.read(self.input, &mut buffer) {
                Ok(1..) => {}
                _ => return false,
            }
        }
    }

    /// Closes one direction or none, and waits before it goes.
    fn linger(&mut self) {
        match self.rng.below(4) {
            0 => self.process.close(self.output, End::Write),
            1 => self.process.close(self.input, End::Read),
            _ => {}
        }
        let time = [0, 10, 70_000][self.rng.index(3)];
        self.process.sleep(time);
    }
}
