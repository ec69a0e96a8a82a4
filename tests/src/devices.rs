//! Guests with a network card and a disk: a TCP session and the disk's transfers go on over every
//! move.

use std::time::Duration;

use anyhow::{Result, ensure};
use rxl_lab::{GuestKind, GuestSpec, Route, Shape, guest_address};

use crate::background::Background;
use crate::lab::{Session, describe, spec};
use crate::tally::{Tally, note};

/// Pages that a guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 100;
/// A file on host1 that ends the session.
const OVER: &str = "/run/rxl-session-over";
/// Lines that have to come back before the guest moves, and after it.
const LINES_MIN: usize = 10;
/// How long the last lines may take.
const TIMEOUT: Duration = Duration::from_secs(120);

const ROUTES: [(&str, Route); 4] = [
    ("rxl to rxl", Route::Rxl),
    ("rxl to stock xl", Route::RxlToXl),
    ("stock xl to rxl", Route::XlToRxl),
    ("rxl to rxl again", Route::Rxl),
];

/// Opens a lab of two hosts, whose second network cards guests use.
///
/// # Errors
/// It does not come up.
pub fn open() -> Result<Session> {
    let session = Session::open_shaped(Shape { nics: 2, ..Shape::default() })?;
    session.lab().push_rxl()?;
    session.lab().provide_devices()?;
    Ok(session)
}

/// Moves a PV and a PVH guest, there and back, with one session open all the time.
pub fn run(tally: &mut Tally, session: &Session) {
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let guest = format!("devices-{kind}");
        let label = kind.to_string().to_uppercase();
        // The drivers and busybox take a few MiB.
        let memory_mib = spec(&guest, kind).memory_mib + 32;
        let dirty_pages_per_s = DIRTY_PAGES_PER_S;
        let spec =
            GuestSpec { memory_mib, dirty_pages_per_s, has_devices: true, ..spec(&guest, kind) };
        tally.case(&format!("{label}: start"), || session.start_spec(&spec));
        let moved = |routes| move_with_session(session, &guest, kind, routes);
        tally.case(&format!("{label}: a session over four moves"), || moved(&ROUTES));
        tally.case(&format!("{label}: stop"), || session.remove(&guest));
    }
    tally.case("hosts have their NICs back", || session.lab().withdraw_devices());
}

fn move_with_session(
    session: &Session,
    guest: &str,
    kind: GuestKind,
    routes: &[(&str, Route)],
) -> Result<()> {
    let client = session.host(1)?;
    client.run(&format!("rm -f {OVER}"))?;
    let address = guest_address();
    let lines = format!(
        "sh -c 'i=0; while [ ! -e {OVER} ]; do i=$((i + 1)); echo $i; sleep 0.2; done | \
         socat -t 60 - TCP:{address}:7'"
    );
    let talk = Background::start(client, &lines)?;
    let moved = all_moves(session, guest, kind, routes);
    client.run(&format!("sleep 3; touch {OVER}"))?;
    let talked = talk.finish(TIMEOUT)?;
    moved?;
    ensure!(talked.status.success(), "the session: {}", describe(&talked));
    let got: Vec<usize> = talked.stdout.lines().filter_map(|line| line.parse().ok()).collect();
    let wanted: Vec<usize> = (1..=got.len()).collect();
    ensure!(got == wanted, "lines are missing or out of order: {} came", got.len());
    ensure!(got.len() >= LINES_MIN * (routes.len() + 1), "only {} lines came back", got.len());
    note(format!("{} lines came back over one connection", got.len()));
    Ok(())
}

fn all_moves(
    session: &Session,
    guest: &str,
    kind: GuestKind,
    routes: &[(&str, Route)],
) -> Result<()> {
    let mut blocks = 0;
    for (name, route) in routes {
        note(name);
        session.migrate(guest, kind, *route)?;
        let report = session.lab().check_guest(guest)?;
        let (errors, first) = (report.disk_errors, report.first_disk_error.unwrap_or_default());
        ensure!(errors == 0, "{errors} transfers failed, the first so: {first}");
        ensure!(report.disk_blocks > blocks, "the disk stands still at {blocks} blocks");
        blocks = report.disk_blocks;
    }
    note(format!("{blocks} blocks of the disk, none failed"));
    Ok(())
}
