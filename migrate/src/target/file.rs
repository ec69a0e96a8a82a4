//! A stream that is a file: workers read its pages by themselves, several batches at once.
//!
//! The process that restores reads all but pages, and of these the page tables. It gives memory to
//! what a record names and to what tables refer to, notes types, and hands the place of the pages in
//! the file to a worker that is ready, with all frames; then it goes on behind them. A worker has one
//! batch that it places and one for when that is done. So it waits for nothing but the file.
//!
//! A page may come again, in a later record of a live save, and its last content counts. So a batch
//! waits while any page of it is under way ([`Batches`]). All else in the stream waits until no
//! batch is: vCPUs, parameters and pins need memory as it will be, and no page table that is still
//! mapped here.
//!
//! Not here: processes and files (`toolstack`).

use std::cmp::Ordering;
use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::frame::{Mfn, PageBuf, Pfn, WORDS_PER_PAGE};
use crate::hypervisor::{StreamIn, TargetDomain};
use crate::runs;
use crate::stream::libxc::PageEntry;
use crate::target::driver::Reader;
use crate::target::guest::Frames;
use crate::target::links::{Answer, Ask, Asked, Owner, bug, finder};
use crate::target::pages::Placer;
use crate::x86::pv::localise;

/// What could not be read, if the file has become shorter.
const FILE: &str = "could not read page data from the file";

/// Present entries that the page tables of a batch have at most: those of eight tables, which is more
/// than a batch has where a guest's tables are spread over its memory.
pub(crate) const REFERRED_MAX: usize = 8 * WORDS_PER_PAGE;

/// Pages in a file, and where they belong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Where in the file the first page is; the others follow.
    pub offset: u64,
    /// At most [`crate::hypervisor::BATCH_PAGES_MAX`], by ascending pfn, all with data.
    #[serde(with = "runs::entries")]
    pub entries: Vec<PageEntry>,
    /// The frame of each.
    #[serde(with = "runs::frames")]
    pub frames: Vec<u64>,
    /// What the page tables among them refer to, ascending: at most [`REFERRED_MAX`].
    #[serde(with = "runs::pfns")]
    pub referred: Vec<Pfn>,
    /// The frame of each.
    #[serde(with = "runs::frames")]
    pub referred_frames: Vec<u64>,
}

/// Places batches of the file `input` in the memory of `domain` until the owner wants no more. What
/// goes wrong the owner is told.
///
/// # Errors
/// The file's, Xen's, or the owner's: that it is no more, too.
pub fn work_on_file<D, I>(domain: &D, input: &mut I, owner: &mut impl Owner) -> Result<()>
where
    D: TargetDomain,
    I: StreamIn<D::Pages>,
{
    let (mut placer, mut reader) = (Placer::new(domain), Reader::new(input));
    let mut owner = Asked::new(owner);
    loop {
        let Answer::Place(batch) = owner.ask(&Ask::Batch)? else {
            return Err(owner.give_up(bug("an answer that is no batch")));
        };
        let there = reader.input.go_to(batch.offset);
        let there = there.map_err(|source| Error::Stream { what: FILE, source });
        let mut frames = Told::new(&batch);
        let placed = there.and_then(|()| placer.place(&mut reader, &mut frames, &batch.entries));
        placed.map_err(|error| owner.give_up(error))?;
    }
}

/// Frames that came with a batch, by pfn.
struct Told {
    pages: Vec<(Pfn, u64)>,
    referred: Vec<(Pfn, u64)>,
}

impl Told {
    fn new(batch: &Batch) -> Told {
        let pages = batch.entries.iter().map(|entry| entry.pfn).zip(batch.frames.iter().copied());
        let referred = batch.referred.iter().copied().zip(batch.referred_frames.iter().copied());
        Told { pages: pages.collect(), referred: referred.collect() }
    }
}

impl Frames for Told {
    fn frames(&self, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>> {
        pfns.map(finder(&self.pages)).collect()
    }

    fn localise(&mut self, tables: &mut [&mut PageBuf]) -> Result<()> {
        let mut frame = finder(&self.referred);
        tables.iter_mut().try_for_each(|table| localise(table, |pfn| frame(pfn).map(Mfn)))
    }
}

/// Batches that a worker has at most.
const BATCHES_MAX: usize = 2;

/// Who places what: each worker that has asked, who was given one last at the end, with the pfns of
/// its batches, ascending, the oldest batch first.
#[derive(Debug, Default)]
pub(super) struct Batches(Vec<(u8, VecDeque<Vec<Pfn>>)>);

impl Batches {
    /// A worker that may place `batch` now, and from now on does: of those that have least to do
    /// the one that was given something longest ago.
    pub(super) fn give(&mut self, batch: &Batch) -> Option<u8> {
        let pfns: Vec<Pfn> = batch.entries.iter().map(|entry| entry.pfn).collect();
        if self.0.iter().flat_map(|(_, batches)| batches).any(|others| overlap(others, &pfns)) {
            return None;
        }
        let loads = self.0.iter().map(|(_, batches)| batches.len()).enumerate();
        let (index, _) = loads.filter(|(_, load)| *load < BATCHES_MAX).min_by_key(|(_, l)| *l)?;
        let (worker, mut batches) = self.0.remove(index);
        batches.push_back(pfns);
        self.0.push((worker, batches));
        Some(worker)
    }

    /// `worker` has placed the oldest that it had, if it had anything.
    pub(super) fn finish(&mut self, worker: u8) {
        match self.0.iter_mut().find(|(known, _)| *known == worker) {
            Some((_, batches)) => drop(batches.pop_front()),
            None => self.0.push((worker, VecDeque::new())),
        }
    }

    pub(super) fn are_under_way(&self) -> bool {
        self.0.iter().any(|(_, batches)| !batches.is_empty())
    }
}

/// Whether two ascending lists have a pfn in common.
fn overlap(mut left: &[Pfn], mut right: &[Pfn]) -> bool {
    // Most batches are of other parts of the guest.
    if left.last() < right.first() || right.last() < left.first() {
        return false;
    }
    while let ([a, rest_left @ ..], [b, rest_right @ ..]) = (left, right) {
        match a.cmp(b) {
            Ordering::Less => left = rest_left,
            Ordering::Greater => right = rest_right,
            Ordering::Equal => return true,
        }
    }
    false
}
