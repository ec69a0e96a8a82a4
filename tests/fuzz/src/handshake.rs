//! Both ends of `xl`'s handshake, with whatever the peer says and whatever fails here. The rules
//! that are asserted are those of `rxl_migrate::xl::handshake`: never two copies that run.

use std::cell::RefCell;
use std::io;

use rxl_migrate::Error;
use rxl_migrate::xl::channel::{
    Cancellable, Direction, Ends, Heard, Ready, Said, Until, hear, say,
};
use rxl_migrate::xl::handshake::{
    Message, Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent, Sender, SenderAction, SenderEnd,
    SenderEvent,
};
use rxl_migrate::xl::header::Header;

use crate::assert_told;
use crate::input::Input;

const MESSAGES: [Message; 5] =
    [Message::Banner, Message::Ready, Message::Go, Message::Report, Message::Destroyed];
/// Events of an input; no machine takes more than a dozen.
const EVENTS_MAX: usize = 64;

pub(crate) fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.u8() % 4 {
        0 => sender(input),
        3 => channel(input),
        paused => receiver(input, paused == 2),
    }
}

/// Descriptors to a peer of which the input says what it does.
struct Peer<'a>(RefCell<Input<'a>>);

impl Ends for Peer<'_> {
    fn wait(&self, _direction: Direction, until: Until) -> io::Result<Ready> {
        match self.0.borrow_mut().u8() {
            1 => Ok(Ready::Silence),
            2 if until == Until::Cancelled => Ok(Ready::Cancelled),
            3 => Err(io::ErrorKind::InvalidInput.into()),
            _ => Ok(Ready::Now),
        }
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut input = self.0.borrow_mut();
        let count = match input.u8() {
            255 => return Err(io::ErrorKind::Interrupted.into()),
            254 => return Err(io::ErrorKind::ConnectionReset.into()),
            count => usize::from(count).min(into.len()),
        };
        let bytes = input.bytes(count);
        into.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Ok(bytes.len())
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.borrow_mut().u8() {
            255 => Err(io::ErrorKind::WouldBlock.into()),
            254 => Err(io::ErrorKind::BrokenPipe.into()),
            count => Ok((16 * usize::from(count) + 1).min(bytes.len())),
        }
    }
}

/// Messages over descriptors: in pieces, late, broken off, or something else.
fn channel(mut input: Input<'_>) {
    let message = input.choice(&MESSAGES).unwrap_or(Message::Go);
    let until = if input.u8() == 0 { Until::Cancelled } else { Until::TheEnd };
    let peer = Peer(RefCell::new(input));
    match hear(&peer, message, until, || ()) {
        Heard::Bytes(bytes) => {
            let text = message.text();
            let whole = bytes.len() == message.wire_bytes() && bytes.starts_with(text);
            let other = bytes.len() <= message.wire_bytes() && !text.starts_with(&bytes);
            assert!(whole || other, "neither {message:?} nor something else");
        }
        Heard::Lost(error) => assert_told(&error),
        Heard::Cancelled => assert_eq!(until, Until::Cancelled),
    }
    match say(&peer, &[0x5a; 5000], until) {
        Said::Done => {}
        Said::Failed(error) => assert_told(&error),
        Said::Cancelled => assert_eq!(until, Until::Cancelled),
    }
    if let Err(error) = Header::read_from(&mut Cancellable(&peer)) {
        assert_told(&error);
    }
}

/// Bytes from the peer, for a message that was waited for.
fn heard(input: &mut Input<'_>, awaited: Option<Message>) -> Vec<u8> {
    let kind = input.u8();
    match (MESSAGES.get(usize::from(kind)), awaited) {
        (Some(Message::Report), _) => [Message::Report.text(), &[input.u8()]].concat(),
        (Some(message), _) => message.text().to_vec(),
        (None, Some(message)) if kind == 5 => {
            let mut bytes = message.text().to_vec();
            bytes.resize(message.wire_bytes(), 0);
            bytes
        }
        _ => input.bytes(kind.into()).to_vec(),
    }
}

/// An event that a machine does not take is named, with its state, and changes nothing.
fn assert_refused(error: &Error) {
    assert!(matches!(error, Error::Machine { .. }), "{error}");
    assert_told(error);
}

/// What has happened to the sender's copy.
#[derive(Default)]
struct Sent {
    tried_go: bool,
    runs_there: bool,
    given_back: bool,
    destroyed: bool,
}

