//! Both ends of a migration in one process, over a wire that can be cut at any byte, with fake
//! hosts: which copies run, whatever happens.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::handshake::{
    Message, ReceiverCause, ReceiverEnd, SenderCause as Cause, SenderEnd,
};
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::movable::{Facts, Unmovable};
use rxl_toolstack::lifecycle::Lifecycle;

use crate::channel::Channel;
use crate::fake::{Condition, FakeHost, Request, STREAM};
use crate::gate::Gate;
use crate::guard::Guard;
use crate::migrate::{Conclusion, Departure, ToHost};
use crate::outgoing::check_movable;
use crate::output::Screen;
use crate::receive::{Arrival, Helpers};
use crate::timeline::Timeline;

const NAME: &str = "web";
const NO_HELPERS: Helpers = Helpers { guard: false, monitor: false };

/// Two hosts, the domain on the first, and where the wire breaks.
struct Pair {
    source: FakeHost,
    domid: DomId,
    target: FakeHost,
    /// After how many bytes to the target, and to the source, the wire is cut.
    cut: (usize, usize),
    paused: bool,
    source_gate: Arc<Gate>,
    target_gate: Arc<Gate>,
}

/// How both ends ended, and what the sender's user read.
#[derive(Debug)]
struct Ends {
    sender: SenderEnd,
    receiver: ReceiverEnd,
    text: String,
}

impl Pair {
    fn new() -> Pair {
        let (source, domid) = FakeHost::with_domain(NAME);
        Pair {
            source,
            domid,
            target: FakeHost::default(),
            cut: (usize::MAX, usize::MAX),
            paused: false,
            source_gate: Arc::new(Gate::new().unwrap()),
            target_gate: Arc::new(Gate::new().unwrap()),
        }
    }

    fn run(&self) -> Ends {
        let (sender_end, near) = UnixStream::pair().unwrap();
        let (far, receiver_end) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            let (from_near, to_far) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            scope.spawn(move || relay(from_near, to_far, self.cut.0));
            scope.spawn(move || relay(far, near, self.cut.1));
            let receiver = scope.spawn(move || self.receive(receiver_end));
            let (sender, text) = self.send(sender_end);
            Ends { sender, receiver: receiver.join().unwrap(), text }
        })
    }

    fn send(&self, wire: UnixStream) -> (SenderEnd, String) {
        let screen = Screen::buffer();
        let mut timeline = Timeline::default();
        let config = self.source.config(self.domid).unwrap();
        let mut departure = Departure {
            host: &self.source,
            domid: self.domid,
            name: NAME,
            header: &Header::new(&config).unwrap(),
            debug: false,
            channel: channel(wire, &self.source_gate),
            gate: &self.source_gate,
            guard: Guard::none(),
            cap: None,
            screen: &screen,
            timeline: &mut timeline,
            events: None,
            save_error: None,
            details: Vec::new(),
            way: ToHost { target: "host2" },
        };
        let end = departure.run().unwrap();
        let Departure { details, channel, .. } = departure;
        drop(channel);
        let conclusion = Conclusion { guest: NAME, target: "host2", end, details: &details };
        conclusion.tell(&screen, || self.source.state(self.domid).ok());
        (end, screen.text())
    }

    fn receive(&self, wire: UnixStream) -> ReceiverEnd {
        let screen = Screen::buffer();
        let channel = channel(wire, &self.target_gate);
        let mut arrival =
            Arrival::new(&self.target, channel, &self.target_gate, &screen, NO_HELPERS);
        arrival.paused = self.paused;
        arrival.run().unwrap()
    }

    /// Copies that run, and all that there are.
    fn count(&self) -> (usize, usize) {
        let all = [self.source.domains(), self.target.domains()].concat();
        (all.iter().filter(|(_, c)| *c == Condition::Runs).count(), all.len())
    }

    fn assert_runs_at_source_only(&self) {
        assert!(!self.source.is_logging());
        assert_eq!(self.source.domains(), [(NAME.to_owned(), Condition::Runs)]);
        assert_eq!(self.target.domains(), []);
    }

    fn assert_runs_at_target_only(&self) {
        assert_eq!(self.source.domains(), []);
        assert_eq!(self.target.domains(), [(NAME.to_owned(), Condition::Runs)]);
    }
}

