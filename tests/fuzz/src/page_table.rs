//! PV page tables: normalising, localising, and what they refer to.

use rxl_migrate::fake::tables;
use rxl_migrate::frame::{Mfn, PageBuf, Pfn};
use rxl_migrate::x86::pv::{
    PTE_FRAME_MASK, Unfit, get_u32, get_u64, localise, normalise, put, referenced,
};

use crate::block;
use crate::input::Input;

/// Slots of a top-level table that are Xen's: not the guest's, and zero in the stream.
const XEN_SLOTS: std::ops::Range<usize> = 256..272;

/// The guest's memory: pfn n, below the size, at mfn `BASE` + n, but for a hole at every
/// multiple of 7.
#[derive(Clone, Copy)]
struct Memory {
    pages: u64,
}

const BASE: u64 = 0x1234;

impl Memory {
    fn mfn(self, pfn: Pfn) -> Option<Mfn> {
        (pfn.0 < self.pages && !pfn.0.is_multiple_of(7)).then(|| Mfn(BASE + pfn.0))
    }

    fn pfn(self, mfn: Mfn) -> Option<Pfn> {
        mfn.0.checked_sub(BASE).map(Pfn).filter(|pfn| self.mfn(*pfn).is_some())
    }
}

pub(crate) fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let level = input.u8() % 4 + 1;
    let memory = Memory { pages: u64::from(input.u16()) };
    let offset = usize::from(input.u16());
    let mut table = PageBuf::zeroed();
    if block::read(&mut input, &mut table.0).is_none() {
        return;
    }
    // Guest memory does not belong in logs.
    assert_eq!(format!("{table:?}"), "PageBuf(..)");
    fields(&table, offset);
    let raw = table.clone();
    match normalise(level, &mut table, |mfn| memory.pfn(mfn)) {
        Ok(()) => {
            for pfn in referenced(&table) {
                assert!(memory.mfn(pfn).is_some(), "a table in the stream refers to {pfn}");
            }
            localise(&mut table, |pfn| memory.mfn(pfn).ok_or(())).expect("known pfns");
            for (slot, (was, is)) in raw.words().zip(table.words()).enumerate() {
                let xens = level == 4 && XEN_SLOTS.contains(&slot);
                assert_eq!(is, if xens { 0 } else { was }, "slot {slot}");
            }
        }
        Err(Unfit::Superpage) => assert!(level > 1),
        Err(Unfit::Frame { entry, mfn }) => {
            let pte = raw.words().nth(entry).expect("an entry of the table");
            assert_eq!((pte & PTE_FRAME_MASK) >> 12, mfn);
            assert_eq!(memory.pfn(Mfn(mfn)), None);
        }
    }
    // A peer's table may refer to anything.
    let mut table = raw.clone();
    let localised = localise(&mut table, |pfn| memory.mfn(pfn).ok_or(pfn));
    let unknown = referenced(&raw).find(|pfn| memory.mfn(*pfn).is_none());
    assert_eq!(localised.err(), unknown);
}

/// Fields of a guest's structures, at an offset that may be past their end.
fn fields(page: &PageBuf, offset: usize) {
    let bytes = page.0.get(offset..).unwrap_or_default();
    let low = get_u32(&page.0, offset);
    assert_eq!(low.is_some(), bytes.len() >= 4);
    let word = get_u64(&page.0, offset);
    assert_eq!(word.is_some(), bytes.len() >= 8);
    let mut copy = page.clone();
    put(&mut copy.0, offset, &[0x5a; 8]);
    assert_eq!(
        get_u64(&copy.0, offset).is_some_and(|w| w == 0x5a5a_5a5a_5a5a_5a5a),
        word.is_some()
    );
    assert!(word.is_some() || copy.0 == page.0, "a field that is not there was written");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let of = |level: u8, entries: &[(usize, u64)]| {
        let head = [&[level - 1][..], &1000_u16.to_le_bytes(), &8_u16.to_le_bytes()].concat();
        [head, block::write(&tables(entries).0)].concat()
    };
    vec![
        of(1, &[(0, BASE + 1), (7, BASE + 999), (511, BASE + 2)]),
        of(2, &[(0, BASE + 1), (3, 77)]),
        of(3, &[(5, BASE + 7)]),
        of(4, &[(0, BASE + 1), (256, 1), (271, 1), (272, BASE + 5)]),
        of(1, &[(0, 1), (9, 16)]),
    ]
}
