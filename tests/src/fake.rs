//! The fake Xen's suite: stock's save helper and rxl's, in every pairing, move guests that are
//! compared page by page. No lab, no Xen, native speed.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rxl_fake_xen::{
    Activity, Filed, GuestKind, Migration, Planted, Program, Programs, Rig, Size, Ways,
    without_optional,
};

use crate::stock::{self, Format};
use crate::tally::{Tally, note};
use crate::unit;

/// Who saves, who restores.
type Pair = (Program, Program);

const PAIRS: [Pair; 4] = [
    (Program::Stock, Program::Stock),
    (Program::Stock, Program::Rxl),
    (Program::Rxl, Program::Stock),
    (Program::Rxl, Program::Rxl),
];
/// A guest with room to grow to 16 GiB.
const LARGE_SIZE: Size = Size { pages: 4 << 20, memory: 64 << 10 };
/// A guest that is not moved within a few milliseconds.
const MEDIUM_SIZE: Size = Size { pages: 64 << 10, memory: 64 << 10 };
const LARGE: [(Pair, GuestKind, Activity); 4] = [
    ((Program::Stock, Program::Rxl), GuestKind::PvLinear, Activity::Stopped),
    ((Program::Rxl, Program::Stock), GuestKind::PvTree, Activity::Writing),
    ((Program::Stock, Program::Rxl), GuestKind::Pvh, Activity::Stopped),
    ((Program::Rxl, Program::Stock), GuestKind::Pvh, Activity::Writing),
];
const GUESTS: [GuestKind; 3] = [GuestKind::PvLinear, GuestKind::PvTree, GuestKind::Pvh];
const ACTIVITIES: [Activity; 3] = [Activity::Stopped, Activity::Writing, Activity::Ballooning];
/// How large guests go over links. At least two of the six are left.
const LINKED: [(GuestKind, Ways); 5] = [
    (GuestKind::PvLinear, Ways::Links(3)),
    (GuestKind::PvTree, Ways::Sealed(2)),
    (GuestKind::PvTree, Ways::Killed(6, 2)),
    (GuestKind::Pvh, Ways::Links(3)),
    (GuestKind::Pvh, Ways::Killed(6, 2)),
];
/// The part of a large guest that has to go over links, if there are some, in percent.
const LINKS_SHARE: usize = 50;
/// Cells of the matrix.
const CELLS: u64 = (PAIRS.len() * GUESTS.len() * ACTIVITIES.len()) as u64;
/// A guest with strangers at the sender's door: a batch goes over the stream for each few that the
/// sender hears before it hears the receiver.
const BESIEGED_SIZE: Size = Size { pages: 128 << 10, memory: 128 << 10 };
/// So many have to have come for anything to be shown.
const STRANGERS_MIN: usize = 1000;
/// What strangers may cost the sender, in KiB.
const STRANGERS_KIB_MAX: u64 = 8 << 10;
/// For so many migrations there is one run in which something goes wrong.
const TROUBLED_SHARE: u64 = 3;
/// What a slow call takes at least.
const CALL_DELAY: Duration = Duration::from_millis(1);
/// Differences that are shown of a copy that differs.
const SHOWN_MAX: usize = 5;

/// The matrix, then what is done once: planted faults, slow calls, large guests; then trouble.
/// `runs` migrations of the matrix have seeds from `seed` on.
pub fn run(tally: &mut Tally, runs: u64, seed: u64) {
    let Some(rig) = tally.case("the programs are built", build) else { return };
    matrix(tally, &rig, runs, seed);
    planted(tally, &rig, seed);
    verified(tally, &rig, seed);
    for (pair, guest, activity) in LARGE {
        moves(tally, &rig, &Migration { size: LARGE_SIZE, ..case(pair, guest, activity, seed) });
    }
    linked(tally, &rig, &LINKED, seed);
    besieged(tally, &rig, seed);
    filed(tally, &rig, seed);
    troubled(tally, &rig, runs / TROUBLED_SHARE, seed);
}

