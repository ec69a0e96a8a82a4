//! `rxl evacuate` and `/etc/rxl.toml` as a user meets them. No Xen is needed: scripts stand in for
//! `xl` here and for ssh, and a migration of rxl's own fails where there is no libxl to ask.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;

fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A host with two guests, one half of a migration, and two targets, one of which is off.
struct World(tempfile::TempDir);

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let lines = "echo Name ID Mem VCPUs State Time\n\
                     echo Domain-0 0 1024 1 r----- 1.0\n\
                     echo small 1 128 1 -b---- 1.0\n\
                     echo large 2 512 2 -b---- 1.0\n\
                     echo half--incoming 3 512 2 --p--- 1.0";
        script(dir.path(), "xl", lines);
        let off = "test \"$1\" = on || { echo off >&2; exit 255; }\necho 'free_memory : 4096'";
        script(dir.path(), "ssh", off);
        World(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn evacuate(&self, config: &str, args: &[&str]) -> Output {
        let config_path = self.path("rxl.toml");
        fs::write(&config_path, config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rxl"));
        command.env("RXL_XL", self.path("xl")).env("RXL_CONFIG", config_path);
        command.args(["evacuate", "-s", &self.path("ssh")]).args(args).output().unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_dry_run_says_who_would_go_where_and_does_nothing() {
    let world = World::new();
    let out = world.evacuate("[evacuate]\nto = ['off', 'on']\n", &["--dry-run"]);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    let said = text(&out.stdout);
    let words: Vec<Vec<&str>> = said.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(words[1][..2], ["large", "on"], "{said}");
    assert_eq!(words[2][..2], ["small", "on"], "{said}");
    assert!(said.contains("half--incoming  here") && said.contains("half of a migration"));
    assert!(said.ends_with("2 would be moved, 0 would be left\n"), "{said}");
    assert!(text(&out.stderr).contains("off gets no guest: it does not answer"), "{out:?}");
}

#[test]
fn guests_that_could_not_be_moved_are_named_with_the_reason() {
    let world = World::new();
    let report = world.path("report.json");
    let args = ["--to", "on", "--except", "large", "--report", &report];
    // Whatever keeps a migration from beginning where the tests run.
    let out = world.evacuate("", &args);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    let summary: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert_eq!((&summary["moved"], &summary["left"]), (&0.into(), &1.into()), "{summary}");
    let guest = &summary["guests"][0];
    assert_eq!((&guest["guest"], &guest["place"]), (&"small".into(), &"here".into()));
    assert!(guest["why"].as_str().unwrap().starts_with("on: "), "{summary}");
    assert!(text(&out.stdout).ends_with("0 moved, 1 left\n"), "{out:?}");
}

#[test]
fn without_a_target_that_answers_nothing_is_tried() {
    let world = World::new();
    let out = world.evacuate("", &["--to", "off"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).ends_with("rxl: no target can be used\n"), "{out:?}");
    let out = world.evacuate("", &["--to", "on", "--except", "nobody"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("--except nobody: there is no such guest here"));
}

#[test]
fn a_mistake_in_the_configuration_is_a_usage_error_with_its_line() {
    let world = World::new();
    let out = world.evacuate("[migrate]\n\nmax-pause = 'soon'\n", &["--to", "on"]);
    assert_eq!(out.status.code(), Some(2));
    let said = text(&out.stderr);
    assert!(said.contains("rxl.toml:3: invalid value 'soon' for '--max-pause <MS>'"), "{said}");
}
