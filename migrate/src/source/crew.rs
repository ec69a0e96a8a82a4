//! Who has which batch: the workers as the sender of passes employs them.
//!
//! Each worker has a request that it does and one for when it is done; whoever has least to do
//! gets the next, so that a slow way gets less. While there are links, only their workers get
//! batches: the stream is left to what must not wait behind pages. A link that is lost gives back
//! the pages of all batches that the receiver has not confirmed.

use std::collections::{BTreeMap, VecDeque};

use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::frame::Pfn;
use crate::source::batch::Outcome;
use crate::source::workers::{Failure, News, Reply, Request, WorkerId, Workers};
use crate::stream::libxc::PageEntry;
use crate::stream::link::{LinkSet, Offer};

/// Batches that a worker has at most: one that it works on, one for when it is done.
const BATCHES_EACH: usize = 2;

/// The workers.
pub(super) struct Crew {
    workers: Box<dyn Workers>,
    members: BTreeMap<WorkerId, Member>,
    /// The pass that is sent now, as links count them.
    pass: u32,
    /// Links that took part in it.
    took_part: LinkSet,
}

/// One worker.
struct Member {
    link: Option<u8>,
    /// Pages of each request that it has, the oldest first.
    under_way: VecDeque<Vec<Pfn>>,
    /// What it has sent.
    total: Total,
    /// Pages of what it has sent and the receiver has not confirmed, each with the number of
    /// records that have to be confirmed for that.
    unconfirmed: VecDeque<(u64, Vec<Pfn>)>,
}

/// What one worker has sent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Total {
    /// Over which link, if not over the stream.
    pub(super) link: Option<u8>,
    /// Bytes of page data.
    pub(super) bytes: u64,
    /// Batches.
    pub(super) batches: u64,
}

/// What the sender of passes has to know.
#[derive(Debug)]
pub(super) enum Noted {
    /// Nothing.
    Nothing,
    /// A link has become usable.
    Joined(u8),
    /// A request is done.
    Done(Outcome),
    /// What a worker has sent, and done for it.
    Counted(Total, Counters),
    /// A link is lost, and with it these pages.
    Lost {
        /// Which.
        link: u8,
        /// Pages that have to be sent again.
        pages: Vec<Pfn>,
        /// Why.
        why: String,
        /// What it has sent, whether it arrived or not.
        total: Total,
    },
}

impl Crew {
    pub(super) fn new(workers: Box<dyn Workers>) -> Crew {
        Crew { workers, members: BTreeMap::new(), pass: 0, took_part: LinkSet::default() }
    }

    /// What the receiver is told of links.
    pub(super) fn offer(&self) -> Option<Offer> {
        self.workers.offer()
    }

    /// Workers that get batches.
    pub(super) fn len(&self) -> usize {
        self.employed().count()
    }

    /// Whether there are links.
    pub(super) fn has_links(&self) -> bool {
        self.members.values().any(|member| member.link.is_some())
    }

    /// Whether no worker has anything to do.
    pub(super) fn is_idle(&self) -> bool {
        self.members.values().all(|member| member.under_way.is_empty())
    }

    fn employed(&self) -> impl Iterator<Item = (&WorkerId, &Member)> {
        let links = self.has_links();
        self.members.iter().filter(move |(_, member)| member.link.is_some() || !links)
    }

    /// Hands a batch to whoever has least to do. The batch comes back if all have enough.
    pub(super) fn offer_batch(&mut self, batch: Vec<Pfn>, last: bool) -> Option<Vec<Pfn>> {
        let Some((worker, busy)) = self.least_busy().filter(|(_, busy)| *busy < BATCHES_EACH)
        else {
            return Some(batch);
        };
        debug_assert!(busy < BATCHES_EACH);
        self.submit(worker, &Request::Batch { pages: batch.clone(), last }, batch);
        None
    }

    /// Has the receiver told of pages without data over a link. `false`: there is none.
    pub(super) fn tell(&mut self, entries: &[PageEntry]) -> bool {
        let Some((worker, _)) = self.least_busy().filter(|_| self.has_links()) else {
            return false;
        };
        let pages = entries.iter().map(|entry| entry.pfn).collect();
        self.submit(worker, &Request::Entries(entries.to_vec()), pages);
        true
    }

    fn least_busy(&self) -> Option<(WorkerId, usize)> {
        let all = self.employed().map(|(worker, member)| (*worker, member.under_way.len()));
        all.min_by_key(|(_, busy)| *busy)
    }

