//! Strikes at each of the [`points`](super::points) and checks everything after it: which copies
//! run, what is left, what the guest's memory is, and what the user was told.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rxl_lab::{Finished, GuestSpec, Host};

use super::aftermath::{Copy, Things, copies_on, settle};
use super::by_hand::Instructions;
use super::points::{Blow, End, MIGRATE, Outcome, Point, RECEIVE, Who};
use super::start_again;
use crate::background::Background;
use crate::bad_input::log_dirty;
use crate::lab::{Session, describe};
use crate::tally::{Tally, note};

/// How long a migration may take in emulation, with a guest that does not suspend.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(400);
/// How long it may take until the migration is held.
const HELD_TIMEOUT: Duration = Duration::from_secs(300);
/// How often what is left is looked for again, and after how long.
const LOOKS: u32 = 3;
const LOOK_PAUSE: Duration = Duration::from_secs(3);
/// Where the relay can be talked to.
const FIFOS: &str = "/run/rxl-relay";
/// The daemon that answers for xenstore, whichever of the two it is.
const XENSTORE: &str = "xenstored$";

/// Moves one guest, again and again.
pub(super) struct Kills<'a> {
    session: &'a Session,
    spec: &'a GuestSpec,
    relay: String,
    /// What is on a host, by its number and whether the guest is there.
    before: BTreeMap<(u8, bool), Things>,
    table: Vec<String>,
}

impl<'a> Kills<'a> {
    pub(super) fn new(session: &'a Session, spec: &'a GuestSpec) -> Kills<'a> {
        let (relay, before, table) = (String::new(), BTreeMap::new(), Vec::new());
        Kills { session, spec, relay, before, table }
    }

    /// Strikes at all of them.
    pub(super) fn run(&mut self, tally: &mut Tally, points: &[&Point]) {
        let label = self.spec.kind.to_string().to_uppercase();
        let ready = format!("{label}: what there is before");
        if tally.case(&ready, || self.prepare()).is_none() {
            return;
        }
        for point in points {
            if tally.case(&point.name(), || self.strike(point)).is_none() {
                self.table.push(format!("{:<58} FAILED", point.name()));
                start_again(tally, self.session, self.spec);
                tally.case(&ready, || self.prepare());
            }
        }
        note(format!("{:<58} {:<8} runs on", "point", "outcome"));
        self.table.iter().for_each(note);
    }

    /// Installs the relay, moves the guest there and back, and remembers what is on the hosts.
    fn prepare(&mut self) -> Result<()> {
        let lab = self.session.lab();
        self.relay = lab.push_program("rxl-relay")?;
        lab.set_nic_rates(&[])?;
        lab.on_all_hosts(new_fifos)?;
        self.before.clear();
        for _ in 0..2 {
            let (from, to) = self.session.here_and_there(&self.spec.name)?;
            let migrate = format!("rxl migrate -s lab-rsh --no-encrypt {}", self.spec.name);
            from.run_within(&format!("{migrate} {}", to.name()), MIGRATION_TIMEOUT)?;
            settle(self.session)?;
            self.look(to)?;
        }
        Ok(())
    }

    /// Adds what is there now, with the guest on `host`, to what there may be.
    fn look(&mut self, host: &Host) -> Result<()> {
        let found = self.session.lab().on_all_hosts(Things::on)?;
        for (other, things) in self.session.lab().hosts().iter().zip(found) {
            let key = (other.number(), other.number() == host.number());
            let had = self.before.remove(&key).unwrap_or_default();
            self.before.insert(key, things.or(&had));
        }
        Ok(())
    }

    /// One point, from its migration to the last check.
    fn strike(&mut self, point: &Point) -> Result<()> {
        let guest = &self.spec.name;
        let (source, target) = self.session.here_and_there(guest)?;
        new_fifos(source)?;
        let phase = point.phase;
        let transport = format!("{} {} {FIFOS} lab-rsh", self.relay, phase.point);
        let migrate =
            format!("rxl migrate -s '{transport}' {} {guest} {}", phase.options, target.name());
        let migration = Background::start(source, &migrate)?;
        let struck = hold_and_strike(point, guest, source, target);
        let ended = migration.finish(MIGRATION_TIMEOUT);
        struck?;
        let ended = ended?;
        settle(self.session)?;
        let host = self.judge(point, &ended, source, target)?;
        settle(self.session)?;
        let left = self.left(host)?;
        ensure!(left.is_empty(), "left behind: {}; {}", left.join(", "), describe(&ended));
        ensure!(!log_dirty(host, guest)?, "log-dirty is still on");
        let report = self.session.check(guest, host)?;
        note(format!("{} pages, none bad", report.pages_checked));
        let row = format!("{:<58} {:<8} {}", point.name(), point.outcome, host.name());
        self.table.push(row);
        Ok(())
    }

    /// Checks what has become of the guest, helps by hand where that was said, and gives the host
    /// that it runs on, alone.
    fn judge<'h>(
        &self,
        point: &Point,
        ended: &Finished,
        source: &'h Host,
        target: &'h Host,
    ) -> Result<&'h Host> {
        let guest = &self.spec.name;
        let last = ended.stderr.trim().lines().last().unwrap_or("");
        note(format!("it says: {last}"));
        let by_itself = point.blow != Blow::Kill(MIGRATE);
        let is_told = matches!(ended.status.code(), Some(0 | 1 | 130));
        ensure!(is_told || !by_itself, "rxl migrate died of itself: {}", describe(ended));
        if point.outcome == Outcome::Unsure {
            let here = copies_on(source, guest)?;
            ensure!(!here.iter().any(Copy::runs), "it runs at the source: {here:?}");
            Instructions::find(&ended.stderr)?.follow(source, target)?;
        } else {
            let succeeded = ended.status.success();
            ensure!(succeeded == (point.outcome == Outcome::Moved), "{}", describe(ended));
        }
        let (here, there) = (copies_on(source, guest)?, copies_on(target, guest)?);
        let alone =
            |copies: &[Copy]| matches!(copies, [copy] if copy.runs() && copy.name == *guest);
        let host = match (alone(&here) && there.is_empty(), alone(&there) && here.is_empty()) {
            (true, false) => source,
            (false, true) => target,
            _ => bail!("at the source {here:?}, at the target {there:?}; {}", describe(ended)),
        };
        let as_expected = match point.outcome {
            Outcome::Moved => host.number() == target.number(),
            Outcome::Kept => host.number() == source.number(),
            Outcome::Unsure => true,
        };
        ensure!(as_expected, "it runs on {}: {}", host.name(), describe(ended));
        Ok(host)
    }

    /// What is on the hosts that was not, for a guest that is on `host`: what still is once those
    /// who watch domains have had time to see that one is gone.
    fn left(&self, host: &Host) -> Result<Vec<String>> {
        let mut left = self.left_now(host)?;
        for _ in 0..LOOKS {
            if left.is_empty() {
                break;
            }
            thread::sleep(LOOK_PAUSE);
            left = self.left_now(host)?;
        }
        Ok(left)
    }

    fn left_now(&self, host: &Host) -> Result<Vec<String>> {
        let found = self.session.lab().on_all_hosts(Things::on)?;
        let mut left = Vec::new();
        for (other, things) in self.session.lab().hosts().iter().zip(found) {
            let key = (other.number(), other.number() == host.number());
            let before = self.before.get(&key).context("nobody looked before")?;
            let more = things.beyond(before).into_iter();
            left.extend(more.map(|what| format!("{what} on {}", other.name())));
        }
        Ok(left)
    }
}

