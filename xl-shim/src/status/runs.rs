//! Where rxls of this host say what they are doing: a file for each, in a directory that does not
//! outlive the host. A file is always a whole one: it is written beside and takes the other's
//! place.
//!
//! A file stays for a minute after its rxl's end. The next rxl that begins takes it away then, or
//! whoever reads the directory. The file of an rxl that was killed is taken by its guard, once that
//! has put things right; if the guard was killed as well it goes like others, once the domain's
//! lock is free.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::state::State;
use crate::lock;

/// Where they are.
const DIRECTORY: &str = "/run/rxl";
/// Longest that is read, in bytes; a connection costs 0.1 KiB.
const STATE_BYTES_MAX: u64 = 256 << 10;
/// How long the end of an rxl can be read, for whoever has waited for it.
const KEPT_AFTER_END: Duration = Duration::from_secs(60);

/// The directory.
#[derive(Clone, Debug)]
pub(crate) struct Runs(PathBuf);

/// What an rxl is doing, or has left to its guard.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Run {
    pub(crate) state: State,
    /// It was killed, and its guard or its save helper is not done yet.
    pub(crate) is_killed: bool,
}

impl Runs {
    /// That of this host.
    pub(crate) fn of_this_host() -> Runs {
        Runs(DIRECTORY.into())
    }

    #[cfg(test)]
    pub(crate) fn at(directory: &Path) -> Runs {
        Runs(directory.to_owned())
    }

    fn path(&self, pid: u32) -> PathBuf {
        self.0.join(format!("{pid}.json"))
    }

    /// Says what the rxl of `state` is doing.
    pub(super) fn write(&self, state: &State) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        let path = self.path(state.pid);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(state)?)?;
        fs::rename(&new, &path)
    }

    /// What that rxl says, or said last.
    pub(super) fn read(&self, pid: u32) -> Option<State> {
        read(&self.path(pid))
    }

    /// Takes away what the rxl of that number, which is gone, has said.
    pub(crate) fn forget(&self, pid: u32) {
        for end in ["json", "new"] {
            // Whoever reads the directory may have been quicker.
            let _ = fs::remove_file(self.path(pid).with_extension(end));
        }
    }

    /// Takes away what is left of rxls that are gone, but for ends that may still be read.
    pub(super) fn tidy(&self) {
        self.list();
    }

    /// All that goes on, the oldest first. Takes away what is left of others.
    pub(crate) fn list(&self) -> Vec<Run> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut runs: Vec<Run> = entries.filter_map(|entry| examine(&entry.path())).collect();
        runs.sort_by_key(|run| (run.state.started_unix_ms, run.state.pid));
        runs
    }
}

/// What is said in `path`, if that goes on; else removes it, if it is time.
fn examine(path: &Path) -> Option<Run> {
    let pid: u32 = path.file_stem()?.to_str()?.parse().ok()?;
    if path.extension().is_none_or(|end| end != "json") {
        // One that is about to take the other's place, or never did.
        if process_started(pid).is_none() {
            let _ = fs::remove_file(path);
        }
        return None;
    }
    let state = read(path);
    let lives = process_started(pid).is_some_and(|started| {
        // What cannot be read may be a newer rxl's.
        state.as_ref().is_none_or(|state| state.pid_started == started)
    });
    let is_killed = !lives && state.as_ref().is_some_and(|s| lock::is_held(&s.lock_name()));
    let ended = state.as_ref().is_some_and(|state| state.exit.is_some());
    let goes_on = lives || (is_killed && !ended);
    // Whoever waits for the end may not have read it yet.
    let is_fresh = ended && age(path) <= Some(KEPT_AFTER_END);
    if !goes_on && !is_fresh {
        // If it cannot be removed, somebody else has, or may.
        let _ = fs::remove_file(path);
        return None;
    }
    state.filter(|_| !ended).map(|state| Run { state, is_killed })
}

fn read(path: &Path) -> Option<State> {
    let size = fs::metadata(path).ok()?.len();
    let text = (size <= STATE_BYTES_MAX).then(|| fs::read(path).ok()).flatten()?;
    serde_json::from_slice(&text).ok()
}

fn age(path: &Path) -> Option<Duration> {
    SystemTime::now().duration_since(fs::metadata(path).ok()?.modified().ok()?).ok()
}

/// When a process that lives began, in ticks since the host did (proc(5), `stat`, field 22).
pub(crate) fn process_started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::state::{Doing, example};
    use super::*;
    use crate::lock::Lock;

    fn own() -> State {
        let pid = std::process::id();
        State { pid, pid_started: process_started(pid).unwrap(), ..example() }
    }

    /// A process number that nobody has any more.
    fn gone() -> u32 {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn what_a_guard_takes_away_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let runs = Runs::at(directory.path());
        runs.write(&own()).unwrap();
        assert!(runs.read(own().pid).is_some());
        runs.forget(own().pid);
        runs.forget(own().pid);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_an_rxl_that_lives_says_is_there_until_it_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let runs = Runs::at(&directory.path().join("rxl"));
        assert_eq!(runs.list(), []);
        runs.write(&own()).unwrap();
        assert_eq!(runs.list(), [Run { state: own(), is_killed: false }]);
        let ended = State { exit: Some(0), ..own() };
        runs.write(&ended).unwrap();
        assert_eq!(runs.list(), []);
        assert_eq!(runs.read(ended.pid), Some(ended), "whoever waits for the end can read it");
    }

    #[test]
    fn what_is_left_of_one_that_was_killed_goes_once_its_guard_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let runs = Runs::at(directory.path());
        let domain = format!("killed-{}", std::process::id());
        let state = State { doing: Doing::Receive, domain, pid: gone(), ..example() };
        let guard = Lock::of_incoming(&state.domain).unwrap();
        runs.write(&state).unwrap();
        assert_eq!(runs.list(), [Run { state: state.clone(), is_killed: true }]);
        drop(guard);
        // A process that another test starts may have the lock for a moment.
        while lock::is_held(&state.lock_name()) {
            std::thread::yield_now();
        }
        assert_eq!(runs.list(), []);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_process_that_has_the_number_of_another_is_not_taken_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let runs = Runs::at(directory.path());
        runs.write(&State { pid_started: 1, domid: Some(65_000), ..own() }).unwrap();
        assert_eq!(runs.list(), []);
        fs::write(directory.path().join(format!("{}.json", gone())), "{").unwrap();
        fs::write(directory.path().join(format!("{}.new", gone())), "{").unwrap();
        fs::write(directory.path().join("note"), "").unwrap();
        assert_eq!(runs.list(), []);
        let left: Vec<_> = fs::read_dir(directory.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}
