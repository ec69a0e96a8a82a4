//! Guests that change while they move: one that gives memory back and takes it again, one that has
//! only begun to boot, and one that writes too fast and is slowed. Afterwards the guest's memory is
//! right, on one host; or the migration was refused, with a reason, and it runs on where it was.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_lab::{GuestKind, GuestSpec, Host, REPORT_PATH};
use serde_json::Value;

use crate::background::Background;
use crate::lab::{Session, describe, spec};
use crate::tally::{Tally, note};

/// Pages that a guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 200;
/// Memory that a guest leaves to its kernel, to be given back.
const LEFT_MIB: u32 = 48;
/// Memory that it gives back.
const BALLOON_MIB: u32 = 32;
/// Pages that a guest rewrites per second which is to be slowed: several times what
/// [`SLOW_RATE_MBIT`] carries.
const FAST_PAGES_PER_S: u64 = 20_000;
/// How fast memory may go then.
const SLOW_RATE_MBIT: u64 = 100;
/// A limit that a guest has had before: of one processor in percent.
const OWN_CAP: u32 = 90;
/// How long a migration may take; libxl alone waits 60 s for a guest to suspend.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(300);

/// Who receives.
const RECEIVERS: [(&str, &str); 2] = [("rxl to rxl", ""), ("rxl to stock xl", "--receiver xl")];

/// Runs it with a guest of `kind`, or one of each.
pub fn run(tally: &mut Tally, session: &Session, kind: Option<GuestKind>) {
    let kinds = kind.map_or(vec![GuestKind::Pv, GuestKind::Pvh], |kind| vec![kind]);
    for kind in kinds {
        let label = kind.to_string().to_uppercase();
        let guest = roomy(kind);
        if tally.case(&format!("{label}: start"), || session.start_spec(&guest)).is_some() {
            for (name, receiver) in RECEIVERS {
                let what = format!("{label}: balloons while it moves, {name}");
                tally.case(&what, || ballooning(session, &guest, receiver));
            }
        }
        tally.case(&format!("{label}: stop"), || session.remove(&guest.name));
        let guest = GuestSpec { dirty_pages_per_s: FAST_PAGES_PER_S, ..roomy(kind) };
        if tally
            .case(&format!("{label}: start one that writes fast"), || session.start_spec(&guest))
            .is_some()
        {
            tally.case(&format!("{label}: is slowed in vain, and stays as fast as it was"), || {
                slowed_in_vain(session, &guest.name)
            });
            tally.case(&format!("{label}: is slowed, and fast again at the target"), || {
                slowed(session, &guest.name)
            });
        }
        tally.case(&format!("{label}: stop"), || session.remove(&guest.name));
        for (name, receiver) in RECEIVERS {
            let what = format!("{label}: boots while it moves, {name}");
            tally.case(&what, || booting(session, kind, receiver));
        }
    }
}

/// A guest with memory that it does not need.
fn roomy(kind: GuestKind) -> GuestSpec {
    let plain = spec(&format!("restless-{kind}"), kind);
    let memory_mib = plain.memory_mib + LEFT_MIB;
    let dirty_pages_per_s = DIRTY_PAGES_PER_S;
    GuestSpec { memory_mib, leave_mib: Some(LEFT_MIB), dirty_pages_per_s, ..plain }
}

/// Lets it give memory back and take it again for as long as it is there under its name; prints
/// the least that it had.
fn balloon(spec: &GuestSpec) -> String {
    let GuestSpec { name, memory_mib: most, .. } = spec;
    format!(
        "least={most}; \
         while mem=$(xl list {name} 2>/dev/null | awk 'NR == 2 {{ print $3 }}'); [ \"$mem\" ]; do \
             [ $mem -ge $least ] || least=$mem; \
             if [ $mem -le {} ]; then xl mem-set {name} {most}; \
             elif [ $mem -ge {} ]; then xl mem-set {name} {}; fi; \
         done >/dev/null 2>&1; echo $least",
        most - BALLOON_MIB + 2,
        most - 2,
        most - BALLOON_MIB,
    )
}

