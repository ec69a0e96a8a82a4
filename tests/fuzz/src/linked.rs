//! Streams with links, made by hand.

use rxl_migrate::fake::{Script, tables};
use rxl_migrate::frame::{PAGE_SIZE, PageBuf, PageType, Pfn};
use rxl_migrate::stream::libxc::{PageEntry, StreamHeader, page_data_head};
use rxl_migrate::stream::link::{
    LinkSet, Offer, Secret, link_lost_record, pass_end_record, pass_record,
};
use rxl_migrate::stream::packed::{ZstdPacker, pack};
use rxl_migrate::stream::reduced::{Builder, Reduced};

use crate::AGREED;

/// A stream and what comes over its links.
pub(crate) struct Linked {
    pub(crate) script: Script,
    pub(crate) links: Vec<Vec<u8>>,
}

impl Linked {
    /// `script` with an offer of `links` links and without its state.
    pub(crate) fn new(mut script: Script, links: u8) -> Linked {
        let offer = Offer::new(links, Secret::new([7; 32]), Vec::new());
        let offer = offer.record().expect("a short offer");
        script.records.iter_mut().for_each(|record| *record += offer.len());
        script.bytes.splice(StreamHeader::BYTES..StreamHeader::BYTES, offer);
        script.rewind();
        Linked { script, links: vec![Vec::new(); links.into()] }
    }

    /// A pass has ended on the stream.
    pub(crate) fn ends(mut self, pass: u32, links: &[u8]) -> Linked {
        let mut set = LinkSet::default();
        links.iter().for_each(|link| set.insert(*link));
        self.script.bytes.extend(pass_end_record(pass, set).expect("a record"));
        self
    }

    /// A link is lost.
    pub(crate) fn loses(mut self, link: u8) -> Linked {
        self.script.bytes.extend(link_lost_record(link).expect("a record"));
        self
    }

    /// Link `link` brings `bytes`.
    pub(crate) fn over(mut self, link: usize, bytes: &[u8]) -> Linked {
        self.links.get_mut(link).expect("a link").extend(bytes);
        self
    }

    /// Its state follows.
    pub(crate) fn finish(self) -> Linked {
        let Linked { script, links } = self;
        let script = if script.hvm { script.finish_hvm() } else { script.finish_pv() };
        Linked { script, links }
    }

    /// The stream, then the links.
    pub(crate) fn ways(self) -> Vec<Vec<u8>> {
        [&[self.script.bytes][..], &self.links].concat()
    }
}

/// On a link: what follows belongs to `pass`.
pub(crate) fn to(pass: u32) -> Vec<u8> {
    pass_record(pass).expect("a record")
}

/// Pages that are filled with a byte, in one record.
pub(crate) fn pages(pages: &[(u64, u8)]) -> Vec<u8> {
    let entry = |page: &(u64, u8)| PageEntry { pfn: Pfn(page.0), kind: PageType::Normal };
    let entries: Vec<PageEntry> = pages.iter().map(entry).collect();
    let content = pages.iter().flat_map(|page| [page.1; PAGE_SIZE]);
    page_data_head(&entries).expect("a few pages").into_iter().chain(content).collect()
}

/// A page in each form, but for what refers to content: that of `had`, which `pfn` and the next one
/// are filled with.
pub(crate) fn reduced(pfn: u64, had: u8) -> Vec<u8> {
    let entry = |pfn| PageEntry { pfn: Pfn(pfn), kind: PageType::Normal };
    let (before, content) = (PageBuf([had; PAGE_SIZE]), PageBuf([0x5a; PAGE_SIZE]));
    let mut differs = before.clone();
    if let Some(byte) = differs.0.first_mut() {
        *byte = 1;
    }
    let digest = AGREED.digest(&before);
    let (mut packed, mut delta, mut dense) = (Vec::new(), Vec::new(), Vec::new());
    let packed = pack(&content, &mut packed).expect("it is shorter");
    let delta = pack(&differs, &mut delta).expect("it is shorter");
    let pages = [
        Reduced::Same(digest),
        Reduced::Delta(digest, delta),
        Reduced::Zero,
        Reduced::Packed(packed),
        Reduced::Whole(&content),
        Reduced::Zstd(ZstdPacker::default().pack(&content, &mut dense).expect("it is shorter")),
    ];
    let mut builder = Builder::default();
    for (pfn, page) in (pfn..).zip(pages) {
        assert!(builder.add(entry(pfn), page), "there is room");
    }
    builder.take().expect("a few pages")
}

/// A page table of the lowest level.
pub(crate) fn table(pfn: u64, below: &[(usize, u64)]) -> Vec<u8> {
    let kind = PageType::Table { level: 1, pinned: false };
    let head = page_data_head(&[PageEntry { pfn: Pfn(pfn), kind }]).expect("a page");
    [&head[..], &tables(below).0].concat()
}

/// Two links: the first brings pages in two passes, the second some of the same, and is lost.
pub(crate) fn two_links(hvm: bool) -> Linked {
    let (script, low) = if hvm { (Script::hvm(), 2) } else { (Script::pv(), 12) };
    let mut linked = Linked::new(script, 2)
        .over(0, &[to(0), pages(&[(low, 0x52), (low + 1, 0x53)]), to(1)].concat())
        .over(1, &[to(0), pages(&[(low + 1, 0x33)]), to(1), pages(&[(low, 0x34)])].concat());
    if !hvm {
        linked = linked.over(0, &table(10, &[(0, 4), (1, 5), (2, 9), (3, 14)]));
    }
    linked
        .over(0, &[pages(&[(low, 0x54)]), to(2), pages(&[(low, 0x55)]), to(3)].concat())
        .ends(0, &[0, 1])
        .ends(1, &[0, 1])
        .loses(1)
        .ends(2, &[0])
        .finish()
}
