//! Giving memory to the new domain, and knowing which of its pfns have some.
//!
//! What a pfn costs here is paid for by memory that the hypervisor gave: nothing grows for a pfn
//! before its population has succeeded, so a stream that names absurd pfns costs nothing.

use std::io;

use crate::bitmap::PageBitmap;
use crate::error::{Error, GuestError, Result};
use crate::frame::{PAGE_SIZE, Pfn};
use crate::hypervisor::{BATCH_PAGES_MAX, TargetDomain};

/// First pfn that a translated guest cannot have: 48 bits of guest-physical address are what
/// four levels of nested paging translate, in pages of 2^12 bytes.
pub(super) const HVM_PFN_END: u64 = 1 << (48 - 12);

/// log2 of the pages in a 2 MiB extent.
const EXTENT_ORDER: u32 = 9;
/// Pages in a 2 MiB extent.
const EXTENT_PAGES: u64 = 1 << EXTENT_ORDER;

/// What Linux and Xen call it when there is not enough memory.
const ENOMEM: i32 = 12;

/// Which pfns of a domain have memory.
pub(super) trait Space {
    /// Whether extents of 2 MiB are worth asking for: a PV guest has no use for them.
    const EXTENTS: bool;
    /// The frame of `pfn`, if it has memory.
    fn frame(&self, pfn: Pfn) -> Option<u64>;
    /// Remembers that `pfn` has memory at `frame`.
    fn set_frame(&mut self, pfn: Pfn, frame: u64) -> Result<(), GuestError>;
}

/// Populates those of `wanted` that have no memory yet, a few hypercalls for all of them: whole
/// 2 MiB runs as one extent each where that helps, so that the guest keeps its superpages.
pub(super) fn populate<D: TargetDomain, S: Space>(
    domain: &D,
    space: &mut S,
    wanted: impl Iterator<Item = Pfn>,
) -> Result<()> {
    let mut missing: Vec<Pfn> = wanted.filter(|pfn| space.frame(*pfn).is_none()).collect();
    missing.sort_unstable();
    missing.dedup();
    let single = if S::EXTENTS { populate_extents(domain, space, &missing)? } else { missing };
    for pfns in single.chunks(BATCH_PAGES_MAX) {
        let frames = domain.populate(pfns, 0)?;
        if frames.len() < pfns.len() {
            return Err(Error::NoMemory(io::Error::from_raw_os_error(ENOMEM)));
        }
        for (pfn, frame) in pfns.iter().zip(frames) {
            space.set_frame(*pfn, frame)?;
        }
    }
    Ok(())
}

/// Populates the whole aligned 2 MiB runs of `missing`, which is sorted; the pfns that are left
/// come back. So do extents that the host cannot give as one.
fn populate_extents<D: TargetDomain, S: Space>(
    domain: &D,
    space: &mut S,
    missing: &[Pfn],
) -> Result<Vec<Pfn>> {
    let runs = missing.chunk_by(|a, b| a.0 / EXTENT_PAGES == b.0 / EXTENT_PAGES);
    let (whole, parts): (Vec<&[Pfn]>, Vec<&[Pfn]>) =
        runs.partition(|run| run.len() as u64 == EXTENT_PAGES);
    let extents: Vec<Pfn> = whole.iter().filter_map(|run| run.first().copied()).collect();
    let frames = match extents.as_slice() {
        [] => Vec::new(),
        // None of them exists then, and each page is asked for by itself.
        extents => domain.populate(extents, EXTENT_ORDER).unwrap_or_default(),
    };
    for (run, first) in whole.iter().zip(&frames) {
        for (pfn, offset) in run.iter().zip(0..) {
            space.set_frame(*pfn, first + offset)?;
        }
    }
    let refused = whole.iter().skip(frames.len());
    Ok(refused.chain(&parts).flat_map(|run| run.iter().copied()).collect())
}

/// The frames of `pfns`, all of which have memory.
pub(super) fn frames<S: Space>(space: &S, pfns: impl Iterator<Item = Pfn>) -> Result<Vec<u64>> {
    pfns.map(|pfn| space.frame(pfn).ok_or(Error::Guest(GuestError::State(NO_MEMORY)))).collect()
}

/// Why a pfn that something refers to cannot be used.
pub(super) const NO_MEMORY: &str = "it refers to a page that has no memory";

/// The populated pfns of a translated guest, where the frame is the pfn: a bitmap in pieces, for
/// guests have memory at both ends of large holes. A piece is no larger than the page that it is
/// made for. One at the end of all that a guest can have costs 16 MiB besides, for the places of
/// pieces before it.
#[derive(Debug, Default)]
pub(super) struct Populated {
    pieces: Vec<Option<Box<PageBitmap>>>,
}

/// pfns in a piece: 128 MiB of guest, 4 KiB of bits.
const PIECE_PAGES: u64 = 1 << 15;
const _: () = assert!(PIECE_PAGES / 8 <= PAGE_SIZE as u64);

impl Space for Populated {
    const EXTENTS: bool = true;

    fn frame(&self, pfn: Pfn) -> Option<u64> {
        let piece = self.pieces.get(piece(pfn)?)?.as_ref()?;
        piece.get(Pfn(pfn.0 % PIECE_PAGES)).then_some(pfn.0)
    }

    fn set_frame(&mut self, pfn: Pfn, _frame: u64) -> Result<(), GuestError> {
        let index = piece(pfn).ok_or(GuestError::State(NO_MEMORY))?;
        if index >= self.pieces.len() {
            self.pieces.resize_with(index + 1, || None);
        }
        if let Some(piece) = self.pieces.get_mut(index) {
            let piece = piece.get_or_insert_with(|| Box::new(PageBitmap::new(PIECE_PAGES)));
            piece.set(Pfn(pfn.0 % PIECE_PAGES));
        }
        Ok(())
    }
}

/// The piece that has the bit of `pfn`, if a translated guest can have such a pfn.
fn piece(pfn: Pfn) -> Option<usize> {
    Pfn(pfn.0 / PIECE_PAGES).index().filter(|_| pfn.0 < HVM_PFN_END)
}
