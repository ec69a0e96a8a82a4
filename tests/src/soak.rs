//! Two guests go back and forth for a long time; then nothing may be more than it was.

use anyhow::{Result, ensure};
use rxl_lab::{GuestKind, Host, Route};

use crate::census::Census;
use crate::lab::Session;
use crate::tally::{Tally, note};

/// Pages that each guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 200;

/// The guests: both are there all the time.
const GUESTS: [(&str, GuestKind); 2] = [("soak-pv", GuestKind::Pv), ("soak-pvh", GuestKind::Pvh)];

/// Moves both guests there and back `rounds` times, checks them after each move, and compares
/// what is on the hosts before and after. The first failure ends it.
pub fn run(tally: &mut Tally, session: &Session, rounds: u32) {
    let complete = cases(tally, session, rounds);
    if complete.is_none() {
        note("the rest of the soak is left out");
    }
    for (guest, _) in GUESTS {
        tally.case(&format!("{guest}: stop"), || session.remove(guest));
    }
}

fn cases(tally: &mut Tally, session: &Session, rounds: u32) -> Option<()> {
    for (guest, kind) in GUESTS {
        tally.case(&format!("{guest}: start"), || session.start(guest, kind, DIRTY_PAGES_PER_S))?;
    }
    // What is there before the first migration differs: xl's daemons give way to rxl's.
    tally.case("a round before counting", || there_and_back(session))?;
    let before = tally.case("counts before", || session.lab().on_all_hosts(Census::take))?;
    for round in 1..=rounds {
        tally.case(&format!("round {round} of {rounds}"), || there_and_back(session))?;
    }
    let after = tally.case("counts after", || session.lab().on_all_hosts(Census::take))?;
    for ((host, before), after) in session.lab().hosts().iter().zip(&before).zip(&after) {
        tally.case(&format!("no leak on {}", host.name()), || compare(host, before, after));
    }
    Some(())
}

fn there_and_back(session: &Session) -> Result<()> {
    for _ in 0..2 {
        for (guest, kind) in GUESTS {
            session.migrate(guest, kind, Route::Rxl)?;
        }
    }
    Ok(())
}

fn compare(host: &Host, before: &Census, after: &Census) -> Result<()> {
    let (lines, leaks) = before.compare(after);
    note(format!("{:<40} {:>10} {:>10}", host.name(), "before", "after"));
    lines.iter().for_each(note);
    ensure!(leaks == 0, "{leaks} counts are higher than before");
    Ok(())
}
