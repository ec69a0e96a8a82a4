//! Which pages of a set go to which worker: if possible those that it has mapped already
//! ([`super::kept`]), because to the others that mapping is of no use.
//!
//! How many pages a worker gets, and when, is not decided here (`crew`). Who has none of its own
//! left takes those that nobody has mapped, and then others': a slow worker holds nobody up, and a
//! worker that is lost leaves nothing behind.

use std::collections::{BTreeMap, VecDeque};
use std::iter::Peekable;
use std::ops::Range;

use crate::bitmap::PageBitmap;
use crate::frame::Pfn;
use crate::hypervisor::BATCH_PAGES_MAX;
use crate::source::workers::WorkerId;

/// Pages in a 2 MiB extent, which the receiver gives to the guest in one piece if they all come in
/// one record.
const EXTENT_PAGES: usize = 512;
/// Neighbouring pages that have one owner: those of a word of a bitmap.
pub(super) const RUN_PAGES: u64 = 64;

/// Who sent which pages last: a byte for [`RUN_PAGES`] of them.
pub(super) struct Owners {
    pages: u64,
    /// The number of the worker and one more; 0: nobody. Empty until there is an owner.
    runs: Vec<u8>,
}

impl Owners {
    /// Nobody has any of the pfns `0..pages`.
    pub(super) fn new(pages: u64) -> Owners {
        Owners { pages, runs: Vec::new() }
    }

    /// `worker` (`None`: nobody of them) sends `batch`: the runs of it that it has from another, or
    /// from nobody. A worker whose number is too large for a byte is forgotten.
    pub(super) fn note(&mut self, worker: Option<WorkerId>, batch: &[Pfn]) -> Vec<u64> {
        if self.runs.is_empty() {
            self.runs = vec![0; usize::try_from(self.pages.div_ceil(RUN_PAGES)).unwrap_or(0)];
        }
        let number = worker.and_then(|worker| u8::try_from(worker + 1).ok()).unwrap_or(0);
        let mut taken_over = Vec::new();
        for run in batch.chunk_by(|a, b| a.0 / RUN_PAGES == b.0 / RUN_PAGES) {
            let Some(run) = run.first().map(|pfn| pfn.0 / RUN_PAGES) else { continue };
            let index = usize::try_from(run).ok();
            let owner = index.and_then(|index| self.runs.get_mut(index));
            if owner.as_ref().is_none_or(|owner| **owner != number || number == 0) {
                taken_over.push(run);
            }
            if let Some(owner) = owner {
                *owner = number;
            }
        }
        taken_over
    }

    fn of(&self, run: u64) -> Option<WorkerId> {
        let number = usize::try_from(run).ok().and_then(|run| self.runs.get(run))?;
        usize::from(*number).checked_sub(1)
    }
}

/// The pages of a set that have not been handed out yet.
pub(super) struct Shares<'a> {
    set: &'a PageBitmap,
    /// By owner; `None`: nobody's. None is without pages.
    shares: BTreeMap<Option<WorkerId>, Share>,
}

/// Pages of one owner.
#[derive(Default)]
struct Share {
    pages: u64,
    /// Where they are, in ascending order. All pages of the set between are this owner's.
    stretches: VecDeque<Range<u64>>,
}

