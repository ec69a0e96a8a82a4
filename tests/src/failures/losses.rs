//! Migrations over several connections in which workers, connections and NICs are lost, early, late
//! and when the guest is asked to suspend. Each has to succeed all the same: the guest runs at the
//! target and nowhere else, all of its memory is right, and nothing is left behind.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rxl_lab::{GuestKind, GuestSpec, Host, Shape};

use super::start_again;
use crate::background::Background;
use crate::lab::{Session, describe};
use crate::tally::{Tally, note};

/// NICs of each host, and connections: one over each.
const NICS: u8 = 4;
/// Rate of each NIC: slow enough that a moment is not over when it has been seen to come.
const RATE: &str = "20mbit";
/// How long a migration may take in emulation.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(240);
/// How long it may take until a moment has come.
const MOMENT_TIMEOUT: Duration = Duration::from_secs(90);
/// Where the report is.
const REPORT: &str = "/run/rxl-failures.json";

/// When something is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// As soon as all connections are there.
    Early,
    /// When two thirds of the guest's memory have arrived.
    Late,
    /// When the guest has been asked to suspend.
    Suspending,
}

impl Moment {
    const ALL: [(Moment, &str); 3] = [
        (Moment::Late, "when most memory has arrived"),
        (Moment::Suspending, "when the guest is to suspend"),
        (Moment::Early, "as soon as all connections are there"),
    ];
}

/// What is done: at the source (`true`) or the target, by which command.
type Blow = (&'static str, bool, &'static str);

const BLOWS: [Blow; 8] = [
    ("a worker of the sender is killed", true, "pkill -9 -n -f '[-]-save-worker'"),
    ("all workers of the sender are killed", true, "pkill -9 -f '[-]-save-worker'"),
    ("a worker of the receiver is killed", false, "pkill -9 -n -f '[-]-restore-worker'"),
    ("all workers of the receiver are killed", false, "pkill -9 -f '[-]-restore-worker'"),
    ("a worker of the receiver hangs", false, "pkill -STOP -n -f '[-]-restore-worker'"),
    ("a NIC of the source goes down", true, "ip link set eth1 down"),
    ("a NIC of the target goes down", false, "ip link set eth2 down"),
    ("all NICs but one go down", false, "for n in 1 2 3; do ip link set eth$n down; done"),
];

/// Puts NICs right again.
const REPAIR: &str = "for n in 1 2 3; do ip link set eth$n up; done";

/// One migration in which something is lost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loss {
    pub(super) kind: GuestKind,
    moment: Moment,
    when: &'static str,
    blow: Blow,
}

impl Loss {
    /// For a person, and for `--only`.
    pub(super) fn name(&self) -> String {
        format!("{}: {} {}", self.kind.to_string().to_uppercase(), self.blow.0, self.when)
    }
}

/// All of them, those of a kind of guest after each other.
pub(super) fn all() -> Vec<Loss> {
    let of_kind = |kind| {
        Moment::ALL.into_iter().flat_map(move |(moment, when)| {
            BLOWS.into_iter().map(move |blow| Loss { kind, moment, when, blow })
        })
    };
    [GuestKind::Pv, GuestKind::Pvh].into_iter().flat_map(of_kind).collect()
}

/// Opens a lab of the shape that it takes.
///
/// # Errors
/// It does not come up, or one of another shape is up.
pub(super) fn open() -> Result<Session> {
    let session = Session::open_shaped(Shape { nics: NICS, ..Shape::default() })?;
    session.lab().push_rxl()?;
    Ok(session)
}

/// Moves the guest through all of `losses`, over slow NICs.
pub(super) fn run(tally: &mut Tally, session: &Session, spec: &GuestSpec, losses: &[&Loss]) {
    if losses.is_empty() {
        return;
    }
    let rates = vec![RATE.to_owned(); NICS.into()];
    tally.case("slow NICs", || session.lab().set_nic_rates(&rates));
    for loss in losses {
        if tally.case(&loss.name(), || survives(session, spec, loss.moment, loss.blow)).is_none() {
            start_again(tally, session, spec);
        }
    }
    tally.case("NICs as fast as before", || session.lab().set_nic_rates(&[]));
}

/// Moves the guest to the other host, strikes at the moment, and checks everything.
fn survives(session: &Session, spec: &GuestSpec, moment: Moment, blow: Blow) -> Result<()> {
    let guest = &spec.name;
    let (from, to) = session.here_and_there(guest)?;
    let (_, at_source, command) = blow;
    let struck = if at_source { from } else { to };
    let rxl = format!("rxl migrate -s lab-rsh --no-encrypt --streams {NICS} --report {REPORT}");
    let migrate = format!("{rxl} {guest} {}", to.name());
    let mut migration = Background::start(from, &migrate)?;
    let waited = wait_for(moment, spec, from, to, &mut migration);
    // There may be nobody left to kill.
    let strike = waited.and_then(|()| struck.run(&format!("{command} || true")));
    let finished = migration.finish(MIGRATION_TIMEOUT);
    struck.run(&format!("{REPAIR}; pkill -CONT -f '[-]-restore-worker' || true"))?;
    strike?;
    let finished = finished?;
    ensure!(finished.status.success(), "{}", describe(&finished));
    let report = session.check(guest, to)?;
    let lost = lost(from)?;
    note(format!("{lost} connections lost; {} pages, none bad", report.pages_checked));
    ensure!(lost > 0 || moment == Moment::Suspending, "no connection was lost");
    Ok(())
}

/// Connections that the sender's report says were lost.
fn lost(from: &Host) -> Result<usize> {
    let text = from.run(&format!("cat {REPORT}"))?;
    let report: serde_json::Value = serde_json::from_str(&text).context("reading the report")?;
    let links = report.get("links").and_then(serde_json::Value::as_array);
    let links = links.context("the report has no connections")?;
    ensure!(links.len() == usize::from(NICS), "{} connections joined", links.len());
    Ok(links.iter().filter(|link| link.get("lost").is_some()).count())
}

fn wait_for(
    moment: Moment,
    spec: &GuestSpec,
    from: &Host,
    to: &Host,
    migration: &mut Background<'_>,
) -> Result<()> {
    let guest = &spec.name;
    if moment == Moment::Suspending {
        // Once for the watch itself, once for the request.
        let node = format!("/local/domain/$(xl domid {guest})/control/shutdown");
        let watch = format!("xenstore-watch -n 2 {node} >/dev/null");
        return from.run_within(&watch, MIGRATION_TIMEOUT).map(|_| ());
    }
    let (host, count, enough) = match moment {
        Moment::Early => (from, "pgrep -f '[-]-save-worker' | wc -l".to_owned(), u64::from(NICS)),
        _ => (
            to,
            format!("xl list {guest}--incoming 2>/dev/null | awk 'NR == 2 {{ print $3 }}'"),
            u64::from(spec.memory_mib) * 2 / 3,
        ),
    };
    let deadline = Instant::now() + MOMENT_TIMEOUT;
    while host.run(&count)?.trim().parse::<u64>().unwrap_or(0) < enough {
        if migration.has_ended()? || Instant::now() > deadline {
            bail!("the moment does not come");
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
