//! The points of a migration at which something is killed or cut, and what has to come of it.
//!
//! A point is a phase and a blow. The phase is where `rxl-relay`, which is the transport, holds the
//! migration until the blow has been dealt, so nothing here depends on timing.

use std::fmt;

use rxl_lab::GuestKind;

/// One end of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Target,
}

/// A process that takes part, by how its command line is found. It is the newest such process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Who {
    name: &'static str,
    pub(super) end: End,
    /// For `pgrep -f`; brackets keep it from finding the shell that looks.
    pub(super) pattern: &'static str,
}

pub(super) const MIGRATE: Who =
    Who { name: "rxl migrate", end: End::Source, pattern: "^rxl migrate " };
const SOURCE_GUARD: Who =
    Who { name: "its guard", end: End::Source, pattern: "[d]omain-guard .*source " };
const SAVE_HELPER: Who =
    Who { name: "the save helper", end: End::Source, pattern: "[-]-save-domain" };
const SAVE_WORKER: Who =
    Who { name: "a save worker", end: End::Source, pattern: "[-]-save-worker" };
const TRANSPORT: Who =
    Who { name: "the transport", end: End::Source, pattern: "^[^ ]*/rxl-relay " };
pub(super) const RECEIVE: Who =
    Who { name: "rxl migrate-receive", end: End::Target, pattern: "^rxl .*migrate-receive" };
pub(super) const TARGET_GUARD: Who =
    Who { name: "the receiver's guard", end: End::Target, pattern: "[d]omain-guard .*target " };
const RESTORE_HELPER: Who =
    Who { name: "the restore helper", end: End::Target, pattern: "[-]-restore-domain" };
const RESTORE_WORKER: Who =
    Who { name: "a restore worker", end: End::Target, pattern: "[-]-restore-worker" };
const MONITOR: Who = Who { name: "the monitor", end: End::Target, pattern: "[d]omain-monitor " };

/// What is done at a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blow {
    Terminate(Who),
    Kill(Who),
    /// The connection breaks, and both ends see that.
    Cut,
}

use Blow::{Cut, Kill, Terminate};

/// What has to come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The guest runs at the target and nowhere else, with nothing to be done.
    Moved,
    /// It runs at the source and nowhere else, with nothing to be done.
    Kept,
    /// The sender had tried to give the permission to start: the guest runs at most at the target,
    /// and what is printed says how to get to exactly one copy that runs.
    Unsure,
}

use Outcome::{Kept, Moved, Unsure};

/// A moment of a migration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Phase {
    name: &'static str,
    /// The relay's name for it.
    pub(super) point: &'static str,
    /// How the migration is started so that it comes there, and comes there in this way.
    pub(super) options: &'static str,
    /// Whether the guest is suspended at the source then; `None`: it has another name already.
    pub(super) is_suspended: Option<bool>,
    /// xenstore stands still at the target from there on, so that the receiver is caught in what
    /// comes next: what is waited for, as a shell condition, before the blow.
    pub(super) caught: Option<&'static str>,
    blows: &'static [(Blow, Outcome)],
}

/// Whether the receiver waits for an answer of xenstore's, in read or futex: for the sender, or
/// for its save helper, it waits in poll.
const WAITS_FOR_XENSTORE: &str =
    "grep -qE '^(0|202) ' /proc/$(pgrep -n -f '^rxl .*migrate-receive')/syscall";

/// The stream carries the pages, from two workers.
const STREAM: &str = "--streams 0 --workers 2";

const HELLO: Phase = Phase {
    name: "hello",
    point: "banner",
    options: STREAM,
    is_suspended: Some(false),
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Kept),
        (Kill(MIGRATE), Kept),
        (Kill(SOURCE_GUARD), Moved),
        (Kill(TRANSPORT), Kept),
        (Terminate(RECEIVE), Kept),
        (Kill(RECEIVE), Kept),
        (Cut, Kept),
    ],
};

