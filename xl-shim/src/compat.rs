//! What rxl's command line is to `xl`'s: one table, from which README's "Compatibility" and
//! `docs/compatibility.md` are made. A test keeps all four equal: this table, the command line,
//! and both documents. After a change, `UPDATE_EXPECT=1 cargo test -p rxl compat` writes the
//! documents anew.
//!
//! What is printed is in [`crate::words`].

use clap::CommandFactory;
use expect_test::expect_file;

use crate::cli::Cli;
use crate::words::{self, Message};

/// What an option of rxl is to xl's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It does what xl's does.
    AsXl,
    /// It does something else than xl's; the note says what.
    Differs,
    /// xl has none.
    Own,
    /// The real xl does it, with the whole command line.
    LeftToXl,
}

impl State {
    fn text(self) -> &'static str {
        match self {
            State::AsXl => "as xl's",
            State::Differs => "differs",
            State::Own => "rxl's own",
            State::LeftToXl => "left to the real xl",
        }
    }
}

/// An option.
struct Opt {
    /// Empty: before any verb.
    verb: &'static str,
    name: &'static str,
    /// What it means, in xl if xl has it.
    meaning: &'static str,
    state: State,
    /// What else is to be known of it.
    note: &'static str,
}

macro_rules! options {
    ($($verb:literal {
        $($state:ident $note:literal { $($name:literal: $meaning:literal,)* })*
    })*) => {
        &[$($($(Opt {
            verb: $verb, name: $name, meaning: $meaning, state: State::$state, note: $note,
        },)*)*)*]
    };
}

/// All options, in the order of the documents. Beside the state stands a note.
const OPTIONS: &[Opt] = options! {
    "" {
        AsXl "" {
            "-v": "say more; may be repeated",
            "-t": "progress with carriage returns",
            "-T": "time and process in each line of libxl's log",
        }
        AsXl "rxl's verbs ask for no force and have no dry run, but for `migrate --dry-run`" {
            "-f": "force; accepted, and nothing asks for it",
            "-N": "dry run; refused in xl's words, exit code 1",
        }
    }
    "migrate" {
        AsXl "" {
            "-s": "the command that runs a program on the target; empty: HOST is a whole command",
            "-e": "no monitoring process at the target",
            "-F": "the same as -e",
            "-C": "another configuration; with rxl the guest keeps its name and UUID",
            "-p": "leave the domain paused",
            "-D": "keep the domain's number",
            "--debug": "send all memory again and compare it",
            "--live": "ignored: migration is always live",
        }
        Own "" {
            "--report": "figures as JSON, or as a page with plots",
            "--prometheus": "counters for node_exporter",
            "--receiver": "the program at the target",
            "--workers": "who maps and sends memory",
            "--mapper": "what maps it: privcmd, or rxl's kernel module",
        }
        Own "fails the migration if a page differs at the target, which must have rxl \
             ([verify](docs/verify.md))" {
            "--verify": "compare digests of all memory before the target may start the domain",
        }
        Own "nothing is moved: what it would take, from a short look at what the guest writes \
             ([policy](docs/policy.md))" {
            "--dry-run": "say how long it would take and what the pause would be",
            "--sample": "for how long it looks",
        }
        Own "in Mbit/s, on average: for the sake of others that use the network" {
            "--rate": "how fast memory may go at most; what a dry run reckons with",
        }
        Own "without ssh, where `rxl migrate-receive --listen` runs ([TLS](docs/tls.md))" {
            "--tls": "reach the target by TLS",
            "--tls-cert": "this host's certificate",
            "--tls-key": "its key",
            "--tls-peer-ca": "who has to have signed the target's certificate",
        }
        Own "memory over several connections, where both ends are rxl ([links](docs/links.md)); \
             the target must reach the source's addresses, else all goes through ssh" {
            "--streams": "how many connections",
            "--nics": "over these network cards",
            "--addresses": "at these addresses of the source",
            "--no-encrypt": "without encryption",
            "--reduce": "without content that the target can do without",
        }
        Own "the guest is suspended once the pause is expected to be short enough \
             ([policy](docs/policy.md))" {
            "--policy": "by the expected pause, or by xl's rule",
            "--max-pause": "how long the pause may be",
            "--max-time": "for how long memory is sent before it, at most",
            "--max-passes": "how many times, at most",
            "--on-limit": "what to do if the pause would be too long even so",
            "--throttle": "slow a guest that writes faster than its memory can be sent",
        }
    }
    "migrate-receive" {
        AsXl "" {
            "-e": "no monitoring process",
            "-d": "print the configuration",
            "-p": "leave the domain paused",
        }
        Own "`rxl migrate` passes it, so that a target that is too full refuses before anything is \
             done to the domain" {
            "--need": "KiB that the domain takes",
        }
        Own "for `rxl migrate --tls` ([TLS](docs/tls.md))" {
            "--listen": "wait on this port instead of standard input",
            "--forever": "go on listening",
            "--tls-cert": "this host's certificate",
            "--tls-key": "its key",
            "--tls-peer-ca": "who has to have signed the sender's certificate",
        }
        Differs "the same as `-e`" {
            "-F": "stay in the foreground as the monitoring process",
        }
        LeftToXl "Remus and COLO" {
            "-r": "Remus",
            "--colo": "COLO",
            "--coloft-script": "COLO's script",
            "--userspace-colo-proxy": "COLO's proxy",
        }
    }
    "save" {
        AsXl "files are xl's, both ways" {
            "-c": "let the domain run on",
            "-p": "leave the domain paused",
            "-D": "keep the domain's number for when it is restored",
        }
        Own "written under another name, synced and renamed before the domain ends; without \
             `--force` only a file of the same guest is replaced" {
            "-": "as FILE: standard output",
            "--force": "replace FILE whatever it is",
            "--workers": "who maps and writes memory",
            "--mapper": "what maps it: privcmd, or rxl's kernel module",
            "--report": "figures as JSON, or as a page with plots",
            "--prometheus": "counters for node_exporter",
        }
    }
    "restore" {
        AsXl "files are xl's, both ways" {
            "-p": "leave the domain paused",
            "-e": "no monitoring process",
            "-d": "print the configuration",
            "-F": "stay in the foreground as the monitoring process",
            "-c": "connect to the console (by the real xl, once the domain is complete)",
            "-V": "start a VNC viewer (by the real xl)",
            "--vncviewer": "the same as -V",
            "-A": "the same, with the password",
            "--vncviewer-autopass": "the same as -A",
        }
        Own "" {
            "-": "as FILE: standard input",
        }
    }
};

