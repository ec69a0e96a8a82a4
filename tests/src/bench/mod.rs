//! Benchmarks that run in the lab (`tests/bench`). docs/bench.md says what their figures mean.
//!
//! Each prints a line for each run: JSON, or words for a reader.
#![allow(clippy::print_stdout, reason = "this is the output of the benchmarks")]

use std::io::{self, Write};

use anyhow::{Context, Result};
use rxl_lab::GuestSpec;
use serde::Serialize;

use crate::lab::Session;

pub mod backends;
pub mod cliff;
pub mod link;
pub mod locks;
pub mod mapping;
pub mod nics;
pub mod policy;
pub mod traps;

/// Prints one figure, as JSON if that is asked for, and lets it out at once: a run takes long.
///
/// # Errors
/// It cannot be written.
pub fn print<T: Serialize + std::fmt::Display>(figure: &T, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(figure)?);
    } else {
        println!("{figure}");
    }
    io::stdout().flush().context("Cannot write to standard output")
}

/// Starts a guest. One that ends while it boots is started again: the emulator makes that happen
/// once in a while, and a benchmark is too long to lose for it.
///
/// # Errors
/// It does not start.
pub fn start(session: &Session, spec: &GuestSpec) -> Result<()> {
    session.start_spec(spec).or_else(|error| {
        eprintln!("tests/bench: again: {error:#}");
        session.start_spec(spec)
    })
}

/// The middle one of `values`; of an even number, the lower of the two in the middle.
#[must_use]
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len().checked_sub(1)? / 2;
    values.get(middle).copied()
}

/// A number to one decimal.
#[must_use]
pub fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// A share or a ratio to two decimals.
#[must_use]
pub fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }
}