/// Every cell of the matrix once, planted faults, and a little trouble: within a minute.
pub fn run_short(tally: &mut Tally) {
    let Some(rig) = tally.case("the programs are built", build) else { return };
    matrix(tally, &rig, CELLS, 0);
    planted(tally, &rig, 0);
    verified(tally, &rig, 0);
    linked(tally, &rig, &[(GuestKind::Pvh, Ways::Sealed(2))], 0);
    besieged(tally, &rig, 0);
    filed(tally, &rig, 0);
    troubled(tally, &rig, CELLS / TROUBLED_SHARE, 0);
}

/// A seed also says which cell of the matrix it is. The first of each cell has its stream judged
/// by stock's verifier.
fn matrix(tally: &mut Tally, rig: &Rig, runs: u64, seed: u64) {
    let cells: Vec<_> = PAIRS
        .into_iter()
        .flat_map(|pair| GUESTS.map(|guest| (pair, guest)))
        .flat_map(|(pair, guest)| ACTIVITIES.map(|activity| (pair, guest, activity)))
        .collect();
    for (run, seed) in (0..runs).zip(seed..) {
        let index = usize::try_from(seed % CELLS).unwrap_or(0);
        let Some((pair, guest, activity)) = cells.get(index).copied() else { continue };
        let migration = Migration { ways: ways(pair, seed), ..case(pair, guest, activity, seed) };
        tally.case(&name(&migration), || migrate(rig, &migration, run < CELLS));
    }
}

/// How rxl moves memory in this run: every way comes to every cell.
fn ways(pair: Pair, seed: u64) -> Ways {
    let turn = seed / CELLS + seed;
    match pair {
        (Program::Rxl, Program::Rxl) => match turn % 8 {
            0 => Ways::Alone,
            1 => Ways::Workers(3),
            2 => Ways::Links(1),
            3 => Ways::Killed(4, 3),
            4 => Ways::Links(4),
            5 => Ways::Sealed(2),
            6 => Ways::Verified(u8::try_from(turn / 8 % 3).unwrap_or(0)),
            _ => Ways::Killed(2, 8),
        },
        (Program::Rxl, Program::Stock) => match turn % 4 {
            0 => Ways::Alone,
            1 => Ways::Workers(3),
            2 => Ways::Threads(2),
            // Nobody takes the offer.
            _ => Ways::Links(2),
        },
        // Stock cannot offer links.
        (Program::Stock, _) => Ways::Alone,
    }
}

/// A large guest goes over links, and not over the stream.
fn linked(tally: &mut Tally, rig: &Rig, cases: &[(GuestKind, Ways)], seed: u64) {
    for (guest, ways) in cases.iter().copied() {
        let both = case((Program::Rxl, Program::Rxl), guest, Activity::Writing, seed);
        let migration = Migration { size: LARGE_SIZE, ways, ..both };
        tally.case(&name(&migration), || {
            let moved = rig.migrate(&migration)?;
            ensure!(moved.differences.is_empty(), "the copy differs");
            let memory = usize::try_from(LARGE_SIZE.memory)? * 4096;
            let stream = moved.stream.len() * 100 / memory;
            note(format!("{stream} % of the memory went over the stream"));
            ensure!(100 - stream.min(100) >= LINKS_SHARE, "links are hardly used");
            Ok(())
        });
    }
}

