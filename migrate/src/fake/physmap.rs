//! Which frame is behind a frame number of a domain: sparse, and small where it is dense.

use std::collections::BTreeMap;

use crate::frame::INVALID_FRAME;

/// Entries that are kept together.
const CHUNK: u64 = 512;

/// Frames by pfn or gfn.
#[derive(Clone, Debug, Default)]
pub(super) struct PhysMap(BTreeMap<u64, Box<[u64; CHUNK as usize]>>);

impl PhysMap {
    pub(super) fn get(&self, pfn: u64) -> Option<u64> {
        let mfn = self.0.get(&(pfn / CHUNK))?[(pfn % CHUNK) as usize];
        (mfn != INVALID_FRAME).then_some(mfn)
    }

    pub(super) fn insert(&mut self, pfn: u64, mfn: u64) {
        let chunk = self.0.entry(pfn / CHUNK);
        let chunk = chunk.or_insert_with(|| Box::new([INVALID_FRAME; CHUNK as usize]));
        chunk[(pfn % CHUNK) as usize] = mfn;
    }

    pub(super) fn remove(&mut self, pfn: u64) -> Option<u64> {
        let mfn = self.get(pfn)?;
        self.insert(pfn, INVALID_FRAME);
        Some(mfn)
    }

    /// All pairs of pfn and mfn, by pfn.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let chunks = self.0.iter().flat_map(|(chunk, mfns)| (chunk * CHUNK..).zip(mfns.iter()));
        chunks.filter(|(_, mfn)| **mfn != INVALID_FRAME).map(|(pfn, mfn)| (pfn, *mfn))
    }
}

impl FromIterator<(u64, u64)> for PhysMap {
    fn from_iter<I: IntoIterator<Item = (u64, u64)>>(pairs: I) -> PhysMap {
        let mut map = PhysMap::default();
        pairs.into_iter().for_each(|(pfn, mfn)| map.insert(pfn, mfn));
        map
    }
}
