//! The program as a user or a script calls it. No Xen is needed: what would need it is the real
//! `xl`'s, for which a script stands in.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Output;

use assert_cmd::Command;

fn rxl(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rxl"));
    command.env("RXL_XL", "/nonexistent/xl").args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A script that prints its name and arguments, and ends with code 3.
fn fake_xl() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("xl");
    std::fs::write(&path, "#!/bin/sh\nfor a; do echo \"[$a]\"; done\nexit 3\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    (dir, path)
}

#[test]
fn every_other_verb_is_the_real_xls_with_all_its_arguments() {
    let (_dir, xl) = fake_xl();
    for args in [
        &["-vv", "list", "-l", "a b"] as &[&str],
        &["dump-core", "-c", "dom", "file"],
        &["vcpu-list", "--help"],
        &["help", "list"],
        &["migrate-receive", "-r", "-e"],
        &["-f"],
        &[],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rxl"));
        let out = command.env("RXL_XL", &xl).args(args).output().unwrap();
        let expected: String = args.iter().map(|a| format!("[{a}]\n")).collect();
        assert_eq!((text(&out.stdout), out.status.code()), (expected, Some(3)), "{args:?}");
    }
}

#[test]
fn without_a_real_xl_the_error_names_what_was_looked_for() {
    let out = rxl(&["list"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("running /nonexistent/xl"), "{out:?}");
}

#[test]
fn an_xl_that_leads_back_to_rxl_is_found_out() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rxl"));
    let out = command.env("RXL_XL", env!("CARGO_BIN_EXE_rxl")).arg("list").output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("leads back to rxl"), "{out:?}");
}

#[test]
fn usage_errors_are_xls_words_and_exit_code_2() {
    for (args, words) in [
        (&["migrate"] as &[&str], "'xl migrate' requires at least 2 arguments."),
        (&["migrate", "dom"], "'xl migrate' requires at least 2 arguments."),
        (&["migrate", "-Z", "dom", "host"], "option `Z' not supported."),
        (&["migrate", "dom", "host", "--frobnicate"], "option `--frobnicate' not supported."),
        (&["migrate-receive", "-x"], "option `x' not supported."),
        (&["resume"], "'xl resume' requires at least 1 argument."),
        (&["cancel"], "'xl cancel' requires at least 1 argument."),
        (&["save", "dom"], "'xl save' requires at least 2 arguments."),
        (&["save", "-x", "dom", "file"], "option `x' not supported."),
        (&["restore", "-p"], "'xl restore' requires at least 1 argument."),
    ] {
        let out = rxl(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert_eq!(text(&out.stdout), "");
        let stderr = text(&out.stderr);
        assert!(stderr.starts_with(words), "{args:?}: {stderr}");
        assert!(stderr.contains("Usage: "), "{stderr}");
    }
}

#[test]
fn help_names_rxls_verbs_and_says_whose_the_others_are() {
    for args in [&["help"] as &[&str], &["--help"], &["-h"]] {
        let out = rxl(args);
        let help = text(&out.stdout);
        assert_eq!(out.status.code(), Some(0));
        assert!(help.contains("migrate-receive") && help.contains("Every other verb is xl's"));
        assert!(!help.contains("domain-monitor"), "{help}");
    }
    for args in [&["migrate", "--help"] as &[&str], &["help", "migrate"]] {
        let out = rxl(args);
        assert_eq!(out.status.code(), Some(0));
        let help = text(&out.stdout);
        assert!(help.contains("--receiver <CMD>") && !help.contains("--live"), "{help}");
    }
    let version = format!("rxl {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(text(&rxl(&["--version"]).stdout), version);
}

#[test]
fn completions_and_manual_name_the_verbs_and_options() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(text(&rxl(&["completions", shell]).stdout).contains("migrate-receive"), "{shell}");
    }
    let man = text(&rxl(&["man"]).stdout);
    assert!(man.contains(".SH \"RXL MIGRATE\"") && man.contains("\\-\\-receiver"), "{man}");
    for (verb, words) in [
        ("migrate", "Exit codes: 0 the domain runs at the target"),
        ("migrate-receive", "standard input"),
        ("save", "Exit codes: 0 it is saved"),
        ("restore", "Exit codes: 0 the domain is there"),
        ("resume", "left suspended"),
        ("status", "As JSON"),
        ("cancel", "Exit codes: 0 it is cancelled"),
        ("completions", "The shell"),
        ("man", "manual page"),
    ] {
        let section = man.split_once(&format!(".SH \"RXL {}\"\n", verb.to_uppercase()));
        let section = section.map_or("", |(_, rest)| rest).split(".SH \"RXL ").next();
        assert!(section.unwrap_or_default().contains(words), "{verb}: {man}");
    }
    assert!(man.contains("RUST_LOG") && man.contains("/var/lib/rxl/reports"), "{man}");
    assert!(man.contains(".SH \"RXL SAVE\"") && man.contains("\\&'xl {}' requires"), "{man}");
    let man = text(&rxl(&["man", "save"]).stdout);
    assert!(man.contains(".TH rxl-save 1") && man.contains("\\-\\-force"), "{man}");
    assert_eq!(rxl(&["man", "domain-guard"]).status.code(), Some(1));
}

