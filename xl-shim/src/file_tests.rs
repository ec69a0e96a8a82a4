//! Saving to files and restoring from them with fake hosts: which copies run, and what is left,
//! whatever happens.

use std::fs::{self, File};
use std::io::{Read, pipe};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::restoring::RestoreEnd;
use rxl_migrate::xl::saving::{SaveCause as Cause, SaveEnd, Then};
use rxl_toolstack::lifecycle::Lifecycle;
use tempfile::TempDir;

use crate::Exit;
use crate::channel::Channel;
use crate::fake::{Condition, FakeHost, Request, STREAM};
use crate::gate::Gate;
use crate::guard::Guard;
use crate::output::Screen;
use crate::receive::{Arrival, Helpers, Saved};
use crate::restore;
use crate::save::{Save, SaveFile, ToFile};
use crate::timeline::Timeline;

const NAME: &str = "web";

/// A host with a domain, and a directory for its file.
struct Place {
    host: FakeHost,
    domid: DomId,
    dir: TempDir,
    gate: Arc<Gate>,
}

impl Place {
    fn new() -> Place {
        let (host, domid) = FakeHost::with_domain(NAME);
        Place { host, domid, dir: TempDir::new().unwrap(), gate: Arc::new(Gate::new().unwrap()) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("web.save")
    }

    fn config(&self) -> DomainConfig {
        DomainConfig::parse(&self.host.config(self.domid).unwrap()).unwrap()
    }

    /// Header and stream, as they have to be in the file.
    fn whole(&self) -> Vec<u8> {
        let header = Header::new(&self.config().to_json()).unwrap();
        [header.to_bytes(), STREAM.to_vec()].concat()
    }

    fn begin(&self) -> SaveFile {
        SaveFile::begin(&self.path(), &self.config(), false).unwrap()
    }

    fn save(&self, then: Then) -> (SaveEnd, String) {
        self.save_to(self.begin(), then)
    }

    /// How it ended, and what the user reads and what else is known.
    fn save_to(&self, file: SaveFile, then: Then) -> (SaveEnd, String) {
        let screen = Screen::buffer();
        let mut timeline = Timeline::default();
        let header = Header::new(&self.config().to_json()).unwrap();
        let mut save = Save {
            host: &self.host,
            domid: self.domid,
            name: NAME,
            header: &header,
            debug: false,
            channel: Channel::to_file(file.writer().unwrap(), self.gate.clone()).unwrap(),
            gate: &self.gate,
            guard: Guard::none(),
            cap: None,
            screen: &screen,
            timeline: &mut timeline,
            events: None,
            save_error: None,
            details: Vec::new(),
            way: ToFile { name: "web.save", file, then },
        };
        let end = save.run();
        let Save { details, save_error, .. } = save;
        let why = save_error.map(|error| error.to_string());
        let text = [screen.text()].into_iter().chain(why).chain(details);
        (end, text.collect::<Vec<_>>().join("\n"))
    }

    /// The guest runs, and nothing of the save is left but what was there before.
    fn assert_nothing_happened(&self, old: Option<&[u8]>) {
        assert_eq!(self.host.domains(), [(NAME.to_owned(), Condition::Runs)]);
        assert!(!self.host.is_logging());
        assert_eq!(fs::read(self.path()).ok().as_deref(), old);
        let files = fs::read_dir(self.dir.path()).unwrap().count();
        assert_eq!(files, usize::from(old.is_some()));
    }

    fn on(&self, request: Request, act: impl Fn() -> bool + Send + Sync + 'static) {
        self.host.hook(move |asked| asked != request || act());
    }
}

#[test]
fn a_saved_domain_is_in_its_file_as_xl_writes_it_and_is_gone() {
    let place = Place::new();
    let path = place.path();
    place.on(Request::Destroy, move || path.exists());
    let (end, text) = place.save(Then::Destroy);
    assert_eq!(end, SaveEnd::Saved);
    assert_eq!(fs::read(place.path()).unwrap(), saved_file());
    assert_eq!(place.host.domains(), []);
    assert_eq!(text, "Saving to web.save new xl format (info 0x3/0x0/30)");
}

/// What the file of [`NAME`] holds.
fn saved_file() -> Vec<u8> {
    Place::new().whole()
}

#[test]
fn a_domain_that_stays_runs_on_or_is_paused() {
    for (then, condition) in [(Then::Run, Condition::Runs), (Then::Pause, Condition::Paused)] {
        let place = Place::new();
        assert_eq!(place.save(then).0, SaveEnd::Saved);
        assert_eq!(fs::read(place.path()).unwrap(), saved_file());
        assert_eq!(place.host.domains(), [(NAME.to_owned(), condition)]);
    }
}

#[test]
fn a_full_disk_leaves_the_domain_running() {
    let place = Place::new();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (end, text) = place.save_to(SaveFile::of(full.into()), Then::Destroy);
    assert_eq!(end, SaveEnd::Kept(Cause::NotWritten));
    assert!(text.contains("Failed to save domain, resuming domain\n"), "{text}");
    assert!(text.contains("writing the header: No space left on device"), "{text}");
    place.assert_nothing_happened(None);
}

#[test]
fn a_reader_that_goes_in_mid_stream_leaves_the_domain_running() {
    let place = Place::new();
    let (mut reader, writer) = pipe().unwrap();
    let header = place.whole().len() - STREAM.len();
    let reading = thread::spawn(move || reader.read_exact(&mut vec![0; header]).unwrap());
    // The stream begins when nobody reads any more.
    let reading = std::sync::Mutex::new(Some(reading));
    place.on(Request::Save, move || {
        reading.lock().unwrap().take().unwrap().join().unwrap();
        true
    });
    let (end, _) = place.save_to(SaveFile::of(writer.into()), Then::Destroy);
    assert_eq!(end, SaveEnd::Kept(Cause::NotWritten));
    place.assert_nothing_happened(None);
}

#[test]
fn a_save_that_fails_or_is_cancelled_leaves_the_domain_and_the_old_file() {
    let place = Place::new();
    let old = [&place.whole(), b"of yesterday".as_slice()].concat();
    fs::write(place.path(), &old).unwrap();
    place.on(Request::Save, || false);
    assert_eq!(place.save(Then::Destroy).0, SaveEnd::Kept(Cause::NotWritten));
    place.assert_nothing_happened(Some(&old));

    let (gate, cancel) = (place.gate.clone(), place.host.canceller());
    place.on(Request::Save, move || {
        assert!(gate.cancel());
        cancel();
        true
    });
    assert_eq!(place.save(Then::Destroy).0, SaveEnd::Kept(Cause::Cancelled));
    place.assert_nothing_happened(Some(&old));
}

#[test]
fn a_file_that_cannot_have_its_name_leaves_the_domain_running() {
    let place = Place::new();
    let file = place.begin();
    fs::create_dir(place.path()).unwrap();
    let (end, text) = place.save_to(file, Then::Destroy);
    assert_eq!(end, SaveEnd::Kept(Cause::NotKept));
    assert!(text.contains("naming the file: "), "{text}");
    fs::remove_dir(place.path()).unwrap();
    place.assert_nothing_happened(None);
}

#[test]
fn a_domain_that_cannot_be_destroyed_or_resumed_is_told_from_one_that_is_not_saved() {
    let place = Place::new();
    place.on(Request::Destroy, || false);
    assert_eq!(place.save(Then::Destroy).0, SaveEnd::SavedWithRemains);
    assert_eq!(place.host.domains(), [(NAME.to_owned(), Condition::Suspended)]);
    let place = Place::new();
    place.on(Request::Pause, || false);
    assert_eq!(place.save(Then::Pause).0, SaveEnd::SavedNotResumed);
    assert_eq!(place.host.domains(), [(NAME.to_owned(), Condition::Suspended)]);
}

/// Restores `bytes` on `host`: the exit code, and what the user reads.
fn restore(host: &FakeHost, gate: &Arc<Gate>, bytes: &[u8], paused: bool) -> (Exit, String) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("web.save");
    fs::write(&path, bytes).unwrap();
    let file = File::open(path).unwrap();
    let screen = Screen::buffer();
    let channel = Channel::from_file(file.into(), gate.clone()).unwrap();
    let helpers = Helpers { guard: false, monitor: false };
    let mut arrival = Arrival::new(host, channel, gate, &screen, helpers);
    arrival.paused = paused;
    arrival.saved = Some(Saved { name: "web.save", config: None });
    let end = arrival.restore_from_file();
    let made = arrival.made().is_some();
    assert!(made || !matches!(end, RestoreEnd::Restored));
    (restore::tell(&screen, "web.save", &end), screen.text())
}

