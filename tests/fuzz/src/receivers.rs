//! Workers on links, as the process that restores sees them: each runs the engine's own
//! [`rxl_migrate::target::links::work`], as a coroutine, over bytes of a [`Source`].
//!
//! A worker can be left, ended or cut off wherever the real one could be: when it waits for an
//! answer, when it has mapped pages and waits for their content, and between records.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::rc::Rc;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use rxl_migrate::Error;
use rxl_migrate::fake::{FakeDomain, FakePages, fill_pages};
use rxl_migrate::hypervisor::{PageSlot, StreamIn};
use rxl_migrate::stream::link::Offer;
use rxl_migrate::target::links::{
    Answer, Ask, LinkIn, Links, MESSAGE_BYTES_MAX, Need, Owner, work,
};

use crate::AGREED;
use crate::ways::{Source, Turn};
use crate::{assert_told, passed_on};

/// Links that can be opened; for more of an offer there is no worker.
pub(crate) const OPENED_MAX: u8 = 4;
/// Bytes of a worker's stack.
const STACK_BYTES: usize = 1 << 20;

/// Why a worker does not go on.
enum Pause {
    /// It would wait for bytes.
    Reading,
    /// It waits for an answer.
    Asked(Ask),
}

/// It goes on with an answer, if it waits for one and may have it.
type Running = Coroutine<Option<Answer>, Pause, String, DefaultStack>;

/// What a worker's parts have in common.
struct Talk<'a> {
    yielder: &'a Yielder<Option<Answer>, Pause>,
    /// What reading says, if it is over.
    over: Rc<Cell<Option<ErrorKind>>>,
}

impl Talk<'_> {
    fn check(&self) -> io::Result<()> {
        self.over.get().map_or(Ok(()), |over| Err(over.into()))
    }

    fn pause(&self) -> io::Result<()> {
        self.check()?;
        self.yielder.suspend(Pause::Reading);
        self.check()
    }
}

impl Owner for &Talk<'_> {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        let answer = self.yielder.suspend(Pause::Asked(ask.clone()));
        // Without one its owner is gone, or it has noticed meanwhile that its peer is.
        answer.ok_or(ErrorKind::BrokenPipe.into())
    }
}

/// A worker's end of a link.
struct Link<'a, S> {
    talk: &'a Talk<'a>,
    source: Rc<RefCell<S>>,
    way: usize,
    confirmed: u64,
}

impl<S: Source> Link<'_, S> {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.talk.check()?;
        self.source.borrow_mut().fill(self.way, bytes)
    }
}

impl<S: Source> StreamIn<FakePages> for Link<'_, S> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.fill(buf)
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        self.talk.pause()?;
        fill_pages(pages, slots, |block| self.fill(block))
    }
}

impl<S: Source> LinkIn<FakePages> for Link<'_, S> {
    fn confirm(&mut self, records: u64) -> io::Result<()> {
        assert_eq!(records, self.confirmed + 1, "a record is confirmed twice, or none");
        self.confirmed = records;
        match self.talk.pause() {
            // It hears of the end when it reads on.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(()),
            paused => paused,
        }
    }
}

/// One worker.
struct Worker {
    running: Running,
    over: Rc<Cell<Option<ErrorKind>>>,
    /// It waits for an answer.
    asked: bool,
    /// The answer that it has not taken.
    answer: Option<Answer>,
}

