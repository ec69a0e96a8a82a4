//! The kernel module `rxl_map` on real Xen: threads map and unmap random ranges of the memory of
//! live and dying guests, processes that do so are killed, guests balloon, and what the module has
//! to refuse is tried. Then every domain has the pages that it had, the kernel has complained of
//! nothing, and no page that was read was another frame's.
//!
//! The program that does it is `toolstack/examples/kmod`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_lab::{GuestKind, Host, Shape};

use crate::background::Background;
use crate::lab::{Session, describe, spec};
use crate::tally::{Tally, note};

/// How long one process works.
const ROUND: Duration = Duration::from_secs(60);
/// What it may take longer, on an emulated host.
const ROUND_SLACK: Duration = Duration::from_secs(120);
/// How long a guest may take to be gone.
const GONE_TIMEOUT: Duration = Duration::from_secs(60);

/// A guest that is paused: what it has in memory stays.
const FIXED: &str = "kmod-fixed";
/// A guest that is paused, and destroyed in every round.
const DYING: &str = "kmod-dying";
/// A guest that runs, and balloons.
const LIVE: &str = "kmod-live";
const GUESTS: [(&str, GuestKind); 3] =
    [(FIXED, GuestKind::Pvh), (DYING, GuestKind::Pv), (LIVE, GuestKind::Pv)];

/// Lines of the kernel's log that mean that something is wrong.
const COMPLAINTS: &str = "dmesg | grep -iE \
    'warn|bug:|oops|fault|multicall|bad page|lockdep|hung|stall|rxl_map.*(fail|error)' || true";
/// Memory that Xen may keep of guests that are gone, in MiB.
const FREE_SLACK_MIB: u64 = 1;

/// Opens a lab of the shape that it takes, with the module and the programs on it.
///
/// # Errors
/// It does not come up, or the module cannot be built or loaded.
pub fn open() -> Result<Session> {
    let session = Session::open_shaped(Shape { hosts: 1, vcpus: 2, ..Shape::default() })?;
    session.lab().push_module()?;
    Ok(session)
}

/// Runs all of it; the rounds take `minutes`.
pub fn run(tally: &mut Tally, session: &Session, minutes: u32) {
    let Some(host) = tally.case("a host", || session.host(1)) else { return };
    let before = tally.case("free memory before", || free_mib(host));
    if rounds(tally, session, minutes.max(1)).is_none() {
        note("the rest is left out");
    }
    for (guest, _) in GUESTS {
        tally.case(&format!("{guest}: stop"), || session.remove(guest));
    }
    tally.case("all memory is free again, and the module can be removed", || {
        gone(host)?;
        host.run("rmmod rxl_map")?;
        let (before, now) = (before.context("It is not known what was free")?, free_mib(host)?);
        ensure!(now + FREE_SLACK_MIB >= before, "{before} MiB were free, now {now}");
        Ok(())
    });
}

fn free_mib(host: &Host) -> Result<u64> {
    Ok(host.run("xl info free_memory")?.trim().parse()?)
}

/// The programs' paths.
struct Programs {
    frames: String,
    kmod: String,
}

fn rounds(tally: &mut Tally, session: &Session, rounds: u32) -> Option<()> {
    let host = session.host(1).ok()?;
    let programs = tally.case("the programs are on the host", || {
        let push = |name| session.lab().push_example("rxl-toolstack", name);
        Ok(Programs { frames: push("mapping")?, kmod: push("kmod")? })
    })?;
    for (guest, kind) in GUESTS {
        tally.case(&format!("{guest}: start"), || start(session, &programs, guest, kind))?;
    }
    let complaints = tally.case("what the kernel says before", || host.run(COMPLAINTS))?;
    for round in 1..=rounds {
        let name = format!("round {round} of {rounds}");
        tally.case(&name, || self::round(session, &programs, round))?;
    }
    tally.case("the kernel has not complained", || {
        let now = host.run(COMPLAINTS)?;
        ensure!(now == complaints, "the kernel says:\n{now}");
        Ok(())
    })
}

/// Starts a guest and lists its frames.
fn start(session: &Session, programs: &Programs, guest: &str, kind: GuestKind) -> Result<()> {
    let host = session.host(1)?;
    session.start_spec(&spec(guest, kind))?;
    if guest != LIVE {
        host.run(&format!("xl pause {guest}"))?;
    }
    let command = format!("{} frames $(xl domid {guest}) /run/{guest}", programs.frames);
    host.run_within(&command, ROUND_SLACK).map(drop)
}

/// One process; a kill in every second, a dying guest and a balloon in all.
fn round(session: &Session, programs: &Programs, round: u32) -> Result<()> {
    let host = session.host(1)?;
    if round > 1 {
        start(session, programs, DYING, GuestKind::Pv)?;
    }
    let is_killed = round.is_multiple_of(2);
    // One that is to be killed has to be there however long the host takes for all else.
    let time = if is_killed { 10 * ROUND } else { ROUND };
    let mut command = format!("{} {} {round}", programs.kmod, time.as_secs());
    for (guest, _) in GUESTS {
        let kind = if guest == LIVE { "changing" } else { "fixed" };
        let domid = host.run(&format!("xl domid {guest}"))?;
        command.push_str(&format!(" {}:/run/{guest}:{kind}", domid.trim()));
    }
    let player = Background::start(host, &command)?;
    let meanwhile = disturb(host, round);
    // One that has ended by itself says why below.
    let was_there = !is_killed || player.signal_group("KILL").is_ok();
    let finished = player.finish(ROUND + ROUND_SLACK)?;
    if !is_killed || !was_there {
        ensure!(finished.status.success(), "the program {}", describe(&finished));
        ensure!(was_there, "the program ended before it could be killed");
    }
    meanwhile?;
    if is_killed {
        note("killed in the middle of it");
    } else {
        note(finished.stdout.trim());
    }
    gone(host)
}

/// What happens while a process works.
fn disturb(host: &Host, round: u32) -> Result<()> {
    let rmmod = host.finish("sleep 10; rmmod rxl_map", GONE_TIMEOUT)?;
    ensure!(!rmmod.status.success(), "the module was removed while in use");
    let mib = if round.is_multiple_of(2) { 128 } else { 96 };
    host.run(&format!("xl mem-set {LIVE} {mib}"))?;
    host.run(&format!("xl destroy {DYING}"))?;
    host.run("sleep 10").map(drop)
}

/// Waits until the guest that was destroyed is gone: nobody has a page of it any more.
fn gone(host: &Host) -> Result<()> {
    let wait = "for i in $(seq 50); do [ \"$(xl list | grep -c '(null)')\" = 0 ] && exit; \
                sleep 1; done; xl list; exit 1";
    let finished = host.finish(wait, GONE_TIMEOUT)?;
    ensure!(finished.status.success(), "a dead domain is left: {}", finished.stdout);
    host.run("xl list").context("xl").map(drop)
}