fn open_gate() -> Arc<Gate> {
    Arc::new(Gate::new().unwrap())
}

#[test]
fn a_restored_domain_runs_under_its_name_or_is_paused() {
    for (paused, condition) in [(false, Condition::Runs), (true, Condition::Paused)] {
        let host = FakeHost::default();
        let (exit, text) = restore(&host, &open_gate(), &saved_file(), paused);
        assert_eq!(exit, Exit::Success);
        assert_eq!(host.domains(), [(NAME.to_owned(), condition)]);
        assert_eq!(
            text,
            "Loading new save file web.save (new xl fmt info 0x3/0x0/30)\n \
             Savefile contains xl domain config in JSON format\n\
             Parsing config from <saved>"
        );
    }
}

#[test]
fn what_cannot_be_restored_leaves_nothing_and_the_user_reads_why() {
    let whole = saved_file();
    let header = whole.len() - STREAM.len();
    for (bytes, words) in [
        (&whole[..0], "it ends within its header; it is not a saved domain, or was cut off"),
        (&whole[..header - 1], "it ends within its header"),
        (&whole[..whole.len() - 1], "Restore failed"),
        (&[b'x'; 200], "File has wrong magic number - corrupt or for a different tool?"),
    ] {
        let host = FakeHost::default();
        let (exit, text) = restore(&host, &open_gate(), bytes, false);
        assert_eq!(exit, Exit::Failed);
        let line = format!("web.save was not restored, and nothing of it is here: {words}");
        assert!(text.contains(&line), "{text}");
        assert_eq!(host.domains(), []);
    }
}

