//! Where this rxl says what it is doing: kept here for the screen and the report, and written to
//! its file for other processes.

use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rxl_migrate::frame::DomId;
use rxl_migrate::progress::{Figures, Progress, Sample};
use rxl_migrate::report::Stamped;
use rxl_migrate::xl::config::DomainConfig;

use super::runs::{self, Runs};
use super::state::{Doing, Phase, State, VERSION};
use crate::Exit;
use crate::report::Target;

/// How often progress alone is written, at most, in nanoseconds.
const WRITE_INTERVAL_NS: u64 = 500_000_000;

/// The place; all clones are the same. The default one is nowhere, and everything about it is lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct Board(Option<Arc<Mutex<Posted>>>);

#[derive(Debug)]
struct Posted {
    state: State,
    progress: Progress,
    runs: Runs,
    /// When it was last written, on the clock of events.
    written_ns: u64,
    /// Somebody has been told that it cannot be written.
    told: bool,
}

impl Board {
    /// Says in `runs` that this process does that to a domain, and takes away what is left there
    /// of others: who never asks for the status would have a file for each migration else.
    pub(crate) fn post(
        runs: Runs,
        doing: Doing,
        domain: (&str, Option<DomId>),
        config: &DomainConfig,
        target: Option<Target>,
    ) -> Board {
        runs.tidy();
        let pid = process::id();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (name, domid) = domain;
        let state = State {
            version: VERSION,
            doing,
            domain: name.to_owned(),
            domid: domid.map(|domid| domid.0),
            uuid: config.uuid().map(str::to_owned),
            target,
            pid,
            pid_started: runs::process_started(pid).unwrap_or_default(),
            started_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            phase: Phase::Starting,
            exit: None,
            memory: Figures::default(),
        };
        let progress = Progress::default();
        let mut posted = Posted { state, progress, runs, written_ns: 0, told: false };
        posted.write();
        Board(Some(Arc::new(Mutex::new(posted))))
    }

    /// Takes note of one of the save helper's events.
    pub(crate) fn see(&self, stamped: &Stamped) {
        self.with(|posted| {
            posted.progress.see(stamped);
            posted.state.memory = posted.progress.figures();
            let came = Phase::of_event(&stamped.event).is_some_and(|phase| posted.reach(phase));
            if came || stamped.t_ns.saturating_sub(posted.written_ns) >= WRITE_INTERVAL_NS {
                posted.written_ns = stamped.t_ns;
                posted.write();
            }
        });
    }

    /// It has come to `phase`.
    pub(crate) fn reach(&self, phase: Phase) {
        self.with(|posted| {
            if posted.reach(phase) {
                posted.write();
            }
        });
    }

    /// It is over.
    pub(crate) fn end(&self, exit: Exit) {
        self.with(|posted| {
            posted.state.exit = Some(exit as u8);
            posted.write();
        });
    }

    /// What had been sent when.
    pub(crate) fn samples(&self) -> Vec<Sample> {
        self.with(|posted| posted.progress.samples().to_vec()).unwrap_or_default()
    }

    /// How far the memory is.
    pub(crate) fn figures(&self) -> Option<Figures> {
        self.with(|posted| posted.state.memory.clone())
    }

    fn with<T>(&self, act: impl FnOnce(&mut Posted) -> T) -> Option<T> {
        let posted = self.0.as_ref()?;
        Some(act(&mut posted.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Posted {
    /// Whether that is news. The save helper's events come later than what rxl sees itself.
    fn reach(&mut self, phase: Phase) -> bool {
        let news = phase > self.state.phase;
        self.state.phase = self.state.phase.max(phase);
        news
    }

    /// That nobody can look on is no reason to stop.
    fn write(&mut self) {
        if let Err(error) = self.runs.write(&self.state)
            && !std::mem::replace(&mut self.told, true)
        {
            tracing::warn!("rxl status cannot show this: {error}");
        }
    }
}

/// Whoever gave up before there was anything to tell has failed.
impl Drop for Posted {
    fn drop(&mut self) {
        if self.state.exit.is_none() {
            self.state.exit = Some(Exit::Failed as u8);
            self.write();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use rxl_migrate::report::Event;

    use super::super::state;
    use super::*;

    fn see(board: &Board, t_ms: u64, event: Event) {
        board.see(&Stamped { t_ns: t_ms * 1_000_000, event });
    }

    #[test]
    fn who_begins_takes_away_what_others_have_left_longer_ago() {
        let directory = tempfile::tempdir().unwrap();
        let runs = Runs::at(directory.path());
        let ended = |pid| State { pid, pid_started: u64::MAX, exit: Some(0), ..state::example() };
        for pid in [1, 2] {
            runs.write(&ended(pid)).unwrap();
        }
        let file = File::open(directory.path().join("1.json")).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(61)).unwrap();
        let config = DomainConfig::parse(r#"{"c_info":{"name":"web"}}"#).unwrap();
        let board = Board::post(runs.clone(), Doing::Receive, ("web", None), &config, None);
        assert_eq!(runs.read(1), None);
        assert_eq!(runs.read(2), Some(ended(2)), "whoever waits for the end can read it");
        drop(board);
    }

    #[test]
    fn others_read_how_far_it_is_and_how_it_ended() {
        let directory = tempfile::tempdir().unwrap();
        let runs = Runs::at(directory.path());
        let config = DomainConfig::parse(r#"{"c_info":{"name":"web","uuid":"u"}}"#).unwrap();
        let target = Some(Target::Host("host2".to_owned()));
        let post = || {
            let domain = ("web", Some(DomId(5)));
            Board::post(runs.clone(), Doing::Migrate, domain, &config, target.clone())
        };
        let read = || runs.read(process::id()).unwrap();
        let board = post();
        assert_eq!((read().phase, read().uuid.as_deref()), (Phase::Starting, Some("u")));
        see(&board, 1000, Event::PassStarted { pass: 0, last: false, pages: 9 });
        assert_eq!((read().phase, read().memory.pages), (Phase::Memory, 9));
        let part = |done| Event::PassProgress { pass: 0, done, pages: 9, bytes: 1, links: vec![] };
        see(&board, 1001, part(1));
        assert_eq!(read().memory.done, 0, "not that often");
        see(&board, 2000, part(2));
        assert_eq!(read().memory.done, 2);
        board.reach(Phase::Ready);
        see(&board, 3000, Event::Finished { bytes: 3 });
        assert_eq!(read().phase, Phase::Ready, "an event that comes late takes nothing back");
        board.end(Exit::Success);
        drop(board);
        assert_eq!(read().exit, Some(0));
        drop(post());
        assert_eq!(read().exit, Some(1));
    }
}