impl<'a> Shares<'a> {
    /// Divides `set` as `owners` says.
    pub(super) fn new(set: &'a PageBitmap, owners: &Owners) -> Shares<'a> {
        let mut shares: BTreeMap<_, Share> = BTreeMap::new();
        let mut before = None;
        for (run, word) in set.words_set(0..set.len().div_ceil(RUN_PAGES)) {
            let owner = owners.of(run);
            let share = shares.entry(owner).or_default();
            share.pages += u64::from(word.count_ones());
            let end = (run + 1) * RUN_PAGES;
            match share.stretches.back_mut().filter(|_| before == Some(owner)) {
                Some(stretch) => stretch.end = end,
                None => share.stretches.push_back(run * RUN_PAGES..end),
            }
            before = Some(owner);
        }
        Shares { set, shares }
    }

    /// Pages that are left.
    pub(super) fn pages(&self) -> u64 {
        self.shares.values().map(|share| share.pages).sum()
    }

    /// About `wanted` pages for `worker` (`None`: for this process), [`BATCH_PAGES_MAX`] at most;
    /// none if none are left.
    pub(super) fn next_batch(&mut self, worker: Option<WorkerId>, wanted: usize) -> Vec<Pfn> {
        let Some(owner) = self.whose(worker) else { return Vec::new() };
        let Some(share) = self.shares.get_mut(&owner) else { return Vec::new() };
        let stretches = share.stretches.iter().cloned();
        let mut pfns = stretches.flat_map(|stretch| self.set.iter_in(stretch)).peekable();
        let batch = next_batch(&mut pfns, wanted);
        share.hand_out(&batch);
        if share.pages == 0 {
            self.shares.remove(&owner);
        }
        batch
    }

    /// Whose pages `worker` is to send next.
    fn whose(&self, worker: Option<WorkerId>) -> Option<Option<WorkerId>> {
        let preferred = [worker, None].into_iter().find(|owner| self.shares.contains_key(owner));
        let most = || self.shares.iter().max_by_key(|(_, share)| share.pages);
        preferred.or_else(|| most().map(|(owner, _)| *owner))
    }
}

impl Share {
    /// Its first pages, `batch`, are handed out.
    fn hand_out(&mut self, batch: &[Pfn]) {
        self.pages = self.pages.saturating_sub(batch.len() as u64);
        let next = batch.last().map_or(0, |last| last.0 + 1);
        while self.stretches.front().is_some_and(|stretch| stretch.end <= next) {
            self.stretches.pop_front();
        }
        if let Some(first) = self.stretches.front_mut() {
            first.start = first.start.max(next);
        }
    }
}

/// About `wanted` of the next pages, [`BATCH_PAGES_MAX`] at most. A large batch ends where a 2 MiB
/// extent does.
fn next_batch(pfns: &mut Peekable<impl Iterator<Item = Pfn>>, wanted: usize) -> Vec<Pfn> {
    let extent = |pfn: Pfn| pfn.0 / EXTENT_PAGES as u64;
    let wanted = wanted.min(BATCH_PAGES_MAX);
    let mut batch: Vec<Pfn> = Vec::with_capacity(wanted);
    while let Some(pfn) = pfns.next_if(|pfn| match batch.last() {
        None => true,
        Some(before) if wanted < EXTENT_PAGES || extent(*before) == extent(*pfn) => {
            batch.len() < wanted
        }
        Some(_) => batch.len() + EXTENT_PAGES <= wanted,
    }) {
        batch.push(pfn);
    }
    batch
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Hands out all pages of `set`, in batches of `wanted`, to `workers` in turn.
    fn handed_out(
        set: &PageBitmap,
        owners: &Owners,
        workers: &[Option<WorkerId>],
        wanted: usize,
    ) -> Vec<(Option<WorkerId>, Vec<Pfn>)> {
        let mut shares = Shares::new(set, owners);
        let mut turn = workers.iter().copied().cycle();
        let next = || {
            let worker = turn.next()?;
            let batch = shares.next_batch(worker, wanted);
            (!batch.is_empty()).then_some((worker, batch))
        };
        std::iter::from_fn(next).collect()
    }

    fn pfns(range: Range<u64>) -> Vec<Pfn> {
        range.map(Pfn).collect()
    }

    #[test]
    fn a_worker_gets_what_it_has_then_what_nobody_has_then_what_others_have() {
        let (mut set, mut owners) = (PageBitmap::new(1024), Owners::new(1024));
        set.set_all();
        owners.note(Some(3), &pfns(0..128));
        owners.note(Some(5), &pfns(128..512));
        owners.note(Some(3), &pfns(512..640));
        owners.note(Some(400), &pfns(900..1000));
        let mut shares = Shares::new(&set, &owners);
        let next = |shares: &mut Shares<'_>, wanted| shares.next_batch(Some(3), wanted);
        assert_eq!(next(&mut shares, 100), pfns(0..100));
        // What one owner has is not one piece.
        assert_eq!(next(&mut shares, 100), [pfns(100..128), pfns(512..584)].concat());
        assert_eq!(next(&mut shares, 1000), pfns(584..640));
        assert_eq!(next(&mut shares, 384), pfns(640..1024));
        assert_eq!((shares.pages(), next(&mut shares, 84)), (384, pfns(128..212)));
        assert_eq!(shares.next_batch(Some(5), 100), pfns(212..312));
        // Who shall not get any more has lost its pages to others.
        assert_eq!(shares.next_batch(None, 1000), pfns(312..512));
        assert_eq!((shares.pages(), next(&mut shares, 1)), (0, vec![]));
    }

    #[test]
    fn a_worker_is_told_of_runs_that_others_have_sent_meanwhile() {
        let mut owners = Owners::new(1024);
        assert_eq!(owners.note(Some(0), &pfns(0..128)), [0, 1]);
        assert_eq!(owners.note(Some(0), &pfns(100..200)), [2, 3]);
        assert_eq!(owners.note(Some(1), &pfns(64..65)), [1]);
        assert_eq!(owners.note(Some(0), &pfns(0..200)), [1]);
        // This process.
        assert_eq!(owners.note(None, &pfns(0..1)), [0]);
        assert_eq!(owners.note(Some(0), &pfns(0..65)), [0]);
        // One that cannot be remembered has everything anew each time.
        assert_eq!(owners.note(Some(255), &pfns(0..1)), [0]);
        assert_eq!(owners.note(Some(255), &pfns(0..1)), [0]);
        assert_eq!(owners.note(Some(1), &[Pfn(5000)]), [78]);
    }

    fn batches(pfns: &[u64], wanted: usize) -> Vec<Vec<u64>> {
        let mut pfns = pfns.iter().map(|n| Pfn(*n)).peekable();
        let next = || Some(next_batch(&mut pfns, wanted)).filter(|batch| !batch.is_empty());
        let all = std::iter::from_fn(next);
        all.map(|batch| batch.into_iter().map(|pfn| pfn.0).collect()).collect()
    }

    #[test]
    fn large_batches_end_where_extents_do() {
        let pfns: Vec<u64> = (100..3000).collect();
        let firsts: Vec<u64> = batches(&pfns, 5000).iter().map(|batch| batch[0]).collect();
        assert_eq!(firsts, [100, 1024, 2048]);
        let firsts: Vec<u64> = batches(&pfns, 700).iter().map(|batch| batch[0]).collect();
        assert_eq!(firsts, [100, 512, 1024, 1536, 2048, 2560]);
    }

    proptest! {
        #[test]
        fn every_page_is_handed_out_once_and_to_its_owner_as_long_as_that_wants_some(
            pages in prop::collection::btree_set(0_u64..3000, 0..600),
            batches in prop::collection::vec((0_usize..4, 0_u64..3000, 1_u64..400), 0..20),
            wanted in 1_usize..200,
        ) {
            let (mut set, mut owners) = (PageBitmap::new(3000), Owners::new(3000));
            pages.iter().for_each(|pfn| set.set(Pfn(*pfn)));
            for (worker, first, count) in batches {
                owners.note(Some(worker), &pfns(first..(first + count).min(3000)));
            }
            let mut left = pages.clone();
            for (worker, batch) in handed_out(&set, &owners, &[Some(0), Some(2), None], wanted) {
                let owner = |pfn: u64| owners.of(pfn / RUN_PAGES);
                let has_own = left.iter().any(|pfn| owner(*pfn) == worker);
                prop_assert!(batch.len() <= wanted);
                for pfn in batch {
                    prop_assert!(left.remove(&pfn.0), "{pfn} comes twice or is not in the set");
                    prop_assert!(!has_own || owner(pfn.0) == worker);
                }
            }
            prop_assert_eq!(left, BTreeSet::new());
        }

        #[test]
        fn all_pages_are_in_a_batch_in_order_and_none_is_too_large(
            gaps in prop::collection::vec(1_u64..40, 0..3000),
            wanted in 1_usize..3000,
        ) {
            let pfns: Vec<u64> = gaps.iter().scan(0, |at, gap| { *at += gap; Some(*at) }).collect();
            let batches = batches(&pfns, wanted);
            prop_assert!(batches.iter().all(|batch| batch.len() <= wanted.min(BATCH_PAGES_MAX)));
            prop_assert_eq!(batches.concat(), pfns);
        }
    }
}
