//! Who has which batch: the workers as the sender of passes employs them.
//!
//! Each worker has a request that it does and one for when it is done; whoever has least to do
//! gets the next, so that a slow way gets less. How large a batch is follows from what the worker
//! has done so far, and shrinks with what is left of the pass, so that all are done at about the
//! same time, however unequal they are. While there are links, only their workers get batches: the
//! stream is left to what must not wait behind pages. A link that is lost gives back the pages of
//! all batches that the receiver has not confirmed.

use std::collections::{BTreeMap, VecDeque};

use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::frame::Pfn;
use crate::source::batch::{Outcome, Pass};
use crate::source::workers::{Failure, News, Reply, Request, WorkerId, Workers};
use crate::stream::libxc::PageEntry;
use crate::stream::link::{LinkSet, Offer};

/// Batches that a worker has at most: one that it works on, one for when it is done.
const BATCHES_EACH: usize = 2;
/// Pages of the smallest batch. A batch costs a few messages and system calls, which is little
/// beside this many pages.
const BATCH_PAGES_MIN: u64 = 16;
/// What is left of a pass, as far as it is a worker's, goes out in so many batches at least: those
/// that it has, and one more.
const BATCHES_PER_SHARE: u64 = 3;
/// Pages that each worker is taken to have done before it has done any: half a batch.
const PAGES_DONE_AT_FIRST: u64 = 512;

/// The workers.
pub(super) struct Crew<'a> {
    workers: Box<dyn Workers + 'a>,
    members: BTreeMap<WorkerId, Member>,
    /// The pass that is sent now, as links count them.
    pass: u32,
    /// Links that took part in it.
    took_part: LinkSet,
}

