//! A stream that is a file: workers read its pages by themselves, several batches at once.
//!
//! The process that restores reads all but pages. It gives memory to what a record names, notes
//! types, and hands the place of the pages in the file, with their frames, to a worker that is
//! idle; then it goes on behind them. A worker asks for nothing but page tables ([`Ask::Resolve`]).
//!
//! A page may come again, in a later record of a live save, and its last content counts. So a batch
//! waits while any page of it is under way ([`Batches`]). All else in the stream waits until no
//! batch is: vCPUs, parameters and pins need memory as it will be, and no page table that is still
//! mapped here.
//!
//! Not here: processes and files (`toolstack`).

use std::cmp::Ordering;
use std::collections::BTreeMap;

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
    let mut memory = Asked::new(owner);
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

/// Who places what.
#[derive(Debug, Default)]
pub(super) struct Batches {
    idle: Vec<u8>,
    /// The pfns that each of the others places, ascending.
    under_way: BTreeMap<u8, Vec<Pfn>>,
}

impl Batches {
    /// A worker that may place `batch` now, and from now on does.
    pub(super) fn give(&mut self, batch: &Batch) -> Option<u8> {
        let pfns: Vec<Pfn> = batch.entries.iter().map(|entry| entry.pfn).collect();
        if self.under_way.values().any(|others| overlap(others, &pfns)) {
            return None;
        }
        let worker = self.idle.pop()?;
        self.under_way.insert(worker, pfns);
        Some(worker)
    }

    /// `worker` has placed what it had, if it had anything.
    pub(super) fn finish(&mut self, worker: u8) {
        self.under_way.remove(&worker);
        self.idle.push(worker);
    }

    pub(super) fn are_under_way(&self) -> bool {
        !self.under_way.is_empty()
    }
}

/// Whether two ascending lists have a pfn in common.
fn overlap(mut left: &[Pfn], mut right: &[Pfn]) -> bool {
    while let ([a, rest_left @ ..], [b, rest_right @ ..]) = (left, right) {
        match a.cmp(b) {
            Ordering::Less => left = rest_left,
            Ordering::Greater => right = rest_right,
            Ordering::Equal => return true,
        }
    }
    false
}
