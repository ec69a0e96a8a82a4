//! The two ends of a link, and the stream that several write: modelled on `toolstack`, which the
//! simulator does not have.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::rc::Rc;

use rxl_migrate::fake::{FakePages, fill_pages, put_pages};
use rxl_migrate::hypervisor::{PagePiece, PageSlot, StreamIn, StreamOut};
use rxl_migrate::source::workers::Confirmed;
use rxl_migrate::stream::link::{CONFIRMATION_BYTES, Confirmations, Unconfirmed};
use rxl_migrate::target::links::LinkIn;

use crate::pipe::PipeId;
use crate::plant::{Plant, assume_zeros, on_its_way};
use crate::process::Process;
use crate::world::Cond;

/// How often a receiver that waits says that it is there.
const HEARTBEAT: u64 = 1_000;
/// How long a sender waits for a word of the receiver.
const SILENCE_MAX: u64 = 5_000;
/// How long it waits for page data to be confirmed or taken, and for a pass to begin.
const STALL_MAX: u64 = 30_000;
const TURN_MAX: u64 = 120_000;

/// The sender's end.
pub(crate) struct SendingLink<'a, 'b> {
    there: PipeId,
    watch: Watch<'a, 'b>,
}

/// What the sender hears, whatever it waits for.
#[derive(Clone)]
pub(crate) struct Watch<'a, 'b> {
    pub(crate) process: &'a Process<'b>,
    back: PipeId,
    heard: Rc<RefCell<Heard>>,
}

#[derive(Default)]
struct Heard {
    confirmed: Confirmations,
    at: u64,
    /// When something was confirmed.
    got_on: u64,
}

impl<'a, 'b> SendingLink<'a, 'b> {
    pub(crate) fn new(process: &'a Process<'b>, there: PipeId, back: PipeId) -> Self {
        SendingLink { there, watch: Watch { process, back, heard: Rc::default() } }
    }

    /// For whoever else makes this process wait.
    pub(crate) fn watch(&self) -> Watch<'a, 'b> {
        self.watch.clone()
    }

    /// One record begins so.
    fn note_sent(&self, head: &[u8]) {
        self.watch.heard.borrow_mut().confirmed.note_sent(head);
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let process = self.watch.process;
        process.step();
        let mut left = bytes;
        while !left.is_empty() {
            match process.try_write(self.there, left) {
                Some(done) => left = left.get(done?..).unwrap_or_default(),
                None => self.watch.wait_for(Cond::Writable(self.there))?,
            }
        }
        Ok(())
    }
}

impl Watch<'_, '_> {
    /// Takes some of what has come. Does not wait.
    fn hear(&self) -> io::Result<()> {
        let mut bytes = [0; 64 * CONFIRMATION_BYTES];
        match self.process.try_read(self.back, &mut bytes).transpose()? {
            Some(0) => return Err(ErrorKind::ConnectionReset.into()),
            Some(count) => self.take(bytes.get(..count).unwrap_or_default()),
            None => {}
        }
        Ok(())
    }

    fn take(&self, bytes: &[u8]) {
        let mut heard = self.heard.borrow_mut();
        heard.at = self.process.world().now;
        if heard.confirmed.take(bytes) {
            heard.got_on = heard.at;
        }
    }

    /// Waits for `wanted`, and hears what comes meanwhile.
    pub(crate) fn wait_for(&self, wanted: Cond) -> io::Result<()> {
        let started = self.process.world().now;
        while !self.process.holds(wanted) {
            self.wait_once(wanted, started)?;
        }
        Ok(())
    }

    /// Waits for `wanted`, or for a word, or for a while.
    fn wait_once(&self, wanted: Cond, started: u64) -> io::Result<()> {
        let tick = Cond::At(self.process.world().now + HEARTBEAT);
        self.process.wait([wanted, Cond::Readable(self.back), tick, Cond::Never]);
        self.hear()?;
        self.check(started)
    }

    fn check(&self, started: u64) -> io::Result<()> {
        let mut world = self.process.world();
        let (heard, now) = (self.heard.borrow(), world.now);
        // The second mistake would cost the links that wait, and that be all.
        let mistakes = [Plant::StalledLinkKept, Plant::IdleLinkUnwatched];
        let limit = match heard.confirmed.next() {
            _ if world.plan.plant.is_some_and(|plant| mistakes.contains(&plant)) => u64::MAX,
            None => u64::MAX,
            Some(Unconfirmed::Data) => STALL_MAX,
            Some(Unconfirmed::Pass) => TURN_MAX,
        };
        let why = if now - heard.at.max(started) > SILENCE_MAX {
            "links: one given up after silence"
        } else if now - heard.got_on.max(started) > limit {
            "links: one given up that does not get on"
        } else {
            return Ok(());
        };
        world.facts.coverage.count(why);
        Err(ErrorKind::TimedOut.into())
    }
}

