//! `rxl evacuate` with three hosts: six guests leave host1 for two others, one of which fails while
//! they do. Then they come back, in two goes, because the first is cancelled. Each guest has to run
//! exactly once all the time that anybody looks, with all of its memory right.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rxl_lab::{GuestKind, GuestSpec, Host, Shape};
use serde_json::Value;

use crate::background::Background;
use crate::lab::{Session, describe, spec};
use crate::tally::{Tally, note};

/// Pages that a guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 50;
/// How long an evacuation may take in emulation.
const TIMEOUT: Duration = Duration::from_secs(560);
const POLL: Duration = Duration::from_millis(200);
/// Where the summary is.
const REPORT: &str = "/run/rxl-evacuate.json";

/// Ends what serves migrations on a host, those under way first. What it runs stays.
const FAIL: &str = "pkill -9 -f 'lab-rsh-[s]erver'; pkill -9 -f 'migrate-[r]eceive'; true";

/// Opens a lab of three hosts.
///
/// # Errors
/// It does not come up, or a smaller one is up.
pub fn open() -> Result<Session> {
    let session = Session::open_shaped(Shape { hosts: 3, ..Shape::default() })?;
    session.lab().push_rxl()?;
    Ok(session)
}

/// Runs all of it.
pub fn run(tally: &mut Tally, session: &Session) {
    let guests = guests();
    for guest in &guests {
        // Paused, so that those that run do not keep the processors from one that boots.
        tally.case(&format!("start {}", guest.name), || {
            session.start_spec(guest)?;
            session.host(1)?.run(&format!("xl pause {}", guest.name))
        });
    }
    tally.case("all run", || {
        guests.iter().try_for_each(|guest| {
            session.host(1)?.run(&format!("xl unpause {}", guest.name)).map(drop)
        })
    });
    tally.case("a dry run says who would go where", || plan(session, guests.len()));
    tally.case("host3 fails half-way, and all get away", || fails_half_way(session, &guests));
    tally.case("cancelled half-way, each guest runs once", || cancelled(session, &guests));
    tally.case("the next evacuation moves the rest", || goes_on(session, &guests));
    for guest in &guests {
        tally.case(&format!("stop {}", guest.name), || session.remove(&guest.name));
    }
}

fn guests() -> Vec<GuestSpec> {
    let guest = |number: usize| {
        let kind = if number < 2 { GuestKind::Pvh } else { GuestKind::Pv };
        let spec = spec(&format!("fleet{number}"), kind);
        GuestSpec { dirty_pages_per_s: DIRTY_PAGES_PER_S, ..spec }
    };
    (0..6).map(guest).collect()
}

fn command(targets: &str, options: &str) -> String {
    format!("rxl evacuate -s lab-rsh --report {REPORT} --to {targets} {options} -- --no-encrypt")
}

fn plan(session: &Session, guests: usize) -> Result<()> {
    let said = session.host(1)?.run(&command("host2,host3", "--dry-run"))?;
    let end = format!("{guests} would be moved, 0 would be left");
    ensure!(said.trim_end().ends_with(&end), "{said}");
    ensure!(said.contains("host2") && said.contains("host3"), "one target only: {said}");
    Ok(())
}

fn fails_half_way(session: &Session, guests: &[GuestSpec]) -> Result<()> {
    let (source, failing) = (session.host(1)?, session.host(3)?);
    let evacuation = Background::start(source, &command("host2,host3", "--parallel 2"))?;
    let waited = until("a guest runs on host3 and another is on its way there", || {
        let domains = failing.run("xl list")?;
        let arrived = domains.lines().any(|l| l.starts_with("fleet") && !l.contains("--incoming"));
        Ok(arrived && domains.contains("--incoming"))
    });
    failing.run(FAIL)?;
    let finished = evacuation.finish(TIMEOUT)?;
    waited?;
    ensure!(finished.status.success(), "{}\n{}", describe(&finished), finished.stdout);
    ensure!(finished.stderr.contains("not moved"), "no migration failed: {}", finished.stderr);
    let summary = summary(source)?;
    let count = |name| summary.get(name).and_then(Value::as_u64);
    let all = u64::try_from(guests.len())?;
    ensure!((count("moved"), count("left")) == (Some(all), Some(0)), "{summary}");
    let places = check_all(session, guests)?;
    let told: Vec<_> = guests.iter().map(|guest| place(&summary, &guest.name)).collect();
    let seen: Vec<_> = places.iter().cloned().map(Some).collect();
    ensure!(told == seen, "the summary says {told:?}, they are at {seen:?}");
    ensure!(!places.contains(&"host1".to_owned()), "one is still here: {places:?}");
    note(format!("they are at {}", places.join(", ")));
    Ok(())
}

fn cancelled(session: &Session, guests: &[GuestSpec]) -> Result<()> {
    let source = session.host(2)?;
    let before = at(session, guests, source)?;
    let evacuation = Background::start(source, &command("host1", ""))?;
    let target = session.host(1)?;
    let waited = until("the second guest is on its way", || {
        let domains = target.run("xl list")?;
        let arrived = domains.lines().any(|l| l.starts_with("fleet") && !l.contains("--incoming"));
        Ok(arrived && domains.contains("--incoming"))
    });
    evacuation.signal_group("INT")?;
    let finished = evacuation.finish(TIMEOUT)?;
    waited?;
    ensure!(finished.status.code() == Some(130), "{}", describe(&finished));
    check_all(session, guests)?;
    let after = at(session, guests, source)?;
    note(format!("{} guests on host2, {} after Ctrl-C", before, after));
    ensure!(after > 0 && after < before, "{} of {} are left", after, before);
    Ok(())
}

fn goes_on(session: &Session, guests: &[GuestSpec]) -> Result<()> {
    let source = session.host(2)?;
    let evacuation = Background::start(source, &command("host1", "--parallel 2"))?;
    let finished = evacuation.finish(TIMEOUT)?;
    ensure!(finished.status.success(), "{}\n{}", describe(&finished), finished.stdout);
    check_all(session, guests)?;
    ensure!(at(session, guests, source)? == 0, "some are still on host2");
    Ok(())
}

/// How many of the guests are on that host.
fn at(session: &Session, guests: &[GuestSpec], host: &Host) -> Result<usize> {
    let mut count = 0;
    for guest in guests {
        let found = session.lab().find_guest(&guest.name)?;
        count += usize::from(found.iter().any(|one| one.name() == host.name()));
    }
    Ok(count)
}

/// Checks that each guest runs once and is right; the host of each.
fn check_all(session: &Session, guests: &[GuestSpec]) -> Result<Vec<String>> {
    let check = |guest: &GuestSpec| {
        let found = session.lab().find_guest(&guest.name)?;
        let [host] = found.as_slice() else {
            let names: Vec<String> = found.iter().map(|host| host.name()).collect();
            anyhow::bail!("{} is on {names:?}", guest.name);
        };
        session.check(&guest.name, host)?;
        Ok(host.name())
    };
    guests.iter().map(check).collect()
}

fn summary(host: &Host) -> Result<Value> {
    serde_json::from_str(&host.run(&format!("cat {REPORT}"))?).context("the summary")
}

fn place(summary: &Value, guest: &str) -> Option<String> {
    let text = |line: &Value, name| Some(line.get(name)?.as_str()?.to_owned());
    let mut all = summary.get("guests")?.as_array()?.iter();
    text(all.find(|line| text(line, "guest").as_deref() == Some(guest))?, "place")
}

fn until(what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not within {} s: {what}", TIMEOUT.as_secs());
        thread::sleep(POLL);
    }
    Ok(())
}
