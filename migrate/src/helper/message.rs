//! The messages that a helper sends to libxl, as bytes and back. The table is in
//! [`crate::helper`].

use std::io::{self, Read};

use super::DOMID_RESERVED;
use crate::frame::DomId;

/// Longest context or text in a message; what is longer is cut.
pub const STRING_BYTES_MAX: usize = 8192;

/// Numbers of messages. Callback flags are `1 << number`.
pub(super) mod number {
    pub(crate) const LOG: u16 = 1;
    pub(crate) const PROGRESS: u16 = 2;
    pub(crate) const SUSPEND: u16 = 3;
    pub(crate) const SWITCH_QEMU_LOGDIRTY: u16 = 7;
    pub(crate) const STATIC_DATA_DONE: u16 = 8;
    pub(crate) const RESTORE_RESULTS: u16 = 9;
    pub(crate) const COMPLETE: u16 = 10;
}

/// One message of the helper to libxl.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A line for libxl's log.
    Log {
        /// xentoollog's level; stock also sends some that have no name in
        /// [`LogLevel`](crate::hypervisor::LogLevel).
        level: u32,
        /// What failed underneath, if anything.
        errno: Option<u32>,
        /// Who speaks.
        context: String,
        /// The line.
        text: String,
    },
    /// How far it is.
    Progress {
        /// Who speaks.
        context: String,
        /// What is being done.
        what: String,
        /// Units done.
        done: u64,
        /// Units to do.
        total: u64,
    },
    /// Suspend the guest.
    Suspend,
    /// Let the device model log its writes, or no longer.
    SwitchQemuLogdirty {
        /// Which domain.
        domain: DomId,
        /// On or off.
        enable: bool,
    },
    /// The static data has been read.
    StaticDataDone {
        /// The stream held no CPUID leaves.
        missing_cpuid: bool,
        /// The stream held no MSRs.
        missing_msr: bool,
    },
    /// Where the rings of the restored guest are.
    RestoreResults {
        /// Frame of xenstore's ring.
        store: u64,
        /// Frame of the console's ring.
        console: u64,
    },
    /// The end.
    Complete {
        /// 0, or -1.
        retval: i32,
        /// What failed.
        errno: i32,
    },
}

/// Bytes that are not a message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MessageError {
    /// A number that means nothing, or a message of checkpointed streams.
    #[error("unknown message {0}")]
    Unknown(u16),
    /// It ends early, goes on after its last argument, or an argument makes no sense.
    #[error("message {number}: {why}")]
    Malformed {
        /// Which message.
        number: u16,
        /// What is wrong.
        why: &'static str,
    },
}