const START: Phase = Phase {
    name: "start of the stream",
    point: "stream",
    options: STREAM,
    is_suspended: Some(false),
    caught: None,
    blows: &[
        (Kill(MIGRATE), Kept),
        (Kill(SAVE_HELPER), Kept),
        (Terminate(TRANSPORT), Kept),
        (Kill(RECEIVE), Kept),
        (Kill(TARGET_GUARD), Moved),
        (Cut, Kept),
    ],
};

const FIRST_PASS: Phase = Phase {
    name: "pass 0",
    point: "pages",
    options: STREAM,
    is_suspended: Some(false),
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Kept),
        (Kill(MIGRATE), Kept),
        (Kill(SOURCE_GUARD), Moved),
        (Terminate(SAVE_HELPER), Kept),
        (Kill(SAVE_HELPER), Kept),
        (Kill(SAVE_WORKER), Kept),
        (Kill(TRANSPORT), Kept),
        (Terminate(RECEIVE), Kept),
        (Kill(RECEIVE), Kept),
        (Kill(TARGET_GUARD), Moved),
        (Terminate(RESTORE_HELPER), Kept),
        (Kill(RESTORE_HELPER), Kept),
        (Cut, Kept),
    ],
};

const LATER_PASS: Phase = Phase {
    name: "pass 1",
    point: "again",
    // Five passes, unless the guest writes next to nothing.
    options: "--streams 0 --workers 2 --policy stock",
    is_suspended: Some(false),
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Kept),
        (Kill(SAVE_HELPER), Kept),
        (Kill(RECEIVE), Kept),
        (Kill(RESTORE_HELPER), Kept),
        (Cut, Kept),
    ],
};

const LINKS: Phase = Phase {
    name: "end of pass 0 over links",
    point: "pass-end",
    options: "--streams 2 --no-encrypt",
    is_suspended: None,
    caught: None,
    blows: &[
        (Kill(SAVE_WORKER), Moved),
        (Kill(RESTORE_WORKER), Moved),
        (Kill(SAVE_HELPER), Kept),
        (Kill(RESTORE_HELPER), Kept),
    ],
};

const SUSPENDED: Phase = Phase {
    name: "suspended",
    point: "again",
    // The second pass is the last.
    options: "--streams 0 --workers 2 --max-passes 1 --max-pause 1",
    is_suspended: Some(true),
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Kept),
        (Kill(MIGRATE), Kept),
        (Kill(SOURCE_GUARD), Moved),
        (Terminate(SAVE_HELPER), Kept),
        (Kill(SAVE_HELPER), Kept),
        (Kill(SAVE_WORKER), Kept),
        (Terminate(TRANSPORT), Kept),
        (Terminate(RECEIVE), Kept),
        (Kill(RECEIVE), Kept),
        (Kill(TARGET_GUARD), Moved),
        (Kill(RESTORE_HELPER), Kept),
        (Cut, Kept),
    ],
};

const STATE: Phase = Phase {
    name: "state",
    point: "state",
    options: STREAM,
    is_suspended: Some(true),
    caught: None,
    blows: &[
        (Kill(MIGRATE), Kept),
        (Kill(RECEIVE), Kept),
        (Terminate(RESTORE_HELPER), Kept),
        (Cut, Kept),
    ],
};

const SENT: Phase = Phase {
    name: "state sent",
    point: "end",
    options: STREAM,
    is_suspended: Some(true),
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Kept),
        (Kill(MIGRATE), Kept),
        (Kill(TRANSPORT), Kept),
        (Terminate(RECEIVE), Kept),
        (Kill(RECEIVE), Kept),
        (Cut, Kept),
    ],
};

const BUILD: Phase = Phase {
    name: "the receiver's build",
    point: "end",
    options: STREAM,
    is_suspended: Some(true),
    caught: Some(WAITS_FOR_XENSTORE),
    blows: &[(Kill(RECEIVE), Kept), (Kill(MIGRATE), Kept)],
};

