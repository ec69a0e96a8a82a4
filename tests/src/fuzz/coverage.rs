//! Which lines of the parsers the corpora reach.
//!
//! The program is built without optimisation and with a counter at every edge. libFuzzer runs a
//! corpus, and the seeds, as if to minimise them, and its control file says which counters each
//! input moved (`COV`). The places of the counters are in the program (section `__sancov_pcs`), and
//! its debugging information says which line each instruction belongs to. A line counts if there is
//! code for it, and is reached if the counter before the start of a part of it has moved. A counter
//! has 8 bits, so the body of a loop that is taken a multiple of 256 times looks as if it were not.
//! Declarations of types are left out: what is derived for them is not the parsers'.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use addr2line::{Context as Lines, gimli};
use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSection};
use rxl_fuzz::{TARGETS, Target};

use super::{COUNT_EDGES, build_with, corpus, directory, libfuzzer, run_logged, seeds};
use crate::tally::note;
use crate::unit::workspace;

/// Least percentage of lines.
const PERCENT_MIN: usize = 95;

/// The files that read what a peer, a file or a guest wrote.
const PARSERS: [&str; 33] = [
    "bitmap.rs",
    "frame.rs",
    "helper/channel.rs",
    "helper/invocation.rs",
    "helper/message.rs",
    "report.rs",
    "runs.rs",
    "source/batch.rs",
    "source/crew.rs",
    "source/pass.rs",
    "source/pv.rs",
    "source/workers.rs",
    "stream/libxc.rs",
    "stream/libxl.rs",
    "stream/link.rs",
    "target/crew.rs",
    "target/driver.rs",
    "target/hvm.rs",
    "target/links.rs",
    "target/machine.rs",
    "target/memory.rs",
    "target/p2m.rs",
    "target/pages.rs",
    "target/passes.rs",
    "target/pv.rs",
    "target/vcpu.rs",
    "x86/pv.rs",
    "xl/channel.rs",
    "xl/config.rs",
    "xl/handshake/mod.rs",
    "xl/handshake/receiver.rs",
    "xl/handshake/sender.rs",
    "xl/header.rs",
];

/// Where the parsers are, from the root of the tree.
const SOURCES: &str = "migrate/src/";

/// Lines of a file: those with code, and those of them that were reached.
#[derive(Default)]
struct Reached {
    code: BTreeSet<u32>,
    reached: BTreeSet<u32>,
}

/// Builds, runs all corpora, prints the table.
///
/// # Errors
/// Anything that fails, and a file with fewer lines reached than [`PERCENT_MIN`] percent.
pub(super) fn run() -> Result<()> {
    // Functions that nothing calls are to be there, and addresses are to be those of the file.
    let rustflags = format!(
        "{COUNT_EDGES} -Cllvm-args=-sanitizer-coverage-level=3 \
         -Cllvm-args=-sanitizer-coverage-prune-blocks=0 \
         -Clink-dead-code -Crelocation-model=static"
    );
    let program = build_with("dev", &rustflags)?;
    let mut moved = BTreeSet::new();
    for target in TARGETS {
        moved.extend(counters(&program, &target)?);
    }
    let bytes = fs::read(&program).context("Cannot read the program")?;
    let files = lines(&bytes, &moved)?;
    table(&files)
}

/// The counters that corpus and seeds of `target` move, as indices into their table.
fn counters(program: &Path, target: &Target) -> Result<BTreeSet<usize>> {
    let directory = directory(&format!("{}/coverage", target.name))?;
    fs::remove_dir_all(&directory).context("Cannot empty a directory")?;
    let (fewest, control) = (directory.join("fewest"), directory.join("control"));
    fs::create_dir_all(&fewest).context("Cannot make a directory")?;
    let mut command = libfuzzer(program, target);
    command.arg("-merge=1").arg(format!("-merge_control_file={}", control.display()));
    command.args([fewest, corpus(target), seeds(target)?]);
    run_logged(command, &directory.join("log"))?;
    let control = fs::read_to_string(control).context("Cannot read the control file")?;
    let lines = control.lines().filter_map(|line| line.strip_prefix("COV "));
    // The first number is that of the input.
    let numbers = lines.flat_map(|line| line.split(' ').skip(1));
    numbers.map(|number| number.parse().context("Cannot read the control file")).collect()
}

