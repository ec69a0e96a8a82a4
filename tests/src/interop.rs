//! Every pairing of rxl and the stock `xl`: guests that write their memory are migrated, and saved
//! and restored, by either end, and nothing is lost. One is the stock `xl` at both ends with rxl's
//! package diverting its save helper.

use std::time::Duration;

use anyhow::{Result, ensure};
use rxl_lab::{GuestKind, GuestSpec, Host, Release, Route, Shape, save_path};

use crate::lab::{Session, describe, spec};
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
const VARIANTS: [(&str, Variant); 6] = [
    ("save -c lets it run on, restore makes another", checkpoint),
    ("save -p and restore -p leave it paused", paused),
    ("save and restore through pipes", pipes),
    ("two workers save and restore, processes and threads", by_workers),
    ("save replaces no other guest's file", other_file),
    ("a paused guest is refused at once", paused_before),
];

/// Processors of each guest.
const GUEST_VCPUS: u8 = 2;

/// Runs the matrix with a PV and a PVH guest, or with an HVM guest.
pub fn run(tally: &mut Tally, session: &Session, hvm: bool) {
    let kinds: &[GuestKind] =
        if hvm { &[GuestKind::Hvm] } else { &[GuestKind::Pv, GuestKind::Pvh] };
    for &kind in kinds {
        let guest = format!("interop-{kind}");
        let label = kind.to_string().to_uppercase();
        let spec = guest_spec(&guest, kind);
        let start = || session.start_spec(&spec);
        tally.case(&format!("{label}: start ({} MiB)", spec.memory_mib), start);
        for (name, route) in PAIRINGS {
            tally.case(&format!("{label}: migrate, {name}"), || {
                session.migrate(&guest, kind, route)
            });
            tally.case(&format!("{label}: save and restore, {name}"), || {
                session.save_and_restore(&guest, route)
            });
        }
        let name = "stock xl with rxl's helper diverted to";
        tally.case(&format!("{label}: migrate, save and restore, {name}"), || {
            diverted(session, || {
                session.migrate(&guest, kind, Route::Xl)?;
                session.save_and_restore(&guest, Route::Xl)
            })
        });
        for (name, run) in VARIANTS.into_iter().filter(|_| !hvm) {
            tally.case(&format!("{label}: {name}"), || {
                run(session, &guest)?;
                check(session, &guest)
            });
        }
        tally.case(&format!("{label}: stop"), || session.remove(&guest));
    }
}

fn guest_spec(guest: &str, kind: GuestKind) -> GuestSpec {
    let (dirty_pages_per_s, vcpus) = (DIRTY_PAGES_PER_S, GUEST_VCPUS);
    GuestSpec { dirty_pages_per_s, vcpus, ..spec(guest, kind) }
}

/// Opens a lab whose second host has a newer Xen, with rxl on both.
///
/// # Errors
/// It does not come up.
pub fn open_newer() -> Result<Session> {
    let releases = vec![Release::Xen417, Release::Xen420];
    let session = Session::open_shaped(Shape { releases, ..Shape::default() })?;
    session.lab().push_rxl()?;
    Ok(session)
}

/// Guests go from one release of Xen to a newer one, which is the way that Xen promises.
pub fn run_newer(tally: &mut Tally, session: &Session) {
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let guest = format!("newer-{kind}");
        let label = kind.to_string().to_uppercase();
        for (name, route) in PAIRINGS {
            let start = || session.start_spec(&guest_spec(&guest, kind));
            tally.case(&format!("{label}: start on {}", Release::Xen417), start);
            tally.case(&format!("{label}: migrate, {name}"), || {
                session.migrate(&guest, kind, route)
            });
            tally.case(&format!("{label}: save and restore there, {name}"), || {
                session.save_and_restore(&guest, route)
            });
        }
        tally.case(&format!("{label}: saved by rxl before, restored by rxl after"), || {
            session.start_spec(&guest_spec(&guest, kind))?;
            carried_over(session, &guest)
        });
        if kind == GuestKind::Pv {
            tally.case("PV: refused where Xen has no shadow paging", || no_shadow(session, &guest));
        }
        tally.case(&format!("{label}: stop"), || session.remove(&guest));
    }
}

/// Saves the guest on host1, and restores it on host2.
fn carried_over(session: &Session, guest: &str) -> Result<()> {
    let (file, there) = (save_path(guest), session.host(2)?);
    let script = format!("set -e; rxl save {guest} {file}; lab-rsh host2 'cat > {file}' < {file}");
    session.host(1)?.run_within(&script, SCRIPT_TIMEOUT)?;
    there.run_within(&format!("rxl restore {file}; rm {file}"), SCRIPT_TIMEOUT)?;
    session.check(guest, there).map(drop)
}

fn no_shadow(session: &Session, guest: &str) -> Result<()> {
    let there = session.host(2)?;
    let refused = there.finish(&format!("rxl migrate {guest} host1"), SCRIPT_TIMEOUT)?;
    let says_why = refused.stderr.contains("shadow paging");
    ensure!(!refused.status.success() && says_why, "{}", describe(&refused));
    session.check(guest, there).map(drop)
}

/// Does `run` while every stock xl uses rxl's helper, and could use no other.
fn diverted(session: &Session, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let on_all = |script: &str| session.lab().on_all_hosts(|host| host.run(script));
    on_all("set -e; rxl divert; chmod a-x /usr/lib/xen-*/bin/libxl-save-helper.distrib")?;
    let result = run();
    on_all(
        "set -e; chmod a+x /usr/lib/xen-*/bin/libxl-save-helper.distrib; rxl divert --undo; \
         [ ! -L /usr/lib/xen-*/bin/libxl-save-helper ]; [ -z \"$(dpkg-divert --list '*helper')\" ]",
    )?;
    result
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

fn paused_before(session: &Session, guest: &str) -> Result<()> {
    let refused = "grep -q 'it is paused' /run/rxl-said";
    on_host(
        session,
        guest,
        &format!(
            "xl pause $guest; ! rxl save $guest $file 2>/run/rxl-said; {refused}; [ ! -e $file ]; \
             ! rxl migrate -s '' $guest 'touch /run/rxl-started' 2>/run/rxl-said; {refused}; \
             [ ! -e /run/rxl-started ]; xl unpause $guest"
        ),
    )
    .map(drop)
}

/// Hosts of the lab have one processor, and so no workers by themselves. Those that restore are
/// looked for while they do.
fn by_workers(session: &Session, guest: &str) -> Result<()> {
    let modes = [
        ("process", "pgrep -fc '[-]-restore-worker'"),
        ("thread", "cat /proc/[0-9]*/task/[0-9]*/comm 2>/dev/null | grep -c '^worker$'"),
    ];
    for (mode, count) in modes {
        let restore = format!(
            "rxl restore $file & pid=$!; seen=0; while kill -0 $pid 2>/dev/null; do \
             [ $({count}) -lt 2 ] || seen=1; sleep 0.1; done; wait $pid; rm $file; [ $seen = 1 ]"
        );
        let script = format!(
            "export RXL_WORKERS=2:{mode}; xl save $guest $file; {restore}; \
             rxl save $guest $file; {restore}"
        );
        on_host(session, guest, &script)?;
        check(session, guest)?;
    }
    Ok(())
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
