//! The protocol between libxl and its save helper, both directions, and the helper's arguments.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use rxl_migrate::frame::DomId;
use rxl_migrate::helper::{
    Callbacks, HelperChannel, Invocation, Message, MessageError, STRING_BYTES_MAX,
};
use rxl_migrate::hypervisor::{LogLevel, Toolstack};
use rxl_migrate::report::Event;

use crate::assert_told;
use crate::input::Input;

pub(crate) fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.u8() % 4 {
        0 => messages(input),
        1 => payload(input.rest()),
        2 => arguments(input.rest()),
        _ => channel(input),
    }
}

/// A descriptor that says something else before it is read the first time.
struct Descriptor<'a> {
    bytes: &'a [u8],
    before: Option<io::ErrorKind>,
}

impl io::Read for Descriptor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.before.take() {
            Some(kind) => Err(kind.into()),
            None => self.bytes.read(buf),
        }
    }
}

/// A sequence of messages, as libxl reads it.
fn messages(mut input: Input<'_>) {
    let before = match input.u8() {
        1 => Some(io::ErrorKind::Interrupted),
        2 => Some(io::ErrorKind::ConnectionReset),
        _ => None,
    };
    let mut stream = Descriptor { bytes: input.rest(), before };
    loop {
        let before = stream.bytes.len();
        match Message::read_from(&mut stream) {
            Ok(Some(message)) => {
                assert!(stream.bytes.len() < before);
                encode(&message);
            }
            Ok(None) => return assert!(before == 0 && stream.bytes.is_empty()),
            Err(error) => {
                use io::ErrorKind::{ConnectionReset, InvalidData, UnexpectedEof};
                let known = [ConnectionReset, InvalidData, UnexpectedEof];
                assert!(known.contains(&error.kind()), "{error:?}");
                return assert_told(&error);
            }
        }
    }
}

fn payload(bytes: &[u8]) {
    match Message::decode(bytes) {
        Ok(message) => encode(&message),
        Err(error @ (MessageError::Unknown(_) | MessageError::Malformed { .. })) => {
            assert_told(&error);
        }
    }
}

/// What was read is written so that it is read again, but for what a string cannot hold.
fn encode(message: &Message) {
    let bytes = message.encode();
    assert!(bytes.len() <= 2 + usize::from(u16::MAX));
    let again = Message::read_from(&mut &bytes[..]).expect("rxl reads what it writes");
    let again = again.expect("a message");
    assert!(format!("{again:?}").len() <= format!("{message:?}").len() + 64);
    let text = match message {
        Message::Log { context, text, .. } => context.clone() + text,
        Message::Progress { context, what, .. } => context.clone() + what,
        _ => String::new(),
    };
    if !text.contains('\0') && text.len() <= STRING_BYTES_MAX {
        assert_eq!(&again, message);
    }
}

/// Arguments, each with a NUL after it.
fn arguments(bytes: &[u8]) {
    let words = bytes.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec()));
    match Invocation::parse(&words.collect::<Vec<_>>()) {
        Ok(Invocation::Save(save)) => {
            assert!(save.io_fd > 2 && save.domain.0 < 0x7ff0);
        }
        Ok(Invocation::Restore(restore)) => {
            assert!(restore.io_fd > 2 && restore.domain.0 < 0x7ff0);
        }
        Err(error) => assert_told(&error),
    }
}

/// The helper's end, with libxl's answers from the input.
fn channel(mut input: Input<'_>) {
    let callbacks = Callbacks(input.u16().into());
    let (asks, aborted) = (input.u16(), input.u8() == 1);
    // libxl may stop to listen.
    let room = usize::from(input.u16());
    let mut sent = vec![0; room];
    let mut left = &mut sent[..];
    let aborted: fn() -> bool = if aborted { || true } else { || false };
    let helper = HelperChannel::new(input.rest(), &mut left, DomId(7), callbacks, aborted, || {
        Duration::ZERO
    });
    let mut helper = helper.with_events(Box::new(|event| assert_eq!(event, &Event::SuspendAsked)));
    let mut failed = Vec::new();
    for ask in 0..16 {
        let done = match asks >> ask & 1 {
            0 => continue,
            _ => one_of(&mut helper, ask),
        };
        if let Err(error) = done {
            assert_told(&error);
            failed.push(error.kind());
        }
    }
    let lost = [io::ErrorKind::UnexpectedEof, io::ErrorKind::WriteZero];
    assert!(!failed.iter().any(|kind| lost.contains(kind)) || helper.aborted());
    assert!(!format!("{helper:?}").is_empty());
    let complete = helper.complete(0, 0);
    assert!(complete.is_ok() || complete.is_err_and(|error| lost.contains(&error.kind())));
    let unused = left.len();
    // All but what broke off is what libxl can read.
    let mut stream = sent.get(..room - unused).unwrap_or_default();
    while let Ok(Some(message)) = Message::read_from(&mut stream) {
        assert!(!matches!(message, Message::Log { level, .. } if level != 5));
    }
}

fn one_of<R: io::Read, W: io::Write>(helper: &mut HelperChannel<R, W>, ask: u16) -> io::Result<()> {
    match ask {
        0 | 8 => helper.suspend().map(|_| ()),
        1 | 9 => helper.qemu_log_dirty(ask == 1),
        2 | 10 => helper.static_data_done(ask == 2, ask == 10),
        3 => helper.restore_results(1, u64::MAX),
        4 => {
            helper.event(&Event::SuspendAsked);
            Ok(())
        }
        5 | 11 => {
            helper.log(LogLevel::Info, "a line");
            Ok(())
        }
        _ => {
            helper.progress("Frames", u64::from(ask % 4) * 700, 2100);
            Ok(())
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let text = |text: &str| text.to_owned();
    let messages = [
        Message::Log { level: 5, errno: None, context: text("xc"), text: text("Saving") },
        Message::Log { level: 8, errno: Some(22), context: text(""), text: text("\u{e4}") },
        Message::Progress { context: text("xc"), what: text("Frames"), done: 1, total: 1 << 40 },
        Message::Suspend,
        Message::SwitchQemuLogdirty { domain: DomId(7), enable: true },
        Message::StaticDataDone { missing_cpuid: true, missing_msr: false },
        Message::RestoreResults { store: 3, console: u64::MAX },
        Message::Complete { retval: -1, errno: 5 },
    ];
    let encoded: Vec<Vec<u8>> = messages.iter().map(Message::encode).collect();
    let payloads = encoded.iter().map(|bytes| [&[1][..], bytes.get(2..).unwrap_or(&[])].concat());
    let mut seeds: Vec<Vec<u8>> = payloads.collect();
    seeds.extend([0, 1, 2].map(|before| [&[0, before], &encoded.concat()[..]].concat()));
    for line in [
        "--save-domain 5 6 7 1 136 0",
        "--restore-domain 5 6 7 3 0 4 0 768 0",
        "--restore-domain 5 6 7 3 0 4 0 768 1",
        "--save-domain 2 6 32752 4 x 0",
        "--help",
    ] {
        seeds.push([&[2][..], line.replace(' ', "\0").as_bytes()].concat());
    }
    let replies = [1_i32, 0, 0, 1, -1, 0].map(i32::to_le_bytes).concat();
    for (asks, room) in [(0xffff_u16, 4096_u16), (0xffff, 40), (0x0303, 4096)] {
        let head = [0x388, asks].map(u16::to_le_bytes).concat();
        seeds.push([&[3][..], &head, &[0], &room.to_le_bytes(), &replies].concat());
    }
    seeds
}