fn channel(wire: UnixStream, gate: &Arc<Gate>) -> Channel {
    let input = OwnedFd::from(wire.try_clone().unwrap());
    Channel::new(input, wire.into(), gate.clone())
}

/// Carries `limit` bytes, then cuts the wire for both directions.
fn relay(mut from: UnixStream, mut to: UnixStream, limit: usize) {
    let mut left = limit;
    let mut buffer = [0; 256];
    loop {
        let room = left.min(buffer.len());
        match from.read(&mut buffer[..room]) {
            Ok(0) | Err(_) if left > 0 => {
                // An end that closed, not a cut: what it sent before still arrives.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Ok(n) if n > 0 && to.write_all(&buffer[..n]).is_ok() => left -= n,
            _ => {
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}

fn failing(request: Request) -> impl Fn(Request) -> bool + Send + Sync {
    move |asked| asked != request
}

#[test]
fn a_domain_moves_and_the_user_reads_what_xl_prints() {
    let pair = Pair::new();
    let ends = pair.run();
    assert_eq!((ends.sender, ends.receiver), (SenderEnd::Moved, ReceiverEnd::Running));
    pair.assert_runs_at_target_only();
    assert_eq!(
        ends.text,
        "Saving to migration stream new xl format (info 0x3/0x0/30)\n\
         migration sender: Target has acknowledged transfer.\n\
         migration sender: Giving target permission to start.\n\
         migration sender: Target reports successful startup.\n\
         Migration successful."
    );
}

#[test]
fn a_domain_that_is_to_stay_paused_arrives_paused() {
    let pair = Pair { paused: true, ..Pair::new() };
    assert_eq!(pair.run().sender, SenderEnd::Moved);
    assert_eq!(pair.source.domains(), []);
    assert_eq!(pair.target.domains(), [(NAME.to_owned(), Condition::Paused)]);
}

/// Wherever the wire breaks: no two copies run, and if none runs the user is told so.
fn check_after_a_cut(pair: &Pair, ends: &Ends, cut: usize) {
    let (running, copies) = pair.count();
    assert!(running <= 1 && copies >= 1, "cut at {cut}: {ends:?}");
    match ends.sender {
        SenderEnd::Moved => pair.assert_runs_at_target_only(),
        SenderEnd::Kept(_) => pair.assert_runs_at_source_only(),
        SenderEnd::Uncertain(_) => {
            let away = (format!("{NAME}--migratedaway"), Condition::Suspended);
            assert_eq!(pair.source.domains(), [away], "cut at {cut}");
            assert!(ends.text.contains("Domain state is now undefined !"));
            assert!(ends.text.contains("rxl resume web--migratedaway"));
        }
        other => panic!("cut at {cut}: {other:?}"),
    }
    if running == 0 {
        assert!(matches!(ends.sender, SenderEnd::Uncertain(_)), "cut at {cut}: {ends:?}");
    }
}

#[test]
fn the_wire_may_break_after_any_byte_to_the_target() {
    let header = Header::new(&Pair::new().source.config(DomId(1)).unwrap()).unwrap();
    let before_go = header.to_bytes().len() + STREAM.len();
    let all = before_go + Message::Go.text().len();
    for cut in 0..=all {
        let pair = Pair { cut: (cut, usize::MAX), ..Pair::new() };
        let ends = pair.run();
        check_after_a_cut(&pair, &ends, cut);
        match ends.sender {
            SenderEnd::Kept(_) => assert!(cut <= before_go, "resumed after Go: {ends:?}"),
            _ => assert!(cut >= before_go, "cut at {cut}: {ends:?}"),
        }
        let runs_there = pair.target.domains().iter().any(|(_, c)| *c == Condition::Runs);
        assert_eq!(runs_there, cut == all, "cut at {cut}: unpaused without permission");
    }
}

#[test]
fn the_wire_may_break_after_any_byte_to_the_source() {
    let ready = Message::Banner.text().len() + Message::Ready.text().len();
    let all = ready + Message::Report.wire_bytes();
    for cut in 0..=all {
        let pair = Pair { cut: (usize::MAX, cut), ..Pair::new() };
        let ends = pair.run();
        check_after_a_cut(&pair, &ends, cut);
        assert!(cut >= ready || matches!(ends.sender, SenderEnd::Kept(_)), "cut at {cut}");
        assert!(cut < all || ends.sender == SenderEnd::Moved);
    }
}

#[test]
fn a_target_that_is_too_full_refuses_and_the_domain_runs_on() {
    let pair = Pair::new();
    pair.target.hook(failing(Request::ReserveMemory));
    let ends = pair.run();
    assert_eq!(ends.receiver, ReceiverEnd::Nothing(ReceiverCause::NotCreated));
    assert!(matches!(ends.sender, SenderEnd::Kept(Cause::NotSent | Cause::NoReady)), "{ends:?}");
    assert!(ends.text.ends_with("rxl: web keeps running here."), "{}", ends.text);
    pair.assert_runs_at_source_only();
}

#[test]
fn a_guest_that_cannot_be_moved_is_refused_at_either_end() {
    let pair = Pair::new();
    let config = |host: &FakeHost| DomainConfig::parse(&host.config(pair.domid).unwrap()).unwrap();
    let check = |live| check_movable(&pair.source, pair.domid, &config(&pair.source), live);
    assert_eq!(check(true), Ok(()));
    let facts = pair.source.facts(pair.domid).unwrap();
    pair.source.set_facts(Facts { shadow_paging: false, ..facts });
    assert_eq!(check(true), Err(Unmovable::NoShadowPaging));
    assert_eq!(check(false), Ok(()));
    pair.source.add_to_config(r#""pcidevs":[{"bus":3}]"#);
    assert_eq!(check(false), Err(Unmovable::PciDevices(1)));
    // A sender that did not look.
    let ends = pair.run();
    assert!(matches!(ends.sender, SenderEnd::Kept(_)), "{ends:?}");
    pair.assert_runs_at_source_only();
}

#[test]
fn a_target_that_cannot_make_the_domain_leaves_it_to_the_source() {
    let pair = Pair::new();
    pair.target.hook(failing(Request::Restore));
    let ends = pair.run();
    assert_eq!(ends.sender, SenderEnd::Kept(Cause::NoReady));
    assert!(ends.text.contains("rxl: web was not moved: the target did not take the domain"));
    pair.assert_runs_at_source_only();
}

#[test]
fn a_target_that_cannot_start_the_domain_destroys_it_and_says_so() {
    for request in [Request::Rename, Request::Unpause] {
        let pair = Pair::new();
        pair.target.hook(failing(request));
        let ends = pair.run();
        assert_eq!(ends.sender, SenderEnd::Kept(Cause::TargetFailed(3)), "{request:?}");
        assert_eq!(ends.receiver, ReceiverEnd::GivenBack { told: true });
        assert!(ends.text.contains(
            "migration sender: Target reports startup failure (status code 3).\n\
             migration sender: Trying to resume at our end.\n\
             migration sender: Resumed OK.\n\
             Migration failed due to problems at target."
        ));
        pair.assert_runs_at_source_only();
    }
}

#[test]
fn a_target_that_cannot_destroy_its_copy_does_not_give_the_domain_back() {
    let pair = Pair::new();
    pair.target.hook(|r| r != Request::Unpause && r != Request::Destroy);
    let ends = pair.run();
    assert_eq!(ends.receiver, ReceiverEnd::Remains);
    assert_eq!(ends.sender, SenderEnd::Uncertain(Cause::NotDestroyed(3)));
    assert_eq!(pair.count(), (0, 2));
}

#[test]
fn a_source_that_cannot_save_or_rename_keeps_the_domain() {
    for (request, cause) in [(Request::Save, Cause::NotSent), (Request::Rename, Cause::NotRenamed)]
    {
        let pair = Pair::new();
        pair.source.hook(failing(request));
        let ends = pair.run();
        assert_eq!(ends.sender, SenderEnd::Kept(cause));
        assert!(matches!(ends.receiver, ReceiverEnd::Nothing(_)), "{ends:?}");
        pair.assert_runs_at_source_only();
    }
}

#[test]
fn a_copy_that_can_neither_be_resumed_nor_destroyed_is_named_to_the_user() {
    let pair = Pair::new();
    pair.target.hook(failing(Request::Restore));
    pair.source.hook(failing(Request::Resume));
    let ends = pair.run();
    assert_eq!(ends.sender, SenderEnd::NotResumed(Cause::NoReady));
    assert!(ends.text.ends_with("rxl: Try again: rxl resume web"), "{}", ends.text);

    let pair = Pair::new();
    pair.source.hook(failing(Request::Destroy));
    let ends = pair.run();
    assert_eq!(ends.sender, SenderEnd::MovedWithRemains);
    assert!(ends.text.contains("xl destroy web--migratedaway"), "{}", ends.text);
}

#[test]
fn a_remainder_of_another_migration_is_left_alone() {
    let pair = Pair::new();
    pair.target.add("web--incoming", Condition::Paused);
    let ends = pair.run();
    assert!(matches!(ends.sender, SenderEnd::Kept(_)), "{ends:?}");
    assert_eq!(pair.target.domains(), [("web--incoming".to_owned(), Condition::Paused)]);
}

#[test]
fn cancelling_before_go_leaves_the_domain_running_at_the_source() {
    // During the save, and while the target makes the domain.
    for at in [Request::Save, Request::Restore] {
        let pair = Pair::new();
        let (gate, cancel) = (pair.source_gate.clone(), pair.source.canceller());
        let hook = move |request| {
            if request == at {
                assert!(gate.cancel());
                cancel();
            }
            true
        };
        match at {
            Request::Save => pair.source.hook(hook),
            _ => pair.target.hook(hook),
        }
        let ends = pair.run();
        assert_eq!(ends.sender, SenderEnd::Kept(Cause::Cancelled), "{at:?}");
        pair.assert_runs_at_source_only();
    }
}

#[test]
fn cancelling_after_go_is_too_late_at_both_ends() {
    let pair = Pair::new();
    let gates = [pair.source_gate.clone(), pair.target_gate.clone()];
    pair.target.hook(move |request| {
        if request == Request::Unpause {
            assert!(gates.iter().all(|gate| !gate.cancel()));
        }
        true
    });
    assert_eq!(pair.run().sender, SenderEnd::Moved);
    pair.assert_runs_at_target_only();
}

#[test]
fn cancelling_the_receiver_leaves_the_domain_running_at_the_source() {
    let pair = Pair::new();
    let gate = pair.target_gate.clone();
    pair.target.hook(move |request| {
        if request == Request::Restore {
            gate.cancel();
        }
        true
    });
    let ends = pair.run();
    assert_eq!(ends.receiver, ReceiverEnd::Nothing(ReceiverCause::Cancelled));
    assert_eq!(ends.sender, SenderEnd::Kept(Cause::NoReady));
    pair.assert_runs_at_source_only();
}

#[test]
fn something_else_than_a_receiver_is_quoted_and_gets_nothing() {
    let pair = Pair::new();
    let (sender_end, mut other) = UnixStream::pair().unwrap();
    other.write_all(b"Welcome to host2!\n").unwrap();
    let (end, text) = pair.send(sender_end);
    assert_eq!(end, SenderEnd::Kept(Cause::WrongBanner));
    assert!(text.contains(r#"host2 said "Welcome to host2!\n""#), "{text}");
    let mut got = Vec::new();
    other.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"", "the domain was sent to something else");
    pair.assert_runs_at_source_only();
}

#[test]
fn a_receiver_that_reads_something_else_than_go_destroys_its_copy() {
    let pair = Pair::new();
    let (mut sender, receiver_end) = UnixStream::pair().unwrap();
    let header = Header::new(r#"{"c_info":{"name":"web"}}"#).unwrap();
    sender.write_all(&header.to_bytes()).unwrap();
    sender.write_all(&STREAM).unwrap();
    sender.write_all(b"domain is yours, but").unwrap();
    let end = pair.receive(receiver_end);
    assert_eq!(end, ReceiverEnd::Nothing(ReceiverCause::WrongGo));
    assert_eq!(pair.target.domains(), []);
}
