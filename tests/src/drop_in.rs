//! A script that drives `xl` and knows nothing of rxl (`tests/scripts/drive-xl`), run word for word
//! with the stock `xl` and with rxl in its place (`rxl divert --as-xl`): every command has to end
//! with the same exit code, and to say what scripts look for in the same order.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_lab::{GuestKind, GuestSpec};

use crate::lab::{Session, spec};
use crate::tally::{Tally, note};
use crate::unit::workspace;

const SCRIPT: &str = include_str!("../scripts/drive-xl");
/// Where it is on host1.
const PATH: &str = "/usr/local/bin/drive-xl";
/// What it said with rxl in xl's place.
const TRANSCRIPT: &str = "docs/drop-in.md";
const GUEST: &str = "web1";
/// Pages that the guest rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 50;
/// Time for all of it, most of which is ssh in emulation.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What the other host's lines begin with.
const TARGETS: &str = "migration target: ";
/// What lines begin with that scripts look for.
const LOOKED_FOR: [&str; 6] = [
    "$ ",
    "(exit code",
    "migration ",
    "Migration successful",
    "Saving to ",
    "Loading new save file",
];

/// Runs the script with either; `update` writes the transcript.
pub fn run(tally: &mut Tally, session: &Session, update: bool) {
    let spec = GuestSpec { dirty_pages_per_s: DIRTY_PAGES_PER_S, ..spec(GUEST, GuestKind::Pv) };
    tally.case("the guest starts", || session.start_spec(&spec));
    let stock = tally.case("a script drives the stock xl", || drive(session));
    tally.case("the same script drives rxl in xl's place", || {
        on_all(session, "rxl divert --as-xl")?;
        let driven = drive(session);
        on_all(session, "rxl divert --undo")?;
        let (stock, driven) = (stock.context("nothing to compare with")?, driven?);
        ensure!(driven.contains("\nrxl: "), "rxl had nothing to do with it");
        ensure!(!stock.contains("\nrxl: "), "rxl had to do with the other");
        let (wanted, got) = (looked_for(&stock), looked_for(&driven));
        let differ = wanted.iter().zip(&got).find(|(wanted, got)| wanted != got);
        ensure!(differ.is_none(), "not the same: {differ:?}");
        ensure!(wanted.len() == got.len(), "{} lines instead of {}", got.len(), wanted.len());
        note(format!("{} lines that scripts look for are the same", got.len()));
        if update { write(&driven) } else { Ok(()) }
    });
    tally.case("the guest stops", || session.remove(GUEST));
}

/// What the script says, both outputs in order. The guest has to be all right after it.
fn drive(session: &Session) -> Result<String> {
    let host = session.host(1)?;
    host.write_file(PATH, "755", SCRIPT.as_bytes())?;
    let said = host.run_within(&format!("{PATH} {GUEST} host2 2>&1"), TIMEOUT)?;
    session.check(GUEST, host)?;
    Ok(said)
}

fn on_all(session: &Session, script: &str) -> Result<()> {
    session.lab().on_all_hosts(|host| host.run(script)).map(drop)
}

/// Lines that scripts look for, without the numbers in them. Those of the other host come last:
/// they travel by themselves, and so have no order beside this host's.
fn looked_for(said: &str) -> Vec<String> {
    let lines = said.lines().filter(|line| LOOKED_FOR.iter().any(|start| line.starts_with(start)));
    let (there, here): (Vec<_>, Vec<_>) = lines.partition(|line| line.starts_with(TARGETS));
    here.into_iter()
        .chain(there)
        .map(|line| match line.starts_with("(exit code") {
            true => line.to_owned(),
            false => line.replace(|c: char| c.is_ascii_digit(), "#"),
        })
        .collect()
}

fn write(said: &str) -> Result<()> {
    let mut text = String::from(
        "# A script that drives `xl`, with rxl in its place\n\n\
         `tests/scripts/drive-xl` knows nothing of rxl. After `rxl divert --as-xl` on both \
         hosts it says this, in\nthe lab; `tests/run drop-in` runs it with the stock `xl` as \
         well, and compares exit codes and the lines\nthat scripts look for. (`tests/run \
         drop-in --update` \
         writes this page.)\n\n```\n",
    );
    for line in said.lines().filter(|line| !line.contains("progress:")) {
        writeln!(text, "{}", line.trim_end())?;
    }
    text.push_str("```\n");
    std::fs::write(workspace().join(TRANSCRIPT), text).context("Cannot write the transcript")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_domains_do_not_matter_and_exit_codes_do() {
        let said = "$ xl list web1\nweb1 4 128\nmigration target: 12 ready\n(exit code 0)\n";
        let wanted = ["$ xl list web#", "(exit code 0)", "migration target: ## ready"];
        assert_eq!(looked_for(said), wanted);
    }
}
