//! Every pairing of rxl and the stock `xl`: guests that write their memory are migrated, and saved
//! and restored, by either end, and nothing is lost.

use std::time::Duration;

use anyhow::{Result, ensure};
use rxl_lab::{GuestKind, Host, Route, save_path};

use crate::lab::{Session, spec};
use crate::smoke::DIRTY_PAGES_PER_S;
use crate::tally::Tally;

/// All pairings: who sends or saves, who receives or restores.
const PAIRINGS: [(&str, Route); 4] = [
    ("rxl to rxl", Route::Rxl),
    ("stock xl to rxl", Route::XlToRxl),
    ("rxl to stock xl", Route::RxlToXl),
    ("stock xl to stock xl", Route::Xl),
];

/// Time that a few saves and restores may take in emulation.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(300);

/// What is done with a guest, which has to run afterwards.
type Variant = fn(&Session, &str) -> Result<()>;

/// What rxl's verbs can do beside.
const VARIANTS: [(&str, Variant); 4] = [
    ("save -c lets it run on, restore makes another", checkpoint),
    ("save -p and restore -p leave it paused", paused),
    ("save and restore through pipes", pipes),
    ("save replaces no other guest's file", other_file),
];

/// Runs the matrix with a PV and a PVH guest.
pub fn run(tally: &mut Tally, session: &Session) {
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let guest = format!("interop-{kind}");
        let label = kind.to_string().to_uppercase();
        let start = || session.start(&guest, kind, DIRTY_PAGES_PER_S);
        tally.case(&format!("{label}: start ({} MiB)", spec(&guest, kind).memory_mib), start);
        for (name, route) in PAIRINGS {
            tally.case(&format!("{label}: migrate, {name}"), || {
                session.migrate(&guest, kind, route)
            });
            tally.case(&format!("{label}: save and restore, {name}"), || {
                session.save_and_restore(&guest, route)
            });
        }
        for (name, run) in VARIANTS {
            tally.case(&format!("{label}: {name}"), || {
                run(session, &guest)?;
                check(session, &guest)
            });
        }
        tally.case(&format!("{label}: stop"), || session.remove(&guest));
    }
}

/// The guest runs where it is, and nothing is left of a save but what is known.
fn check(session: &Session, guest: &str) -> Result<()> {
    let (host, _) = session.here_and_there(guest)?;
    host.run(&format!("rm -f {}", save_path(guest)))?;
    let left = host.run("ls /var/tmp | grep partial || true")?;
    ensure!(left.is_empty(), "left behind: {left}");
    session.check(guest, host).map(drop)
}

/// Runs shell lines on the host of `guest`; `$file` is where it is saved.
fn on_host<'a>(session: &'a Session, guest: &str, script: &str) -> Result<&'a Host> {
    let (host, _) = session.here_and_there(guest)?;
    let script = format!("set -e; file={}; guest={guest}; {script}", save_path(guest));
    host.run_within(&script, SCRIPT_TIMEOUT)?;
    Ok(host)
}

fn checkpoint(session: &Session, guest: &str) -> Result<()> {
    let host = on_host(session, guest, "rxl save -c $guest $file")?;
    session.check(guest, host)?;
    let refused =
        "! rxl restore $file 2>/run/rxl-said; grep -q 'on this host already' /run/rxl-said";
    on_host(session, guest, refused)?;
    on_host(session, guest, "xl destroy $guest; rxl restore $file").map(drop)
}

fn paused(session: &Session, guest: &str) -> Result<()> {
    let is_paused = "xl list $guest | tail -n 1 | grep -Eq ' ..p... '";
    on_host(
        session,
        guest,
        &format!(
            "rxl save -p $guest $file; {is_paused}; xl destroy $guest; \
             rxl restore -p $file; {is_paused}; xl unpause $guest"
        ),
    )
    .map(drop)
}

fn pipes(session: &Session, guest: &str) -> Result<()> {
    on_host(session, guest, "rxl save $guest - > $file; cat $file | rxl restore -").map(drop)
}

fn other_file(session: &Session, guest: &str) -> Result<()> {
    let script = "echo something else > $file; \
        ! rxl save $guest $file 2>/run/rxl-said; grep -q -- '--force replaces it' /run/rxl-said; \
        [ \"$(cat $file)\" = 'something else' ]; rxl save -c --force $guest $file";
    on_host(session, guest, script).map(drop)
}
