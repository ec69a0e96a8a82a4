//! What needs no lab: formatting, lints, and the tests of all crates by `cargo test`.
#![allow(clippy::print_stdout, reason = "this is the output of the test runner")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::tally::{Tally, note};

/// Runs all of it.
pub fn run(tally: &mut Tally) {
    if has_component("fmt") {
        let args = ["fmt", "--all", "--check"];
        tally.case("formatting (cargo fmt)", || cargo_succeeds(&args));
    }
    if has_component("clippy") {
        let args = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
        tally.case("lints (cargo clippy)", || cargo_succeeds(&args));
    }
    let counts = tally.case("tests of the crates (cargo test)", cargo_test);
    if let Some((passed, failed)) = counts {
        tally.add("a test of the crates (see above)", passed, failed);
    }
}

/// Cargo, in the workspace.
pub fn cargo() -> Command {
    let program = std::env::var_os("CARGO").map_or(PathBuf::from("cargo"), PathBuf::from);
    let mut command = Command::new(program);
    command.current_dir(workspace()).stdin(Stdio::null());
    command
}

/// The root of the tree.
#[must_use]
pub fn workspace() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// Not every toolchain has every component; the tests that judge behaviour need none.
fn has_component(name: &str) -> bool {
    let output = cargo().args([name, "--version"]).output();
    let found = output.is_ok_and(|output| output.status.success());
    if !found {
        note(format!("NOT CHECKED: this toolchain has no `cargo {name}`"));
    }
    found
}

fn cargo_succeeds(args: &[&str]) -> Result<()> {
    let status = cargo().args(args).status().context("Cannot start cargo")?;
    ensure!(status.success(), "`cargo {}` failed ({status})", args.join(" "));
    Ok(())
}

/// Runs every test of every crate, shows the output, and counts: passed, failed.
fn cargo_test() -> Result<(u64, u64)> {
    let mut child = cargo()
        .args(["test", "--workspace", "--quiet", "--no-fail-fast"])
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no standard output")?;
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(output).lines() {
        let line = line.context("Cannot read the output of cargo")?;
        if let Some((good, bad)) = counts(&line) {
            passed += good;
            failed += bad;
        }
        println!("{line}");
    }
    let status = child.wait().context("Cannot wait for cargo")?;
    ensure!(passed + failed > 0, "no test ran ({status})");
    ensure!(status.success() || failed > 0, "`cargo test` failed ({status})");
    Ok((passed, failed))
}

/// The numbers of a line `test result: ok. 3 passed; 0 failed; ...`.
fn counts(line: &str) -> Option<(u64, u64)> {
    let (_, results) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what: &str| {
        let part = results.split("; ").find_map(|part| part.strip_suffix(what));
        part.and_then(|count| count.trim().parse().ok())
    };
    Some((number("passed")?, number("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_of_a_test_program_is_counted_and_no_other() {
        let line = "test result: FAILED. 6 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(counts(line), Some((6, 4)));
        let line = "test result: ok. 12 passed; 0 failed; 0 ignored; finished in 0.00s";
        assert_eq!(counts(line), Some((12, 0)));
        assert_eq!(counts("test passed; 3 passed ... ok"), None);
    }
}