fn ballooning(session: &Session, spec: &GuestSpec, receiver: &str) -> Result<()> {
    let guest = &spec.name;
    let (from, to) = session.here_and_there(guest)?;
    let script = format!("timeout {} sh -c '{}'", MIGRATION_TIMEOUT.as_secs(), {
        balloon(spec).replace('\'', "'\\''")
    });
    let balloon = Background::start(from, &script)?;
    let moved = migrate(session, guest, from, to, receiver);
    // A guest that has stayed changes for ever.
    if session.lab().find_guest(guest)?.iter().any(|host| host.number() == from.number()) {
        balloon.signal_group("TERM")?;
    }
    let least = balloon.finish(MIGRATION_TIMEOUT)?.stdout;
    let host = moved?;
    note(format!("least memory meanwhile: {} MiB", least.trim()));
    if let Ok(least) = least.trim().parse::<u32>() {
        ensure!(least < spec.memory_mib - BALLOON_MIB / 2, "it has not given memory back");
    }
    host.run(&format!("xl mem-set {guest} {}", spec.memory_mib))?;
    session.check(guest, host).map(drop)
}

/// No pause is as short as what is allowed, so that in the end it stays, with the limit it had.
fn slowed_in_vain(session: &Session, guest: &str) -> Result<()> {
    let (here, there) = session.here_and_there(guest)?;
    here.run(&format!("xl sched-credit2 -d {guest} -c {OWN_CAP}"))?;
    let command = slowing(guest, there, "cancel");
    let finished = here.finish(&command, MIGRATION_TIMEOUT)?;
    ensure!(!finished.status.success(), "{}", describe(&finished));
    ensure!(finished.stderr.contains("keeps running here"), "{}", describe(&finished));
    was_slowed(here)?;
    let cap = cap(here, guest)?;
    ensure!(cap == OWN_CAP, "its limit is {cap} % now");
    here.run(&format!("xl sched-credit2 -d {guest} -c 0"))?;
    session.check(guest, here).map(drop)
}

fn slowed(session: &Session, guest: &str) -> Result<()> {
    let (from, to) = session.here_and_there(guest)?;
    let finished = from.finish(&slowing(guest, to, "force"), MIGRATION_TIMEOUT)?;
    ensure!(finished.status.success(), "{}", describe(&finished));
    was_slowed(from)?;
    let cap = cap(to, guest)?;
    ensure!(cap == 0, "its limit is {cap} % at the target");
    session.check(guest, to).map(drop)
}

fn slowing(guest: &str, to: &Host, on_limit: &str) -> String {
    let to = to.name();
    format!(
        "rm -f {REPORT_PATH}; rxl migrate -s lab-rsh --no-encrypt --rate {SLOW_RATE_MBIT} \
         --throttle --max-pause 1 --on-limit {on_limit} --report {REPORT_PATH} {guest} {to}"
    )
}

/// The report says that a guest was slowed.
fn was_slowed(source: &Host) -> Result<()> {
    let report: Value = serde_json::from_str(&source.run(&format!("cat {REPORT_PATH}"))?)?;
    let percent = report.get("throttled_percent").and_then(Value::as_u64);
    note(format!("it had {percent:?} % of its processors in the end"));
    ensure!(percent.is_some(), "it was not slowed");
    Ok(())
}

/// A guest's limit in percent of one processor; 0: none.
fn cap(host: &Host, guest: &str) -> Result<u32> {
    let said = host.run(&format!("xl sched-credit2 -d {guest}"))?;
    let cap = said.lines().last().and_then(|line| line.split_whitespace().last());
    cap.and_then(|cap| cap.parse().ok()).with_context(|| format!("no limit in: {said}"))
}

/// A guest whose kernel has just begun.
fn booting(session: &Session, kind: GuestKind, receiver: &str) -> Result<()> {
    let guest = spec(&format!("booting-{kind}"), kind);
    let (from, to) = (session.host(1)?, session.host(2)?);
    session.remove(&guest.name)?;
    session.lab().create_guest(from, &guest)?;
    let done = migrate(session, &guest.name, from, to, receiver)
        // Its answer comes once it has booted, wherever that is.
        .and_then(|host| session.check(&guest.name, host).map(drop));
    session.remove(&guest.name)?;
    done
}

/// Moves it; gives the host on which it is then, which was said.
fn migrate<'h>(
    session: &'h Session,
    guest: &str,
    from: &'h Host,
    to: &'h Host,
    receiver: &str,
) -> Result<&'h Host> {
    let command = format!("rxl migrate -s lab-rsh --no-encrypt {receiver} {guest} {}", to.name());
    let finished = from.finish(&command, MIGRATION_TIMEOUT)?;
    session.settle(guest)?;
    let last = finished.stderr.trim().lines().rev().nth(1).unwrap_or("").to_owned();
    if finished.status.success() {
        note(format!("moved to {}", to.name()));
        return Ok(to);
    }
    note(format!("refused: {last}"));
    let kept = format!("{guest} keeps running here");
    ensure!(finished.stderr.contains(&kept), "{}", describe(&finished));
    session.here_and_there(guest).map(|(host, _)| host).context("after a refusal")
}