/// The lines of each parser's file.
fn lines(program: &[u8], moved: &BTreeSet<usize>) -> Result<BTreeMap<String, Reached>> {
    let object = object::File::parse(program).context("Cannot read the program")?;
    let table = object.section_by_name("__sancov_pcs").context("the program has no counters")?;
    let table = table.data().context("Cannot read the table of counters")?;
    // Pairs of an address and flags.
    let words = table.as_chunks::<16>().0.iter().map(|pair| pair.first_chunk::<8>());
    let places: Vec<u64> = words.flatten().map(|word| u64::from_le_bytes(*word)).collect();
    let visited = moved.iter().map(|index| places.get(*index).copied().context("no such counter"));
    let visited: BTreeSet<u64> = visited.collect::<Result<_>>()?;
    let places: BTreeSet<u64> = places.into_iter().collect();

    let section = |id: gimli::SectionId| {
        let section = object.section_by_name(id.name());
        let data = section.and_then(|section| section.data().ok()).unwrap_or_default();
        Ok::<_, gimli::Error>(gimli::EndianSlice::new(data, gimli::LittleEndian))
    };
    let dwarf = gimli::Dwarf::load(section).context("Cannot read the debugging information")?;
    let lines = Lines::from_dwarf(dwarf).context("Cannot read the debugging information")?;
    let mut files: BTreeMap<String, Reached> = BTreeMap::new();
    let ranges = lines.find_location_range(0, u64::MAX);
    for (address, _, location) in ranges.context("Cannot read the debugging information")? {
        let (Some(file), Some(line)) = (location.file, location.line) else { continue };
        let Some((_, name)) = file.split_once(SOURCES) else { continue };
        // Code up to the first counter of the program is none of a parser.
        let Some(place) = places.range(..=address).next_back() else { continue };
        let file = files.entry(name.to_owned()).or_default();
        file.code.insert(line);
        if visited.contains(place) {
            file.reached.insert(line);
        }
    }
    Ok(files)
}

/// Prints lines, lines reached and percent of each parser, and the lines that were not.
fn table(files: &BTreeMap<String, Reached>) -> Result<()> {
    note(format!("{:<28} {:>6} {:>8} {:>4}  not reached", "file", "lines", "reached", "%"));
    let mut poor = Vec::new();
    for name in PARSERS {
        let none = Reached::default();
        let file = files.get(name).unwrap_or(&none);
        let path = workspace().join(SOURCES).join(name);
        let missing = missing(&path, file)?;
        let lines = file.code.len() - declarations(&path, &file.code)?.len();
        ensure!(lines > 0, "no code of {name} is in the program");
        let reached = lines - missing.len();
        let percent = 100 * reached / lines;
        let list: Vec<String> = missing.iter().map(u32::to_string).collect();
        let list = list.join(" ");
        note(format!("{name:<28} {lines:>6} {reached:>8} {percent:>4}  {list}"));
        if percent < PERCENT_MIN {
            poor.push(name);
        }
    }
    ensure!(poor.is_empty(), "below {PERCENT_MIN} %: {}", poor.join(", "));
    Ok(())
}

fn missing(path: &Path, file: &Reached) -> Result<BTreeSet<u32>> {
    let missing: BTreeSet<u32> = file.code.difference(&file.reached).copied().collect();
    let declared = declarations(path, &missing)?;
    Ok(missing.difference(&declared).copied().collect())
}

/// Those of `lines` that declare: attributes, and types with what is derived for them. Types have
/// no code of their own, and rustfmt ends each with the indentation that it began with.
fn declarations(path: &Path, lines: &BTreeSet<u32>) -> Result<BTreeSet<u32>> {
    let text = fs::read_to_string(path).with_context(|| format!("Cannot read {path:?}"))?;
    let mut found = BTreeSet::new();
    let mut end: Option<String> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.trim_start();
        let indentation = line.get(..line.len() - code.len()).unwrap_or_default();
        let is_type = ["struct ", "enum "].iter().any(|word| {
            let item = code
                .strip_prefix("pub")
                .map_or(code, |rest| rest.split_once(' ').map_or(rest, |(_, item)| item));
            item.starts_with(word)
        });
        if end.is_none() && is_type && !code.ends_with(';') && !code.ends_with('}') {
            end = Some(format!("{indentation}}}"));
        }
        if end.is_some() || is_type || code.starts_with("#[") {
            found.insert(number);
        }
        if end.as_deref() == Some(line) {
            end = None;
        }
    }
    Ok(found.intersection(lines).copied().collect())
}
