use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const MESSAGES: [Message; 5] =
    [Message::Banner, Message::Ready, Message::Go, Message::Report, Message::Destroyed];

#[test]
fn the_messages_have_the_lengths_that_xl_counts() {
    assert_eq!(MESSAGES.map(|m| m.text().len()), [54, 34, 44, 39, 44]);
    assert_eq!(MESSAGES.map(Message::wire_bytes), [54, 34, 44, 40, 44]);
    assert_eq!(Message::Banner.text().last(), Some(&b'\n'), "the banner alone has no NUL");
    assert!(MESSAGES[1..].iter().all(|m| m.text().last() == Some(&0)));
    assert_eq!(Message::Destroyed.text(), Message::Go.text());
}

#[test]
fn a_good_migration_takes_the_steps_of_xl_and_renames_while_it_waits() {
    use SenderAction as Act;
    use SenderEvent as Ev;
    let report = [Message::Report.text(), &[0]].concat();
    let script = [
        (Ev::Begin, Act::Receive(Message::Banner)),
        (Ev::Received(Message::Banner.text()), Act::SendDomain),
        (Ev::Done, Act::RenameAway),
        (Ev::Done, Act::Receive(Message::Ready)),
        (Ev::Received(Message::Ready.text()), Act::SendGo),
        (Ev::Done, Act::Receive(Message::Report)),
        (Ev::Received(&report), Act::Destroy),
        (Ev::Done, Act::Finish(SenderEnd::Moved)),
    ];
    let mut sender = Sender::new();
    for (event, action) in script {
        assert_eq!(sender.step(event).unwrap(), action);
    }
}

#[test]
fn an_event_that_cannot_happen_is_an_error_that_names_state_and_event() {
    let mut sender = Sender::new();
    let text = sender.step(SenderEvent::Done).unwrap_err().to_string();
    assert_eq!(text, "bug in rxl: success while a sender that has not begun");
    let mut receiver = Receiver::new(false);
    let text = receiver.step(ReceiverEvent::Lost).unwrap_err().to_string();
    assert_eq!(text, "bug in rxl: end of the channel while a receiver that has not begun");
}

#[test]
fn a_receiver_that_is_cancelled_while_go_may_be_on_its_way_gives_the_domain_back() {
    use ReceiverAction as Act;
    use ReceiverEvent as Ev;
    let script = [
        (Ev::Begin, Act::Send(Message::Banner)),
        (Ev::Done, Act::Create),
        (Ev::Done, Act::Send(Message::Ready)),
        (Ev::Done, Act::Receive(Message::Go)),
        (Ev::Cancelled, Act::Destroy),
        (Ev::Done, Act::SendReport(22)),
        (Ev::Done, Act::Send(Message::Destroyed)),
        (Ev::Done, Act::Finish(ReceiverEnd::Nothing(ReceiverCause::Cancelled))),
    ];
    let mut receiver = Receiver::new(false);
    for (event, action) in script {
        assert_eq!(receiver.step(event).unwrap(), action);
    }
}

#[test]
fn a_sender_that_could_not_send_go_hears_what_a_receiver_said_before_it_went() {
    use SenderAction as Act;
    use SenderEvent as Ev;
    let until_go = |sender: &mut Sender| {
        for event in [
            Ev::Begin,
            Ev::Received(Message::Banner.text()),
            Ev::Done,
            Ev::Done,
            Ev::Received(Message::Ready.text()),
        ] {
            sender.step(event).unwrap();
        }
        assert_eq!(sender.step(Ev::Failed).unwrap(), Act::Receive(Message::Report));
    };
    let mut sender = Sender::new();
    until_go(&mut sender);
    let report = [Message::Report.text(), &[22]].concat();
    let next = sender.step(Ev::Received(&report)).unwrap();
    assert_eq!(next, Act::Receive(Message::Destroyed));
    let next = sender.step(Ev::Received(Message::Destroyed.text())).unwrap();
    assert_eq!(next, Act::RenameBack);

    let mut sender = Sender::new();
    until_go(&mut sender);
    let end = SenderEnd::Uncertain(SenderCause::GoNotSent);
    assert_eq!(sender.step(Ev::Lost).unwrap(), Act::Finish(end));
}

