//! The two ends of a worker on a link, each without the other: a worker whose owner answers
//! anything, and the process that restores with workers that ask for anything.
//!
//! Neither is a peer's to say. But it is a worker that reads what a peer sends, and what it asks
//! must not be able to harm more than its own domain.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use rxl_migrate::Error;
use rxl_migrate::fake::{FakePages, FakeToolstack, Host, WIRING, fill_pages};
use rxl_migrate::frame::{PageType, Pfn};
use rxl_migrate::hypervisor::{PageSlot, StreamIn, TargetDomain};
use rxl_migrate::stream::libxc::PageEntry;
use rxl_migrate::stream::link::Offer;
use rxl_migrate::target::links::{Answer, Ask, LinkIn, Links, Need, Owner, work};
use rxl_migrate::target::restore_with;

use crate::AGREED;
use crate::assert_told;
use crate::input::{Input, Owned};
use crate::linked::two_links;
use crate::ways::{Packed, Source, Stream, Wires};

const FRAMES: u64 = 64;
/// Pages that the domain of a lonely worker has.
const PAGES: u64 = 16;

/// A link, and an owner who says what comes next in the input.
struct Lonely<'a> {
    input: &'a RefCell<Packed>,
    /// An answer was none to its question.
    lied: Cell<bool>,
    /// The link breaks where the input ends.
    breaks: bool,
}

impl StreamIn<FakePages> for &Lonely<'_> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let filled = self.input.borrow_mut().fill(1, buf);
        filled.map_err(|end| if self.breaks { io::ErrorKind::ConnectionReset.into() } else { end })
    }

    fn read_pages(&mut self, pages: &FakePages, slots: &mut [PageSlot<'_>]) -> io::Result<()> {
        fill_pages(pages, slots, |block| self.input.borrow_mut().fill(1, block))
    }
}

impl LinkIn<FakePages> for &Lonely<'_> {
    fn confirm(&mut self, _records: u64) -> io::Result<()> {
        Ok(())
    }
}

impl Owner for &Lonely<'_> {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        let wanted = match ask {
            Ask::Prepare(entries) => Some(entries.iter().filter(|e| e.kind.has_data()).count()),
            Ask::Resolve(pfns) | Ask::Look(pfns) => Some(pfns.len()),
            Ask::Differ(_) | Ask::Pass(_) | Ask::Batch | Ask::Failed(_) => None,
        };
        let answer = self.input.borrow_mut().take(|input| match input.u8() % 8 {
            6 => Some(Answer::GoOn),
            7 => None,
            more => {
                let count = wanted.unwrap_or(0) + usize::from(more == 5);
                Some(Answer::Frames((0..count).map(|_| input.u8().into()).collect()))
            }
        });
        let answer = answer.ok_or(io::ErrorKind::BrokenPipe)?;
        let given = match &answer {
            Answer::Frames(frames) => Some(frames.len()),
            Answer::GoOn | Answer::Place(_) => None,
        };
        // What it was let into it does not look at.
        if wanted.is_some() && given != wanted {
            self.lied.set(true);
        }
        Ok(answer)
    }
}

/// A worker on the link of an input, with an owner of the same. `breaks`: so does the link, at
/// its end.
pub(crate) fn worker(input: Input<'_>, hvm: bool, breaks: bool) {
    let host = Host::new(FRAMES, 7);
    let domain = host.create(hvm, FRAMES / 2, 2);
    let pfns: Vec<Pfn> = (0..PAGES).map(Pfn).collect();
    domain.populate(&pfns, 0).expect("memory");
    let input = RefCell::new(Packed::new(input, false));
    let lonely = Lonely { input: &input, lied: Cell::default(), breaks };
    if let Err(error) = work(&domain, &mut &lonely, &mut &lonely, AGREED) {
        assert!(lonely.lied.get() || !matches!(error, Error::Machine { .. }), "{error}");
        assert_told(&error);
    }
    assert_eq!(host.mapped_pages(), 0, "pages are still mapped");
}

/// Workers whose questions are in the input.
struct Curious {
    input: Owned,
}

impl Curious {
    fn need(input: &mut Input<'_>, stream: bool) -> Need {
        let (kind, link) = (input.u8(), input.u8() % 4);
        let ask = match kind % 8 {
            0 if stream => return Need::Stream,
            1 => return Need::Ended(link, "ended".into()),
            2 | 3 => {
                let count = input.u8();
                let entry = |word: u16| PageEntry {
                    pfn: Pfn(u64::from(word) & 0xfff),
                    kind: u8::try_from(word >> 12)
                        .ok()
                        .and_then(PageType::from_nibble)
                        .unwrap_or(PageType::Normal),
                };
                Ask::Prepare((0..count).map(|_| entry(input.u16())).collect())
            }
            4 => {
                let count = input.u8();
                let pfns = (0..count).map(|_| Pfn(input.u16().into())).collect();
                match kind / 8 % 3 {
                    0 => Ask::Resolve(pfns),
                    1 => Ask::Look(pfns),
                    _ => Ask::Differ(pfns),
                }
            }
            5 => Ask::Failed("a reason".into()),
            _ => Ask::Pass(input.u8().into()),
        };
        Need::Ask(link, ask)
    }
}

impl Links for Curious {
    fn open(&mut self, _offer: &Offer) {}

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        if !self.input.is_empty() {
            return Ok(self.input.take(|input| Self::need(input, stream)));
        }
        if stream { Ok(Need::Stream) } else { Err(io::Error::other("all workers have ended")) }
    }

    /// The last one never takes any.
    fn answer(&mut self, link: u8, _answer: &Answer) -> io::Result<()> {
        if link < 3 { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    fn dismiss(&mut self, _link: u8) {}
}

/// The process that restores, with workers that ask what the input says: whether it takes it.
pub(crate) fn owner(mut input: Input<'_>, hvm: bool) -> bool {
    let host = Host::new(FRAMES, 7);
    let domain = host.create(hvm, FRAMES / 2, 2);
    let source = Rc::new(RefCell::new(Wires::new(two_links(hvm).ways(), 0)));
    let links = Box::new(Curious { input: Owned::new(input.rest()) });
    let (mut stream, mut toolstack) = (Stream::new(&source), FakeToolstack::new(&domain));
    let restored = restore_with(&domain, &mut stream, &mut toolstack, Some(links), &WIRING);
    assert_eq!(host.mapped_pages(), 0, "pages are still mapped");
    if let Err(error) = &restored {
        assert!(!matches!(error, Error::Machine { .. }), "{error}");
        assert_told(error);
    }
    restored.is_ok()
}
