//! Every input of the corpora, and every seed, under plain `cargo test`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a panic is a failed test")]

use std::fs;
use std::path::{Path, PathBuf};

use rxl_fuzz::{TARGETS, Target};

/// Bytes of all corpora together.
const CORPORA_BYTES_MAX: u64 = 1 << 20;

fn corpus(target: &Target) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let entries = fs::read_dir(&directory).unwrap_or_else(|e| panic!("{directory:?}: {e}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{directory:?} is empty");
    files
}

#[test]
fn every_seed_and_every_input_of_the_corpora_is_dealt_with() {
    for target in TARGETS {
        target.seeds().iter().for_each(|seed| target.run(seed));
        for file in corpus(&target) {
            // Shown only if the test fails.
            println!("{}", file.display());
            target.run(&fs::read(&file).unwrap());
        }
    }
}

#[test]
fn the_corpora_are_small_and_of_known_targets() {
    let files = TARGETS.iter().flat_map(corpus);
    let bytes: u64 = files.map(|file| fs::metadata(file).unwrap().len()).sum();
    assert!(bytes <= CORPORA_BYTES_MAX, "{bytes} bytes");
    let directories = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in fs::read_dir(directories).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(Target::named(&name).is_some(), "no target is called {name}");
    }
}
