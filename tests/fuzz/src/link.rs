//! What the two ends say about links: the offer, passes, hellos, confirmations; and the messages
//! between the processes of one end, which hold what a peer chose.

use std::fmt::Debug;

use rxl_migrate::counters::Counters;
use rxl_migrate::frame::{PageType, Pfn};
use rxl_migrate::source::workers::{self, Failure, Reply, Request};
use rxl_migrate::source::{Outcome, Pass};
use rxl_migrate::stream::libxc::{
    FormatError, PageEntry, RECORD_HEADER_BYTES, ReadKind, RecordHeader, RecordKind,
};
use rxl_migrate::stream::link::{
    ADDRESSES_MAX, Confirmations, HELLO_BYTES, LINKS_MAX, LinkSet, OFFER_BYTES_MAX, Offer, Secret,
    check_hello, fingerprint, hello, is_same, link_lost_record, parse_link_lost, parse_pass,
    parse_pass_end, pass_end_record, pass_record,
};
use rxl_migrate::stream::reduced::Reduce;
use rxl_migrate::target::file::Batch;
use rxl_migrate::target::links::{self, Answer, Ask};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::assert_told;
use crate::input::Input;

type Reader = fn(&[u8]) -> Result<(), FormatError>;

/// How each kind of input is read; the first byte is one of these.
const READERS: [Reader; 7] = [offer, pass, pass_end, link_lost, greeting, confirmations, messages];

pub(crate) fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let reader = input.choice(&READERS).expect("there are readers");
    if let Err(error) = reader(input.rest()) {
        assert_told(&error);
    }
}

/// The body of a record that was written, which is one that stock skips.
fn body(record: &[u8], kind: RecordKind) -> &[u8] {
    let (head, rest) = record.split_first_chunk::<RECORD_HEADER_BYTES>().expect("a record");
    let header = RecordHeader::parse(*head).expect("rxl reads what it writes");
    assert_eq!(header.kind, ReadKind::Known(kind));
    assert_eq!(rest.len(), header.length + header.padding());
    rest.get(..header.length).expect("a whole record")
}

fn offer(bytes: &[u8]) -> Result<(), FormatError> {
    let Some(offer) = Offer::parse(bytes)? else { return Ok(()) };
    assert!(offer.links <= LINKS_MAX && offer.addresses.len() <= ADDRESSES_MAX);
    // Nobody can have it from a log.
    assert!(format!("{offer:?}").contains("secret: Secret"));
    let record = offer.record().expect("an offer that is not too long");
    let written = body(&record, RecordKind::RxlOffer);
    assert!(written.len() <= OFFER_BYTES_MAX);
    assert_eq!(Offer::parse(written), Ok(Some(offer)));
    Ok(())
}

fn pass(bytes: &[u8]) -> Result<(), FormatError> {
    let parsed = parse_pass(bytes)?;
    assert_eq!(body(&pass_record(parsed)?, RecordKind::RxlPass), bytes);
    Ok(())
}

fn pass_end(bytes: &[u8]) -> Result<(), FormatError> {
    let (pass, links) = parse_pass_end(bytes)?;
    assert_eq!(body(&pass_end_record(pass, links)?, RecordKind::RxlPassEnd), bytes);
    let mut again = LinkSet::default();
    links.iter().for_each(|link| again.insert(link));
    assert_eq!(again, links);
    again.insert(LINKS_MAX);
    assert!(again == links && !links.contains(LINKS_MAX) && !links.contains(u8::MAX));
    Ok(())
}

fn link_lost(bytes: &[u8]) -> Result<(), FormatError> {
    let parsed = parse_link_lost(bytes)?;
    assert!(parsed < LINKS_MAX);
    assert_eq!(body(&link_lost_record(parsed)?, RecordKind::RxlLinkLost), bytes);
    Ok(())
}

/// What comes first over a connection, from whoever has made it.
fn greeting(bytes: &[u8]) -> Result<(), FormatError> {
    let mut input = Input::new(bytes);
    let mut random = [0; 32];
    random.fill(input.u8());
    let secret = Secret::new(random);
    let rest = input.rest();
    let Some(bytes) = rest.first_chunk::<HELLO_BYTES>() else { return Ok(()) };
    if let Some((link, reduce)) = check_hello(&secret, bytes) {
        assert_eq!(hello(&secret, link, reduce), *bytes);
        let other = Secret::new([random[0].wrapping_add(1); 32]);
        assert_eq!(check_hello(&other, bytes), None);
        let token = bytes.split_at(16).1;
        assert!(is_same(&secret.hello_token(link, reduce), token));
        for other in [secret.welcome_token(link), secret.proof_token(link)] {
            assert!(!is_same(&other, token));
        }
    }
    Ok(())
}

/// A receiver's word, in pieces: what it comes to does not depend on them.
fn confirmations(bytes: &[u8]) -> Result<(), FormatError> {
    let mut input = Input::new(bytes);
    let mut heard = Confirmations::default();
    let mut whole = Vec::new();
    while !input.is_empty() {
        let count = usize::from(input.u8());
        let piece = input.bytes(count);
        let before = heard.records();
        heard.take(piece);
        assert!(heard.records() >= before, "a word is taken back");
        whole.extend_from_slice(piece);
    }
    let words = whole.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
    assert_eq!(heard.records(), words.max().unwrap_or(0));
    assert!(!format!("{heard:?}").is_empty());
    Ok(())
}