impl Message {
    /// The message as it goes to libxl. Strings are cut to [`STRING_BYTES_MAX`], so a message
    /// always fits its 16-bit length; a NUL within becomes a space.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder(vec![0; 2]);
        match self {
            Message::Log { level, errno, context, text } => {
                out.u16(number::LOG).u32(*level).u32(errno.unwrap_or(u32::MAX));
                out.string(context).string(text)
            }
            Message::Progress { context, what, done, total } => {
                out.u16(number::PROGRESS).string(context).string(what).u64(*done).u64(*total)
            }
            Message::Suspend => out.u16(number::SUSPEND),
            Message::SwitchQemuLogdirty { domain, enable } => {
                out.u16(number::SWITCH_QEMU_LOGDIRTY).u32(domain.0.into()).u32(u32::from(*enable))
            }
            Message::StaticDataDone { missing_cpuid, missing_msr } => out
                .u16(number::STATIC_DATA_DONE)
                .u32(u32::from(*missing_cpuid) | u32::from(*missing_msr) << 1),
            Message::RestoreResults { store, console } => {
                out.u16(number::RESTORE_RESULTS).u64(*store).u64(*console)
            }
            Message::Complete { retval, errno } => {
                out.u16(number::COMPLETE).u32(retval.cast_unsigned()).u32(errno.cast_unsigned())
            }
        };
        out.finish()
    }

    /// The message in `payload`, which is everything after the length.
    ///
    /// # Errors
    /// Anything that [`Message::encode`] does not make, but for text that is not UTF-8, which
    /// is replaced.
    pub fn decode(payload: &[u8]) -> Result<Message, MessageError> {
        let (head, rest) = payload
            .split_first_chunk()
            .ok_or(MessageError::Malformed { number: 0, why: "it has no number" })?;
        let mut from = Decoder { number: u16::from_ne_bytes(*head), rest };
        let message = match from.number {
            number::LOG => Message::Log {
                level: from.u32()?,
                errno: Some(from.u32()?).filter(|errno| *errno != u32::MAX),
                context: from.string()?,
                text: from.string()?,
            },
            number::PROGRESS => Message::Progress {
                context: from.string()?,
                what: from.string()?,
                done: from.u64()?,
                total: from.u64()?,
            },
            number::SUSPEND => Message::Suspend,
            number::SWITCH_QEMU_LOGDIRTY => {
                Message::SwitchQemuLogdirty { domain: from.domain()?, enable: from.flags(1)? == 1 }
            }
            number::STATIC_DATA_DONE => {
                let missing = from.flags(3)?;
                let (missing_cpuid, missing_msr) = (missing & 1 != 0, missing & 2 != 0);
                Message::StaticDataDone { missing_cpuid, missing_msr }
            }
            number::RESTORE_RESULTS => {
                Message::RestoreResults { store: from.u64()?, console: from.u64()? }
            }
            number::COMPLETE => Message::Complete {
                retval: from.u32()?.cast_signed(),
                errno: from.u32()?.cast_signed(),
            },
            other => return Err(MessageError::Unknown(other)),
        };
        from.finish()?;
        Ok(message)
    }

    /// Reads one message, as libxl does; `None` at the end of the channel.
    ///
    /// # Errors
    /// The descriptor's, an end in mid-message, or `InvalidData` with a [`MessageError`].
    pub fn read_from(channel: &mut impl Read) -> io::Result<Option<Message>> {
        let mut length = [0; 2];
        let (first, second) = length.split_at_mut(1);
        loop {
            match channel.read(first) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        channel.read_exact(second)?;
        let mut payload = vec![0; usize::from(u16::from_ne_bytes(length))];
        channel.read_exact(&mut payload)?;
        let message = Message::decode(&payload);
        message.map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }
}

/// A message in the making; its first two bytes are kept for the length.
struct Encoder(Vec<u8>);

