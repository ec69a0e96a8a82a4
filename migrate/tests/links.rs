//! A guest that is sent over several links arrives as it was, whichever of them break and when.

#![allow(clippy::unwrap_used, reason = "what is not there is to stop the test")]

mod common;

use std::thread;

use common::{HOST_FRAMES, Link, Pipe, Receivers, Senders, WIRING, guest};
use rxl_migrate::counters::{Counters, LeftOut};
use rxl_migrate::error::Error;
use rxl_migrate::fake::{FakeDomain, FakeToolstack, Heard, Host, HvmSpec, Rng, compare};
use rxl_migrate::frame::PAGE_SIZE;
use rxl_migrate::hypervisor::{BATCH_PAGES_MAX, Domain};
use rxl_migrate::report::Event;
use rxl_migrate::source::precopy::Policy;
use rxl_migrate::source::workers::{News, Request};
use rxl_migrate::source::{self, Verify, save_with};
use rxl_migrate::stream::reduced::Reduce;
use rxl_migrate::target::links::{Answer, Ask, Links, Need};
use rxl_migrate::target::restore_with;

const LIVE: source::Options =
    source::Options { live: true, verify: Verify::No, policy: Policy::Stock };
/// Pages that a copy may have more than the guest had when it was suspended: what it gave back
/// meanwhile comes along.
const BALLOONED_PAGES_MAX: u64 = 2000;

/// What came of a migration.
struct Moved {
    differences: Vec<String>,
    joined: usize,
    lost: usize,
    left_out: LeftOut,
    /// Bytes that no link carried.
    over_stream: u64,
}

/// Moves `source` over a stream and links that break after so many bytes.
fn moved(
    source: &FakeDomain,
    breaks: &[Option<usize>],
    seed: u64,
    reduce: Reduce,
    options: &source::Options,
) -> Moved {
    let links: Vec<Link> = breaks.iter().map(|after| Link::new(*after)).collect();
    let mut senders = Senders::new(source);
    senders.reduce = reduce;
    moved_by(source, senders, &links, seed, options)
}

/// The same, sent by `senders`.
fn moved_by(
    source: &FakeDomain,
    mut senders: Senders,
    links: &[Link],
    seed: u64,
    options: &source::Options,
) -> Moved {
    let stream = Pipe::new(1 << 20, None);
    let joins = senders.offer(links);
    let info = source.info().unwrap();
    let host = Host::new(HOST_FRAMES, seed ^ 0x5eed);
    let target =
        host.create(info.hvm, info.total_pages + BALLOONED_PAGES_MAX, info.max_vcpu_id + 1);
    let receivers = Receivers::new(&target, &stream, links, joins);
    let receiver = {
        let (target, mut stream) = (target.clone(), stream.clone());
        thread::spawn(move || {
            let mut toolstack = FakeToolstack::new(&target);
            let links = Some(Box::new(receivers) as _);
            let restored = restore_with(&target, &mut stream, &mut toolstack, links, &WIRING);
            // A sender that waits for room is not to wait for ever.
            if restored.is_err() {
                stream.close();
            }
            restored
        })
    };
    let mut toolstack = FakeToolstack::new(source);
    let mut out = stream.clone();
    let saved = save_with(source, &mut out, &mut toolstack, Some(Box::new(senders)), options);
    stream.close();
    let outcome = receiver.join().unwrap().unwrap();
    let bytes = saved.unwrap().bytes;
    let count = |wanted: fn(&Event) -> bool| {
        let events = toolstack.heard.iter();
        events.filter(|heard| matches!(heard, Heard::Event(event) if wanted(event))).count()
    };
    assert_eq!(host.mapped_pages(), 0, "a worker holds guest memory");
    let (mut counters, mut over_links) = (Counters::default(), 0);
    for heard in &toolstack.heard {
        if let Heard::Event(Event::Counted { counters: more, bytes, .. }) = heard {
            counters += more;
            over_links += bytes;
        }
    }
    Moved {
        differences: compare(source, &target, &WIRING, &outcome),
        joined: count(|event| matches!(event, Event::LinkJoined { .. })),
        lost: count(|event| matches!(event, Event::LinkLost { .. })),
        left_out: counters.left_out,
        over_stream: bytes - over_links,
    }
}

#[test]
fn a_guest_that_writes_arrives_as_it_was_over_any_number_of_links() {
    let mut left_out = [0; 5];
    for seed in 0..4 {
        for links in [1, 2, 5] {
            // Without Zstandard, which mostly leaves less, every second time.
            let less = if seed % 2 == 0 { Reduce::ZSTD } else { Reduce::NONE };
            let kinds = Reduce::from_bits(!less.bits()).or(Reduce::ALWAYS);
            let moved = moved(&guest(seed), &vec![None; links], seed, kinds, &LIVE);
            assert_eq!(moved.differences, [""; 0], "{links} links, {seed}");
            assert_eq!((moved.joined, moved.lost), (links, 0), "{links} links, {seed}");
            let pages = moved.left_out.by_kind().map(|(_, saved)| saved.pages);
            left_out.iter_mut().zip(pages).for_each(|(sum, pages)| *sum += pages);
        }
    }
    assert!(left_out.iter().all(|pages| *pages > 0), "{left_out:?}");
}