/// Bytes that a peer may send: any of the messages, a report of any status, or rubbish.
fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => prop::sample::select(MESSAGES.to_vec()).prop_map(|m| m.text().to_vec()),
        4 => prop::sample::select(vec![0_u8, 0, 1, 3, 255])
            .prop_map(|s| [Message::Report.text(), &[s]].concat()),
        1 => prop::collection::vec(any::<u8>(), 0..60),
    ]
}

/// Stands for the bytes that are waited for.
const AS_AWAITED: u8 = 8;

/// Which event to feed, and the bytes if it is `Received`. Those that a good migration is made
/// of come often, so that all states are reached.
fn any_events() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let kind = prop_oneof![8 => Just(AS_AWAITED), 8 => Just(2), 2 => Just(3), 1 => 0_u8..8];
    prop::collection::vec((kind, any_bytes()), 1..120)
}

/// The bytes to feed: `bytes`, or those of the message that `action` waits for.
fn fill_in(kind: u8, awaited: Option<Message>, bytes: &[u8]) -> (u8, Vec<u8>) {
    match (kind, awaited) {
        (AS_AWAITED, Some(Message::Report)) => {
            let status = u8::try_from(bytes.len() % 3).unwrap();
            (1, [Message::Report.text(), &[status]].concat())
        }
        (AS_AWAITED, Some(message)) => (1, message.text().to_vec()),
        (kind, _) => (kind, bytes.to_vec()),
    }
}

fn sender_event(kind: u8, bytes: &[u8]) -> SenderEvent<'_> {
    match kind {
        0 => SenderEvent::Begin,
        1 => SenderEvent::Received(bytes),
        2 => SenderEvent::Done,
        3 => SenderEvent::Failed,
        4 => SenderEvent::Lost,
        5 => SenderEvent::Cancelled,
        6 => SenderEvent::Suspended(true),
        _ => SenderEvent::Suspended(false),
    }
}

fn receiver_event(kind: u8, bytes: &[u8]) -> ReceiverEvent<'_> {
    match kind {
        0 => ReceiverEvent::Begin,
        1 => ReceiverEvent::Received(bytes),
        2 => ReceiverEvent::Done,
        3 => ReceiverEvent::Failed(3),
        4 => ReceiverEvent::Failed(0),
        5 => ReceiverEvent::Cancelled,
        _ => ReceiverEvent::Lost,
    }
}

/// What must have happened before an action of the sender may be asked for.
#[derive(Default)]
struct SenderHistory {
    ready: bool,
    tried_go: bool,
    succeeded: bool,
    given_back: bool,
    destroyed: bool,
    over: bool,
}

impl SenderHistory {
    fn answered(&mut self, action: SenderAction, event: SenderEvent<'_>) {
        match (action, event) {
            (SenderAction::Receive(Message::Ready), SenderEvent::Received(b)) => {
                self.ready = b == Message::Ready.text();
            }
            (SenderAction::SendGo, SenderEvent::Done | SenderEvent::Failed) => {
                self.tried_go = true;
            }
            (SenderAction::Receive(Message::Report), SenderEvent::Received(b)) => {
                self.succeeded = report_status(b) == Some(0);
            }
            (SenderAction::Receive(Message::Destroyed), SenderEvent::Received(b)) => {
                self.given_back = b == Message::Destroyed.text();
            }
            _ => {}
        }
    }