/// The rest of README's table.
const REST: &[(&str, &str)] = &[
    ("`evacuate`", "rxl's own: moves every domain of the host"),
    (
        "`resume`",
        "rxl's own (xl has one from 4.20 on): lets a domain run on that a migration or a \
      save left suspended",
    ),
    ("`divert`", "rxl's own: stock `xl` and libvirt use rxl's helper from then on, or scripts rxl"),
    ("`status` `cancel`", "rxl's own: what is under way on this host, and its end"),
    ("all other verbs", "the real xl does them"),
    (
        "messages and exit codes",
        "xl's, at the same points ([list](docs/compatibility.md)); rxl's \
      own lines begin with `rxl: `, and 130 says that a signal cancelled",
    ),
    (
        "as `libxl-save-helper` under stock `xl` or libvirt",
        "save and restore of plain streams; \
      Remus and COLO are handed to libxl's own helper",
    ),
    (
        "stock `xl` sends, rxl receives; rxl sends, stock `xl` receives",
        "works for PV, PVH and HVM, \
      tested in the lab (Xen 4.17, and from there to 4.20)",
    ),
    ("PV guests, 64-bit", "works; a p2m tree (old kernels) only on the modelled Xen so far"),
    (
        "PCI passthrough; vNUMA; 32-bit PV guests; PV guests where Xen lacks shadow paging; a \
      paused guest",
        "refused before anything is sent, not even `ssh` is started, with what to do",
    ),
    (
        "too little memory at the target",
        "where rxl receives, refused before anything is done to the guest (over TLS, or with \
      `--receiver`: once the target has its configuration)",
    ),
    (
        "a CPU feature that the guest has and the target lacks",
        "refused before memory is sent, by \
      name; `xl` takes it away in silence",
    ),
    ("PVH guests", "works"),
    (
        "network cards and disks (vif, vbd)",
        "work: tested with PV and PVH guests, a TCP session that goes on and a disk in a file of \
         each host",
    ),
    ("HVM guests", "works (with QEMU as the device model), without emulated disks or NICs so far"),
    (
        "Xen",
        "tested on 4.17 (Debian 12), and from there to 4.20 (Debian 13); the interface version is \
         probed, so that 4.14 to 4.22 should work",
    ),
    ("architecture", "x86-64"),
];

