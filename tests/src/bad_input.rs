//! Migrations and saves that have to fail: with a message that says why, the exit code of `xl`, the
//! guest running on where it was, and nothing left of the attempt at either end.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rxl_lab::{Finished, GuestKind, GuestSpec, Host, RXL_PATH, quote};
use serde_json::Value;

use crate::background::Background;
use crate::lab::{Session, describe, spec};
use crate::tally::{Tally, note};

/// Exit code of a migration that failed, as `xl`'s.
const FAILED: i32 = 1;
/// Exit code of one that the user cancelled, as a shell reports it.
const CANCELLED: i32 = 130;
/// What the user is told of the guest.
const KEPT: &str = "keeps running here";
/// Pages that the guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 200;
/// How long a migration that fails may take; libxl alone waits 60 s for a guest to suspend.
const FAILURE_TIMEOUT: Duration = Duration::from_secs(240);
/// How long it may take until memory arrives at the target.
const STREAM_TIMEOUT: Duration = Duration::from_secs(300);
/// A domain that has this much memory while it arrives is in mid-stream.
const ARRIVED_MIB: u64 = 16;
/// Memory that is left at a target that is full.
const LEFT_MIB: u64 = 80;
/// A disk of less than any guest's memory.
const SMALL_DISK: &str = "/run/rxl-small-disk";
/// Takes what a pipe holds, and no more.
const SLOW_FILE: &str = "/run/rxl-slow-file";
/// An address of the lab's network that no host has.
const NOBODY: &str = "10.77.0.99";

/// How a migration of `guest`, which runs on host1, is made to fail.
type Provoke = fn(&Session, &str) -> Result<()>;

/// What is not particular to a kind of guest.
const REFUSALS: [(&str, Provoke); 5] = [
    ("unknown domain", unknown_domain),
    ("host unreachable", unreachable_host),
    ("no such receiver at the target", no_such_receiver),
    ("neither rxl nor xl at the target", no_receiver_at_all),
    ("not enough memory at the target", no_memory),
];

/// What happens while memory moves.
const BREAKS: [(&str, Provoke); 7] = [
    ("the target kills its side mid-stream", receiver_is_killed),
    ("ssh is killed mid-stream", ssh_is_killed),
    ("Ctrl-C during pre-copy", interrupted),
    ("rxl and its save helper are killed mid-stream", sender_is_killed),
    ("the disk is full during a save", full_disk),
    ("Ctrl-C during a save", save_interrupted),
    ("rxl and its save helper are killed during a save", save_is_killed),
];

/// Runs all of it.
pub fn run(tally: &mut Tally, session: &Session) {
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let guest = format!("bad-{kind}");
        let spec = GuestSpec { dirty_pages_per_s: DIRTY_PAGES_PER_S, ..spec(&guest, kind) };
        let refusals = if kind == GuestKind::Pv { &REFUSALS[..] } else { &[] };
        cases(tally, session, &spec, refusals.iter().chain(&BREAKS));
    }
    let mute = GuestSpec { ignores_suspend: true, ..spec("bad-mute", GuestKind::Pv) };
    let never_answers: Provoke = never_suspends;
    cases(tally, session, &mute, &[("a guest that never answers suspend", never_answers)]);
}

/// Runs cases with one guest, which has to be unharmed after each.
fn cases<'a>(
    tally: &mut Tally,
    session: &Session,
    spec: &GuestSpec,
    cases: impl IntoIterator<Item = &'a (&'a str, Provoke)>,
) {
    let label = spec.kind.to_string().to_uppercase();
    let guest = &spec.name;
    tally.case(&format!("{label}: start"), || session.start_spec(spec));
    for (name, provoke) in cases {
        tally.case(&format!("{label}: {name}"), || {
            provoke(session, guest)?;
            unharmed(session, guest)
        });
    }
    tally.case(&format!("{label}: stop"), || session.remove(guest));
}