impl Sent {
    fn answered(&mut self, action: SenderAction, event: SenderEvent<'_>) {
        match (action, event) {
            (SenderAction::SendGo, SenderEvent::Done | SenderEvent::Failed) => self.tried_go = true,
            (SenderAction::Receive(Message::Report), SenderEvent::Received(bytes)) => {
                self.runs_there = bytes == [Message::Report.text(), &[0]].concat();
            }
            (SenderAction::Receive(Message::Destroyed), SenderEvent::Received(bytes)) => {
                self.given_back = bytes == Message::Destroyed.text();
            }
            (SenderAction::Destroy, SenderEvent::Done) => self.destroyed = true,
            _ => {}
        }
    }

    /// Whether the copy here is the only one that may run.
    fn is_ours(&self) -> bool {
        !self.tried_go || self.given_back
    }

    fn check(&self, action: SenderAction) {
        let good = match action {
            SenderAction::Resume | SenderAction::RenameBack => self.is_ours(),
            SenderAction::SendGo => !self.tried_go,
            SenderAction::Destroy => self.runs_there,
            SenderAction::Finish(end) => match end {
                SenderEnd::Moved => self.destroyed,
                SenderEnd::MovedWithRemains => self.runs_there && !self.destroyed,
                SenderEnd::Kept(_) | SenderEnd::NotResumed(_) => self.is_ours() && !self.destroyed,
                SenderEnd::Uncertain(_) => !self.is_ours() && !self.destroyed,
            },
            _ => true,
        };
        assert!(good, "{action:?}");
    }
}

fn sender(mut input: Input<'_>) {
    let (mut machine, mut sent) = (Sender::default(), Sent::default());
    let mut last = None;
    for _ in 0..EVENTS_MAX {
        if input.is_empty() {
            break;
        }
        let awaited = match last {
            Some(SenderAction::Receive(message)) => Some(message),
            _ => None,
        };
        let bytes;
        let event = match input.u8() % 8 {
            0 => SenderEvent::Begin,
            1 => {
                bytes = heard(&mut input, awaited);
                SenderEvent::Received(&bytes)
            }
            2 => SenderEvent::Done,
            3 => SenderEvent::Failed,
            4 => SenderEvent::Lost,
            5 => SenderEvent::Cancelled,
            6 => SenderEvent::Suspended(true),
            _ => SenderEvent::Suspended(false),
        };
        match machine.step(event) {
            Ok(action) => {
                let over = matches!(last, Some(SenderAction::Finish(_)));
                assert!(!over, "{action:?} after the end");
                if let Some(last) = last {
                    sent.answered(last, event);
                }
                let is_late = sent.tried_go && event == SenderEvent::Cancelled;
                assert!(!is_late, "cancelled after the permission");
                sent.check(action);
                last = Some(action);
            }
            Err(error) => assert_refused(&error),
        }
    }
    assert!(!format!("{machine:?}").is_empty());
    if let Some(SenderAction::Finish(SenderEnd::Kept(cause) | SenderEnd::Uncertain(cause))) = last {
        assert_told(&cause);
    }
}

/// What has happened to the receiver's copy.
#[derive(Default)]
struct Received {
    go: bool,
    unpaused: bool,
    /// The copy is ours: the sender has been, or is being, told of success.
    reported: bool,
    destroyed: bool,
}

impl Received {
    fn answered(&mut self, action: ReceiverAction, event: ReceiverEvent<'_>) {
        match (action, event) {
            (ReceiverAction::Receive(_), ReceiverEvent::Received(bytes)) => {
                self.go = bytes == Message::Go.text();
            }
            (ReceiverAction::Unpause, ReceiverEvent::Done) => self.unpaused = true,
            (ReceiverAction::Destroy, ReceiverEvent::Done) => self.destroyed = true,
            _ => {}
        }
    }

    fn check(&mut self, action: ReceiverAction, paused: bool) {
        let good = match action {
            ReceiverAction::Rename => self.go,
            ReceiverAction::Unpause => self.go && !paused,
            ReceiverAction::SendReport(0) => {
                self.reported = true;
                self.go && (self.unpaused || paused)
            }
            // Without Go it says so only once its copy is gone.
            ReceiverAction::SendReport(_) => !self.unpaused && (self.go || self.destroyed),
            ReceiverAction::Destroy => !self.unpaused && !self.reported,
            ReceiverAction::Send(Message::Destroyed) => self.destroyed,
            ReceiverAction::Finish(end) => match end {
                ReceiverEnd::Running | ReceiverEnd::RunningUnreported => self.reported,
                ReceiverEnd::Nothing(_) => !self.go,
                ReceiverEnd::GivenBack { .. } => self.go && self.destroyed,
                ReceiverEnd::Remains => !self.unpaused && !self.destroyed,
            },
            _ => true,
        };
        assert!(good, "{action:?}");
    }
}