    fn check(&mut self, action: SenderAction) {
        assert!(!self.over, "{action:?} after the end");
        match action {
            SenderAction::SendGo => assert!(self.ready && !self.tried_go),
            SenderAction::Resume => {
                assert!(!self.tried_go || self.given_back, "resumed although Go was tried");
                assert!(!self.destroyed);
            }
            SenderAction::Destroy => {
                assert!(self.succeeded && !self.given_back, "destroyed without a report");
                self.destroyed = true;
            }
            SenderAction::Finish(SenderEnd::Kept(_) | SenderEnd::NotResumed(_)) => {
                assert!((!self.tried_go || self.given_back) && !self.destroyed);
                self.over = true;
            }
            SenderAction::Finish(SenderEnd::Uncertain(_)) => {
                assert!(self.tried_go && !self.destroyed);
                self.over = true;
            }
            SenderAction::Finish(_) => {
                assert!(self.destroyed);
                self.over = true;
            }
            _ => {}
        }
    }
}

#[derive(Default)]
struct ReceiverHistory {
    created: bool,
    go: bool,
    renamed: bool,
    unpaused: bool,
    gone: bool,
    over: bool,
}

impl ReceiverHistory {
    fn answered(&mut self, action: ReceiverAction, event: ReceiverEvent<'_>) {
        match (action, event) {
            (ReceiverAction::Receive(Message::Go), ReceiverEvent::Received(b)) => {
                self.go = b == Message::Go.text();
            }
            (ReceiverAction::Create, ReceiverEvent::Done) => self.created = true,
            (ReceiverAction::Rename, ReceiverEvent::Done) => self.renamed = true,
            (ReceiverAction::Unpause, ReceiverEvent::Done) => self.unpaused = true,
            (ReceiverAction::Destroy, ReceiverEvent::Done) => self.gone = true,
            _ => {}
        }
    }