/// Checks that the guest runs on host1 as if nothing had been tried.
fn unharmed(session: &Session, guest: &str) -> Result<()> {
    let source = session.host(1)?;
    let report = session.check(guest, source)?;
    note(format!("{} of {} pages bad", report.bad_pages, report.pages_checked));
    ensure!(!log_dirty(source, guest)?, "log-dirty is still on");
    Ok(())
}

/// Whether Xen logs the writes of a domain, from the description that debug key q prints.
pub(crate) fn log_dirty(host: &Host, guest: &str) -> Result<bool> {
    let domid = host.run(&format!("xl domid {guest}"))?;
    let text = host.run("xl debug-keys q && sleep 1 && xl dmesg")?;
    let title = format!("General information for domain {}:", domid.trim());
    let Some((_, domain)) = text.rsplit_once(&title) else {
        bail!("Xen does not describe domain {}", domid.trim());
    };
    let domain = domain.split("General information").next().unwrap_or(domain);
    // A PV guest has such a line only while its writes are logged.
    let paging = domain.lines().find(|line| line.contains("paging assistance:"));
    Ok(paging.is_some_and(|line| line.contains("log_dirty")))
}

/// The exit code must be `code`, and the message must hold all of `words`.
fn expect_failure(finished: &Finished, code: i32, words: &[&str]) -> Result<()> {
    ensure!(finished.status.code() == Some(code), "{}", describe(finished));
    for word in words {
        ensure!(finished.stderr.contains(word), "no {word:?}: {}", describe(finished));
    }
    let last = finished.stderr.trim().lines().last().unwrap_or("");
    note(format!("it says: {last}"));
    Ok(())
}

/// A migration that fails by itself.
fn fails(session: &Session, command: &str, words: &[&str]) -> Result<()> {
    let finished = session.host(1)?.finish(command, FAILURE_TIMEOUT)?;
    expect_failure(&finished, FAILED, words)
}

fn unknown_domain(session: &Session, _: &str) -> Result<()> {
    let words = ["no-such-domain is an invalid domain identifier"];
    fails(session, "rxl migrate no-such-domain host2", &words)
}

fn unreachable_host(session: &Session, guest: &str) -> Result<()> {
    let why = format!("could not reach {NOBODY}");
    fails(session, &format!("rxl migrate {guest} {NOBODY}"), &[&why, KEPT])
}

fn no_such_receiver(session: &Session, guest: &str) -> Result<()> {
    let command = format!("rxl migrate --receiver no-such-program {guest} host2");
    fails(session, &command, &["no receiver was found on host2", KEPT])
}

fn no_receiver_at_all(session: &Session, guest: &str) -> Result<()> {
    let target = session.host(2)?;
    let rename = |from: &str, to: &str| {
        target.run(&format!(
            "mv {RXL_PATH}{from} {RXL_PATH}{to} && mv /usr/sbin/xl{from} /usr/sbin/xl{to}"
        ))
    };
    rename("", ".hidden")?;
    let result = fails(
        session,
        &format!("rxl migrate {guest} host2"),
        &["neither rxl nor xl on host2", "no receiver was found on host2", KEPT],
    );
    rename(".hidden", "")?;
    result
}

/// A domain that takes nearly all of the target's memory, and never runs.
fn no_memory(session: &Session, guest: &str) -> Result<()> {
    let target = session.host(2)?;
    let fill = format!(
        "mib=$(($(xl info free_memory) - {LEFT_MIB})); cd /tmp && \
         sed '/^name/d; /^type/d; /^memory/d; /^maxmem/d' /etc/xen/{guest}.cfg \
             > bad-filler.cfg && \
         echo \"name='bad-filler' type='pvh' memory=$mib maxmem=$mib\" | tr ' ' '\\n' \
             >> bad-filler.cfg && \
         xl create -q -p bad-filler.cfg; code=$?; rm -f bad-filler.cfg; exit $code"
    );
    target.run_within(&fill, FAILURE_TIMEOUT)?;
    let command = format!("rxl migrate {guest} host2");
    let words = ["not enough memory", "MiB are free", "the target did not answer", KEPT];
    let result = fails(session, &command, &words);
    session.remove("bad-filler")?;
    result
}

