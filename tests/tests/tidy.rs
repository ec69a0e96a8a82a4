//! House rules that no lint knows: which crate may use which, where `unsafe` may be, sizes of
//! files and lines, what may not be in the tree, and licences.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a panic is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Lines of a file of Rust or C. The house rule is about 600; past this a file has to be split.
const FILE_LINES_MAX: usize = 700;
/// Characters of a line of Rust, C or shell.
const LINE_CHARS_MAX: usize = 100;

/// What each crate may depend on among ours. A new crate gets a line here.
const CRATE_GRAPH: [(&str, &[&str]); 13] = [
    ("rxl-xen-sys", &[]),
    ("rxl-migrate", &[]),
    ("rxl-toolstack", &["rxl-migrate", "rxl-xen-sys"]),
    ("rxl", &["rxl-migrate", "rxl-toolstack"]),
    ("rxl-fuzz", &["rxl-migrate"]),
    ("rxl-lab", &[]),
    ("rxl-guest", &[]),
    ("rxl-fake-xen", &["rxl-migrate", "rxl-xen-sys"]),
    ("rxl-fake-xen-preload", &[]),
    ("rxl-sim", &["rxl-migrate"]),
    ("rxl-range-lock", &[]),
    ("rxl-relay", &["rxl-migrate"]),
    ("rxl-tests", &["rxl-fake-xen", "rxl-fuzz", "rxl-lab", "rxl-migrate", "rxl-toolstack"]),
];

/// The licence of each of our crates that is not GPL-3.0-only.
const LGPL_CRATES: [&str; 2] = ["rxl-migrate", "rxl-xen-sys"];

/// Where `unsafe` may be. `toolstack` denies it but for modules that it names; of the others one
/// takes the place of C libraries in a test, one runs the kernel module's C code there, and one is
/// a program of the lab's guests that fills raw memory.
const UNSAFE_PLACES: [&str; 5] = [
    "xen-sys/",
    "toolstack/",
    "tests/fake-xen-preload/src/",
    "tests/range-lock/src/c.rs",
    "dom0-setup/rxl-guest/src/memory.rs",
];

/// Where C may be: what is bound, the kernel module, and what takes the kernel's place in a test.
const C_PLACES: [&str; 3] = ["xen-sys/", "dom0-setup/kmod/", "tests/range-lock/shim/"];

/// Shell scripts of the lab's hosts carry on after a failed command: a host whose boot stops half
/// way cannot be asked why, and a transport still brings what the other end says.
const HOST_SCRIPTS: &str = "dom0-setup/rxl-lab/recipe/";

/// Crates that are not from the public registry have no business in the lock file.
const REGISTRY: &str = concat!("registry+https://github.com/rust-lang/crates", ".io-index");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The output of `cargo metadata` for the whole workspace.
fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform"])
        .arg("x86_64-unknown-linux-gnu")
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
}

/// Ours (true) or everybody else's packages.
fn packages(metadata: &Value, ours: bool) -> impl Iterator<Item = &Value> {
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages.filter(move |p| p["source"].is_null() == ours)
}

/// Every file of the tree that is ours, by its path from the root, with its text if it is text.
fn files() -> Vec<(String, Option<String>)> {
    let root = root();
    let mut found = Vec::new();
    let mut left = vec![root.clone()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            // A file, not a directory, in a second work tree.
            if name == ".git" {
                continue;
            }
            let hidden = name.starts_with('.') && name != ".ci";
            if entry.file_type().unwrap().is_dir() {
                if !hidden && name != "target" {
                    left.push(path);
                }
            } else {
                let content = fs::read(&path).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                found.push((path.strip_prefix(&root).unwrap().display().to_string(), content));
            }
        }
    }
    found.sort();
    assert!(found.iter().any(|(path, _)| path == "migrate/src/lib.rs"));
    found
}

/// The Rust files, with their text.
fn rust_files() -> Vec<(String, String)> {
    let rust = files().into_iter().filter(|(path, _)| path.ends_with(".rs"));
    rust.map(|(path, content)| (path, content.expect("Rust files are UTF-8"))).collect()
}

/// The C files, with their text.
fn files_in_c() -> Vec<(String, String)> {
    let c = files().into_iter().filter(|(path, _)| path.ends_with(".c") || path.ends_with(".h"));
    c.map(|(path, content)| (path, content.expect("C files are UTF-8"))).collect()
}

/// Fails with all of `offences`, a line each.
#[track_caller]
fn assert_none(offences: &[String], rule: &str) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

/// Every line of `files` for which `is_offence` holds, as `path:line: text`.
fn lines_that(files: &[(String, String)], is_offence: impl Fn(&str) -> bool) -> Vec<String> {
    let lines = files.iter().flat_map(|(path, content)| {
        content.lines().enumerate().map(move |(index, line)| (path, index + 1, line))
    });
    lines
        .filter(|(_, _, line)| is_offence(line))
        .map(|(path, number, line)| format!("{path}:{number}: {}", line.trim()))
        .collect()
}