impl StreamOut<FakePages> for SendingLink<'_, '_> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.note_sent(bytes);
        if self.watch.process.world().plan.plant == Some(Plant::ZerosAssumed) {
            return self.put(&assume_zeros(bytes));
        }
        self.put(bytes)
    }

    fn write_pages(&mut self, head: &[u8], pieces: &[PagePiece<'_, FakePages>]) -> io::Result<()> {
        self.note_sent(head);
        let plant = self.watch.process.world().plan.plant;
        put_pages(head, pieces, |bytes| self.put(&on_its_way(plant, bytes)))
    }
}

impl Confirmed for SendingLink<'_, '_> {
    fn confirmed(&mut self) -> io::Result<u64> {
        self.watch.hear()?;
        Ok(self.watch.heard.borrow().confirmed.records())
    }

    fn wait_confirmed(&mut self, records: u64) -> io::Result<()> {
        let started = self.watch.process.world().now;
        while self.confirmed()? < records {
            self.watch.wait_once(Cond::Never, started)?;
        }
        Ok(())
    }
}

/// The receiver's end.
pub(crate) struct ReceivingLink<'a, 'b> {
    there: PipeId,
    heartbeat: Heartbeat<'a, 'b>,
    /// It never gets past this record.
    hangs_at: Option<u64>,
}

/// What the receiver says, and repeats while it waits.
#[derive(Clone)]
pub(crate) struct Heartbeat<'a, 'b> {
    pub(crate) process: &'a Process<'b>,
    back: PipeId,
    said: Rc<RefCell<Said>>,
}

#[derive(Default)]
struct Said {
    confirmed: u64,
    /// The rest of a confirmation that the connection did not take.
    unsent: Vec<u8>,
    /// When it was said.
    at: u64,
}

impl<'a, 'b> ReceivingLink<'a, 'b> {
    pub(crate) fn new(
        process: &'a Process<'b>,
        there: PipeId,
        back: PipeId,
        hangs_at: Option<u64>,
    ) -> Self {
        let heartbeat = Heartbeat { process, back, said: Rc::default() };
        ReceivingLink { there, heartbeat, hangs_at }
    }

    /// For whoever else makes this process wait.
    pub(crate) fn heartbeat(&self) -> Heartbeat<'a, 'b> {
        self.heartbeat.clone()
    }
}

impl Heartbeat<'_, '_> {
    /// Waits until `pipe` can be read, and shows signs of life meanwhile.
    pub(crate) fn wait_readable(&self, pipe: PipeId) -> io::Result<()> {
        while !self.process.holds(Cond::Readable(pipe)) {
            let tick = self.process.world().now + HEARTBEAT;
            self.process.wait([Cond::Readable(pipe), Cond::At(tick), Cond::Never, Cond::Never]);
            // Bytes that trickle in are no reason to be silent.
            let silence = self.process.world().now - self.said.borrow().at;
            if silence >= HEARTBEAT {
                self.beat()?;
            }
        }
        Ok(())
    }

    /// Says how much is confirmed, as far as the connection takes it.
    fn beat(&self) -> io::Result<()> {
        let mut said = self.said.borrow_mut();
        said.at = self.process.world().now;
        if said.unsent.is_empty() {
            said.unsent = said.confirmed.to_le_bytes().to_vec();
        }
        match self.process.try_write(self.back, &said.unsent) {
            Some(Ok(count)) => {
                said.unsent.drain(..count);
                Ok(())
            }
            // A sender that does not listen hears it later.
            None => Ok(()),
            Some(Err(error)) => Err(error),
        }
    }
}

impl StreamIn<FakePages> for ReceivingLink<'_, '_> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.heartbeat.process.try_read(self.there, rest) {
                Some(Ok(0)) => return Err(ErrorKind::UnexpectedEof.into()),
                Some(Ok(count)) => done += count,
                Some(Err(error)) => return Err(error),
                None => self.heartbeat.wait_readable(self.there)?,
            }
        }
        Ok(())
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        fill_pages(pages, slots, |page| self.read_exact(page))
    }
}

impl LinkIn<FakePages> for ReceivingLink<'_, '_> {
    fn confirm(&mut self, records: u64) -> io::Result<()> {
        let process = self.heartbeat.process;
        process.step();
        if self.hangs_at == Some(records) {
            process.world().facts.coverage.count("links: a worker that hangs");
            loop {
                self.heartbeat.beat()?;
                process.sleep(HEARTBEAT);
            }
        }
        self.heartbeat.said.borrow_mut().confirmed = records;
        self.heartbeat.beat()
    }
}
