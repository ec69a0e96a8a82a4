//! Planted mistakes with workers and links: between the product's code and those whom it employs.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use rxl_migrate::source::workers::{News, Reply, Request, WorkerId, Workers};
use rxl_migrate::stream::link::Offer;
use rxl_migrate::target::links::{Answer, Ask, Links, Need};

use crate::plant::Plant;

/// The sender's workers, of whom something wrong is told.
pub(crate) struct LyingWorkers<W> {
    inner: W,
    plant: Plant,
    /// Records that each has sent.
    sent: BTreeMap<WorkerId, u64>,
    made_up: VecDeque<News>,
}

impl<W: Workers> LyingWorkers<W> {
    pub(crate) fn new(inner: W, plant: Plant) -> Self {
        LyingWorkers { inner, plant, sent: BTreeMap::new(), made_up: VecDeque::new() }
    }
}

impl<W: Workers> Workers for LyingWorkers<W> {
    fn offer(&self) -> Option<Offer> {
        self.inner.offer()
    }

    fn submit(&mut self, worker: WorkerId, request: &Request) -> io::Result<()> {
        if self.plant == Plant::ConfirmationsNotAwaited && *request == Request::Confirm {
            let sent = self.sent.get(&worker).copied().unwrap_or(0);
            let done = Ok(rxl_migrate::source::Outcome::default());
            let reply = Reply { done, sent, confirmed: sent, counters: None };
            self.made_up.push_back(News::Reply(worker, reply));
            return Ok(());
        }
        match request {
            Request::Batch { pages, pass, .. } if self.plant == Plant::StaleContent => {
                let (pages, pass) = (pages.clone(), *pass);
                let request = Request::Batch { pages, taken_over: Vec::new(), pass };
                self.inner.submit(worker, &request)
            }
            request => self.inner.submit(worker, request),
        }
    }

    fn news(&mut self, wait: bool) -> io::Result<Option<News>> {
        if let Some(news) = self.made_up.pop_front() {
            return Ok(Some(news));
        }
        let mut news = self.inner.news(wait)?;
        if let Some(News::Reply(worker, reply)) = &mut news {
            self.sent.insert(*worker, reply.sent);
            if self.plant == Plant::LostPagesForgotten {
                reply.confirmed = reply.sent;
            }
        }
        Ok(news)
    }

    fn dismiss(&mut self, worker: WorkerId) {
        self.made_up.retain(|news| !matches!(news, News::Reply(of, _) if *of == worker));
        self.inner.dismiss(worker);
    }
}

/// The receiver's workers, who are told something wrong.
pub(crate) struct LyingLinks<L> {
    inner: L,
    plant: Plant,
    /// Answers that each has had already.
    answered: BTreeMap<u8, u32>,
}

impl<L: Links> LyingLinks<L> {
    pub(crate) fn new(inner: L, plant: Plant) -> Self {
        LyingLinks { inner, plant, answered: BTreeMap::new() }
    }
}

impl<L: Links> Links for LyingLinks<L> {
    fn open(&mut self, offer: &Offer) {
        self.inner.open(offer);
    }

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        let need = self.inner.wait(stream)?;
        match need {
            Need::Ask(link, Ask::Pass(1..)) if self.plant == Plant::PassAppliedEarly => {
                let _ = self.inner.answer(link, &Answer::GoOn);
                *self.answered.entry(link).or_default() += 1;
            }
            _ => {}
        }
        Ok(need)
    }

    fn answer(&mut self, link: u8, answer: &Answer) -> io::Result<()> {
        match self.answered.get_mut(&link).filter(|_| *answer == Answer::GoOn) {
            Some(answers @ 1..) => {
                *answers -= 1;
                Ok(())
            }
            _ => self.inner.answer(link, answer),
        }
    }

    fn dismiss(&mut self, link: u8) {
        self.inner.dismiss(link);
    }
}