fn receiver(mut input: Input<'_>, paused: bool) {
    let (mut machine, mut received) = (Receiver::new(paused), Received::default());
    let mut last = None;
    for _ in 0..EVENTS_MAX {
        if input.is_empty() {
            break;
        }
        let awaited = match last {
            Some(ReceiverAction::Receive(message)) => Some(message),
            _ => None,
        };
        let bytes;
        let event = match input.u8() % 6 {
            0 => ReceiverEvent::Begin,
            1 => {
                bytes = heard(&mut input, awaited);
                ReceiverEvent::Received(&bytes)
            }
            2 => ReceiverEvent::Done,
            3 => ReceiverEvent::Failed(input.u8()),
            4 => ReceiverEvent::Lost,
            _ => ReceiverEvent::Cancelled,
        };
        match machine.step(event) {
            Ok(action) => {
                let over = matches!(last, Some(ReceiverAction::Finish(_)));
                assert!(!over, "{action:?} after the end");
                if let Some(last) = last {
                    received.answered(last, event);
                }
                received.check(action, paused);
                last = Some(action);
            }
            Err(error) => assert_refused(&error),
        }
    }
    assert!(!format!("{machine:?}").is_empty());
    if let Some(ReceiverAction::Finish(ReceiverEnd::Nothing(cause))) = last {
        assert_told(&cause);
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // Events, with the bytes that go with some of them; 5 after a 1 is what is waited for. The
    // first of each has one in every state that the state does not take.
    let sender: [&[u8]; 9] = [
        &[0, 0, 1, 5, 0, 2, 0, 1, 5, 0, 2, 0, 2, 0, 1, 3, 7, 0, 1, 4, 0, 2, 0, 2],
        &[0, 1, 5, 2, 1, 5, 2, 2, 1, 5, 2],
        &[0, 1, 5, 2, 1, 5, 2, 2, 1, 3, 7, 1, 4, 2, 2],
        &[0, 1, 5, 2, 1, 5, 2, 2, 1, 3, 7, 4],
        &[0, 1, 5, 2, 1, 5, 2, 5, 3, 3],
        &[0, 1, 5, 2, 1, 5, 2, 3],
        &[0, 1, 5, 3, 6, 2],
        &[0, 1, 5, 5, 7],
        &[0, 1, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ];
    let receiver: [&[u8]; 13] = [
        &[0, 0, 2, 0, 2, 0, 2, 0, 1, 5, 0, 2, 0, 2, 0, 2],
        &[0, 2, 2, 2, 1, 5, 2, 3, 9, 0, 2, 0, 2, 0, 2],
        &[0, 2, 2, 3, 1, 2],
        &[0, 2, 2, 5, 2],
        &[0, 2, 2, 2, 5, 0, 2, 0, 2, 0, 2],
        &[0, 2, 2, 2, 5, 2, 3, 9],
        &[0, 2, 5],
        &[0, 2, 2, 2, 1, 5, 2, 2, 2],
        &[0, 2, 2, 2, 1, 5, 2, 3, 9, 2, 2, 2],
        &[0, 2, 2, 2, 1, 5, 3, 0, 3, 1, 2],
        &[0, 2, 2, 2, 1, 0, 2],
        &[0, 2, 2, 2, 4, 3, 1],
        &[0, 2, 3, 4],
    ];
    // Each ends with an event that no state takes.
    let of = |first: u8| move |events: &&[u8]| [&[first][..], events, &[0]].concat();
    let receivers = [1, 2].into_iter().flat_map(|first| receiver.iter().map(of(first)));
    let mut seeds: Vec<Vec<u8>> = sender.iter().map(of(0)).collect();
    seeds.extend(receivers);
    for (number, message) in (0..).zip(MESSAGES) {
        let mut bytes = message.text().to_vec();
        bytes.resize(message.wire_bytes(), 0);
        let length = u8::try_from(bytes.len()).unwrap_or_default();
        // All at once; in two pieces, late; too early an end; something else.
        seeds.push([&[3, number, 0, 0, length], &bytes[..], &[0, 255, 1, 0, 9, 0, 0]].concat());
        let (first, second) = bytes.split_at(10);
        let second = [&[1, 0, 255, 0, length - 10], second].concat();
        seeds.push([&[3, number, 1, 0, 10], first, &second].concat());
        seeds.push([&[3, number, 0, 0, 10], first].concat());
        seeds.push([3, number, 1, 0, 3, b'e', b'r', b'r', 0, 254].to_vec());
    }
    let header = Header::new("{}").map(|header| header.to_bytes()).unwrap_or_default();
    // The peer is gone at first, then takes what is said, then sends a header.
    let length = u8::try_from(header.len()).unwrap_or_default();
    seeds.push(
        [&[3, 0, 0, 0, 0, 0, 255, 0, 255, 0, 255, 1, 0, 48], &header[..], &[0, length]].concat(),
    );
    seeds
}
