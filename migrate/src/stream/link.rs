//! Links: further connections between two rxl ends, and what both ends say about them.
//!
//! The sender *offers* links in an optional record near the start of the libxc stream, which a
//! stock receiver skips. A receiver that is rxl opens them to the sender's addresses; whichever
//! arrive carry the page data from then on, and the stream carries the rest.
//!
//! ```text
//!   stream:  headers  OFFER  …static data…  [PAGE_DATA…]  PASS_END 0  PASS_END 1  LINK_LOST n  …
//!            PASS_END last  state records  END
//!   link n:  HELLO ►  ◄ WELCOME  [TLS 1.3, PROOF ►]
//!            PASS k  PAGE_DATA or REDUCED…  PASS k+1  PAGE_DATA or REDUCED…  …  PASS last+1
//!            ◄ confirmations: u64, the records applied so far; repeated while there is no news
//! ```
//!
//! *Passes* are counted from 0, one for each set of pages that is sent, also where part of the
//! last set is sent again. What a link carries after PASS k belongs to pass k, and may be applied
//! once all passes before k are complete. Pass k is complete when PASS_END k has been read, which
//! names the links that took part, and each of them has come to a later pass or is lost. The
//! records that are confirmed are those of page data and of passes: the sender is done when the
//! receiver needs nothing of a link any more.
//!
//! An offer says what of the pages the sender would like to leave out, and a hello which of it the
//! receiver can do without ([`super::reduced`]). An end that knows nothing of that says nothing.
//!
//! What it is not: who opens connections (`toolstack`), or what follows from a loss
//! ([`crate::source`]). Nobody else's format: both ends are rxl's.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::stream::FormatError;
use crate::stream::libxc::{self, ReadKind, RecordKind, le_u64s};
use crate::stream::reduced::{Agreed, Reduce};

/// Most links of a migration; a mask has a bit for each.
pub const LINKS_MAX: u8 = 64;
/// Most addresses that an offer may name.
pub const ADDRESSES_MAX: usize = 64;
/// Longest body of an offer.
pub const OFFER_BYTES_MAX: usize = 8 << 10;
/// Bytes of a hello: a magic number, the link's number, the token.
pub const HELLO_BYTES: usize = 8 + 8 + TOKEN_BYTES;
/// Bytes of a token.
pub const TOKEN_BYTES: usize = 32;
/// Bytes of a confirmation.
pub const CONFIRMATION_BYTES: usize = 8;

/// How a hello begins.
const MAGIC: [u8; 8] = *b"rxl-link";
/// The version of all this.
const VERSION: u32 = 1;

/// Which certificate an encrypted link has: its SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint([u8; 32]);

/// The fingerprint of a certificate.
#[must_use]
pub fn fingerprint(certificate: &[u8]) -> Fingerprint {
    Fingerprint(Sha256::digest(certificate).into())
}

/// What an end shows to the other to prove that it has read the offer.
pub type Token = [u8; TOKEN_BYTES];

/// What both ends' tokens are made of. It travels over the stream, which ssh protects.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// Of random bytes.
    #[must_use]
    pub fn new(random: [u8; 32]) -> Secret {
        Secret(random)
    }

    /// What the receiver shows on link `link`, if it can do without `reduce`.
    #[must_use]
    pub fn hello_token(&self, link: u8, reduce: Reduce) -> Token {
        match reduce {
            // As it was before there was anything to agree on.
            Reduce::NONE => self.token(b"hello", &[link]),
            reduce => self.token(b"hello", &[link, reduce.bits()]),
        }
    }

    /// What the sender answers on link `link`.
    #[must_use]
    pub fn welcome_token(&self, link: u8) -> Token {
        self.token(b"ready", &[link])
    }

    /// What the receiver shows on link `link` once that is encrypted.
    #[must_use]
    pub fn proof_token(&self, link: u8) -> Token {
        self.token(b"proof", &[link])
    }

    /// What goes into digests of pages.
    fn seed(&self) -> u64 {
        let token = self.token(b"pages", &[]);
        token.first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
    }

    fn token(&self, role: &[u8; 5], said: &[u8]) -> Token {
        Sha256::new().chain_update(self.0).chain_update(role).chain_update(said).finalize().into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(64);
        self.0.iter().for_each(|byte| {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        });
        to.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Secret, D::Error> {
        let text = String::deserialize(from)?;
        let digits: Option<Vec<u8>> =
            text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
        let bytes: Vec<u8> =
            digits.unwrap_or_default().as_chunks().0.iter().map(|[a, b]| a << 4 | b).collect();
        let bytes = bytes.try_into().ok().filter(|_| text.len() == 64);
        bytes.map(Secret).ok_or(serde::de::Error::custom("not a secret"))
    }
}