    /// Ends the pass: which it was, and the links that took part. All links go on to the next.
    pub(super) fn end_pass(&mut self) -> (u32, LinkSet) {
        let ended = (self.pass, self.took_part);
        self.pass += 1;
        self.took_part = LinkSet::default();
        for (worker, link) in self.links() {
            self.took_part.insert(link);
            self.submit(worker, &Request::Pass(self.pass), Vec::new());
        }
        ended
    }

    /// Has all links wait for the receiver's confirmation.
    pub(super) fn confirm(&mut self) {
        for (worker, _) in self.links() {
            self.submit(worker, &Request::Confirm, Vec::new());
        }
    }

    /// Asks all workers what they have done.
    pub(super) fn count(&mut self) {
        for worker in self.members.keys().copied().collect::<Vec<_>>() {
            self.submit(worker, &Request::Count, Vec::new());
        }
    }

    fn links(&self) -> Vec<(WorkerId, u8)> {
        let links = self.members.iter().filter_map(|(worker, m)| Some((*worker, m.link?)));
        links.collect()
    }

    /// A worker that has ended meanwhile keeps the request among those that it had: the news of
    /// its end comes later.
    fn submit(&mut self, worker: WorkerId, request: &Request, pages: Vec<Pfn>) {
        if let Err(error) = self.workers.submit(worker, request) {
            tracing::debug!(worker, %error, "a worker does not take a request");
        }
        if let Some(member) = self.members.get_mut(&worker) {
            member.under_way.push_back(pages);
        }
    }

    /// The next news, if there is some; `wait` for it.
    ///
    /// # Errors
    /// The system's, or a failure that ends the save: of a worker on the stream, or of a batch.
    pub(super) fn news(&mut self, wait: bool) -> Result<Option<Noted>> {
        let what = "waiting for workers";
        let news = self.workers.news(wait).map_err(|source| Error::Worker { what, source })?;
        news.map(|news| self.note(news)).transpose()
    }

    fn note(&mut self, news: News) -> Result<Noted> {
        match news {
            News::Joined(worker, link) => Ok(self.join(worker, link)),
            News::Reply(worker, Reply { done: Ok(outcome), sent, confirmed, counters }) => {
                let Some(member) = self.members.get_mut(&worker) else { return Ok(Noted::Nothing) };
                let pages = member.under_way.pop_front().unwrap_or_default();
                member.note_sent(pages, sent, confirmed);
                member.total.bytes += outcome.bytes;
                member.total.batches += u64::from(outcome.pages() > 0);
                Ok(match counters {
                    Some(counters) => Noted::Counted(member.total, counters),
                    None => Noted::Done(outcome),
                })
            }
            News::Reply(worker, Reply { done: Err(Failure::Way(why)), .. }) => {
                self.lose(worker, why)
            }
            News::Reply(_, Reply { done: Err(Failure::Batch(why)), .. }) => Err(Error::Batch(why)),
            News::Ended(worker, why) => self.lose(worker, why),
        }
    }

    fn join(&mut self, worker: WorkerId, link: Option<u8>) -> Noted {
        let (under_way, unconfirmed) = (VecDeque::new(), VecDeque::new());
        let total = Total { link, ..Total::default() };
        self.members.insert(worker, Member { link, under_way, total, unconfirmed });
        let Some(link) = link else { return Noted::Nothing };
        self.took_part.insert(link);
        self.submit(worker, &Request::Pass(self.pass), Vec::new());
        Noted::Joined(link)
    }

    /// A worker cannot send any more. Without a link of its own it may have left a torn record in
    /// the stream, which is worthless then.
    fn lose(&mut self, worker: WorkerId, why: String) -> Result<Noted> {
        self.workers.dismiss(worker);
        let Some(member) = self.members.remove(&worker) else { return Ok(Noted::Nothing) };
        let Some(link) = member.link else { return Err(Error::Batch(why)) };
        let unconfirmed = member.unconfirmed.into_iter().map(|(_, pages)| pages);
        let pages = unconfirmed.chain(member.under_way).flatten().collect();
        Ok(Noted::Lost { link, pages, why, total: member.total })
    }
}

impl Member {
    /// A request is done: `sent` records so far, `confirmed` of them.
    fn note_sent(&mut self, pages: Vec<Pfn>, sent: u64, confirmed: u64) {
        if self.link.is_some() && !pages.is_empty() {
            self.unconfirmed.push_back((sent, pages));
        }
        while self.unconfirmed.front().is_some_and(|(records, _)| *records <= confirmed) {
            self.unconfirmed.pop_front();
        }
    }
}