/// Makes the fifos to the relay, without what an earlier one may have left in them.
fn new_fifos(host: &Host) -> Result<()> {
    let make = format!("mkdir -p {FIFOS} && cd {FIFOS} && rm -f held go && mkfifo held go");
    host.run(&make).map(drop)
}

/// Waits until the migration is held at the point, deals the blow, and lets it go on.
fn hold_and_strike(point: &Point, guest: &str, source: &Host, target: &Host) -> Result<()> {
    let held = source.run_within(&format!("cat {FIFOS}/held"), HELD_TIMEOUT)?;
    ensure!(held.trim() == "held", "the migration ended without coming there");
    if let Some(expected) = point.phase.is_suspended {
        let copies = copies_on(source, guest)?;
        let suspended = copies.iter().any(|copy| copy.state.contains('s'));
        ensure!(suspended == expected, "at the source there is {copies:?}");
    }
    let Some(caught) = point.phase.caught else {
        if point.blow == Blow::Cut {
            return release(source, "cut");
        }
        deal(point.blow, source, target)?;
        return release(source, "go");
    };
    target.run(&format!("pkill -STOP {XENSTORE}"))?;
    let mut struck = release(source, "go");
    if struck.is_ok() {
        let wait = format!("until {caught}; do sleep 0.1; done");
        struck = target.run(&wait).map(drop);
    }
    let struck = struck.and_then(|()| deal(point.blow, source, target));
    // Where the receiver lives, it goes on.
    target.run(&format!("pkill -CONT {XENSTORE}"))?;
    struck.with_context(|| format!("while {} is to be caught", RECEIVE.pattern))
}

/// Tells the relay, if it is there: a transport that was killed holds nothing.
fn release(source: &Host, word: &str) -> Result<()> {
    source.run(&format!("timeout 5 sh -c 'echo {word} > {FIFOS}/go' || true")).map(drop)
}

fn deal(blow: Blow, source: &Host, target: &Host) -> Result<()> {
    let (signal, Who { end, pattern, .. }) = match blow {
        Blow::Terminate(who) => ("TERM", who),
        Blow::Kill(who) => ("KILL", who),
        Blow::Cut => bail!("the relay cuts"),
    };
    let host = if end == End::Source { source } else { target };
    // It may be about to start.
    let find = format!("until pid=$(pgrep -n -f '{pattern}'); do sleep 0.1; done");
    host.run(&format!("{find}; kill -{signal} $pid")).map(drop)
}