/// What the sender offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    version: u32,
    /// Links that the sender would like, numbered from 0.
    pub links: u8,
    /// See [`Secret`].
    pub secret: Secret,
    /// Where the sender listens; link n is meant for number n modulo their count.
    pub addresses: Vec<SocketAddr>,
    /// The certificate of the sender, if links are to be encrypted.
    pub certificate: Option<Fingerprint>,
    /// What the sender would like to leave out.
    #[serde(default, skip_serializing_if = "Reduce::is_none")]
    pub reduce: Reduce,
}

impl Offer {
    /// An offer of `links` links, at most [`LINKS_MAX`], without encryption, and of whole pages.
    #[must_use]
    pub fn new(links: u8, secret: Secret, addresses: Vec<SocketAddr>) -> Offer {
        let links = links.min(LINKS_MAX);
        let (certificate, reduce) = (None, Reduce::NONE);
        Offer { version: VERSION, links, secret, addresses, certificate, reduce }
    }

    /// Of what is offered to be left out, what this program can do without.
    #[must_use]
    pub fn known(&self) -> Reduce {
        self.reduce.and(Reduce::ALL)
    }

    /// What holds for a link whose receiver can do without `reduce`.
    #[must_use]
    pub fn agreed(&self, reduce: Reduce) -> Agreed {
        let reduce = self.reduce.and(reduce.or(Reduce::ALWAYS));
        Agreed { reduce, seed: self.secret.seed(), links: self.links }
    }

    /// The record. `None` where it would be too long.
    #[must_use]
    pub fn record(&self) -> Option<Vec<u8>> {
        let body = serde_json::to_vec(self).ok().filter(|body| body.len() <= OFFER_BYTES_MAX)?;
        libxc::record(RecordKind::RxlOffer, &[&body]).ok()
    }

    /// Reads the body of the record. `None`: an offer of a version that this program does not
    /// know, which it may pass over.
    ///
    /// # Errors
    /// It is no offer, or one of more links or addresses than there may be.
    pub fn parse(body: &[u8]) -> Result<Option<Offer>, FormatError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let content = |why| FormatError::Content { kind: RecordKind::RxlOffer.code(), why };
        let none = |_| content("it is no offer of links");
        if serde_json::from_slice::<Version>(body).map_err(none)?.version != VERSION {
            return Ok(None);
        }
        let offer: Offer = serde_json::from_slice(body).map_err(none)?;
        if offer.links > LINKS_MAX || offer.addresses.len() > ADDRESSES_MAX {
            return Err(content("it offers more than there may be"));
        }
        Ok(Some(offer))
    }
}

/// Which links; bit n is link n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkSet(pub u64);

impl LinkSet {
    /// Whether `link` is in it.
    #[must_use]
    pub fn contains(self, link: u8) -> bool {
        self.0.checked_shr(link.into()).is_some_and(|bits| bits & 1 == 1)
    }

    /// Puts `link` into it.
    pub fn insert(&mut self, link: u8) {
        self.0 |= 1_u64.checked_shl(link.into()).unwrap_or(0);
    }

    /// The links in it, in ascending order.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..LINKS_MAX).filter(move |link| self.contains(*link))
    }
}

/// On a link: what follows belongs to pass `pass`.
///
/// # Errors
/// None that can happen: the body is short.
pub fn pass_record(pass: u32) -> Result<Vec<u8>, FormatError> {
    libxc::record(RecordKind::RxlPass, &[&u64::from(pass).to_le_bytes()])
}

/// On the stream: pass `pass` has ended, and `links` took part in it.
///
/// # Errors
/// As [`pass_record`].
pub fn pass_end_record(pass: u32, links: LinkSet) -> Result<Vec<u8>, FormatError> {
    let body = [u64::from(pass).to_le_bytes(), links.0.to_le_bytes()];
    libxc::record(RecordKind::RxlPassEnd, &[&body.concat()])
}

/// On the stream: link `link` is lost, and what it carried without being confirmed comes again.
///
/// # Errors
/// As [`pass_record`].
pub fn link_lost_record(link: u8) -> Result<Vec<u8>, FormatError> {
    libxc::record(RecordKind::RxlLinkLost, &[&u64::from(link).to_le_bytes()])
}

/// Reads the body of [`pass_record`].
///
/// # Errors
/// It is none.
pub fn parse_pass(body: &[u8]) -> Result<u32, FormatError> {
    let [pass] = words(RecordKind::RxlPass, body)?;
    number(RecordKind::RxlPass, pass)
}

/// Reads the body of [`pass_end_record`].
///
/// # Errors
/// It is none.
pub fn parse_pass_end(body: &[u8]) -> Result<(u32, LinkSet), FormatError> {
    let [pass, links] = words(RecordKind::RxlPassEnd, body)?;
    Ok((number(RecordKind::RxlPassEnd, pass)?, LinkSet(links)))
}

