//! The lab test of every change: guests that write their memory are moved by rxl, and between rxl
//! and the stock `xl`, and nothing is lost.

use rxl_lab::{GuestKind, Route};

use crate::bad_input;
use crate::lab::{Session, spec};
use crate::tally::Tally;

/// Pages that a guest rewrites per second.
pub(crate) const DIRTY_PAGES_PER_S: u64 = 200;

const ROUTES: [(&str, Route); 3] = [
    ("rxl to rxl", Route::Rxl),
    ("stock xl to rxl", Route::XlToRxl),
    ("rxl to stock xl", Route::RxlToXl),
];

/// Moves a guest of each kind along every route, the PV guest also by ssh.
pub fn run(tally: &mut Tally, session: &Session) {
    for kind in [GuestKind::Pv, GuestKind::Pvh, GuestKind::Hvm] {
        let guest = format!("smoke-{kind}");
        let label = kind.to_string().to_uppercase();
        let start = || session.start(&guest, kind, DIRTY_PAGES_PER_S);
        tally.case(&format!("{label}: start ({} MiB)", spec(&guest, kind).memory_mib), start);
        if kind == GuestKind::Pv {
            let cancelled = || bad_input::cancelled_from_elsewhere(session, &guest);
            tally.case(&format!("{label}: rxl status, rxl cancel"), cancelled);
        }
        for (name, route) in ROUTES {
            tally.case(&format!("{label}: {name}"), || session.migrate(&guest, kind, route));
        }
        if kind == GuestKind::Pv {
            // As a user would; the others spare the emulated processor ssh's ciphers.
            let by_ssh = || session.migrate(&guest, kind, Route::RxlBySsh);
            tally.case(&format!("{label}: rxl to rxl by ssh"), by_ssh);
        }
        tally.case(&format!("{label}: stop"), || session.remove(&guest));
    }
}
