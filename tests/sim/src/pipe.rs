//! Pipes, and the link between the two hosts, which is a pipe that takes time and can be cut.
//!
//! What it is not: packets. TCP and ssh deliver all bytes in order or lose the connection, so a
//! lost message is a lost connection here.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};

/// Which pipe of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PipeId(pub(crate) usize);

/// One of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Read,
    Write,
}

/// Bytes on their way in one direction.
#[derive(Debug)]
pub(crate) struct Pipe {
    data: VecDeque<u8>,
    capacity: usize,
    readers: u32,
    writers: u32,
    link: Option<Link>,
}

/// What makes a pipe a link.
#[derive(Debug)]
pub(crate) struct Link {
    /// Milliseconds that a byte takes.
    pub(crate) latency: u64,
    /// Bytes that it takes in a millisecond.
    pub(crate) rate: u64,
    /// Groups of bytes that are under way, with the time of their arrival.
    pub(crate) under_way: VecDeque<(u64, usize)>,
    /// Bytes of `data` that have arrived.
    pub(crate) arrived: usize,
    /// Bytes that it has carried.
    pub(crate) carried: u64,
    /// It is cut once it has carried so many.
    pub(crate) cut_at: Option<u64>,
    /// Whoever writes to a reader that is gone hears it only when the answer comes.
    pub(crate) answers_late: bool,
    /// When the answer comes.
    pub(crate) refused_at: Option<u64>,
    /// It has been cut, and the process at its reading and at its writing end see it then.
    pub(crate) cut: Option<(u64, u64)>,
}

impl Link {
    pub(crate) fn new(latency: u64, rate: u64) -> Link {
        Link {
            latency,
            rate,
            under_way: VecDeque::new(),
            arrived: 0,
            carried: 0,
            cut_at: None,
            answers_late: false,
            refused_at: None,
            cut: None,
        }
    }
}

impl Pipe {
    pub(crate) fn new(capacity: usize) -> Pipe {
        Pipe { data: VecDeque::new(), capacity, readers: 0, writers: 0, link: None }
    }

    pub(crate) fn link(capacity: usize, link: Link) -> Pipe {
        Pipe { link: Some(link), ..Pipe::new(capacity) }
    }

    pub(crate) fn open(&mut self, end: End) {
        match end {
            End::Read => self.readers += 1,
            End::Write => self.writers += 1,
        }
    }

    pub(crate) fn close(&mut self, end: End) {
        match end {
            End::Read => self.readers -= 1,
            End::Write => self.writers -= 1,
        }
    }

    /// Whether anybody holds that end.
    pub(crate) fn is_open(&self, end: End) -> bool {
        match end {
            End::Read => self.readers > 0,
            End::Write => self.writers > 0,
        }
    }

    /// Bytes that a reader can have at `now`.
    pub(crate) fn available(&mut self, now: u64) -> usize {
        let Some(link) = &mut self.link else { return self.data.len() };
        while let Some((_, bytes)) = link.under_way.front().copied().filter(|(at, _)| *at <= now) {
            link.arrived += bytes;
            link.under_way.pop_front();
        }
        link.arrived
    }

    fn is_reset(&self, end: End, now: u64) -> bool {
        let cut = self.link.as_ref().and_then(|link| link.cut);
        cut.is_some_and(|(reader, writer)| {
            now >= match end {
                End::Read => reader,
                End::Write => writer,
            }
        })
    }

    /// Whether there is something in it that nobody is going to read.
    pub(crate) fn is_wasted(&self) -> bool {
        self.readers == 0 && !self.data.is_empty()
    }

    /// Whether a read would not block.
    pub(crate) fn is_readable(&mut self, now: u64) -> bool {
        self.available(now) > 0
            || self.is_reset(End::Read, now)
            || self.writers == 0 && self.data.is_empty() && !self.is_cut()
    }

    /// Whether nothing more comes than a reader can have at `now`.
    pub(crate) fn is_over(&mut self, now: u64) -> bool {
        let all_is_there = self.available(now) == self.data.len();
        self.is_reset(End::Read, now) || self.writers == 0 && all_is_there && !self.is_cut()
    }

    /// Whether a write would not block.
    pub(crate) fn is_writable(&self, now: u64) -> bool {
        self.is_hung_up(now) || self.data.len() < self.capacity
    }