#[test]
fn a_domain_that_is_here_already_is_left_alone() {
    for name in ["web", "web--incoming"] {
        let host = FakeHost::default();
        host.add(name, Condition::Runs);
        let (exit, text) = restore(&host, &open_gate(), &saved_file(), false);
        assert_eq!(exit, Exit::Failed);
        assert!(text.contains(&format!("a domain {name} is on this host already")), "{text}");
        assert_eq!(host.domains(), [(name.to_owned(), Condition::Runs)]);
    }
}

#[test]
fn a_host_that_is_too_full_or_cannot_start_the_domain_has_nothing_of_it() {
    for (request, words) in [
        (Request::ReserveMemory, "the guest needs 512 MiB, 100 MiB are free"),
        (Request::Restore, "Restore failed"),
        (Request::Rename, "it could not be started"),
        (Request::Unpause, "it could not be started"),
    ] {
        let host = FakeHost::default();
        host.hook(move |asked| asked != request);
        let (exit, text) = restore(&host, &open_gate(), &saved_file(), false);
        assert_eq!(exit, Exit::Failed);
        assert!(text.contains(words), "{text}");
        assert_eq!(host.domains(), []);
    }
}

#[test]
fn a_restore_can_be_cancelled_until_the_domain_is_complete() {
    let (host, gate) = (FakeHost::default(), open_gate());
    let cancelled = gate.clone();
    host.hook(move |asked| asked != Request::Restore || cancelled.cancel());
    let (exit, text) = restore(&host, &gate, &saved_file(), false);
    assert_eq!(exit, Exit::Cancelled);
    assert!(text.ends_with("nothing of it is here: cancelled"), "{text}");
    assert_eq!(host.domains(), []);

    let (host, gate) = (FakeHost::default(), open_gate());
    let late = gate.clone();
    host.hook(move |asked| asked != Request::Unpause || !late.cancel());
    assert_eq!(restore(&host, &gate, &saved_file(), false).0, Exit::Success);
    assert_eq!(host.domains(), [(NAME.to_owned(), Condition::Runs)]);
}

#[test]
fn a_copy_that_can_neither_be_started_nor_destroyed_is_told_to_the_user() {
    let host = FakeHost::default();
    host.hook(|asked| asked != Request::Unpause && asked != Request::Destroy);
    let (exit, text) = restore(&host, &open_gate(), &saved_file(), false);
    assert_eq!(exit, Exit::Failed);
    assert!(text.contains("find it with xl list and destroy it"), "{text}");
}
