//! What the process that restores makes of workers on links, whatever their moment.

use std::collections::VecDeque;
use std::io;

use crate::error::Error;
use crate::fake::{FakeToolstack, Host, Script, WIRING, tables};
use crate::frame::{PageType, Pfn};
use crate::stream::libxc::{PageEntry, StreamHeader};
use crate::stream::link::{LinkSet, Offer, Secret, pass_end_record};
use crate::target::guest::Frames;
use crate::target::links::{Answer, Ask, Asked, Links, Need, Owner};
use crate::target::restore_with;

/// A worker on link 0 that asks whenever it can, before anybody looks at the stream.
struct Hasty {
    asks: VecDeque<Ask>,
    waits: bool,
}

impl Links for Hasty {
    fn open(&mut self, _offer: &Offer) {}

    fn wait(&mut self, stream: bool) -> io::Result<Need> {
        if let Some(ask) = (!self.waits).then(|| self.asks.pop_front()).flatten() {
            self.waits = true;
            return Ok(Need::Ask(0, ask));
        }
        if stream { Ok(Need::Stream) } else { Err(io::Error::other("all workers have ended")) }
    }

    fn answer(&mut self, _link: u8, _answer: &Answer) -> io::Result<()> {
        self.waits = false;
        Ok(())
    }

    fn dismiss(&mut self, _link: u8) {}
}

/// What becomes of `script` with a link that brings page 4 in pass 0.
fn with_link(mut script: Script) -> Result<(), Error> {
    let entry = PageEntry { pfn: Pfn(4), kind: PageType::AllocOnly };
    let asks = [Ask::Pass(0), Ask::Prepare(vec![entry]), Ask::Pass(1)];
    let offer = Offer::new(1, Secret::new([7; 32]), Vec::new()).record().unwrap();
    script.rewind();
    script.bytes.splice(StreamHeader::BYTES..StreamHeader::BYTES, offer);
    script.bytes.extend(pass_end_record(0, LinkSet(1)).unwrap());
    let script = if script.hvm { script.finish_hvm() } else { script.finish_pv() };
    let domain = Host::new(48, 7).create(script.hvm, 32, 2);
    let links = Box::new(Hasty { asks: asks.into(), waits: false });
    let mut toolstack = FakeToolstack::new(&domain);
    restore_with(&domain, &mut script.wire(), &mut toolstack, Some(links), &WIRING).map(|_| ())
}

/// Its process is started, and its connection made, while the head of the stream is on its way or
/// the toolstack makes the CPU policy.
#[test]
fn a_link_that_is_faster_than_the_head_of_the_stream_waits_for_it() {
    for script in [Script::pv(), Script::hvm()] {
        with_link(script).unwrap();
    }
}

/// Each page is at the frame that is 100 after it.
#[derive(Default)]
struct Resolves(Vec<Vec<u64>>);

impl Owner for Resolves {
    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        let Ask::Resolve(pfns) = ask else { panic!("{ask:?}") };
        self.0.push(pfns.iter().map(|pfn| pfn.0).collect());
        Ok(Answer::Frames(pfns.iter().map(|pfn| pfn.0 + 100).collect()))
    }
}

/// Each question costs the time of two processes that wait for each other; a table would be one.
#[test]
fn what_all_tables_of_a_batch_refer_to_is_asked_for_at_once() {
    let mut owner = Resolves::default();
    let pfns = [vec![(0, 7), (5, 3), (6, 4)], vec![], vec![(511, 3), (510, 9)]];
    let mut pages = pfns.clone().map(|entries| tables(&entries));
    Asked::new(&mut owner).localise(&mut pages.each_mut().map(|page| &mut **page)).unwrap();
    let there = pfns.map(|entries| {
        let frames: Vec<_> = entries.iter().map(|(slot, pfn)| (*slot, pfn + 100)).collect();
        tables(&frames)
    });
    assert!(pages.iter().zip(&there).all(|(page, there)| page.0 == there.0));
    assert_eq!(owner.0, [[3, 4, 7, 9]]);

    let many: Vec<(usize, u64)> = (0..512).map(|slot| (slot, 2 * slot as u64)).collect();
    let mut pages = [0, 1, 2000].map(|more| {
        let entries: Vec<_> = many.iter().map(|(slot, pfn)| (*slot, pfn + more)).collect();
        tables(&entries)
    });
    let mut owner = Resolves::default();
    Asked::new(&mut owner).localise(&mut pages.each_mut().map(|page| &mut **page)).unwrap();
    let counts: Vec<usize> = owner.0.iter().map(Vec::len).collect();
    assert_eq!(counts, [1024, 512], "as many as a message has room for");
}