    /// Whether a write would fail.
    pub(crate) fn is_hung_up(&self, now: u64) -> bool {
        self.readers == 0 && !self.is_cut() || self.is_reset(End::Write, now)
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.cut.is_some())
    }

    /// All the times at which it changes by itself.
    pub(crate) fn changes(&self) -> impl Iterator<Item = u64> {
        let link = self.link.as_ref();
        let arrival = link.and_then(|link| link.under_way.front().map(|(at, _)| *at));
        let resets = link.and_then(|link| link.cut).map(|(reader, writer)| [reader, writer]);
        arrival.into_iter().chain(resets.into_iter().flatten())
    }

    /// Takes at most `into.len()` of the bytes that are there; `None` would block.
    pub(crate) fn read(&mut self, into: &mut [u8], now: u64) -> Option<io::Result<usize>> {
        let there = self.available(now);
        if there == 0 {
            if self.is_reset(End::Read, now) {
                return Some(Err(ErrorKind::ConnectionReset.into()));
            }
            return (self.writers == 0 && self.data.is_empty() && !self.is_cut()).then_some(Ok(0));
        }
        let bytes = there.min(into.len());
        for (to, from) in into.iter_mut().zip(self.data.drain(..bytes)) {
            *to = from;
        }
        if let Some(link) = &mut self.link {
            link.arrived -= bytes;
        }
        Some(Ok(bytes))
    }

    /// Looks at the first `into.len()` bytes without taking them; how many there are.
    pub(crate) fn peek(&mut self, into: &mut [u8], now: u64) -> usize {
        let there = self.available(now).min(into.len());
        for (to, from) in into.iter_mut().zip(self.data.iter().take(there)) {
            *to = *from;
        }
        there
    }

    /// Puts in as many of `bytes` as there is room for; `None` would block.
    pub(crate) fn write(&mut self, bytes: &[u8], now: u64) -> Option<io::Result<usize>> {
        if self.is_reset(End::Write, now) {
            return Some(Err(ErrorKind::ConnectionReset.into()));
        }
        if self.readers == 0 && !self.is_cut() {
            let link = self.link.as_mut().filter(|link| link.answers_late);
            let at = link.map(|link| *link.refused_at.get_or_insert(now + 2 * link.latency));
            return Some(match at.filter(|at| now < *at) {
                Some(_) => Ok(bytes.len()),
                None => Err(ErrorKind::BrokenPipe.into()),
            });
        }
        let room = self.capacity.saturating_sub(self.data.len()).min(bytes.len());
        if room == 0 {
            return None;
        }
        let taken = bytes.get(..room).unwrap_or_default();
        match &mut self.link {
            None => self.data.extend(taken),
            Some(link) => {
                // What is sent into a cut link is gone, but the sender does not know.
                let alive = match (link.cut, link.cut_at) {
                    (Some(_), _) => 0,
                    (None, None) => room,
                    (None, Some(at)) => {
                        room.min(usize::try_from(at.saturating_sub(link.carried)).unwrap_or(room))
                    }
                };
                let last = link.under_way.back().map_or(now, |(at, _)| *at);
                let arrival = (now + link.latency).max(last) + alive as u64 / link.rate;
                self.data.extend(taken.iter().take(alive));
                if alive > 0 {
                    link.under_way.push_back((arrival, alive));
                }
                link.carried += room as u64;
            }
        }
        Some(Ok(room))
    }

    /// Whether it has carried so much that it is to be cut, and has not been.
    pub(crate) fn is_due_to_be_cut(&self) -> bool {
        self.link.as_ref().is_some_and(|link| {
            link.cut.is_none() && link.cut_at.is_some_and(|at| link.carried >= at)
        })
    }

    /// Cuts a link: what is under way is gone.
    pub(crate) fn cut(&mut self, reader_sees: u64, writer_sees: u64) {
        if let Some(link) = self.link.as_mut().filter(|link| link.cut.is_none()) {
            link.cut = Some((reader_sees, writer_sees));
            self.data.truncate(link.arrived);
            link.under_way.clear();
        }
    }

    /// Cuts it once it has carried `bytes`.
    pub(crate) fn cut_at(&mut self, bytes: u64) {
        if let Some(link) = &mut self.link {
            link.cut_at = Some(bytes);
        }
    }
}