    fn check(&mut self, action: ReceiverAction, stay_paused: bool) {
        assert!(!self.over, "{action:?} after the end");
        match action {
            ReceiverAction::Unpause => assert!(self.go && !stay_paused),
            ReceiverAction::SendReport(0) => {
                assert!(self.go && self.renamed && (self.unpaused || stay_paused));
            }
            ReceiverAction::Send(Message::Destroyed) => assert!(self.gone),
            ReceiverAction::Destroy => assert!(!self.unpaused, "destroyed a running copy"),
            ReceiverAction::Finish(end) => {
                self.over = true;
                let keeps = matches!(end, ReceiverEnd::Running | ReceiverEnd::RunningUnreported);
                assert_eq!(keeps, self.go && (self.unpaused || stay_paused && self.renamed));
                let remains = end == ReceiverEnd::Remains;
                assert_eq!(keeps || remains, self.created && !self.gone, "a copy left behind");
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_order_of_events_makes_the_sender_break_its_rules(events in any_events()) {
        let mut sender = Sender::new();
        let mut history = SenderHistory::default();
        let mut action = sender.step(SenderEvent::Begin).unwrap();
        for (kind, bytes) in &events {
            let awaited = if let SenderAction::Receive(m) = action { Some(m) } else { None };
            let (kind, bytes) = fill_in(*kind, awaited, bytes);
            let event = sender_event(kind, &bytes);
            let before = format!("{sender:?}");
            match sender.step(event) {
                Ok(next) => {
                    history.answered(action, event);
                    history.check(next);
                    action = next;
                }
                Err(_) => prop_assert_eq!(before, format!("{:?}", sender)),
            }
        }
    }

    #[test]
    fn no_order_of_events_makes_the_receiver_break_its_rules(
        events in any_events(),
        stay_paused in any::<bool>(),
    ) {
        let mut receiver = Receiver::new(stay_paused);
        let mut history = ReceiverHistory::default();
        let mut action = receiver.step(ReceiverEvent::Begin).unwrap();
        for (kind, bytes) in &events {
            let awaited = if let ReceiverAction::Receive(m) = action { Some(m) } else { None };
            let (kind, bytes) = fill_in(*kind, awaited, bytes);
            let event = receiver_event(kind, &bytes);
            let before = format!("{receiver:?}");
            match receiver.step(event) {
                Ok(next) => {
                    history.answered(action, event);
                    history.check(next, stay_paused);
                    action = next;
                }
                Err(_) => prop_assert_eq!(before, format!("{:?}", receiver)),
            }
        }
    }
}

/// A copy of the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    None,
    Held,
    Runs,
}

/// Both machines, two copies of the domain and two channels that may break at any moment.
struct World {
    choices: VecDeque<u8>,
    sender: Sender,
    receiver: Receiver,
    todo: (SenderAction, ReceiverAction),
    source: Copy,
    target: Copy,
    /// Bytes on their way.
    to_target: VecDeque<u8>,
    to_source: VecDeque<u8>,
    sent_all: bool,
    broken: bool,
    cancelled: (bool, bool),
}

impl World {
    fn new(choices: Vec<u8>, stay_paused: bool) -> World {
        let (mut sender, mut receiver) = (Sender::new(), Receiver::new(stay_paused));
        let todo = (
            sender.step(SenderEvent::Begin).unwrap(),
            receiver.step(ReceiverEvent::Begin).unwrap(),
        );
        World {
            choices: choices.into(),
            sender,
            receiver,
            todo,
            source: Copy::Runs,
            target: Copy::None,
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            sent_all: false,
            broken: false,
            cancelled: (false, false),
        }
    }

    /// One of `n`; the first, which is "all goes well", once the choices have run out.
    fn choose(&mut self, n: u8) -> u8 {
        self.choices.pop_front().map_or(0, |c| if c < 200 { 0 } else { c % n })
    }

    fn step(&mut self) {
        match self.choose(5) {
            1 => self.broken = true,
            2 => self.cancelled.0 = true,
            3 => self.cancelled.1 = true,
            _ => {}
        }
        if self.choices.pop_front().unwrap_or(0).is_multiple_of(2) {
            self.step_sender();
            self.step_receiver();
        } else {
            self.step_receiver();
            self.step_sender();
        }
        let running = [self.source, self.target].iter().filter(|c| **c == Copy::Runs).count();
        assert!(running <= 1, "two copies run");
        assert!(
            self.source != Copy::None || self.target != Copy::None,
            "no copy is left: {:?}",
            self.todo
        );
    }

    /// How a write goes: arrived, refused, lost on the way though accepted, arrived though refused.
    fn transmit(&mut self, bytes: &[u8], to_target: bool) -> bool {
        let how = if self.broken { 1 + self.choose(2) } else { self.choose(4) };
        if how == 0 || how == 3 {
            let queue = if to_target { &mut self.to_target } else { &mut self.to_source };
            queue.extend(bytes);
        }
        if how != 0 {
            self.broken = true;
        }
        how == 0 || how == 2
    }

    /// Bytes that have arrived, `Some(empty)` for the end of the channel, `None` to wait.
    fn take(&mut self, message: Message, at_target: bool) -> Option<Vec<u8>> {
        let peer_over = if at_target {
            matches!(self.todo.0, SenderAction::Finish(_))
        } else {
            matches!(self.todo.1, ReceiverAction::Finish(_))
        };
        let queue = if at_target { &mut self.to_target } else { &mut self.to_source };
        if queue.len() >= message.wire_bytes() {
            return Some(queue.drain(..message.wire_bytes()).collect());
        }
        (self.broken || peer_over).then(Vec::new)
    }

    /// Whether a change to a copy reports success, and whether it took place.
    fn attempt(&mut self) -> (bool, bool) {
        match self.choose(4) {
            1 => (false, false),
            2 => (false, true),
            _ => (true, true),
        }
    }

    fn step_sender(&mut self) {
        use SenderAction as Act;
        let may_cancel = matches!(
            self.todo.0,
            Act::Receive(Message::Banner | Message::Ready)
                | Act::SendDomain
                | Act::RenameAway
                | Act::SendGo
        );
        let mut received = Vec::new();
        let event = match self.todo.0 {
            Act::Finish(_) => return,
            _ if may_cancel && self.cancelled.0 => SenderEvent::Cancelled,
            Act::Receive(message) => match self.take(message, false) {
                None => return,
                Some(bytes) if bytes.is_empty() => SenderEvent::Lost,
                Some(bytes) => {
                    received = bytes;
                    SenderEvent::Received(&received)
                }
            },
            Act::SendDomain => {
                let (told, done) = self.attempt();
                if done {
                    self.source = Copy::Held;
                }
                self.sent_all = told && !self.broken;
                if self.sent_all { SenderEvent::Done } else { SenderEvent::Failed }
            }
            Act::AskWhetherSuspended => SenderEvent::Suspended(self.source == Copy::Held),
            Act::SendGo => match self.transmit(Message::Go.text(), true) {
                true => SenderEvent::Done,
                false => SenderEvent::Failed,
            },
            Act::Destroy | Act::Resume => {
                let (told, done) = self.attempt();
                if done {
                    let resumes = self.todo.0 == Act::Resume;
                    self.source = if resumes { Copy::Runs } else { Copy::None };
                }
                if told { SenderEvent::Done } else { SenderEvent::Failed }
            }
            Act::RenameAway | Act::RenameBack => match self.attempt().0 {
                true => SenderEvent::Done,
                false => SenderEvent::Failed,
            },
        };
        self.todo.0 = self.sender.step(event).unwrap();
        drop(received);
    }

    fn step_receiver(&mut self) {
        use ReceiverAction as Act;
        let may_cancel = matches!(
            self.todo.1,
            Act::Send(Message::Banner | Message::Ready)
                | Act::Create
                | Act::Receive(Message::Go)
                | Act::Rename
        );
        let done = |ok| if ok { ReceiverEvent::Done } else { ReceiverEvent::Failed(3) };
        let mut received = Vec::new();
        let event = match self.todo.1 {
            Act::Finish(_) => return,
            _ if may_cancel && self.cancelled.1 => ReceiverEvent::Cancelled,
            Act::Send(message) => done(self.transmit(message.text(), false)),
            Act::SendReport(status) => {
                let bytes = [Message::Report.text(), &[status]].concat();
                done(self.transmit(&bytes, false))
            }
            Act::Receive(message) => match self.take(message, true) {
                None => return,
                Some(bytes) if bytes.is_empty() => ReceiverEvent::Lost,
                Some(bytes) => {
                    received = bytes;
                    ReceiverEvent::Received(&received)
                }
            },
            Act::Create if self.sent_all => {
                let (ok, _) = self.attempt();
                self.target = if ok { Copy::Held } else { Copy::None };
                done(ok)
            }
            Act::Create if self.broken || matches!(self.todo.0, SenderAction::Finish(_)) => {
                done(false)
            }
            Act::Create => return,
            Act::Rename => done(self.attempt().0),
            Act::Unpause | Act::Destroy => {
                let (told, happened) = self.attempt();
                if happened {
                    let runs = self.todo.1 == Act::Unpause;
                    self.target = if runs { Copy::Runs } else { Copy::None };
                }
                done(told)
            }
        };
        self.todo.1 = self.receiver.step(event).unwrap();
        drop(received);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn whatever_breaks_one_copy_at_most_runs_and_one_at_least_is_left(
        choices in prop::collection::vec(any::<u8>(), 0..80),
        stay_paused in any::<bool>(),
    ) {
        let mut world = World::new(choices, stay_paused);
        let mut steps = 0;
        let (end, target_end) = loop {
            world.step();
            if let (SenderAction::Finish(s), ReceiverAction::Finish(r)) = world.todo {
                break (s, r);
            }
            steps += 1;
            prop_assert!(steps < 200, "stuck at {:?}", world.todo);
        };
        let started = if stay_paused { Copy::Held } else { Copy::Runs };
        match end {
            SenderEnd::Moved => {
                prop_assert_eq!((world.source, world.target), (Copy::None, started));
            }
            SenderEnd::MovedWithRemains => prop_assert_eq!(world.target, started),
            SenderEnd::Kept(_) => prop_assert_eq!(world.source, Copy::Runs),
            SenderEnd::NotResumed(_) => prop_assert_ne!(world.target, Copy::Runs),
            SenderEnd::Uncertain(_) => prop_assert_eq!(world.source, Copy::Held),
        }
        if target_end == ReceiverEnd::Running {
            prop_assert_eq!(world.target, started);
        }
    }
}
