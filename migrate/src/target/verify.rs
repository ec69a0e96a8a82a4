//! Comparing what has been placed with the sender's digests ([`crate::stream::digest`]).
//!
//! Nothing is changed here. A page that differs is told to whoever restores the domain, and it is
//! up to that to fail at the end.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::frame::{Mfn, PageBuf, Pfn, WORDS_PER_PAGE};
use crate::hypervisor::{Access, ForeignPages, LogLevel, StreamIn, TargetDomain, Toolstack};
use crate::stream::digest::{self, PageDigest};
use crate::stream::libxc::PageEntry;
use crate::target::driver::Reader;
use crate::target::guest::Memory;
use crate::x86::pv::normalise;

/// Pages that differ of which the numbers are kept; of more it is only known that there are more.
const PAGES_MAX: usize = 1024;
/// Lines about single pages that differ.
const LINES_MAX: usize = 10;

/// What could not be read, if digests end early.
const DIGESTS: &str = "could not read digests";

/// The pages that differ.
#[derive(Debug, Default)]
pub(super) struct Differing(BTreeSet<Pfn>);

impl Differing {
    /// These differ. A page may be told twice: if a link is lost its digests come again.
    pub(super) fn note(&mut self, pages: Vec<Pfn>) {
        for pfn in pages {
            if self.0.len() < PAGES_MAX {
                self.0.insert(pfn);
            }
        }
    }

    /// Names them to the user.
    ///
    /// # Errors
    /// There are some.
    pub(super) fn conclude<T: Toolstack>(&self, toolstack: &mut T) -> Result<()> {
        let Some(first) = self.0.first().copied() else { return Ok(()) };
        for pfn in self.0.iter().take(LINES_MAX) {
            toolstack.log(LogLevel::Error, &format!("verify: pfn {pfn} differs"));
        }
        Err(Error::Differs { pages: self.0.len(), first })
    }
}

/// Compares pages of one domain with digests.
pub(super) struct Verifier<'a, D: TargetDomain> {
    domain: &'a D,
    /// Xen's m2p, once a page table has come.
    m2p: Option<D::Pages>,
}

impl<'a, D: TargetDomain> Verifier<'a, D> {
    pub(super) fn new(domain: &'a D) -> Self {
        Verifier { domain, m2p: None }
    }

    /// Reads the body of a record of digests, `length` bytes: the pages of it that differ, or have
    /// no memory here.
    pub(super) fn compare<I, M>(
        &mut self,
        reader: &mut Reader<'_, I, D::Pages>,
        memory: &mut M,
        length: usize,
    ) -> Result<Vec<Pfn>>
    where
        I: StreamIn<D::Pages>,
        M: Memory,
    {
        let sent = digest::parse(&reader.vec(length, DIGESTS)?)?;
        let pfns: Vec<Pfn> = sent.iter().map(|(entry, _)| entry.pfn).collect();
        let frames = memory.look(&pfns)?;
        let mut differing = Vec::new();
        let (mut there, mut mapped) = (Vec::new(), Vec::new());
        for ((entry, digest), frame) in sent.into_iter().zip(frames) {
            match frame {
                Some(frame) => {
                    there.push((entry, digest));
                    mapped.push(frame);
                }
                None => differing.push(entry.pfn),
            }
        }
        if mapped.is_empty() {
            return Ok(differing);
        }
        let pages = self.domain.map(&mapped, Access::Read)?;
        let mut page = PageBuf::zeroed();
        for (index, (entry, digest)) in there.iter().enumerate() {
            pages.read_page(index, &mut page);
            if !self.is_as_sent(entry, &mut page, digest)? {
                differing.push(entry.pfn);
            }
        }
        Ok(differing)
    }

    /// Whether `page` is what `digest` was made of; a page table is turned back into what was sent.
    fn is_as_sent(
        &mut self,
        entry: &PageEntry,
        page: &mut PageBuf,
        digest: &PageDigest,
    ) -> Result<bool> {
        let Some(level) = entry.kind.table_level() else {
            return Ok(PageDigest::of(page) == *digest);
        };
        let m2p = match &mut self.m2p {
            Some(m2p) => m2p,
            none => none.insert(self.domain.map_m2p()?),
        };
        let mfns = (m2p.page_count() * WORDS_PER_PAGE) as u64;
        let to_pfn = |mfn: Mfn| Some(Pfn(m2p.read_u64(mfn.index().filter(|_| mfn.0 < mfns)?)));
        // An entry that nobody could have sent.
        Ok(normalise(level, page, to_pfn).is_ok() && PageDigest::of(page) == *digest)
    }
}