/// Files of either program are read by several workers. Stock's are of guests that stand still, for
/// it may lose a race with others.
fn filed(tally: &mut Tally, rig: &Rig, seed: u64) {
    let saved_by = [(Program::Stock, Activity::Stopped), (Program::Rxl, Activity::Writing)];
    for (from, activity) in saved_by {
        for (guest, ways) in
            GUESTS.into_iter().zip([Ways::Workers(2), Ways::Threads(2), Ways::Workers(5)])
        {
            let migration = Migration { ways, ..case((from, Program::Rxl), guest, activity, seed) };
            tally.case(&format!("from a file: {}", name(&migration)), || {
                match rig.through_file(&migration)? {
                    Filed::Restored(differences) => {
                        ensure!(differences.is_empty(), "the copy differs: {differences:?}");
                        Ok(())
                    }
                    Filed::Failed(why) => bail!("it is not restored: {why}"),
                }
            });
        }
    }
    let both = case((Program::Rxl, Program::Rxl), GuestKind::Pvh, Activity::Stopped, seed);
    let migration = Migration { size: MEDIUM_SIZE, ways: Ways::WorkerKilled(2), ..both };
    tally.case(&format!("from a file: {}", name(&migration)), || {
        match rig.through_file(&migration)? {
            Filed::Restored(_) => bail!("nobody misses the worker"),
            Filed::Failed(why) => {
                let wanted = "restoring failed: a worker failed: worker";
                ensure!(why.contains(wanted) && why.contains("SIGKILL"), "it says: {why}");
                Ok(())
            }
        }
    });
}

/// Strangers at the door of encrypted links, and a listener, who hears a guest only over links that
/// are not.
fn besieged(tally: &mut Tally, rig: &Rig, seed: u64) {
    let moved = |ways, strangers| {
        let both = case((Program::Rxl, Program::Rxl), GuestKind::Pvh, Activity::Stopped, seed);
        rig.besieged(&Migration { size: BESIEGED_SIZE, ways, ..both }, strangers)
    };
    tally.case("a listener sees a guest's memory on links that are not encrypted", || {
        let seen = moved(Ways::Links(2), false)?;
        note(format!("{} of {} packets", seen.in_clear, seen.packets));
        ensure!(seen.in_clear > 0, "whoever listens to the other case would see nothing either");
        Ok(())
    });
    tally.case("strangers and a thief at the door of encrypted links", || {
        let (quiet, seen) = (moved(Ways::Sealed(3), false)?, moved(Ways::Sealed(3), true)?);
        let more = seen.peak_kib.saturating_sub(quiet.peak_kib);
        let stream = seen.over_stream * 100 / usize::try_from(BESIEGED_SIZE.memory * 4096)?;
        note(format!("{} strangers cost {more} KiB", seen.strangers));
        note(format!("{} packets; {stream} % of the guest over the stream", seen.packets));
        ensure!(seen.packets > 0 && seen.in_clear == 0, "{} packets in clear", seen.in_clear);
        let came = seen.strangers >= STRANGERS_MIN && seen.stolen;
        ensure!(came, "too few were at the door: {seen:?}");
        ensure!(more <= STRANGERS_KIB_MAX, "they cost too much");
        ensure!(100 - stream.min(100) >= LINKS_SHARE, "{stream} % went over the stream");
        Ok(())
    });
}

/// Faults that the comparison has to find; and calls that take long.
fn planted(tally: &mut Tally, rig: &Rig, seed: u64) {
    for pair in PAIRS.into_iter().filter(|(from, to)| from != to) {
        let migration = case(pair, GuestKind::Pvh, Activity::Writing, seed);
        for planted in Planted::ALL {
            let (from, to) = pair;
            let name = format!("planted: {planted} ({from} to {to}): the comparison finds it");
            tally.case(&name, || {
                let differences = rig.migrate_with(planted, &migration)?;
                note(format!("{} differences", differences.len()));
                ensure!(!differences.is_empty(), "the comparison finds nothing");
                Ok(())
            });
        }
        let (_, to) = pair;
        let name = format!("a CPU that lacks features of the guest's is noticed ({to} restores)");
        let stands = case(pair, GuestKind::Pvh, Activity::Stopped, seed);
        tally.case(&name, || rig.restore_on_lesser_cpu(&stands));
        let slow = case(pair, GuestKind::PvTree, Activity::Writing, seed);
        moves(tally, rig, &Migration { call_delay: CALL_DELAY, ..slow });
    }
}

