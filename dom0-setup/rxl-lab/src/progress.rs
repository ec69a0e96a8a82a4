//! One line a step on standard error, with the seconds it took.
//!
//! Plain lines rather than a bar: the lab's output is read in logs at least as often as on a
//! terminal, and steps of several hosts finish in any order.

use std::time::Instant;

use anyhow::Result;

/// Runs `work` and prints `what` with its duration when it ends, well or not.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let outcome = work();
    let seconds = start.elapsed().as_secs_f64();
    match &outcome {
        Ok(_) => eprintln!("lab: {seconds:6.1} s  {what}"),
        Err(_) => eprintln!("lab: {seconds:6.1} s  {what}: failed"),
    }
    outcome
}

/// Prints a line that is worth reading though nothing failed.
pub(crate) fn note(what: &str) {
    eprintln!("lab:           {what}");
}
