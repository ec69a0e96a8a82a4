//! The host as tests handle it.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard};

use super::domain::FakeDomain;
use super::xen::{Dom, Xen};
use crate::frame::DomId;

/// A machine with Xen. Clones are the same machine.
#[derive(Clone)]
pub struct Host(Arc<Mutex<Xen>>);

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Host(..)")
    }
}

/// A machine to make.
#[derive(Debug)]
pub struct HostSpec {
    /// Page frames.
    pub frames: u64,
    /// Determines in what order frames are handed out.
    pub seed: u64,
    /// An empty file that is to hold the frames (frame n is page n), for other processes to map.
    pub file: Option<File>,
    /// As after a boot: frames are handed out in order, and are zero where nobody had them
    /// before; guests that are built have not written anything yet. Otherwise frames are in no
    /// order and hold rubbish.
    pub fresh: bool,
}

impl HostSpec {
    /// Makes the machine, without domains.
    #[must_use]
    pub fn build(self) -> Host {
        Host(Arc::new(Mutex::new(Xen::new(self))))
    }
}

impl Host {
    /// A machine of `frames` page frames and without domains. `seed` determines in what order
    /// frames are handed out.
    #[must_use]
    pub fn new(frames: u64, seed: u64) -> Host {
        HostSpec { frames, seed, file: None, fresh: false }.build()
    }

    /// The domain of that number.
    #[must_use]
    pub fn domain(&self, id: DomId) -> Option<FakeDomain> {
        let exists = self.lock().domains.contains_key(&id.0);
        exists.then(|| FakeDomain::new(self, id))
    }

    /// An empty, paused domain for `pages` pages of memory and vCPUs `0..vcpus`.
    #[must_use]
    pub fn create(&self, hvm: bool, pages: u64, vcpus: u32) -> FakeDomain {
        let vcpus = vec![None; vcpus as usize];
        let domain = Dom { hvm, max_pages: pages, vcpus, ..Dom::default() };
        let id = self.lock().create(domain);
        FakeDomain::new(self, DomId(id))
    }

    /// Lets guests do something at every `accesses`-th call or access to their memory (0: never).
    pub fn run_guests(&self, accesses: u64) {
        self.lock().guests_run_every = accesses;
    }

    /// Lets guests do something now.
    pub fn let_guests_run(&self) {
        self.lock().run_guests();
    }

    /// Whether guests that run give memory back and take some (they do at first).
    pub fn let_guests_balloon(&self, on: bool) {
        self.lock().guests_balloon = on;
    }

    /// Page frames, and pages of the machine-to-physical table, which are behind them in the
    /// file of [`HostSpec::file`].
    #[must_use]
    pub fn size(&self) -> (u64, u64) {
        let xen = self.lock();
        (xen.memory.m2p_start(), xen.memory.m2p_pages())
    }

    /// A planted fault: a reading of the dirty bits, after `succeed` more, clears them and says
    /// that nothing was dirty.
    pub fn forget_clean(&self, succeed: u64) {
        self.lock().forgotten_clean = Some(succeed);
    }

    /// A planted fault: from now on a page of a PV domain that was mapped to be read is found in
    /// that mapping whenever it is mapped again, although it may have another frame by then.
    pub fn map_stale(&self) {
        self.lock().first_mapped = Some(BTreeMap::new());
    }

    /// How often [`Host::map_stale`] has made a difference.
    #[must_use]
    pub fn mapped_stale(&self) -> u64 {
        self.lock().mapped_stale
    }

    /// Lets the call of `op` after `succeed` more fail with `errno`, and that one only. `op` is
    /// the name of a method of one of the traits, or `map_page`, which is each page of a `map`.
    pub fn fail(&self, op: &'static str, succeed: u64, errno: i32) {
        self.lock().faults.push((op, succeed, errno));
    }

    /// Takes back every [`Host::fail`] that has not come true.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    /// Extents of 2 MiB are not to be had.
    pub fn fragment(&self) {
        self.lock().fragmented = true;
    }

    /// CPU policies are refused for this leaf.
    pub fn refuse_leaf(&self, leaf: u32) {
        self.lock().refused_leaf = Some(leaf);
    }

    /// This host's CPU has none of the features in edx of that leaf: a policy loses them when a
    /// domain gets it, without an error.
    pub fn lack_features(&self, leaf: u32) {
        self.lock().lacking = Some(leaf);
    }

    /// Methods called so far, with the domains that they were called for.
    #[must_use]
    pub fn calls(&self) -> Vec<(DomId, &'static str)> {
        self.lock().calls.iter().map(|(id, op)| (DomId(*id), *op)).collect()
    }

    /// Pages that are mapped into the toolstack now.
    #[must_use]
    pub fn mapped_pages(&self) -> u64 {
        self.lock().mappings
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Xen> {
        // A test that failed while it held the lock is not to hide its reason.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
