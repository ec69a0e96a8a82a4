//! The fake Xen's suite: stock's save helper and rxl's, in every pairing, move guests that are
//! compared page by page. No lab, no Xen, native speed.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rxl_fake_xen::{Activity, GuestKind, Migration, Planted, Program, Programs, Rig};

use crate::stock::{self, Format};
use crate::tally::{Tally, note};
use crate::unit;

/// Who saves, who restores.
const PAIRS: [(Program, Program); 4] = [
    (Program::Stock, Program::Stock),
    (Program::Stock, Program::Rxl),
    (Program::Rxl, Program::Stock),
    (Program::Rxl, Program::Rxl),
];
const GUESTS: [GuestKind; 3] = [GuestKind::PvLinear, GuestKind::PvTree, GuestKind::Pvh];
const ACTIVITIES: [Activity; 3] = [Activity::Stopped, Activity::Writing, Activity::Ballooning];
/// Differences that are shown of a copy that differs.
const SHOWN_MAX: usize = 5;

/// Runs `runs` migrations, each with a seed of its own from `seed` on, which also says which cell
/// of the matrix it is. The first of each cell has its stream judged by stock's verifier.
pub fn run(tally: &mut Tally, runs: u64, seed: u64) {
    let Some(rig) = tally.case("the programs are built", build) else { return };
    let cells: Vec<_> = PAIRS
        .into_iter()
        .flat_map(|pair| GUESTS.map(|guest| (pair, guest)))
        .flat_map(|(pair, guest)| ACTIVITIES.map(|activity| (pair, guest, activity)))
        .collect();
    for (run, seed) in (0..runs).zip(seed..) {
        let index = usize::try_from(seed % cells.len() as u64).unwrap_or(0);
        let Some(((from, to), guest, activity)) = cells.get(index).copied() else { continue };
        let migration = Migration { from, to, guest, activity, seed };
        let judge = run < cells.len() as u64;
        let name = format!("{from} to {to}, {guest}, {activity}, seed {seed}");
        tally.case(&name, || migrate(&rig, &migration, judge));
    }
    let plants = Planted::ALL.into_iter().flat_map(|planted| PAIRS.map(|pair| (planted, pair)));
    for (planted, (from, to)) in plants {
        let name = format!("planted: {planted} ({from} to {to}): the comparison finds it");
        let (guest, activity) = (GuestKind::Pvh, Activity::Writing);
        let migration = Migration { from, to, guest, activity, seed };
        tally.case(&name, || {
            let differences = rig.migrate_with(planted, &migration)?;
            note(format!("{} differences", differences.len()));
            ensure!(!differences.is_empty(), "the comparison finds nothing");
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
    if judge {
        stock::verify_stream(&moved.stream, Format::Libxc)?;
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
