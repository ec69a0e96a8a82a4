//! The runner behind `tests/run`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rxl_tests::tally::Tally;
use rxl_tests::unit;

/// Runs rxl's tests.
#[derive(Parser)]
#[command(name = "tests/run")]
struct Arguments {
    #[command(subcommand)]
    suite: Option<Suite>,
}

#[derive(Subcommand)]
enum Suite {
    /// Formatting, lints, and the tests of all crates; needs no lab
    Unit,
}

fn main() -> ExitCode {
    let mut tally = Tally::new();
    match Arguments::parse().suite {
        None | Some(Suite::Unit) => unit::run(&mut tally),
    }
    tally.finish()
}
