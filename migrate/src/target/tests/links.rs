//! What the process that restores makes of workers on links, whatever their moment.

use std::collections::VecDeque;
use std::io;

use crate::error::Error;
use crate::fake::{FakeToolstack, Host, Script, WIRING};
use crate::frame::{PageType, Pfn};
use crate::stream::libxc::{PageEntry, StreamHeader};
use crate::stream::link::{LinkSet, Offer, Secret, pass_end_record};
use crate::target::links::{Answer, Ask, Links, Need};
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