#[test]
fn whole_pages_go_to_a_receiver_that_needs_them() {
    let moved = moved(&guest(0), &[None, None], 0, Reduce::ALWAYS, &LIVE);
    assert_eq!(moved.differences, [""; 0]);
    assert!(moved.left_out.is_nothing(), "{:?}", moved.left_out);
}

/// It would hold up all links at the end of the pass: what is told of that goes over the stream.
#[test]
fn what_was_looked_up_for_the_stream_goes_over_the_first_link_there_is() {
    let (source, links) = (guest(1), [Link::new(None), Link::new(None)]);
    let mut senders = Senders::new(&source);
    senders.reduce = Reduce::NONE;
    // The first batch has been sent by then.
    senders.late = Some(2);
    let moved = moved_by(&source, senders, &links, 1, &LIVE);
    assert_eq!(moved.differences, [""; 0]);
    let batches = moved.over_stream as f64 / (BATCH_PAGES_MAX * PAGE_SIZE) as f64;
    assert!((0.5..1.5).contains(&batches), "{batches}");
}

#[test]
fn links_that_break_at_any_byte_cost_nothing_but_time() {
    let mut lost = 0;
    for seed in 100..124 {
        let mut rng = Rng::new(seed);
        let breaks: Vec<Option<usize>> = (0..3)
            .map(|_| match rng.next() % 4 {
                0 => None,
                // In the hello, in the first records, in later passes.
                1 => Some((rng.next() % 10_000) as usize),
                _ => Some((rng.next() % (10 << 20)) as usize),
            })
            .collect();
        let verify = if seed % 2 == 0 { Verify::Digests } else { Verify::No };
        let options = source::Options { verify, ..LIVE };
        let reduce = Reduce::ALL.or(Reduce::ALWAYS);
        let moved = moved(&guest(seed), &breaks, seed, reduce, &options);
        assert_eq!(moved.differences, [""; 0], "{breaks:?}, {seed}");
        lost += moved.lost;
    }
    assert!(lost > 12, "only {lost} links were lost");
}

/// The receiver fails, whatever the sender does over links: it must not go on without the pages.
#[test]
fn what_a_link_brings_that_cannot_be_applied_ends_both_ends() {
    let source = guest(2);
    let stream = Pipe::new(1 << 20, None);
    let links = [Link::new(None), Link::new(None)];
    let mut senders = Senders::new(&source);
    let joins = senders.offer(&links);
    // No memory for a guest of this size.
    let host = Host::new(1024, 1);
    let target = host.create(true, 5600, 1);
    let receivers = Receivers::new(&target, &stream, &links, joins);
    let receiver = {
        let (target, mut stream) = (target.clone(), stream.clone());
        thread::spawn(move || {
            let mut toolstack = FakeToolstack::new(&target);
            let links = Some(Box::new(receivers) as _);
            let restored = restore_with(&target, &mut stream, &mut toolstack, links, &WIRING);
            stream.close();
            restored.map(|_| ())
        })
    };
    let mut toolstack = FakeToolstack::new(&source);
    let mut out = stream.clone();
    let saved = save_with(&source, &mut out, &mut toolstack, Some(Box::new(senders)), &LIVE);
    assert!(matches!(receiver.join().unwrap(), Err(Error::NoMemory(_))));
    assert!(matches!(saved, Err(Error::Stream { .. })), "{saved:?}");
    assert!(!source.is_logging() && source.is_running());
}

/// The sender must not go before the receiver has heard that a link is through with the last pass:
/// if the link is lost then, nobody is left to say so.
#[test]
fn a_pass_is_confirmed_as_page_data_is() {
    use rxl_migrate::source::workers::Workers;

    let source = HvmSpec { pages: 100, seed: 3 }.build(&Host::new(HOST_FRAMES, 3));
    let target = Host::new(HOST_FRAMES, 4).create(true, 200, 1);
    let links = [Link::new(None)];
    let mut senders = Senders::new(&source);
    let joins = Senders::offer(&mut senders, &links);
    let offer = senders.offer.clone().unwrap();
    let mut receivers = Receivers::new(&target, &Pipe::new(1, None), &links, joins);
    receivers.open(&offer);
    assert_eq!(senders.news(true).unwrap(), Some(News::Joined(0, Some(0))));
    let mut ask = |request: Request| {
        senders.submit(0, &request).unwrap();
        match senders.news(true).unwrap() {
            Some(News::Reply(0, reply)) => (reply.sent, reply.confirmed),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ask(Request::Pass(3)), (1, 0));
    assert_eq!(receivers.wait(true).unwrap(), Need::Ask(0, Ask::Pass(3)));
    assert_eq!(ask(Request::Pass(4)), (2, 0));
    receivers.answer(0, &Answer::GoOn).unwrap();
    assert_eq!(receivers.wait(true).unwrap(), Need::Ask(0, Ask::Pass(4)));
    receivers.answer(0, &Answer::GoOn).unwrap();
    assert_eq!(ask(Request::Confirm), (2, 2));
}
