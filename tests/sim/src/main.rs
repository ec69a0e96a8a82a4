//! `tests/run sim`: runs seeds and says which broke a rule.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this is the output of a test")]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use rayon::prelude::*;
use rxl_sim::{Coverage, PLANTS, Verdict, run};

/// Simulates migrations in which anything goes wrong.
#[derive(Parser)]
#[command(name = "tests/run sim", max_term_width = 100)]
struct Arguments {
    /// How many seeds
    #[arg(long, default_value_t = 2_000)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// One seed, with a trace of what happens
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// Plant each of the mistakes that the checkers know how to find, and see that they do, within
    /// that many seeds
    #[arg(long)]
    plants: bool,
}

/// Seeds that a part of the work has.
const PART: u64 = 1_000;
/// Violations that are shown.
const SHOWN_MAX: usize = 20;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.seed {
        Some(seed) => show(&run(seed, None, true)),
        None if arguments.plants => find_plants(arguments.from, arguments.seeds),
        None => run_all(arguments.from, arguments.seeds),
    }
}

/// The trace of one run.
fn show(verdict: &Verdict) -> ExitCode {
    verdict.lines.iter().for_each(|line| println!("{line}"));
    println!("digest {:016x}", verdict.digest);
    verdict.violations.iter().for_each(|what| println!("VIOLATION: {what}"));
    if verdict.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plants each mistake and looks for it.
fn find_plants(from: u64, seeds: u64) -> ExitCode {
    let mut missed = 0;
    for plant in PLANTS {
        let found = (from..from + seeds)
            .into_par_iter()
            .map(|seed| run(seed, Some(plant), false))
            .find_first(|verdict| !verdict.violations.is_empty());
        match found {
            Some(Verdict { seed, violations, .. }) => {
                let what = violations.first().map_or("", String::as_str);
                println!("{plant:?}: found by seed {seed}: {what}");
            }
            None => {
                println!("{plant:?}: NOT FOUND in {seeds} seeds");
                missed += 1;
            }
        }
    }
    println!("{} planted, {missed} not found", PLANTS.len());
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_all(from: u64, seeds: u64) -> ExitCode {
    let start = Instant::now();
    let (mut coverage, mut broken, mut digest) = (Coverage::default(), Vec::new(), 0_u64);
    let mut first = from;
    while first < from + seeds {
        let end = (first + PART).min(from + seeds);
        let verdicts: Vec<Verdict> =
            (first..end).into_par_iter().map(|seed| run(seed, None, false)).collect();
        for verdict in verdicts {
            coverage.add(&verdict.coverage);
            digest = digest.rotate_left(1) ^ verdict.digest;
            if !verdict.violations.is_empty() {
                broken.push((verdict.seed, verdict.violations));
            }
        }
        first = end;
    }
    print!("{coverage}");
    let mut kinds: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (seed, violations) in &broken {
        for what in violations {
            kinds.entry(what).or_insert((0, *seed)).0 += 1;
        }
    }
    for (what, (count, seed)) in kinds.iter().take(SHOWN_MAX) {
        println!("VIOLATION in {count} seeds, the first is {seed}: {what}");
    }
    let took = start.elapsed().as_secs_f64();
    println!("{seeds} seeds, {} violations, digest {digest:016x}, {took:.1} s", broken.len());
    if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
