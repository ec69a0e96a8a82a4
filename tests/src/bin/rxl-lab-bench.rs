//! The runner behind those suites of `tests/bench` that need the lab.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use rxl_tests::bench::{backends, cliff, mapping, nics, policy};

/// Benchmarks in the lab: they use the one that is up if it suffices, or boot one of their own.
#[derive(Parser)]
#[command(name = "tests/bench", max_term_width = 100)]
enum Bench {
    /// What mapping a guest's memory costs, by who maps and how
    Mapping(mapping::Options),
    /// Whole migrations by each way to map: privcmd's two, and rxl's kernel module
    Backends(backends::Options),
    /// How the time of a migration goes down with the number of NICs
    Nics(nics::Options),
    /// A guest that writes faster than a NIC carries: stock over one, rxl over four
    Cliff(cliff::Options),
    /// Whether the pause is what the user allows
    Policy(policy::Options),
}

fn main() -> ExitCode {
    let done = match Bench::parse() {
        Bench::Mapping(options) => mapping::run(&options),
        Bench::Backends(options) => backends::run(options),
        Bench::Nics(options) => nics::run(options),
        Bench::Cliff(options) => cliff::run(&options),
        Bench::Policy(options) => policy::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tests/bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
