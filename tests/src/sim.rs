//! The simulator (`tests/sim`), built with its own profile and run as a program.

use anyhow::{Result, ensure};

use crate::tally::Tally;
use crate::unit::cargo;

/// Seeds within which each planted mistake has to be found.
const PLANT_SEEDS: &str = "10000";

/// Plants the mistakes that have to be found, then runs `seeds` seeds, in which none may be.
pub fn run(tally: &mut Tally, seeds: u64) {
    tally.case("simulator: planted mistakes are found", || {
        simulate(&["--plants", "--seeds", PLANT_SEEDS])
    });
    let name = format!("simulator: {seeds} seeds");
    tally.case(&name, || simulate(&["--seeds", &seeds.to_string()]));
}

/// Shows the run of one seed.
pub fn show(tally: &mut Tally, seed: u64) {
    let name = format!("simulator: seed {seed}");
    tally.case(&name, || simulate(&["--seed", &seed.to_string()]));
}

fn simulate(args: &[&str]) -> Result<()> {
    let build = ["run", "--quiet", "--profile", "sim", "--package", "rxl-sim", "--"];
    let status = cargo().args(build).args(args).status()?;
    ensure!(status.success(), "the simulator ended with {status}");
    Ok(())
}
