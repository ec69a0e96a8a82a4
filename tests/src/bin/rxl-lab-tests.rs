//! The runner behind `tests/run`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rxl_tests::lab::Session;
use rxl_tests::tally::Tally;
use rxl_tests::{bad_input, smoke, soak, unit};

/// Runs rxl's tests; without a suite, those of CI: unit, then smoke.
///
/// Suites that need the lab use the one that is up, or boot one and take it down at the end.
#[derive(Parser)]
#[command(name = "tests/run", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    suite: Option<Suite>,
}

#[derive(Subcommand)]
enum Suite {
    /// Formatting, lints, and the tests of all crates; needs no lab
    Unit,
    /// Moves a PV and a PVH guest between rxl and rxl, and between rxl and the stock xl
    Smoke,
    /// Moves both guests there and back many times, then counts what is left behind
    Soak {
        /// How many times
        #[arg(long, default_value_t = 20)]
        rounds: u32,
    },
    /// Migrations that have to fail without harm to the guest
    BadInput,
}

fn main() -> ExitCode {
    let mut tally = Tally::new();
    match Arguments::parse().suite {
        None => {
            unit::run(&mut tally);
            in_lab(&mut tally, smoke::run);
        }
        Some(Suite::Unit) => unit::run(&mut tally),
        Some(Suite::Smoke) => in_lab(&mut tally, smoke::run),
        Some(Suite::Soak { rounds }) => in_lab(&mut tally, |tally, session| {
            soak::run(tally, session, rounds);
        }),
        Some(Suite::BadInput) => in_lab(&mut tally, bad_input::run),
    }
    tally.finish()
}

fn in_lab(tally: &mut Tally, suite: impl FnOnce(&mut Tally, &Session)) {
    if let Some(session) = tally.case("the lab is up, with rxl on it", Session::open) {
        suite(tally, &session);
    }
}