/// Starts a migration and waits until memory arrives at the target.
fn mid_stream<'a>(session: &'a Session, guest: &str) -> Result<Background<'a>> {
    let command = format!("rxl migrate {guest} host2");
    let mut migration = Background::start(session.host(1)?, &command)?;
    let deadline = Instant::now() + STREAM_TIMEOUT;
    let size = format!("xl list {guest}--incoming 2>/dev/null | awk 'NR == 2 {{ print $3 }}'");
    loop {
        let arrived = session.host(2)?.run(&size)?.trim().parse().unwrap_or(0);
        if arrived >= ARRIVED_MIB {
            note(format!("{arrived} MiB have arrived"));
            return Ok(migration);
        }
        if migration.has_ended()? || Instant::now() > deadline {
            let finished = migration.finish(Duration::ZERO)?;
            bail!("no memory arrives: {}", describe(&finished));
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// What `rxl status` of a host says of a migration of `guest` that is under way.
fn status(host: &Host, guest: &str) -> Result<Option<Value>> {
    let text = host.run("rxl status --json")?;
    let mut status: Value = serde_json::from_str(&text).context("rxl status --json")?;
    let running = status.get_mut("running").map(Value::take);
    let Some(Value::Array(running)) = running else { bail!("no list: {text}") };
    Ok(running.into_iter().find(|run| run.get("domain").is_some_and(|domain| domain == guest)))
}

/// Looks at a migration from another shell of both hosts, and cancels it from there.
pub(crate) fn cancelled_from_elsewhere(session: &Session, guest: &str) -> Result<()> {
    let (source, target) = (session.host(1)?, session.host(2)?);
    let migration = mid_stream(session, guest)?;
    for (host, doing) in [(source, "migrate"), (target, "receive")] {
        let run = status(host, guest)?.context("rxl status does not show it")?;
        let said = |name| run.pointer(name).unwrap_or(&Value::Null);
        let is_so = *said("/doing") == doing && *said("/cancellable") == true;
        ensure!(is_so, "{}: {run}", host.name());
        if doing == "migrate" {
            ensure!(said("/memory/bytes").as_u64() > Some(0), "nothing is sent: {run}");
        }
    }
    let shown = source.run("rxl status")?;
    note(format!("it says: {}", shown.lines().take(3).collect::<Vec<_>>().join("; ")));
    let cancel = source.finish(&format!("rxl cancel {guest}"), FAILURE_TIMEOUT)?;
    ensure!(cancel.status.success(), "rxl cancel: {}", describe(&cancel));
    expect_failure(&migration.finish(FAILURE_TIMEOUT)?, CANCELLED, &["cancelling", KEPT])?;
    ensure!(status(source, guest)?.is_none(), "rxl status still shows it");
    let again = source.finish(&format!("rxl cancel {guest}"), FAILURE_TIMEOUT)?;
    expect_failure(&again, FAILED, &["is not being migrated"])?;
    unharmed(session, guest)
}

/// Kills the processes of a host whose command line begins with `words`.
fn kill(host: &Host, words: &str) -> Result<()> {
    let pattern = quote(&format!("^{words}"));
    let killed = host.run(&format!("pgrep -a -f {pattern}; pkill -9 -f {pattern}"))?;
    note(format!("killed on {}: {}", host.name(), killed.trim().replace('\n', "; ")));
    Ok(())
}

fn receiver_is_killed(session: &Session, guest: &str) -> Result<()> {
    let migration = mid_stream(session, guest)?;
    kill(session.host(2)?, "rxl migrate-receive")?;
    let words = ["the domain could not be sent", KEPT];
    expect_failure(&migration.finish(FAILURE_TIMEOUT)?, FAILED, &words)
}

fn ssh_is_killed(session: &Session, guest: &str) -> Result<()> {
    let migration = mid_stream(session, guest)?;
    kill(session.host(1)?, "ssh host2 ")?;
    expect_failure(
        &migration.finish(FAILURE_TIMEOUT)?,
        FAILED,
        &["ssh was ended by signal 9", KEPT],
    )
}

/// Only the guard is left, and must be alone with the guest until it is done.
fn sender_is_killed(session: &Session, guest: &str) -> Result<()> {
    let migration = mid_stream(session, guest)?;
    kill(session.host(1)?, "(rxl migrate|[^ ]+ --save-domain) ")?;
    let again = format!("rxl migrate {guest} host2");
    fails(session, &again, &["is being migrated", "is putting things right"])?;
    let finished = migration.finish(FAILURE_TIMEOUT)?;
    ensure!(!finished.status.success(), "{}", describe(&finished));
    Ok(())
}

fn interrupted(session: &Session, guest: &str) -> Result<()> {
    let migration = mid_stream(session, guest)?;
    migration.signal_group("INT")?;
    expect_failure(&migration.finish(FAILURE_TIMEOUT)?, CANCELLED, &["cancelled", KEPT])
}

/// Nothing may be left on the disk.
fn full_disk(session: &Session, guest: &str) -> Result<()> {
    let source = session.host(1)?;
    source
        .run(&format!("mkdir -p {SMALL_DISK} && mount -t tmpfs -o size=32m tmpfs {SMALL_DISK}"))?;
    let saved = "Failed to save domain, resuming domain";
    let result = fails(session, &format!("rxl save {guest} {SMALL_DISK}/x"), &[saved, KEPT]);
    let left = source.run(&format!("ls -A {SMALL_DISK}; umount {SMALL_DISK}"))?;
    ensure!(left.is_empty(), "left on the disk: {left}");
    result
}

/// Starts a save that does not get on, and waits until the guest has suspended for it.
fn mid_save<'a>(session: &'a Session, guest: &str) -> Result<Background<'a>> {
    let source = session.host(1)?;
    source.run(&format!("rm -f {SLOW_FILE}; mkfifo {SLOW_FILE}"))?;
    let reader = format!("sleep 240 < {SLOW_FILE} > /dev/null 2>&1 &");
    let command = quote(&format!("{reader} exec rxl save {guest} {SLOW_FILE}"));
    let mut save = Background::start(source, &format!("sh -c {command}"))?;
    let deadline = Instant::now() + STREAM_TIMEOUT;
    let state = format!("xl list {guest} | awk 'NR == 2 {{ print $5 }}'");
    while !source.run(&state)?.contains('s') {
        if save.has_ended()? || Instant::now() > deadline {
            let finished = save.finish(Duration::ZERO)?;
            bail!("the guest does not suspend: {}", describe(&finished));
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(save)
}

fn save_interrupted(session: &Session, guest: &str) -> Result<()> {
    let save = mid_save(session, guest)?;
    save.signal_group("INT")?;
    expect_failure(&save.finish(FAILURE_TIMEOUT)?, CANCELLED, &["cancelled", KEPT])
}

/// Only the guard is left, which lets the guest run on.
fn save_is_killed(session: &Session, guest: &str) -> Result<()> {
    let save = mid_save(session, guest)?;
    kill(session.host(1)?, "(rxl save|[^ ]+ --save-domain) ")?;
    let finished = save.finish(FAILURE_TIMEOUT)?;
    ensure!(!finished.status.success(), "{}", describe(&finished));
    Ok(())
}

fn never_suspends(session: &Session, guest: &str) -> Result<()> {
    let command = format!("rxl migrate {guest} host2");
    fails(session, &command, &["the guest did not suspend", KEPT])
}