/// Reads the body of [`link_lost_record`].
///
/// # Errors
/// It is none, or names a link that cannot be.
pub fn parse_link_lost(body: &[u8]) -> Result<u8, FormatError> {
    let kind = RecordKind::RxlLinkLost;
    let [link] = words(kind, body)?;
    let link: u8 = number(kind, link)?;
    let why = "there is no such link";
    if link < LINKS_MAX { Ok(link) } else { Err(FormatError::Content { kind: kind.code(), why }) }
}

fn words<const N: usize>(kind: RecordKind, body: &[u8]) -> Result<[u64; N], FormatError> {
    let words: Vec<u64> = le_u64s(body).take(N + 1).collect();
    let why = "not the length that its kind has";
    let wrong = FormatError::Length { kind: kind.code(), length: body.len(), why };
    words.try_into().ok().filter(|_| body.len() == 8 * N).ok_or(wrong)
}

fn number<T: TryFrom<u64>>(kind: RecordKind, word: u64) -> Result<T, FormatError> {
    let why = "a number that is too large";
    T::try_from(word).map_err(|_| FormatError::Content { kind: kind.code(), why })
}

/// What the receiver sends first on link `link`, if it can do without `reduce`, of what is offered.
#[must_use]
pub fn hello(secret: &Secret, link: u8, reduce: Reduce) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    let said = u64::from(link) | u64::from(reduce.bits()) << 8;
    let parts = [&MAGIC[..], &said.to_le_bytes(), &secret.hello_token(link, reduce)];
    for (to, from) in bytes.iter_mut().zip(parts.concat()) {
        *to = from;
    }
    bytes
}

/// The link that a hello is for, if it is one of those of `secret`, and what its receiver can do
/// without.
#[must_use]
pub fn check_hello(secret: &Secret, bytes: &[u8; HELLO_BYTES]) -> Option<(u8, Reduce)> {
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (said, token) = rest.split_first_chunk::<8>()?;
    let [link, bits, rest @ ..] = *said;
    let reduce = Reduce::from_bits(bits);
    let known = bits == reduce.bits() && rest == [0; 6] && link < LINKS_MAX;
    let right = *magic == MAGIC && is_same(&secret.hello_token(link, reduce), token);
    (known && right).then_some((link, reduce))
}

/// What a sender has sent over a link, and the receiver has confirmed.
#[derive(Debug, Default)]
pub struct Confirmations {
    records: u64,
    /// The start of a confirmation whose rest has not come.
    partial: Vec<u8>,
    sent: u64,
    /// Those of the records that are not confirmed with which a pass begins.
    passes: VecDeque<u64>,
}

/// A record that the receiver has not confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unconfirmed {
    /// Page data: nobody else keeps the receiver from applying it.
    Data,
    /// The start of a pass, which has to wait for all other links.
    Pass,
}

impl Confirmations {
    /// Notes that the record that begins with `head` is on its way.
    pub fn note_sent(&mut self, head: &[u8]) {
        self.sent += 1;
        let header = head.first_chunk().and_then(|head| libxc::RecordHeader::parse(*head).ok());
        if header.is_some_and(|header| header.kind == ReadKind::Known(RecordKind::RxlPass)) {
            self.passes.push_back(self.sent);
        }
    }

    /// Takes what has come. `true`: more is confirmed than before.
    pub fn take(&mut self, bytes: &[u8]) -> bool {
        let before = self.records;
        self.partial.extend_from_slice(bytes);
        let (whole, rest) = self.partial.as_chunks::<CONFIRMATION_BYTES>();
        // Never less than before: a peer that takes a word back is not believed.
        let most = whole.iter().map(|word| u64::from_le_bytes(*word)).max();
        self.records = self.records.max(most.unwrap_or(0));
        self.partial = rest.to_vec();
        while self.passes.front().is_some_and(|record| *record <= self.records) {
            self.passes.pop_front();
        }
        self.records > before
    }

    /// Records that are confirmed.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records
    }

    /// What is to be confirmed next; `None`: nothing is on its way.
    #[must_use]
    pub fn next(&self) -> Option<Unconfirmed> {
        let next = self.records.checked_add(1).filter(|next| *next <= self.sent)?;
        let is_pass = self.passes.front() == Some(&next);
        Some(if is_pass { Unconfirmed::Pass } else { Unconfirmed::Data })
    }
}