/// With digests rxl finds a page that changes on its way, and stock refuses the stream.
fn verified(tally: &mut Tally, rig: &Rig, seed: u64) {
    let differs = "1 pages or more differ from the source's";
    for (to, why) in [(Program::Rxl, differs), (Program::Stock, "Mandatory record 0x52580006")] {
        for guest in GUESTS {
            let alone = case((Program::Rxl, to), guest, Activity::Stopped, seed);
            let migration = Migration { ways: Ways::Verified(0), ..alone };
            tally.case(&format!("a page changes on its way: {}", name(&migration)), || {
                let said = rig.changed_page(&migration)?;
                ensure!(said.contains(why), "it says: {said}");
                Ok(())
            });
        }
    }
}

fn case(pair: Pair, guest: GuestKind, activity: Activity, seed: u64) -> Migration {
    Migration::new(pair, guest, activity, seed)
}

/// One migration that has to succeed.
fn moves(tally: &mut Tally, rig: &Rig, migration: &Migration) {
    tally.case(&name(migration), || migrate(rig, migration, false));
}

fn name(migration: &Migration) -> String {
    let Migration { from, to, guest, activity, size, call_delay, ways, seed } = migration;
    let size = match size {
        &Size::SMALL => String::new(),
        Size { pages, memory } => format!(", {} of {} MiB", memory / 256, pages / 256),
    };
    let slow = if call_delay.is_zero() { "" } else { ", slow calls" };
    format!("{from} to {to}, {guest}{size}, {activity}{slow}, {ways}, seed {seed}")
}

/// Runs `runs` saves and restores in which something goes wrong, with seeds from `seed` on.
fn troubled(tally: &mut Tally, rig: &Rig, runs: u64, seed: u64) {
    for (_, seed) in (0..runs).zip(seed..) {
        let program = if seed.is_multiple_of(2) { Program::Stock } else { Program::Rxl };
        let saves = seed / 2 % 2 == 0;
        let end = if saves { "saving" } else { "restoring" };
        tally.case(&format!("trouble while {program} is {end}, seed {seed}"), || {
            note(match saves {
                true => rig.trouble_save(program, seed)?,
                false => rig.trouble_restore(program, seed)?,
            });
            Ok(())
        });
    }
}

fn migrate(rig: &Rig, migration: &Migration, judge: bool) -> Result<()> {
    let moved = rig.migrate(migration)?;
    let (count, shown) = (moved.differences.len(), moved.differences.iter().take(SHOWN_MAX));
    let shown: Vec<_> = shown.map(String::as_str).collect();
    ensure!(count == 0, "the copy differs in {count} things: {}", shown.join("; "));
    if moved.given_up > 0 {
        note(format!("stock's sender gave up {} times before", moved.given_up));
    }
    if judge && !migration.ways.is_verified() {
        stock::verify_stream(&without_optional(&moved.stream)?, Format::Libxc)?;
    }
    Ok(())
}

/// Builds rxl and the library that is preloaded, and finds stock's helper.
///
/// # Errors
/// They cannot be built, or Debian's package is missing.
pub fn build() -> Result<Rig> {
    let output = unit::cargo()
        .args(["build", "--quiet", "--package", "rxl", "--package", "rxl-fake-xen-preload"])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("Cannot start cargo")?;
    ensure!(output.status.success(), "cargo build failed ({})", output.status);
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let programs = Programs {
        stock: stock::program("libxl-save-helper")?,
        rxl: artifact(&messages, "/rxl")?,
        preload: artifact(&messages, "/librxl_fake_xen_preload.so")?,
    };
    Ok(Rig { programs })
}

/// The file that cargo made whose path ends in `end`.
fn artifact(messages: &str, end: &str) -> Result<PathBuf> {
    let mut strings = messages.split('"').filter(|word| word.ends_with(end));
    strings.next().map(PathBuf::from).with_context(|| format!("cargo built no {end}"))
}