#[test]
fn status_needs_no_xen_and_cancel_says_that_there_is_nothing() {
    let out = rxl(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(status["running"].is_array() && status["history"].is_array(), "{status}");
    let out = rxl(&["cancel", "no-such-domain"]);
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(1), String::new()));
    let stderr = text(&out.stderr);
    assert!(stderr.starts_with("rxl: no-such-domain is not being migrated"), "{stderr}");
}

#[test]
fn a_dry_run_is_refused_as_xl_refuses_it() {
    for args in [
        &["-N", "migrate", "dom", "host"] as &[&str],
        &["-N", "save", "dom", "file"],
        &["-N", "restore", "file"],
    ] {
        let out = rxl(args);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains("command does not implement -N (dryrun) option"));
    }
}

#[test]
fn without_xen_a_migration_fails_before_anything_is_started() {
    if std::path::Path::new("/proc/xen/capabilities").exists() {
        eprintln!("not tested: this host runs Xen");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let started = dir.path().join("started");
    let transport = format!("touch {}", started.display());
    let out = rxl(&["migrate", "-s", "", "dom", &transport]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("rxl: "), "{out:?}");
    assert!(!started.exists());
    let out = rxl(&["migrate-receive"]);
    assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(1), ""));
}

#[test]
fn a_save_and_a_restore_that_cannot_begin_leave_the_files_alone() {
    if std::path::Path::new("/proc/xen/capabilities").exists() {
        eprintln!("not tested: this host runs Xen");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("web.save").display().to_string();
    let out = rxl(&["save", "dom", &file]);
    assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(1), ""));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let out = rxl(&["restore", &file]);
    assert_eq!(out.status.code(), Some(1));
    let words = "rxl: Can't open restore file: No such file or directory";
    assert!(text(&out.stderr).starts_with(words), "{out:?}");
}

#[test]
fn the_save_helper_refuses_arguments_that_libxl_does_not_pass() {
    let out = rxl(&["--save-domain", "1"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("--save-domain takes 6 numbers, not 1"), "{out:?}");
}

#[test]
fn a_checkpointed_stream_is_the_stock_helpers_with_all_its_arguments() {
    if !std::path::Path::new("/usr/lib/xen-4.17/bin/libxl-save-helper").exists() {
        eprintln!("not tested: xen-utils-4.17 is not installed");
        return;
    }
    // 2 is COLO. What the stock helper says, it says in messages to libxl.
    let out = rxl(&["--save-domain", "2", "0", "7", "1", "136", "2"]);
    let said = out.stdout.windows(13).any(|bytes| bytes == b"starting save");
    assert!(said, "{out:?}");
}

#[test]
fn a_guard_whose_owner_is_gone_removes_the_unfinished_file_first_of_all() {
    if std::path::Path::new("/proc/xen/capabilities").exists() {
        eprintln!("not tested: this host runs Xen");
        return;
    }
    let draft = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rxl"));
    command.args(["domain-guard", "--draft"]).arg(&draft).args(["source", "--", "web", "5"]);
    let out = command.write_stdin("").output().unwrap();
    assert!(!draft.exists() && !out.status.success(), "{out:?}");
}

#[test]
fn a_guard_that_is_told_that_it_is_over_leaves_without_asking_xen() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rxl"));
    let args = ["domain-guard", "source", "--", "web", "5"];
    let out = command.args(args).write_stdin("x.").output().unwrap();
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(0), b"".as_slice()));
}