/// README's table.
fn summary() -> String {
    let mut out = "| what | state |\n|---|---|\n".to_owned();
    let same = |a: &Opt, b: &Opt| (a.verb, a.state, a.note) == (b.verb, b.state, b.note);
    for group in OPTIONS.chunk_by(same) {
        let names: Vec<&str> = group.iter().map(|option| option.name).collect();
        let Some(Opt { verb, state, note, .. }) = group.first() else { continue };
        let verb = if verb.is_empty() { "before any verb" } else { verb };
        let colon = if note.is_empty() { "" } else { ": " };
        let (names, state) = (names.join(" "), state.text());
        out += &format!("| {verb} `{names}` | {state}{colon}{note} |\n");
    }
    for (what, state) in REST {
        out += &format!("| {what} | {state} |\n");
    }
    out
}

/// `docs/compatibility.md`.
fn document() -> String {
    let mut out = "# Compatibility with xl, option by option and word by word\n\n\
        Made from `xl-shim/src/compat.rs` and `words.rs`: change it there. What else works and \
        what does not is in [README](../README.md#compatibility).\n\n\
        ## Options\n\n| verb | option | meaning | state |\n|---|---|---|---|\n"
        .to_owned();
    for Opt { verb, name, meaning, state, .. } in OPTIONS {
        let verb = if verb.is_empty() { "before any" } else { verb };
        out += &format!("| {verb} | `{name}` | {meaning} | {} |\n", state.text());
    }
    out += "\n## Messages\n\n\
        On standard error, where xl prints them. `{}` stands for what differs.\n\n\
        | verbs | words | it means |\n|---|---|---|\n";
    for Message { verbs, text, meaning } in words::MESSAGES {
        let first = text.lines().next().unwrap_or_default();
        let more = if first == *text { "" } else { " …" };
        out += &format!("| {verbs} | `` {first} ``{more} | {meaning} |\n");
    }
    out
}

/// The options that the command line of `verb` has.
fn options_of(verb: &str) -> Vec<String> {
    let cli = Cli::command();
    let command = if verb.is_empty() { &cli } else { cli.find_subcommand(verb).unwrap() };
    let mut names: Vec<String> = command
        .get_arguments()
        .flat_map(|arg| {
            let short = arg.get_short().map(|letter| format!("-{letter}"));
            let long = arg.get_long().map(|word| format!("--{word}"));
            short.into_iter().chain(long)
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn the_table_has_the_options_of_the_command_line_and_no_others() {
    for verb in ["", "migrate", "migrate-receive", "save", "restore"] {
        let here = OPTIONS.iter().filter(|o| o.verb == verb && o.state != State::LeftToXl);
        let mut here: Vec<String> =
            here.map(|o| o.name.to_owned()).filter(|name| name != "-").collect();
        here.sort();
        assert_eq!(here, options_of(verb), "{verb}");
    }
}

#[test]
fn the_help_says_of_an_option_that_xl_has_none_where_the_table_does() {
    let cli = Cli::command();
    for option in OPTIONS.iter().filter(|o| !o.verb.is_empty() && o.name.starts_with("--")) {
        let command = cli.find_subcommand(option.verb).unwrap();
        let name = option.name.trim_start_matches('-');
        let Some(arg) = command.get_arguments().find(|a| a.get_long() == Some(name)) else {
            assert_eq!(option.state, State::LeftToXl);
            continue;
        };
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let own = option.state == State::Own;
        assert_eq!(help.contains("[not in xl]"), own, "{} {name}: {help}", option.verb);
    }
}

#[test]
fn readme_and_docs_say_what_the_table_says() {
    let (begin, end) = ("## Compatibility\n\n", "\nPV guests migrate live only");
    let readme = include_str!("../../README.md");
    let (before, rest) = readme.split_once(begin).unwrap();
    let (_, after) = rest.split_once(end).unwrap();
    expect_file!["../../README.md"].assert_eq(&[before, begin, &summary(), end, after].concat());
    expect_file!["../../docs/compatibility.md"].assert_eq(&document());
}
