//! What one migration, save or restore of this host is doing, as other processes read it.

use rxl_migrate::progress::Figures;
use rxl_migrate::report::Event;
use serde::{Deserialize, Serialize};

use crate::report::Target;
use crate::timeline::Mark;

/// Version of this format.
pub(crate) const VERSION: u32 = 1;

/// What an rxl does to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Doing {
    /// `rxl migrate`.
    Migrate,
    /// `rxl migrate-receive`.
    Receive,
    /// `rxl save`.
    Save,
    /// `rxl restore`.
    Restore,
}

impl Doing {
    /// Whether the domain is one of this host, and not yet to become one.
    pub(crate) fn is_leaving(self) -> bool {
        matches!(self, Doing::Migrate | Doing::Save)
    }
}

/// How far it has come. None comes after one that is below it here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// What it takes is being started.
    Starting,
    /// Memory is on its way; the guest runs, if it is a migration.
    Memory,
    /// The guest has been asked to suspend.
    Suspending,
    /// It is suspended, and what is left of its memory on its way.
    LastPass,
    /// All memory is out; its state follows.
    State,
    /// All is written.
    Sent,
    /// The copy is complete, and not permitted to run yet.
    Ready,
    /// It is too late to cancel.
    Committed,
}

impl Phase {
    /// The phase that begins with `event`.
    pub(crate) fn of_event(event: &Event) -> Option<Phase> {
        match event {
            Event::PassStarted { last: false, .. } => Some(Phase::Memory),
            Event::SuspendAsked => Some(Phase::Suspending),
            Event::Suspended | Event::PassStarted { last: true, .. } => Some(Phase::LastPass),
            Event::MemorySent => Some(Phase::State),
            Event::Finished { .. } => Some(Phase::Sent),
            _ => None,
        }
    }

    /// The phase that begins with `mark`.
    pub(crate) fn of_mark(mark: Mark) -> Option<Phase> {
        match mark {
            Mark::Sent => Some(Phase::Sent),
            Mark::Ready => Some(Phase::Ready),
            Mark::Committed | Mark::Reported => Some(Phase::Committed),
            Mark::Started | Mark::Answered | Mark::Resumed | Mark::Ended => None,
        }
    }
}

/// One migration, save or restore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    /// [`VERSION`].
    pub(crate) version: u32,
    pub(crate) doing: Doing,
    /// The domain's name.
    pub(crate) domain: String,
    /// Its number, if it is one of this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) domid: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) uuid: Option<String>,
    /// Where it goes, or for `restore` comes from: `host` or `file`.
    #[serde(flatten)]
    pub(crate) target: Option<Target>,
    /// The rxl that does it.
    pub(crate) pid: u32,
    /// When that process began, as its line in `/proc` says: a number may come again.
    pub(crate) pid_started: u64,
    /// When it began, in milliseconds since 1970.
    pub(crate) started_unix_ms: u64,
    pub(crate) phase: Phase,
    /// rxl's exit code; absent until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) exit: Option<u8>,
    /// How far the memory is. Of a domain that is received or restored nothing is known.
    pub(crate) memory: Figures,
}

impl State {
    /// The domain's lock (`crate::lock`) while this goes on.
    pub(crate) fn lock_name(&self) -> String {
        match self.domid.filter(|_| self.doing.is_leaving()) {
            Some(domid) => crate::lock::domain_name(domid),
            None => crate::lock::incoming_name(&self.domain),
        }
    }

    /// Whether the user may mean it by `domain`: a name, number or UUID.
    pub(crate) fn is_of(&self, domain: &str) -> bool {
        let number = self.domid.filter(|_| self.doing.is_leaving());
        self.domain == domain
            || number.is_some_and(|number| number.to_string() == domain)
            || self.uuid.as_ref().is_some_and(|uuid| uuid.eq_ignore_ascii_case(domain))
    }
}

#[cfg(test)]
pub(crate) fn example() -> State {
    State {
        version: VERSION,
        doing: Doing::Migrate,
        domain: "web".to_owned(),
        domid: Some(5),
        uuid: Some("0a1B".to_owned()),
        target: Some(Target::Host("host2".to_owned())),
        pid: 1,
        pid_started: 0,
        started_unix_ms: 1_000_000,
        phase: Phase::Memory,
        exit: None,
        memory: Figures::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written_and_fields_that_are_new_do_not_matter() {
        for target in [Target::Host("host2".to_owned()), Target::File("f".to_owned())] {
            let state = State { target: Some(target), exit: Some(130), ..example() };
            let mut json = serde_json::to_value(&state).unwrap();
            json["memory"]["new"] = 1.into();
            json["newer"] = "x".into();
            assert_eq!(serde_json::from_value::<State>(json).unwrap(), state);
        }
        let nowhere = State { target: None, ..example() };
        let json = serde_json::to_string(&nowhere).unwrap();
        assert_eq!(serde_json::from_str::<State>(&json).unwrap(), nowhere);
    }

    #[test]
    fn a_domain_is_meant_by_its_name_its_uuid_or_its_number_if_it_has_that_here() {
        let state = example();
        assert!(state.is_of("web") && state.is_of("5") && state.is_of("0A1b"));
        assert!(!state.is_of("6") && !state.is_of(""));
        let copy = State { doing: Doing::Receive, ..example() };
        assert!(copy.is_of("web") && !copy.is_of("5"));
    }
}