impl Encoder {
    fn u16(&mut self, value: u16) -> &mut Encoder {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Encoder {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Encoder {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn string(&mut self, value: &str) -> &mut Encoder {
        let limit = value.len().min(STRING_BYTES_MAX);
        let text = (0..=limit).rev().find_map(|cut| value.get(..cut)).unwrap_or("");
        self.u32(u32::try_from(text.len() + 1).unwrap_or(u32::MAX));
        self.0.extend(text.bytes().map(|b| if b == 0 { b' ' } else { b }));
        self.0.push(0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        // Two strings of STRING_BYTES_MAX and a few numbers are the most there is: it fits.
        let length = u16::try_from(self.0.len() - 2).unwrap_or(u16::MAX);
        for (to, from) in self.0.iter_mut().zip(length.to_ne_bytes()) {
            *to = from;
        }
        self.0
    }
}

struct Decoder<'a> {
    number: u16,
    rest: &'a [u8],
}

impl Decoder<'_> {
    fn malformed(&self, why: &'static str) -> MessageError {
        MessageError::Malformed { number: self.number, why }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (head, rest) =
            self.rest.split_first_chunk().ok_or(self.malformed("it ends within an argument"))?;
        self.rest = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.bytes().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.bytes().map(u64::from_ne_bytes)
    }

    fn flags(&mut self, known: u32) -> Result<u32, MessageError> {
        let flags = self.u32()?;
        if flags & !known == 0 { Ok(flags) } else { Err(self.malformed("it has unknown flags")) }
    }

    fn domain(&mut self) -> Result<DomId, MessageError> {
        let domid = self.u32()?;
        let domid = u16::try_from(domid).ok().filter(|d| *d < DOMID_RESERVED);
        domid.map(DomId).ok_or(self.malformed("it is about no domain"))
    }

    fn string(&mut self) -> Result<String, MessageError> {
        let size = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        let (text, rest) =
            self.rest.split_at_checked(size).ok_or(self.malformed("it ends within a string"))?;
        self.rest = rest;
        match text.split_last() {
            Some((0, text)) => Ok(String::from_utf8_lossy(text).into_owned()),
            _ => Err(self.malformed("a string does not end with a NUL")),
        }
    }

    fn finish(self) -> Result<(), MessageError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed("it goes on past its end")) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(s: &str) -> String {
        s.to_owned()
    }

    /// A sample of every message, with its bytes on the wire.
    fn samples() -> Vec<(Message, Vec<u8>)> {
        vec![
            (
                Message::Log { level: 5, errno: None, context: text("xc"), text: text("Saving") },
                [
                    &[0x1c, 0, 1, 0, 5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff][..],
                    &[3, 0, 0, 0, b'x', b'c', 0],
                    &[7, 0, 0, 0, b'S', b'a', b'v', b'i', b'n', b'g', 0],
                ]
                .concat(),
            ),
            (
                Message::Log { level: 8, errno: Some(22), context: text(""), text: text("") },
                vec![0x14, 0, 1, 0, 8, 0, 0, 0, 22, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0],
            ),
            (
                Message::Progress {
                    context: text("xc"),
                    what: text("Frames"),
                    done: 0x400,
                    total: 0x1_0000_0000,
                },
                [
                    &[0x24, 0, 2, 0][..],
                    &[3, 0, 0, 0, b'x', b'c', 0],
                    &[7, 0, 0, 0, b'F', b'r', b'a', b'm', b'e', b's', 0],
                    &[0, 4, 0, 0, 0, 0, 0, 0],
                    &[0, 0, 0, 0, 1, 0, 0, 0],
                ]
                .concat(),
            ),
            (Message::Suspend, vec![2, 0, 3, 0]),
            (
                Message::SwitchQemuLogdirty { domain: DomId(0x102), enable: true },
                vec![10, 0, 7, 0, 2, 1, 0, 0, 1, 0, 0, 0],
            ),
            (
                Message::StaticDataDone { missing_cpuid: false, missing_msr: true },
                vec![6, 0, 8, 0, 2, 0, 0, 0],
            ),
            (
                Message::RestoreResults { store: 0x000f_effc, console: u64::MAX },
                [&[18, 0, 9, 0, 0xfc, 0xef, 0x0f, 0, 0, 0, 0, 0][..], &[0xff; 8]].concat(),
            ),
            (
                Message::Complete { retval: -1, errno: 4 },
                vec![10, 0, 10, 0, 0xff, 0xff, 0xff, 0xff, 4, 0, 0, 0],
            ),
        ]
    }

    #[test]
    fn every_message_has_the_bytes_of_the_protocol_both_ways() {
        for (message, bytes) in samples() {
            assert_eq!(message.encode(), bytes, "{message:?}");
            assert_eq!(Message::read_from(&mut &bytes[..]).unwrap(), Some(message));
        }
    }

    #[test]
    fn a_message_that_ends_early_or_goes_on_is_refused() {
        for (message, bytes) in samples() {
            for cut in 1..bytes.len() {
                let short = Message::read_from(&mut &bytes[..cut]).unwrap_err();
                assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof, "{message:?} cut at {cut}");
            }
            for end in 2..bytes.len() {
                assert!(Message::decode(&bytes[2..end]).is_err(), "{message:?} ended at {end}");
            }
            assert!(Message::decode(&[&bytes[2..], &[0]].concat()).is_err(), "{message:?}");
        }
        assert_eq!(Message::read_from(&mut io::empty()).unwrap(), None);
    }

