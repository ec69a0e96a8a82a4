//! Cases that run one after the other, each shown as it goes, and the count at the end.
#![allow(clippy::print_stdout, reason = "this is the output of the test runner")]

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How many cases passed and failed so far.
#[derive(Debug, Default)]
pub struct Tally {
    passed: u64,
    failed: Vec<String>,
}

impl Tally {
    /// Nothing has run yet.
    #[must_use]
    pub fn new() -> Tally {
        Tally::default()
    }

    /// Runs one case and says how it ended. An error fails it; what it is worth is returned.
    pub fn case<T>(&mut self, name: &str, run: impl FnOnce() -> Result<T>) -> Option<T> {
        println!("{name} ...");
        flush();
        let start = Instant::now();
        let result = run();
        let took = seconds(start.elapsed());
        match result {
            Ok(value) => {
                println!("{name} ... ok ({took})");
                self.passed += 1;
                Some(value)
            }
            Err(error) => {
                println!("{name} ... FAILED ({took})\n    {error:#}");
                self.failed.push(name.to_owned());
                None
            }
        }
    }

    /// Adds what another runner counted.
    pub fn add(&mut self, name: &str, passed: u64, failed: u64) {
        self.passed += passed;
        self.failed.extend((0..failed).map(|_| name.to_owned()));
    }

    /// Prints which cases failed and the closing line. Nothing run at all is a failure.
    #[must_use]
    pub fn finish(self) -> ExitCode {
        for name in &self.failed {
            println!("failed: {name}");
        }
        println!("{} passed, {} failed", self.passed, self.failed.len());
        flush();
        if self.failed.is_empty() && self.passed > 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// A line that belongs to the case that runs.
pub fn note(line: impl std::fmt::Display) {
    println!("    {line}");
    flush();
}

fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

fn flush() {
    // Whoever reads the output may be gone; the exit code still says how it went.
    let _ = io::stdout().flush();
}