const BEFORE_GO: Phase = Phase {
    name: "before GO",
    point: "ready",
    options: STREAM,
    is_suspended: Some(true),
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Kept),
        (Kill(MIGRATE), Kept),
        (Kill(SOURCE_GUARD), Moved),
        (Kill(TRANSPORT), Kept),
        (Terminate(RECEIVE), Kept),
        // The sender hears that the target is ready, and tries.
        (Kill(RECEIVE), Unsure),
        (Kill(TARGET_GUARD), Moved),
        (Kill(MONITOR), Moved),
        (Cut, Kept),
    ],
};

const AFTER_GO: Phase = Phase {
    name: "after GO",
    point: "go",
    options: STREAM,
    is_suspended: None,
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Moved),
        (Kill(MIGRATE), Unsure),
        (Kill(TRANSPORT), Unsure),
        (Terminate(RECEIVE), Kept),
        (Kill(RECEIVE), Unsure),
        (Kill(MONITOR), Moved),
        (Cut, Unsure),
    ],
};

const UNPAUSE: Phase = Phase {
    name: "unpause",
    point: "go",
    options: STREAM,
    is_suspended: None,
    caught: Some(WAITS_FOR_XENSTORE),
    blows: &[(Kill(RECEIVE), Unsure), (Kill(MIGRATE), Unsure)],
};

const REPORT: Phase = Phase {
    name: "report",
    point: "report",
    options: STREAM,
    is_suspended: None,
    caught: None,
    blows: &[
        (Terminate(MIGRATE), Moved),
        (Kill(MIGRATE), Unsure),
        (Kill(TRANSPORT), Unsure),
        (Kill(MONITOR), Moved),
        (Cut, Unsure),
    ],
};

const PHASES: [Phase; 13] = [
    HELLO, START, FIRST_PASS, LATER_PASS, LINKS, SUSPENDED, STATE, SENT, BUILD, BEFORE_GO,
    AFTER_GO, UNPAUSE, REPORT,
];

/// What is done to a PVH guest, too: what its memory, its device model's place in the protocol and
/// its vCPUs make different.
const PVH_PHASES: [&str; 4] = ["pass 0", "suspended", "after GO", "unpause"];
const PVH_BLOWS: [Blow; 4] = [Kill(MIGRATE), Kill(SAVE_HELPER), Kill(RECEIVE), Cut];

/// One of the points.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) kind: GuestKind,
    pub(super) phase: &'static Phase,
    pub(super) blow: Blow,
    pub(super) outcome: Outcome,
}

impl Point {
    /// For a person, and for `--only`.
    pub(super) fn name(&self) -> String {
        let kind = self.kind.to_string().to_uppercase();
        format!("{kind}: {}: {}", self.phase.name, self.blow)
    }
}

/// All points, those of a kind of guest after each other.
pub(super) fn all() -> Vec<Point> {
    let of_kind = |kind: GuestKind| {
        PHASES.iter().flat_map(move |phase| {
            let blows = phase.blows.iter();
            blows.map(move |(blow, outcome)| Point { kind, phase, blow: *blow, outcome: *outcome })
        })
    };
    let pvh = of_kind(GuestKind::Pvh)
        .filter(|point| PVH_PHASES.contains(&point.phase.name) && PVH_BLOWS.contains(&point.blow));
    of_kind(GuestKind::Pv).chain(pvh).collect()
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Terminate(who) => write!(f, "{} is terminated", who.name),
            Kill(who) => write!(f, "{} is killed", who.name),
            Cut => f.write_str("the connection is cut"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Moved => "moved",
            Kept => "kept",
            Unsure => "by hand",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_point_has_a_name_of_its_own_and_help_by_hand_is_for_after_go_only() {
        let all = all();
        assert!(all.len() >= 40, "{}", all.len());
        let names: BTreeSet<String> = all.iter().map(Point::name).collect();
        assert_eq!(names.len(), all.len());
        for point in all.iter().filter(|point| point.outcome == Unsure) {
            assert!(["ready", "go", "report"].contains(&point.phase.point), "{}", point.name());
        }
    }
}
