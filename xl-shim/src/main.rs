//! `rxl`: moves running Xen guests between hosts, and to files and back; a drop-in for `xl`.
//!
//! One program under several names and verbs:
//!
//! - `rxl migrate`, `rxl migrate-receive`: the two ends of a migration ([`migrate`], [`receive`]);
//! - `rxl save`, `rxl restore`: the same with a file ([`save`], [`restore`]);
//! - many migrations at once ([`evacuate`]);
//! - `rxl status`, `rxl cancel`: what of that goes on, and its end ([`status`]);
//! - libxl's save helper, which moves the memory ([`save_helper`]);
//! - `rxl divert`: how stock programs come to use it ([`divert`]);
//! - processes that those start: [`guard`], [`monitor`], [`tls`];
//! - every other verb is the real `xl`'s ([`passthrough`]).
//!
//! What it is not: it holds no algorithm. What may follow what is decided by
//! [`rxl_migrate::xl::handshake`], how memory moves by [`rxl_migrate`], and what a domain is by
//! libxl behind [`rxl_toolstack::lifecycle`].
#![forbid(unsafe_code)]

mod channel;
mod cli;
#[cfg(test)]
mod compat;
mod config;
mod defaults;
mod divert;
mod evacuate;
mod events;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod file_tests;
mod gate;
mod guard;
mod history;
mod host;
mod lock;
mod manual;
mod migrate;
mod monitor;
mod outgoing;
mod output;
#[cfg(test)]
mod pair_tests;
mod passthrough;
mod policy;
mod prometheus;
mod receive;
mod report;
mod restore;
mod resume;
mod save;
mod save_helper;
mod status;
mod stdio;
mod timeline;
mod tls;
mod transport;
mod ways;
mod words;

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use cli::{Cli, Parsed, Verb};
use tracing_subscriber::EnvFilter;

/// What diagnostics are wanted; the first that is set counts.
const LOG_ENV: [&str; 2] = ["RXL_LOG", "RUST_LOG"];

/// All exit codes. 0, 1 and 2 are `xl`'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done; for `migrate`: the domain runs at the target; for `save`: the file is complete.
    Success = 0,
    /// It failed; standard error says what became of the domain.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A signal came while it could still be cancelled, and the domain runs on here; for
    /// `restore`: there is none.
    /// As a shell reports a program that Ctrl-C ended.
    Cancelled = 130,
}

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().collect();
    let exit = run(&args).unwrap_or_else(|error| {
        output::stderr(&format!("rxl: {error:#}"));
        Exit::Failed
    });
    ExitCode::from(exit as u8)
}

fn run(args: &[OsString]) -> anyhow::Result<Exit> {
    let program = args
        .first()
        .and_then(|path| Path::new(path).file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    if save_helper::is_meant(args, &program) {
        init_log(0);
        defaults::apply_to_helper();
        return save_helper::run(args);
    }
    match cli::parse(args, program == "xl") {
        Parsed::Own(cli) => run_verb(&cli),
        Parsed::Xl => Err(passthrough::exec_xl(args.get(1..).unwrap_or_default())),
        Parsed::Text(text) => {
            output::stdout(&text);
            Ok(Exit::Success)
        }
        Parsed::Usage(text) => {
            output::stderr(text.trim_end());
            Ok(Exit::Usage)
        }
    }
}

fn run_verb(cli: &Cli) -> anyhow::Result<Exit> {
    let globals = &cli.globals;
    init_log(globals.verbose);
    if globals.dry_run {
        anyhow::bail!(words::NO_DRY_RUN);
    }
    match &cli.verb {
        Verb::Migrate(args) => migrate::run(globals, args),
        Verb::MigrateReceive(args) => receive::run(globals, args),
        Verb::Save(args) => save::run(globals, args),
        Verb::Restore(args) => restore::run(globals, args),
        Verb::Evacuate(args) => evacuate::run(globals, args),
        Verb::Resume { domain } => resume::run(globals, domain),
        Verb::Status(args) => status::run(args),
        Verb::Cancel { domain } => status::cancel(domain),
        Verb::DomainMonitor { .. } => monitor::run(globals),
        Verb::TlsConnect { target, files } => tls::connect(target, files),
        Verb::DomainGuard(ward) => guard::run(globals, ward),
        Verb::Divert(args) => divert::run(args),
        Verb::Completions { shell } => {
            output::stdout(&manual::completions(*shell));
            Ok(Exit::Success)
        }
        Verb::Man { verb } => {
            output::stdout(&manual::man(verb.as_deref())?);
            Ok(Exit::Success)
        }
    }
}

/// Diagnostics of rxl's own; libxl has a log of its own. `RXL_LOG` says which, or else `RUST_LOG`,
/// as other Rust programs have it, or else `-v`.
fn init_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let named = |name: &&str| env::var(name).ok().filter(|text| !text.is_empty());
    let filter = LOG_ENV.iter().find_map(|name| Some((*name, named(name)?)));
    let filter = filter.and_then(|(name, text)| {
        let parsed = EnvFilter::try_new(&text);
        parsed.inspect_err(|error| output::stderr(&format!("rxl: {name}={text}: {error}"))).ok()
    });
    let filter = filter.unwrap_or_else(|| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}