#[test]
fn crates_depend_on_each_other_only_as_the_design_says() {
    let metadata = metadata();
    let graph: BTreeMap<_, _> = CRATE_GRAPH.into_iter().collect();
    let mut offences = Vec::new();
    let names: BTreeSet<_> = packages(&metadata, true).map(|p| text(p, "name")).collect();
    for package in packages(&metadata, true) {
        let name = text(package, "name");
        let Some(allowed) = graph.get(name) else {
            offences.push(format!("{name} is not in the graph"));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = text(dependency, "name");
            // A crate may name itself, to test with a feature on.
            if names.contains(other) && other != name && !allowed.contains(&other) {
                offences.push(format!("{name} may not depend on {other}"));
            }
        }
    }
    offences.extend(graph.keys().filter(|n| !names.contains(*n)).map(|n| format!("no crate {n}")));
    assert_none(&offences, "the crate graph");
}

#[test]
fn the_engine_builds_where_no_xen_library_is_installed() {
    let metadata = metadata();
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| (text(node, "id"), node))
        .collect();
    let by_id: BTreeMap<_, _> = packages(&metadata, true)
        .chain(packages(&metadata, false))
        .map(|p| (text(p, "id"), p))
        .collect();
    let engine = by_id.values().find(|p| text(p, "name") == "rxl-migrate").unwrap();
    let (mut left, mut seen) = (vec![text(engine, "id")], BTreeSet::new());
    while let Some(id) = left.pop() {
        if seen.insert(id) {
            left.extend(nodes[id]["deps"].as_array().unwrap().iter().map(|d| text(d, "pkg")));
        }
    }
    assert!(seen.len() > 5, "the engine has dependencies: {seen:?}");
    let linking = seen.into_iter().filter(|id| !by_id[id]["links"].is_null());
    // One is of pure Rust and uses `links` for something other than a library, one has its library
    // with it.
    let harmless = ["rayon-core", "zstd-sys"];
    let linking = linking.filter(|id| !harmless.contains(&text(by_id[id], "name")));
    let offences: Vec<_> = linking.map(|id| text(by_id[id], "name").to_owned()).collect();
    assert_none(&offences, "crates behind rxl-migrate that need a C library");
}

/// Whether code, not a comment or a string, says `unsafe`.
fn says_unsafe(line: &str) -> bool {
    let outside_strings: String = line.split('"').step_by(2).collect();
    let code = outside_strings.split("//").next().unwrap_or("");
    let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.any(|word| word == "unsafe")
}

#[test]
fn unsafe_code_is_only_where_the_design_puts_it() {
    let files = rust_files();
    let tidy = file!();
    let elsewhere: Vec<_> = files
        .iter()
        .filter(|(path, _)| !UNSAFE_PLACES.iter().any(|place| path.starts_with(place)))
        .filter(|(path, _)| !tidy.ends_with(path.as_str()))
        .cloned()
        .collect();
    assert_none(&lines_that(&elsewhere, says_unsafe), "`unsafe` outside its places");
    for (path, attribute) in [
        ("migrate/src/lib.rs", "#![forbid(unsafe_code)]"),
        ("xl-shim/src/main.rs", "#![forbid(unsafe_code)]"),
        ("toolstack/src/lib.rs", "#![deny(unsafe_code)]"),
    ] {
        let file = files.iter().find(|(other, _)| other == path).unwrap();
        assert!(file.1.contains(attribute), "{path} has no {attribute}");
    }
    let silent = files.iter().filter(|(path, content)| {
        path.starts_with("toolstack/src/")
            && content.lines().any(says_unsafe)
            && !content.contains("//! # Safety")
    });
    let silent: Vec<_> = silent.map(|(path, _)| path.clone()).collect();
    assert_none(&silent, "modules with `unsafe` whose documentation has no \"# Safety\"");
}

#[test]
fn c_code_is_only_where_the_design_puts_it() {
    let c = files_in_c().into_iter().map(|(path, _)| path);
    let elsewhere = c.filter(|path| !C_PLACES.iter().any(|place| path.starts_with(place)));
    assert_none(&elsewhere.collect::<Vec<_>>(), "C outside its places");
}

#[test]
fn files_and_lines_are_short_enough_to_read() {
    let mut files = rust_files();
    files.extend(files_in_c());
    let long = files.iter().filter(|(_, content)| content.lines().count() > FILE_LINES_MAX);
    let long: Vec<_> = long.map(|(path, c)| format!("{path}: {}", c.lines().count())).collect();
    assert_none(&long, "files to be split");
    let wide = lines_that(&files, |line| line.chars().count() > LINE_CHARS_MAX);
    assert_none(&wide, "lines over 100 characters");
}