    #[test]
    fn messages_of_checkpointed_streams_and_nonsense_are_refused() {
        for number in [0, 4, 5, 6, 11] {
            assert_eq!(Message::decode(&[number, 0]), Err(MessageError::Unknown(number.into())));
        }
        let malformed = |payload: &[u8], why: &str| {
            let error = Message::decode(payload).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        malformed(&[7, 0, 0xf0, 0x7f, 0, 0, 1, 0, 0, 0], "about no domain");
        malformed(&[7, 0, 1, 0, 0, 0, 2, 0, 0, 0], "unknown flags");
        malformed(&[8, 0, 4, 0, 0, 0], "unknown flags");
        malformed(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, b'x'], "does not end with a NUL");
        malformed(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "does not end with a NUL");
        malformed(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0], "within a string");
    }

    #[test]
    fn strings_are_cut_between_characters_and_hold_no_nul() {
        let long = format!("a\0b{}", "\u{e4}".repeat(STRING_BYTES_MAX));
        let message = Message::Log { level: 1, errno: None, context: long.clone(), text: long };
        let bytes = message.encode();
        let Some(Message::Log { context, text, .. }) = Message::read_from(&mut &bytes[..]).unwrap()
        else {
            panic!("not a log message");
        };
        assert_eq!(context, text);
        assert!(text.starts_with("a b\u{e4}") && text.ends_with('\u{e4}'));
        assert_eq!(text.len(), STRING_BYTES_MAX - 1);
    }

    fn string() -> impl Strategy<Value = String> {
        "[^\0]{0,40}"
    }

    fn message() -> impl Strategy<Value = Message> {
        let errno = prop::option::of(any::<u32>().prop_filter("means none", |e| *e != u32::MAX));
        prop_oneof![
            (any::<u32>(), errno, string(), string()).prop_map(|(level, errno, context, text)| {
                Message::Log { level, errno, context, text }
            }),
            (string(), string(), any::<u64>(), any::<u64>()).prop_map(
                |(context, what, done, total)| Message::Progress { context, what, done, total }
            ),
            Just(Message::Suspend),
            (0..DOMID_RESERVED, any::<bool>()).prop_map(|(domid, enable)| {
                Message::SwitchQemuLogdirty { domain: DomId(domid), enable }
            }),
            any::<(bool, bool)>().prop_map(|(missing_cpuid, missing_msr)| {
                Message::StaticDataDone { missing_cpuid, missing_msr }
            }),
            any::<(u64, u64)>()
                .prop_map(|(store, console)| Message::RestoreResults { store, console }),
            any::<(i32, i32)>().prop_map(|(retval, errno)| Message::Complete { retval, errno }),
        ]
    }

    proptest! {
        #[test]
        fn decoding_undoes_encoding(messages in prop::collection::vec(message(), 0..6)) {
            let bytes: Vec<u8> = messages.iter().flat_map(Message::encode).collect();
            let mut channel = &bytes[..];
            for message in messages {
                prop_assert_eq!(Message::read_from(&mut channel).unwrap(), Some(message));
            }
            prop_assert!(Message::read_from(&mut channel).unwrap().is_none());
        }

        #[test]
        fn what_decodes_encodes_to_the_same_bytes(
            number in 0_u8..12,
            rest in prop::collection::vec(prop_oneof![Just(0_u8), Just(1_u8), any::<u8>()], 0..40),
        ) {
            let payload = [&[number, 0][..], &rest].concat();
            if let Ok(message) = Message::decode(&payload)
                && !format!("{message:?}").contains(char::REPLACEMENT_CHARACTER)
                && !format!("{message:?}").contains("\\0")
            {
                prop_assert_eq!(&message.encode()[2..], &payload[..]);
            }
        }
    }
}