/// Messages of either end, one after the other by kind.
fn messages(bytes: &[u8]) -> Result<(), FormatError> {
    let mut input = Input::new(bytes);
    match input.u8() % 4 {
        0 => message::<Request>(input.rest(), workers::MESSAGE_BYTES_MAX),
        1 => message::<Reply>(input.rest(), workers::MESSAGE_BYTES_MAX),
        2 => message::<Ask>(input.rest(), links::MESSAGE_BYTES_MAX),
        _ => message::<Answer>(input.rest(), links::MESSAGE_BYTES_MAX),
    }
    Ok(())
}

fn message<M>(bytes: &[u8], bytes_max: usize)
where
    M: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let bytes = bytes.get(..bytes_max).unwrap_or(bytes);
    match serde_json::from_slice::<M>(bytes) {
        Ok(read) => {
            let written = serde_json::to_vec(&read).expect("a message is JSON");
            let again: M = serde_json::from_slice(&written).expect("rxl reads what it writes");
            assert_eq!(again, read);
        }
        Err(error) => assert_told(&error),
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let secret = Secret::new([7; 32]);
    let addresses = ["10.0.0.1:4000", "[fe80::1%3]:5", "[2001:db8::7]:65535"];
    let addresses = addresses.iter().filter_map(|text| text.parse().ok()).collect();
    let plain = Offer::new(4, secret.clone(), addresses);
    let mut sealed = plain.clone();
    sealed.certificate = Some(fingerprint(b"a certificate"));
    sealed.reduce = Reduce::ALL;
    let [offer, sealed] = [plain, sealed].map(|offer| {
        let record = offer.record().unwrap_or_default();
        body(&record, RecordKind::RxlOffer).to_vec()
    });
    let text = String::from_utf8_lossy(&offer).into_owned();
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut seeds: Vec<(u8, Vec<u8>)> = vec![
        (0, offer),
        (0, sealed),
        (0, text.replace(r#""version":1"#, r#""version":2"#).into_bytes()),
        (0, text.replace(r#""links":4"#, r#""links":65"#).into_bytes()),
        (0, text.replace("0707", "07").into_bytes()),
        (0, b"[1]".to_vec()),
        (1, words(&[7])),
        (1, words(&[u64::MAX])),
        (1, words(&[7, 7])),
        (2, words(&[3, 1 << 63 | 9])),
        (2, words(&[3])),
        (3, words(&[63])),
        (3, words(&[64])),
        (4, [&[7][..], &hello(&secret, 5, Reduce::NONE)].concat()),
        (4, [&[7][..], &hello(&secret, 5, Reduce::ALL)].concat()),
        (4, [&[8][..], &hello(&secret, 5, Reduce::NONE)].concat()),
        (5, vec![8, 7, 0, 0, 0, 0, 0, 0, 0, 3, 8, 0, 0, 13, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let pfns: Vec<Pfn> = [5, 6, 7, 4, 9].map(Pfn).to_vec();
    let entry = |pfn, kind| PageEntry { pfn: Pfn(pfn), kind };
    let entries = vec![entry(1, PageType::Normal), entry(2, PageType::Normal)];
    let outcome = Outcome {
        sent: pfns.clone(),
        without_data: vec![entry(3, PageType::Broken)],
        tables: 1,
        records: 1,
        bytes: 20504,
        ..Outcome::default()
    };
    let json = |kind: u8, message: serde_json::Result<Vec<u8>>| {
        (6, [&[kind][..], &message.unwrap_or_default()].concat())
    };
    for request in [
        Request::Batch {
            pages: pfns.clone(),
            taken_over: vec![0],
            pass: Pass { number: 4, last: true, digests: false },
        },
        Request::Entries(entries.clone()),
        Request::Pass(3),
        Request::Confirm,
        Request::Count,
    ] {
        seeds.push(json(0, serde_json::to_vec(&request)));
    }
    for done in [Ok(outcome), Err(Failure::Way("gone".into())), Err(Failure::Batch("bad".into()))] {
        let counters = Some(Box::new(Counters { mappings: 3, ..Counters::default() }));
        let reply = Reply { done, sent: 7, confirmed: 5, counters };
        seeds.push(json(1, serde_json::to_vec(&reply)));
    }
    let batch = Batch {
        offset: 7,
        entries: entries.clone(),
        frames: vec![1, 2],
        referred: vec![Pfn(3)],
        referred_frames: vec![4],
    };
    let failed = Ask::Failed("why".into());
    let (look, differ) = (Ask::Look(pfns.clone()), Ask::Differ(pfns.clone()));
    let others = [look, differ, Ask::Pass(1), Ask::Batch, failed];
    for ask in [Ask::Prepare(entries), Ask::Resolve(pfns)].into_iter().chain(others) {
        seeds.push(json(2, serde_json::to_vec(&ask)));
    }
    for answer in [Answer::Frames(vec![1, 2, u64::MAX - 1]), Answer::GoOn, Answer::Place(batch)] {
        seeds.push(json(3, serde_json::to_vec(&answer)));
    }
    // Lists that are too long, and runs that cannot be.
    for runs in ["[[0,65537]]", "[[18446744073709551615,2]]", "[[0,65536],[1,1]]", "[[1,2,3]]"] {
        seeds.push((6, [&[3][..], format!(r#"{{"Frames":{runs}}}"#).as_bytes()].concat()));
    }
    seeds.into_iter().map(|(reader, bytes)| [&[reader][..], &bytes].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing of a seed is refused but what is meant to be.
    #[test]
    fn seeds_get_as_far_as_they_should() {
        let read = |seed: &Vec<u8>| {
            let mut input = Input::new(seed);
            let reader = input.choice(&READERS).unwrap();
            reader(input.rest()).is_ok()
        };
        let refused = seeds().iter().filter(|seed| !read(seed)).count();
        assert_eq!(refused, 7, "three offers, two numbers, two lengths");
    }
}