#[test]
fn nothing_is_left_unfinished_or_switched_off() {
    let words = [
        concat!("#[", "ignore"),
        concat!("#[", "should_panic"),
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("db", "g!("),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
    ];
    let offences = lines_that(&rust_files(), |line| words.iter().any(|word| line.contains(word)));
    assert_none(&offences, "leftovers");
}

/// Hosts that files may name: where a reader finds more.
/// Names under `.test` belong to nobody.
const HOSTS: [&str; 8] = [
    "docs.kernel.org",
    "docs.rs",
    "github.com",
    "rustup.rs",
    "static.rust-lang.org",
    "www.w3.org",
    "xenbits.xen.org",
    "xenbits.xenproject.org",
];

#[test]
fn no_file_names_a_machine_of_its_authors() {
    let paths = [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/Us", "ers/")];
    let texts: Vec<_> = files()
        .into_iter()
        .filter(|(path, _)| !path.starts_with("LICENSE") && path != "Cargo.lock")
        .filter_map(|(path, content)| Some((path, content?)))
        .collect();
    let named = lines_that(&texts, |line| paths.iter().any(|path| line.contains(path)));
    assert_none(&named, "paths of somebody's machine");
    let urls = lines_that(&texts, |line| {
        line.match_indices("://").any(|(at, _)| {
            let host = line[at + 3..].split(|c: char| !c.is_alphanumeric() && c != '.' && c != '-');
            let host = host.map(|h| h.trim_end_matches('.')).next().unwrap_or("");
            (line[..at].ends_with("http") || line[..at].ends_with("https"))
                && host.contains('.')
                && !HOSTS.contains(&host)
                && !host.ends_with(".test")
        })
    });
    assert_none(&urls, "hosts that are not in the list");
}

#[test]
fn every_dependency_comes_from_crates_io() {
    let locks = ["Cargo.lock", "tests/fuzz/libfuzzer/Cargo.lock"];
    let locks = locks.map(|lock| fs::read_to_string(root().join(lock)).unwrap()).concat();
    let sources = locks.lines().filter_map(|line| line.strip_prefix("source = "));
    let others: Vec<_> = sources.filter(|s| s.trim_matches('"') != REGISTRY).collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(!root().join(".cargo").exists(), "settings of one machine are in the tree");
}

#[test]
fn shell_scripts_start_strict_and_stay_narrow() {
    let scripts: Vec<(String, String)> = files()
        .into_iter()
        .filter_map(|(path, content)| Some((path, content?)))
        .filter(|(_, content)| {
            let shebang = content.lines().next().unwrap_or("");
            shebang.starts_with("#!") && shebang.ends_with("sh")
        })
        .collect();
    assert!(scripts.iter().any(|(path, _)| path == "tests/run"), "no script found");
    let lax = scripts.iter().filter(|(path, content)| {
        let first = content.lines().find(|l| !l.trim().is_empty() && !l.starts_with('#'));
        !path.starts_with(HOST_SCRIPTS) && !first.is_some_and(|l| l.starts_with("set -eu"))
    });
    let lax: Vec<_> = lax.map(|(path, _)| path.clone()).collect();
    assert_none(&lax, "scripts whose first command is not `set -eu`");
    let wide = lines_that(&scripts, |line| line.chars().count() > LINE_CHARS_MAX);
    assert_none(&wide, "lines over 100 characters");
}

#[test]
fn every_crate_has_the_licence_of_its_directory() {
    let metadata = metadata();
    let wrong = packages(&metadata, true).filter_map(|package| {
        let name = text(package, "name");
        let lgpl = LGPL_CRATES.contains(&name);
        let wanted = if lgpl { "LGPL-2.1-or-later" } else { "GPL-3.0-only" };
        (package["license"] != wanted).then(|| format!("{name}: {}", package["license"]))
    });
    assert_none(&wrong.collect::<Vec<_>>(), "licences of our crates");
}

#[test]
fn every_dependency_has_a_licence_that_deny_toml_allows() {
    let deny = fs::read_to_string(root().join("deny.toml")).unwrap();
    let deny: toml::Table = deny.parse().unwrap();
    let allowed: BTreeSet<_> = deny["licenses"]["allow"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| spdx::license_id(id.as_str().unwrap()).unwrap().name)
        .collect();
    let metadata = metadata();
    let offences = packages(&metadata, false).filter_map(|package| {
        let licence = package["license"].as_str().unwrap_or("none");
        let fine = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX).is_ok_and(|e| {
            e.evaluate(|req| req.license.id().is_some_and(|id| allowed.contains(id.name)))
        });
        (!fine)
            .then(|| format!("{} {}: {licence}", text(package, "name"), text(package, "version")))
    });
    assert_none(&offences.collect::<Vec<_>>(), "licences that deny.toml does not allow");
}
