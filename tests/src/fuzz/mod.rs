//! Runs the fuzz targets of `tests/fuzz` under libFuzzer, and measures what their corpora reach
//! ([`coverage`]).
//!
//! libFuzzer wants code that counts which edges are taken and tells what is compared. A stable
//! compiler can do that (LLVM's SanitizerCoverage pass); what it cannot is AddressSanitizer, which
//! safe code does not need. The instrumented programs have a target directory of their own.

mod coverage;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rxl_fuzz::{TARGETS, Target};

use crate::tally::{Tally, note};
use crate::unit::{cargo, workspace};

/// The triple is named so that build scripts and macros are not instrumented.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Counters on every edge, and a table of where they are: for libFuzzer and for coverage.
const COUNT_EDGES: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table";
/// What makes libFuzzer find more.
const FOR_SEARCH: &str = "-Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Cllvm-args=-sanitizer-coverage-stack-depth \
    -Cllvm-args=-simplifycfg-branch-fold-threshold=0";
/// An input that takes longer hangs.
const SECONDS_MAX: u32 = 10;
/// Beyond this much memory something leaks; single requests are limited by the targets.
const MEMORY_MIB_MAX: u32 = 1024;
/// Longest input that is made: that of the longest seeds, and some.
const INPUT_BYTES_MAX: u32 = 32 << 10;

/// What to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// One target, as `docs/fuzzing.md` names it [default: all, one after the other]
    target: Option<String>,
    /// How long to search with each
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Put what was found into the corpus, and leave out what adds nothing
    #[arg(long)]
    keep: bool,
    /// Do not search, but show which lines of the parsers the corpora reach
    #[arg(long, conflicts_with_all = ["target", "keep"])]
    coverage: bool,
}

/// Runs it.
pub fn run(tally: &mut Tally, options: &Options) {
    if options.coverage {
        tally.case("lines of the parsers that the corpora reach", coverage::run);
        return;
    }
    let targets = match &options.target {
        None => TARGETS.to_vec(),
        Some(name) => Target::named(name).into_iter().collect(),
    };
    if targets.is_empty() {
        let names = TARGETS.map(|target| target.name).join(", ");
        tally.case("fuzzing", || -> Result<()> { bail!("no such target; there are: {names}") });
        return;
    }
    let Some(program) = tally.case("libFuzzer's program", build) else { return };
    for target in targets {
        let name = format!("fuzzing {}: {}", target.name, target.about);
        tally.case(&name, || search(&program, &target, options));
    }
}

fn build() -> Result<PathBuf> {
    let rustflags = format!("{COUNT_EDGES} {FOR_SEARCH}");
    build_with("release", &rustflags)
}

/// The program, built with `profile`, `release` or `dev`.
fn build_with(profile: &str, rustflags: &str) -> Result<PathBuf> {
    let target_dir = directory("build")?;
    let status = cargo()
        .args(["build", "--quiet", "--target", TRIPLE, "--profile", profile])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("RUSTFLAGS", rustflags)
        .current_dir(workspace().join("tests/fuzz/libfuzzer"))
        .status()
        .context("Cannot start cargo")?;
    ensure!(status.success(), "the program does not build ({status})");
    let profile = if profile == "dev" { "debug" } else { profile };
    Ok(target_dir.join(TRIPLE).join(profile).join("rxl-libfuzzer"))
}

/// A directory for fuzzing, beside what cargo builds.
fn directory(name: &str) -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| workspace().join("target"));
    let directory = target.join("fuzz").join(name);
    fs::create_dir_all(&directory).with_context(|| format!("Cannot make {directory:?}"))?;
    Ok(directory)
}

fn corpus(target: &Target) -> PathBuf {
    workspace().join("tests/fuzz/corpus").join(target.name)
}

/// The directory of `target`'s seeds, written anew.
fn seeds(target: &Target) -> Result<PathBuf> {
    let seeds = directory(&format!("{}/seeds", target.name))?;
    for (number, seed) in target.seeds().into_iter().enumerate() {
        fs::write(seeds.join(format!("seed-{number}")), seed).context("Cannot write a seed")?;
    }
    Ok(seeds)
}

fn search(program: &Path, target: &Target, options: &Options) -> Result<()> {
    let (seeds, corpus) = (seeds(target)?, corpus(target));
    let found = directory(&format!("{}/found", target.name))?;
    let crashes = directory(&format!("{}/crashes", target.name))?;
    fs::create_dir_all(&corpus).context("Cannot make the directory of the corpus")?;
    if options.minutes > 0 {
        let mut command = libfuzzer(program, target);
        command.args([&found, &corpus, &seeds]);
        command.arg(format!("-max_total_time={}", options.minutes * 60));
        command.arg(format!("-artifact_prefix={}/", crashes.display()));
        let log = run_logged(command, &crashes.with_file_name("search.log"))?;
        let number = |name: &str| {
            let line = log.lines().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
            line.and_then(|value| value.trim_start_matches(':').trim().parse::<u64>().ok())
        };
        let executions = number("number_of_executed_units").context("libFuzzer gave no figures")?;
        let new = number("new_units_added").unwrap_or(0);
        let minutes = options.minutes;
        note(format!("{minutes} minutes, {executions} executions, {new} new inputs, 0 crashes"));
    }
    if options.keep {
        keep(program, target, &[&corpus, &found, &seeds])?;
    }
    Ok(())
}

/// Replaces the corpus by the fewest inputs of `from` that reach all that they reach together.
fn keep(program: &Path, target: &Target, from: &[&Path]) -> Result<()> {
    let fewest = directory(&format!("{}/fewest", target.name))?;
    fs::remove_dir_all(&fewest).context("Cannot empty a directory")?;
    fs::create_dir_all(&fewest).context("Cannot make a directory")?;
    let mut command = libfuzzer(program, target);
    // Of inputs that take the same edges more often, one will do.
    command.args(["-merge=1", "-use_counters=0"]).arg(&fewest).args(from);
    run_logged(command, &fewest.with_file_name("merge.log"))?;
    let corpus = corpus(target);
    fs::remove_dir_all(&corpus).context("Cannot empty the corpus")?;
    fs::create_dir_all(&corpus).context("Cannot make the corpus")?;
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(&fewest).context("Cannot read what was kept")? {
        let entry = entry.context("Cannot read what was kept")?;
        bytes += fs::copy(entry.path(), corpus.join(entry.file_name()))
            .context("Cannot write the corpus")?;
        files += 1;
    }
    note(format!("the corpus has {files} inputs, {bytes} bytes"));
    Ok(())
}

/// libFuzzer with the limits of every run.
fn libfuzzer(program: &Path, target: &Target) -> Command {
    let mut command = Command::new(program);
    command
        .env("RXL_FUZZ_TARGET", target.name)
        .arg(format!("-timeout={SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg("-print_final_stats=1")
        .stdin(Stdio::null());
    command
}

/// Runs `command` and gives back all that it said, which is also in the file `log`.
fn run_logged(mut command: Command, log: &Path) -> Result<String> {
    let file = File::create(log).with_context(|| format!("Cannot make {log:?}"))?;
    let both = file.try_clone().context("Cannot use the log")?;
    let status = command.stdout(both).stderr(file).status().context("Cannot start libFuzzer")?;
    let text = String::from_utf8_lossy(&fs::read(log).context("Cannot read the log")?).into_owned();
    if !status.success() {
        let last: Vec<&str> = text.lines().rev().take(25).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        bail!("libFuzzer ended with {status}; {log:?} ends with\n{}", last.join("\n"));
    }
    Ok(text)
}
