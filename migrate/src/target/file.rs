//! A stream that is a file: workers read its pages by themselves, several batches at once.
//!
//! The process that restores reads all but pages. It gives memory to what a record names, notes
//! types, and hands the place of the pages in the file, with their frames, to a worker that is
//! ready; then it goes on behind them. A worker has one batch that it places and one for when that
//! is done, so that it need not wait. It asks for nothing but page tables ([`Ask::Resolve`]).
//!
//! A page may come again, in a later record of a live save, and its last content counts. So a batch
//! waits while any page of it is under way ([`Batches`]). All else in the stream waits until no
//! batch is: vCPUs, parameters and pins need memory as it will be, and no page table that is still
//! mapped here.
//!
//! Not here: processes and files (`toolstack`).

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::frame::Pfn;
use crate::hypervisor::{StreamIn, TargetDomain};
use crate::runs;
use crate::stream::libxc::PageEntry;
use crate::target::driver::Reader;
use crate::target::links::{Answer, Ask, Asked, Owner, bug};
use crate::target::pages::Placer;

/// What could not be read, if the file has become shorter.
const FILE: &str = "could not read page data from the file";

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
    let mut owner = Ahead { owner, batches: VecDeque::new() };
    let mut memory = Asked::new(&mut owner);
    loop {
        let Answer::Place(Batch { offset, entries, frames }) = memory.ask(&Ask::Batch)? else {
            return Err(memory.give_up(bug("an answer that is no batch")));
        };
        memory.note(entries.iter().map(|entry| entry.pfn).zip(frames).collect());
        let there = reader.input.go_to(offset);
        let there = there.map_err(|source| Error::Stream { what: FILE, source });
        match there.and_then(|()| placer.place(&mut reader, &mut memory, &entries)) {
            Ok(()) => {}
            Err(error @ Error::Worker { .. }) => return Err(error),
            Err(error) => return Err(memory.give_up(error)),
        }
    }
}

/// An owner, and the batches that have come before they were asked for, or before the answer to
/// something else.
struct Ahead<'a, O> {
    owner: &'a mut O,
    batches: VecDeque<Batch>,
}

impl<O: Owner> Owner for Ahead<'_, O> {
    fn tell(&mut self, ask: &Ask) -> io::Result<()> {
        self.owner.tell(ask)
    }

    fn hear(&mut self) -> io::Result<Answer> {
        self.owner.hear()
    }

    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        self.tell(ask)?;
        if *ask == Ask::Batch {
            return self.batches.pop_front().map_or_else(|| self.hear(), |b| Ok(Answer::Place(b)));
        }
        loop {
            match self.hear()? {
                Answer::Place(batch) => self.batches.push_back(batch),
                answer => return Ok(answer),
            }
        }
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