impl Worker {
    fn new<S: Source + 'static>(domain: &FakeDomain, source: &Rc<RefCell<S>>, link: u8) -> Worker {
        let (domain, source) = (domain.clone(), Rc::clone(source));
        let over = Rc::new(Cell::new(None));
        let (way, ended) = (usize::from(link) + 1, Rc::clone(&over));
        let stack = DefaultStack::new(STACK_BYTES).expect("a stack");
        let running = Coroutine::with_stack(stack, move |yielder: &Yielder<_, _>, _| {
            let talk = Talk { yielder, over: ended };
            let mut link = Link { talk: &talk, source, way, confirmed: 0 };
            match work(&domain, &mut link, &mut &talk, AGREED) {
                Ok(()) => "the end".into(),
                Err(error) => {
                    assert!(!matches!(error, Error::Machine { .. }), "{error}");
                    assert_told(&error);
                    error.chain()
                }
            }
        });
        Worker { running, over, asked: false, answer: None }
    }

    fn is_able(&self) -> bool {
        !self.asked || self.answer.is_some()
    }

    /// Lets it go on; what it does then, or why it has ended.
    fn resume(&mut self) -> Result<Pause, String> {
        self.asked = false;
        match self.running.resume(self.answer.take()) {
            CoroutineResult::Yield(pause) => Ok(pause),
            CoroutineResult::Return(why) => Err(why),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.over.set(Some(ErrorKind::BrokenPipe));
        self.answer = None;
        while !self.running.done() && !std::thread::panicking() {
            let _ = self.resume();
        }
    }
}

/// All of them.
pub(crate) struct Receivers<S> {
    domain: FakeDomain,
    source: Rc<RefCell<S>>,
    workers: BTreeMap<u8, Worker>,
}

impl<S: Source + 'static> Receivers<S> {
    pub(crate) fn new(domain: &FakeDomain, source: &Rc<RefCell<S>>) -> Receivers<S> {
        let (domain, source) = (domain.clone(), Rc::clone(source));
        Receivers { domain, source, workers: BTreeMap::new() }
    }

    /// Links that do not wait for an answer.
    fn able(&self) -> Vec<u8> {
        let able = self.workers.iter().filter(|(_, worker)| worker.is_able());
        able.map(|(link, _)| *link).collect()
    }

    /// Lets a worker go on, with its link in the state `over`; what it needs, if it does.
    fn step(&mut self, link: u8, over: Option<ErrorKind>) -> Option<Need> {
        let worker = self.workers.get_mut(&link).expect("a worker");
        if over.is_some() {
            worker.over.set(over);
        }
        match worker.resume() {
            Ok(Pause::Reading) => None,
            Ok(Pause::Asked(ask)) => {
                worker.asked = true;
                Some(Need::Ask(link, passed_on(&ask, MESSAGE_BYTES_MAX)))
            }
            Err(why) => {
                self.workers.remove(&link);
                Some(Need::Ended(link, why))
            }
        }
    }
}

impl<S: Source + 'static> Links for Receivers<S> {
    fn open(&mut self, offer: &Offer) {
        assert!(self.workers.is_empty(), "links are opened twice");
        for link in 0..offer.links.min(OPENED_MAX) {
            self.workers.insert(link, Worker::new(&self.domain, &self.source, link));
        }
    }

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        loop {
            let able = self.able();
            if able.is_empty() {
                let Some(link) = self.workers.keys().next().copied() else {
                    let all = || io::Error::other("all workers have ended");
                    return if stream { Ok(Need::Stream) } else { Err(all()) };
                };
                if stream {
                    return Ok(Need::Stream);
                }
                // All wait for each other. The sender sees none of it, and is gone in the end.
                return Ok(self.step(link, Some(ErrorKind::ConnectionReset)).expect("an end"));
            }
            let (link, over) = match self.source.borrow_mut().turn(&able, stream) {
                Turn::Stream => return Ok(Need::Stream),
                Turn::GoesOn(link) => (link, None),
                Turn::Ends(link) => (link, Some(ErrorKind::UnexpectedEof)),
                Turn::Breaks(link) => (link, Some(ErrorKind::ConnectionReset)),
            };
            let link = *able.get(link).expect("one of them");
            if let Some(need) = self.step(link, over) {
                return Ok(need);
            }
        }
    }

    fn answer(&mut self, link: u8, answer: &Answer) -> io::Result<()> {
        let worker = self.workers.get_mut(&link).ok_or(ErrorKind::NotFound)?;
        assert!(worker.asked && worker.answer.is_none(), "an answer to nothing");
        worker.answer = Some(passed_on(answer, MESSAGE_BYTES_MAX));
        Ok(())
    }

    fn dismiss(&mut self, link: u8) {
        self.workers.remove(&link);
    }
}