/// Compares without telling by the time it takes where they differ.
#[must_use]
pub fn is_same(a: &Token, b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret() -> Secret {
        Secret::new([7; 32])
    }

    #[test]
    fn an_offer_is_read_as_it_was_written_and_an_unknown_version_is_passed_over() {
        let addresses = vec!["10.0.0.1:4000".parse().unwrap(), "[fe80::1]:5".parse().unwrap()];
        let offer = Offer::new(4, secret(), addresses);
        let record = offer.record().unwrap();
        let header = libxc::RecordHeader::parse(*record.first_chunk().unwrap()).unwrap();
        assert_eq!(header.kind, libxc::ReadKind::Known(RecordKind::RxlOffer));
        let body = &record[8..8 + header.length];
        assert_eq!(Offer::parse(body).unwrap(), Some(offer));
        assert!(!format!("{:?}", secret()).contains('7'));
        assert!(!String::from_utf8_lossy(body).contains("reduce"), "an older end has no such word");
        let mut reduced = Offer::new(1, secret(), Vec::new());
        reduced.reduce = Reduce::ALL;
        let record = reduced.record().unwrap();
        let length = libxc::RecordHeader::parse(*record.first_chunk().unwrap()).unwrap().length;
        assert_eq!(Offer::parse(&record[8..8 + length]).unwrap(), Some(reduced));
        let other = br#"{"version":2,"what":["ever"]}"#;
        assert_eq!(Offer::parse(other).unwrap(), None);
        let long =
            String::from_utf8(body.to_vec()).unwrap().replace(r#""links":4"#, r#""links":65"#);
        for bad in [&b"{}"[..], b"[1]", b"", long.as_bytes()] {
            assert!(Offer::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn records_are_optional_and_read_as_they_were_written() {
        let body = |record: Vec<u8>| {
            assert!(record[3] & 0x80 != 0, "a stock receiver would refuse it");
            record[8..].to_vec()
        };
        assert_eq!(parse_pass(&body(pass_record(7).unwrap())), Ok(7));
        let links = LinkSet(0b1001);
        let end = body(pass_end_record(3, links).unwrap());
        assert_eq!(parse_pass_end(&end), Ok((3, links)));
        assert_eq!(links.iter().collect::<Vec<_>>(), [0, 3]);
        assert_eq!(parse_link_lost(&body(link_lost_record(63).unwrap())), Ok(63));
        assert!(parse_link_lost(&64_u64.to_le_bytes()).is_err());
        assert!(parse_pass(&[0; 7]).is_err() && parse_pass(&[0; 16]).is_err());
        assert!(parse_pass(&[0xff; 8]).is_err());
    }

    #[test]
    fn a_hello_is_good_for_its_own_link_and_its_own_secret_only() {
        for reduce in [Reduce::NONE, Reduce::ZERO, Reduce::ALL] {
            let good = hello(&secret(), 5, reduce);
            assert_eq!(check_hello(&secret(), &good), Some((5, reduce)));
            assert_eq!(check_hello(&Secret::new([8; 32]), &good), None);
            for at in 0..HELLO_BYTES {
                let mut bad = good;
                bad[at] ^= 1;
                assert_eq!(check_hello(&secret(), &bad), None, "byte {at}");
            }
        }
        // As they were before there was anything to agree on.
        let token = Sha256::new().chain_update([7; 32]).chain_update(b"hello").chain_update([5]);
        assert_eq!(secret().hello_token(5, Reduce::NONE), Token::from(token.finalize()));
        assert_ne!(secret().hello_token(5, Reduce::NONE), secret().welcome_token(5));
        assert_ne!(secret().hello_token(0, Reduce::NONE), secret().hello_token(0, Reduce::ZERO));
    }

    #[test]
    fn confirmations_in_pieces_are_understood_and_never_go_back() {
        let mut confirmed = Confirmations::default();
        let mut take = |bytes: &[u8], expected| {
            confirmed.take(bytes);
            assert_eq!(confirmed.records(), expected);
        };
        take(&7_u64.to_le_bytes(), 7);
        take(&[8, 0, 0], 7);
        take(&[0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0], 8);
    }
    #[test]
    fn what_is_to_be_confirmed_next_is_known() {
        let mut confirmed = Confirmations::default();
        let pass = pass_record(0).unwrap();
        let data = libxc::page_data_head(&[]).unwrap();
        assert_eq!(confirmed.next(), None);
        for record in [&pass, &data, &data, &pass] {
            confirmed.note_sent(record);
        }
        let mut next = |records: u64, is_news| {
            assert_eq!(confirmed.take(&records.to_le_bytes()), is_news);
            confirmed.next()
        };
        assert_eq!(next(0, false), Some(Unconfirmed::Pass));
        assert_eq!(next(1, true), Some(Unconfirmed::Data));
        assert_eq!(next(1, false), Some(Unconfirmed::Data));
        assert_eq!(next(2, true), Some(Unconfirmed::Data));
        assert_eq!(next(3, true), Some(Unconfirmed::Pass));
        assert_eq!(next(4, true), None);
        assert_eq!(next(u64::MAX, true), None);
    }
}