/// One worker.
struct Member {
    link: Option<u8>,
    /// Pages that it has done lately: what tells how fast it is, compared with others.
    lately: u64,
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
    /// For each of them, the batches that waited for it to be done.
    pub(super) queued: u64,
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

impl<'a> Crew<'a> {
    pub(super) fn new(workers: Box<dyn Workers + 'a>) -> Crew<'a> {
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

    /// Who is to get the next batch; `None`: all have enough.
    pub(super) fn free(&self) -> Option<WorkerId> {
        let (worker, busy) = self.least_busy()?;
        (busy < BATCHES_EACH).then_some(worker)
    }

    /// How many pages the next batch of `worker` should have, with `left` pages left of the pass.
    pub(super) fn batch_pages(&self, worker: WorkerId, left: u64) -> usize {
        let (mut all, mut own) = (0, 0);
        for (id, member) in self.employed() {
            let done = member.lately + PAGES_DONE_AT_FIRST;
            all += done;
            own += if *id == worker { done } else { 0 };
        }
        let share = u128::from(left) * u128::from(own) / u128::from(all.max(1));
        let pages = share / u128::from(BATCHES_PER_SHARE);
        usize::try_from(pages.max(BATCH_PAGES_MIN.into())).unwrap_or(usize::MAX)
    }

    /// Hands a batch to `worker`, with what it has `taken_over` for it.
    pub(super) fn send(
        &mut self,
        worker: WorkerId,
        batch: Vec<Pfn>,
        taken_over: Vec<u64>,
        pass: Pass,
    ) {
        let request = Request::Batch { pages: batch.clone(), taken_over, pass };
        self.submit(worker, &request, batch);
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
        // What was long ago counts less.
        self.members.values_mut().for_each(|member| member.lately /= 2);
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

    /// Bytes that each link has carried so far.
    pub(super) fn link_bytes(&self) -> Vec<(u8, u64)> {
        let links = self.members.values().filter_map(|m| Some((m.link?, m.total.bytes)));
        links.collect()
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
                if outcome.pages() > 0 {
                    let waiting = member.under_way.iter().filter(|pages| !pages.is_empty());
                    member.total.batches += 1;
                    member.total.queued += waiting.count() as u64;
                }
                member.lately += outcome.sent.len() as u64;
                Ok(match counters {
                    Some(counters) => Noted::Counted(member.total, *counters),
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
        let member = Member { link, lately: 0, under_way, total, unconfirmed };
        self.members.insert(worker, member);
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

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    const PASS: Pass = Pass { number: 0, last: false, digests: false };

    /// Workers that take everything and never say anything by themselves.
    struct Mute;

    impl Workers for Mute {
        fn offer(&self) -> Option<Offer> {
            None
        }

        fn submit(&mut self, _worker: WorkerId, _request: &Request) -> io::Result<()> {
            Ok(())
        }

        fn news(&mut self, _wait: bool) -> io::Result<Option<News>> {
            Ok(None)
        }

        fn dismiss(&mut self, _worker: WorkerId) {}
    }

    fn reply(crew: &mut Crew<'_>, worker: WorkerId, pages: usize, sent: u64, confirmed: u64) {
        let done = Ok(Outcome { sent: vec![Pfn(0); pages], ..Outcome::default() });
        let reply = Reply { done, sent, confirmed, counters: None };
        crew.note(News::Reply(worker, reply)).unwrap();
    }

    /// A crew of links that have come to their first pass.
    fn crew(links: u8) -> Crew<'static> {
        let mut crew = Crew::new(Box::new(Mute));
        for link in 0..links {
            crew.note(News::Joined(link.into(), Some(link))).unwrap();
            reply(&mut crew, link.into(), 0, 0, 0);
        }
        crew
    }

    /// Has workers that do so many pages in a tick send `pages`: when each was done.
    fn ends(speeds: [usize; 4], pages: usize) -> [usize; 4] {
        let mut crew = crew(4);
        let (mut left, mut ends, mut now) = (pages, [0; 4], 0);
        let mut queues: [VecDeque<(usize, usize)>; 4] = Default::default();
        while left > 0 || queues.iter().any(|queue| !queue.is_empty()) {
            while left > 0
                && let Some(worker) = crew.free()
            {
                let size = crew.batch_pages(worker, left as u64).min(1024).min(left);
                crew.send(worker, vec![Pfn(0); size], Vec::new(), PASS);
                queues[worker].push_back((size, size));
                left -= size;
            }
            now += 1;
            for (worker, queue) in queues.iter_mut().enumerate() {
                let Some((size, to_do)) = queue.front_mut() else { continue };
                ends[worker] = now;
                *to_do = to_do.saturating_sub(speeds[worker]);
                if *to_do == 0 {
                    reply(&mut crew, worker, *size, 0, 0);
                    queue.pop_front();
                }
            }
        }
        ends
    }

    #[test]
    fn unequal_workers_are_done_at_about_the_same_time() {
        for speeds in [[1, 1, 1, 1], [1, 1, 2, 2], [1, 4, 4, 10]] {
            let ends = ends(speeds, 60_000);
            let ideal = 60_000 / speeds.iter().sum::<usize>();
            let last = ends.iter().max().unwrap();
            assert!(last * 100 < ideal * 108, "{speeds:?}: {ends:?}, at best {ideal}");
        }
    }

    #[test]
    fn a_small_pass_is_for_all() {
        let ends = ends([1, 1, 1, 1], 300);
        assert!(ends.iter().all(|end| (50..110).contains(end)), "{ends:?}");
    }

    #[test]
    fn it_is_counted_how_full_the_queue_of_a_worker_is() {
        let mut crew = crew(1);
        let send = |crew: &mut Crew<'_>| crew.send(0, vec![Pfn(0)], Vec::new(), PASS);
        // It always has another one; then it has to wait for the next.
        send(&mut crew);
        for _ in 0..3 {
            send(&mut crew);
            reply(&mut crew, 0, 1, 1, 1);
        }
        reply(&mut crew, 0, 1, 1, 1);
        let total = crew.members[&0].total;
        assert_eq!((total.batches, total.queued), (4, 3));
    }

    #[test]
    fn a_lost_link_gives_back_what_was_not_confirmed_and_what_it_had() {
        let mut crew = crew(1);
        for pfn in 1..=3 {
            crew.send(0, vec![Pfn(pfn)], Vec::new(), PASS);
        }
        reply(&mut crew, 0, 1, 1, 0);
        reply(&mut crew, 0, 1, 2, 1);
        let lost = crew.note(News::Ended(0, "cut".into())).unwrap();
        let Noted::Lost { link: 0, pages, .. } = lost else { panic!("{lost:?}") };
        assert_eq!(pages, [Pfn(2), Pfn(3)]);
        assert_eq!((crew.len(), crew.free()), (0, None));
    }
}
