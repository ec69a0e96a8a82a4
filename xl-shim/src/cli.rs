//! The command line: rxl's own verbs, and which command lines are not rxl's.
//!
//! Options, defaults and exit codes are `xl`'s, so that scripts need no change; what `xl` does
//! not have is marked in the help. Whatever comes with a verb that is not listed here belongs to
//! the real `xl`, untouched.

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use rxl_migrate::stream::link::LINKS_MAX;
use rxl_migrate::stream::reduced::Reduce;
use rxl_toolstack::rate::Rate;
use rxl_toolstack::xc::MapperWanted;

use crate::defaults;
use crate::policy::PolicyArgs;
use crate::receive::Place;
use crate::tls::Target;
use crate::ways::{self, LinksWanted, Ways, WorkersWanted};
use crate::words;

/// What the program takes from its environment.
const ENVIRONMENT: &str = "\
/etc/rxl.toml may give options that the command line does not: a table for each verb.\n\n\
Environment:\n\
RXL_XL: the real xl.\n\
RXL_CONFIG: another file than /etc/rxl.toml, or none.\n\
RXL_LOG, or else RUST_LOG: diagnostics, e.g. debug or rxl_toolstack=trace; without them -v says \
how many.\n\
Of the save helper under another toolstack: RXL_WORKERS, RXL_ADDRESSES, RXL_STREAMS, \
RXL_NO_ENCRYPT, RXL_POLICY (README.md).\n\n\
Files: /run/rxl (what is under way), /var/lib/rxl/reports (the last 100 reports).";

/// Moves running Xen guests to other hosts, or to files and back
///
/// rxl has the verbs below. Every other verb is xl's: `rxl VERB …` runs the host's real xl with
/// the same arguments.
#[derive(Debug, Parser)]
#[command(name = "rxl", version, disable_help_subcommand = true, max_term_width = 100)]
#[command(override_usage = "rxl [-vfNtT] VERB [ARGUMENTS]")]
#[command(after_help = ENVIRONMENT)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// `xl`'s options before the verb.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Globals {
    /// Say more; may be repeated
    #[arg(short, action = ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
    /// As in xl; rxl's verbs ask for no force
    #[arg(short)]
    pub(crate) force: bool,
    /// Show progress with carriage returns instead of line by line
    #[arg(short = 't')]
    pub(crate) progress_cr: bool,
    /// Begin each line of libxl's log with the time
    #[arg(short = 'T')]
    pub(crate) timestamps: bool,
    /// As in xl; refused, because rxl's verbs have none (but migrate has --dry-run)
    #[arg(short = 'N')]
    pub(crate) dry_run: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Move a running domain to another host
    Migrate(Box<MigrateArgs>),
    /// Receive a domain from `rxl migrate` or `xl migrate` on standard input
    ///
    /// Started on the target by the sender. Standard output is the channel back to it.
    #[command(name = "migrate-receive")]
    MigrateReceive(ReceiveArgs),
    /// Save a running domain to a file
    Save(SaveArgs),
    /// Make a domain from a file that `rxl save` or `xl save` has written
    Restore(RestoreArgs),
    /// Move every domain of this host to other hosts
    ///
    /// The largest first, each to the target with most free memory. A domain that cannot be moved
    /// to one is tried at the others. Run it again to go on with those that are left.
    Evacuate(EvacuateArgs),
    /// Let a domain run on that a migration or a save has left suspended
    ///
    /// Only after a look at the target: if the domain runs there it must not run here too. A file
    /// that it was saved to is of no use from then on.
    Resume {
        /// Name (also NAME--migratedaway, which becomes NAME again) or number
        #[arg(value_name = "DOM")]
        domain: String,
    },
    /// Have stock xl and libvirt use rxl as well (Debian)
    ///
    /// Puts rxl in the place of the save helper of every Xen that is installed, by dpkg-divert, and
    /// says who is in each place. It stays so when Xen's packages are upgraded.
    Divert(DivertArgs),
    /// Show what is being migrated, saved and restored here, and what was
    Status(StatusArgs),
    /// Cancel the migration, save or restore of a domain, as Ctrl-C would, and wait for its end
    ///
    /// A domain that was to leave runs on here; of one that was to come nothing is left.
    #[command(after_help = "\
A second time it does not wait for the guest any more.\n\n\
Exit codes: 0 it is cancelled; 1 it is not: there is none, or it is too late, or it failed \
meanwhile; 2 wrong usage.")]
    Cancel {
        /// Name, number or UUID
        #[arg(value_name = "DOM")]
        domain: String,
    },
    /// Print a script that completes rxl's command line in SHELL
    Completions {
        /// The shell
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man {
        /// Of that verb only
        #[arg(value_name = "VERB")]
        verb: Option<String>,
    },
    /// Wait for a domain's end and do what its configuration says (run by migrate-receive and
    /// restore)
    #[command(name = "domain-monitor", hide = true)]
    DomainMonitor {
        /// What the domain will be called; which one it is comes on standard input
        name: String,
    },
    /// Move bytes between standard input and output and a receiver that is reached by TLS (run by
    /// migrate)
    #[command(name = "tls-connect", hide = true)]
    TlsConnect {
        /// The receiver
        #[arg(value_name = "HOST[:PORT]")]
        target: Target,
        #[command(flatten)]
        files: TlsArgs,
    },
    /// Put things right if the rxl it belongs to is killed (run by migrate, migrate-receive, save
    /// and restore)
    #[command(name = "domain-guard", hide = true)]
    DomainGuard(GuardArgs),
}

/// Arguments of `domain-guard`.
#[derive(Clone, Debug, Args)]
pub(crate) struct GuardArgs {
    /// Which end it belongs to
    #[arg(value_enum)]
    pub(crate) side: crate::guard::Side,
    /// Name of the domain
    pub(crate) name: String,
    /// Number, at the source
    pub(crate) domid: Option<u16>,
    /// An unfinished file to remove
    #[arg(long)]
    pub(crate) draft: Option<PathBuf>,
    /// The host that the domain is sent to
    #[arg(long)]
    pub(crate) to: Option<String>,
    /// How much processor time to give it back
    #[arg(long)]
    pub(crate) cpu_cap: Option<u16>,
    /// The descriptor of the lock that it holds with its owner
    #[arg(long)]
    pub(crate) lock: Option<RawFd>,
}

/// Options of `divert`.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct DivertArgs {
    /// Put rxl in the place of xl too, for scripts that call xl; other verbs go to the real xl
    #[arg(long)]
    pub(crate) as_xl: bool,
    /// Put everything back
    #[arg(long, conflicts_with = "as_xl")]
    pub(crate) undo: bool,
    /// Change nothing
    #[arg(long, conflicts_with_all = ["as_xl", "undo"])]
    pub(crate) list: bool,
    /// If it was chosen before, do it for a Xen that was installed since (run by dpkg)
    #[arg(long, hide = true, conflicts_with_all = ["as_xl", "undo", "list"])]
    pub(crate) refresh: bool,
}

/// Files for TLS.
#[derive(Clone, Debug, Args)]
pub(crate) struct TlsArgs {
    /// This host's certificate in PEM format, for TLS [not in xl]
    #[arg(long, value_name = "FILE", default_value = "/etc/rxl/tls/cert.pem")]
    pub(crate) tls_cert: PathBuf,
    /// Its key, which nobody else may be able to read [not in xl]
    #[arg(long, value_name = "FILE", default_value = "/etc/rxl/tls/key.pem")]
    pub(crate) tls_key: PathBuf,
    /// Who has to have signed the other end's certificate [not in xl]
    #[arg(long, value_name = "FILE", default_value = "/etc/rxl/tls/ca.pem")]
    pub(crate) tls_peer_ca: PathBuf,
}

impl Default for TlsArgs {
    fn default() -> TlsArgs {
        let file = |name| PathBuf::from("/etc/rxl/tls").join(name);
        let (tls_cert, tls_key) = (file("cert.pem"), file("key.pem"));
        TlsArgs { tls_cert, tls_key, tls_peer_ca: file("ca.pem") }
    }
}

/// Options of `migrate`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Ctrl-C, SIGTERM and SIGHUP cancel a migration as long as the target has no permission to start \
the domain; the domain then runs on here.\n\n\
Exit codes: 0 the domain runs at the target; 1 it failed, and standard error says where the \
domain is; 2 wrong usage; 130 cancelled.")]
pub(crate) struct MigrateArgs {
    /// Domain: name or number
    #[arg(value_name = "DOM")]
    pub(crate) domain: String,
    /// Target host; with an empty `-s`, the whole shell command that reaches a receiver; with --tls
    /// HOST, HOST:PORT or [IPV6-ADDRESS]:PORT
    #[arg(value_name = "HOST")]
    pub(crate) host: String,
    /// Reach the target by TLS instead of ssh: there, `rxl migrate-receive --listen` has to run,
    /// and says what ssh's options -e and -p would [not in xl]
    #[arg(long, conflicts_with_all = ["ssh", "receiver", "no_monitor", "foreground", "paused"])]
    pub(crate) tls: bool,
    #[command(flatten)]
    pub(crate) tls_files: TlsArgs,
    /// Command that runs a program on the target
    #[arg(short = 's', value_name = "SSH", default_value = "ssh")]
    pub(crate) ssh: String,
    /// No monitoring process at the target: nobody acts when the guest reboots or ends
    #[arg(short = 'e')]
    pub(crate) no_monitor: bool,
    /// The same as -e
    #[arg(short = 'F')]
    pub(crate) foreground: bool,
    /// Use this configuration (xl.cfg) at the target; the guest keeps its name and UUID
    #[arg(short = 'C', value_name = "CFG")]
    pub(crate) config: Option<String>,
    /// Leave the domain paused at the target
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// Who maps and sends memory: a number, also with `:process` or `:thread`; or auto, which
    /// starts as many as there are free processors to gain from [not in xl]
    #[arg(long, value_name = "N", default_value = "auto")]
    pub(crate) workers: WorkersWanted,
    /// What maps memory: privcmd; module, which is rxl's kernel module and lets threads map at the
    /// same time; or auto, the module where it is loaded [not in xl]
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) mapper: MapperWanted,
    /// How many connections carry memory beside SSH if the target has rxl; 0: none. Without it one
    /// for each address, and for each worker [not in xl]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=i64::from(LINKS_MAX)))]
    pub(crate) streams: Option<u8>,
    /// Addresses of this host for them; without it those of all its network interfaces
    /// [not in xl]
    #[arg(long, value_name = "IP,…", value_delimiter = ',')]
    pub(crate) addresses: Vec<IpAddr>,
    /// Network interfaces of this host for them [not in xl]
    #[arg(long, value_name = "NIC,…", value_delimiter = ',', conflicts_with = "addresses")]
    pub(crate) nics: Vec<String>,
    /// Do not encrypt them: only in a network that nobody else can listen to [not in xl]
    #[arg(long)]
    pub(crate) no_encrypt: bool,
    /// What may be left out of what goes over them: all, none, or of zero (pages of zeros), same
    /// (pages that are what they were when they were sent before), compress (by LZ4), zstd and
    /// delta (what has changed of a page), with commas; always: even where that takes longer [not
    /// in xl]
    #[arg(long, value_name = "KINDS", default_value = "all")]
    pub(crate) reduce: Reduce,
    #[command(flatten)]
    pub(crate) policy: PolicyArgs,
    /// Keep the domain's number at the target
    #[arg(short = 'D')]
    pub(crate) preserve_domid: bool,
    /// Send all memory again at the end and compare it at the target (lengthens the pause)
    #[arg(long)]
    pub(crate) debug: bool,
    /// Compare digests of all memory before the target may start the domain; it runs on here if a
    /// page differs (lengthens the pause; the target must have rxl) [not in xl]
    #[arg(long, conflicts_with = "debug")]
    pub(crate) verify: bool,
    /// Move nothing: look at what the domain writes, and say how long it would take and what the
    /// pause would be; exit code 1 if it would be given up [not in xl]
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// For how many seconds --dry-run looks [not in xl]
    #[arg(long, value_name = "S", default_value = "5", requires = "dry_run")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) sample: u64,
    /// How fast memory may go to the target at most, in Mbit/s, on average; what --dry-run
    /// reckons with, which without it takes the rate of the last time [not in xl]
    #[arg(long, value_name = "MBIT")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    /// Ignored: migration is always live
    #[arg(long, hide = true)]
    pub(crate) live: bool,
    /// Write a report to FILE, also when the migration fails: as a page with plots if it ends in
    /// .html, else as JSON; may be repeated [not in xl]
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Vec<PathBuf>,
    /// Count it for Prometheus in DIR, where node_exporter's textfile collector reads [not in xl]
    #[arg(long, value_name = "DIR")]
    pub(crate) prometheus: Option<PathBuf>,
    /// Program at the target, e.g. xl; without it rxl where the target has it, else xl [not in xl]
    #[arg(long, value_name = "CMD")]
    pub(crate) receiver: Option<String>,
}

impl MigrateArgs {
    /// How memory is to be moved. `fixed_part` of the pause is not memory, if that is known.
    pub(crate) fn ways(&self, fixed_part: Option<Duration>) -> anyhow::Result<Ways> {
        let links = (self.streams != Some(0)).then(|| {
            let addresses = match self.addresses.as_slice() {
                [] => ways::addresses_of(&self.nics)?,
                addresses => addresses.to_vec(),
            };
            let (encrypted, reduce) = (!self.no_encrypt, self.reduce);
            anyhow::Ok(LinksWanted { addresses, count: self.streams, encrypted, reduce })
        });
        let policy = self.policy.policy(fixed_part);
        let (verify, rate) = (self.verify, self.rate.and_then(Rate::of_mbit));
        Ok(Ways {
            workers: self.workers,
            mapper: self.mapper,
            links: links.transpose()?,
            policy,
            verify,
            rate,
        })
    }
}

/// Options of `migrate-receive`.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ReceiveArgs {
    /// The same as -e
    #[arg(short = 'F')]
    pub(crate) foreground: bool,
    /// No monitoring process: nobody acts when the guest reboots or ends
    #[arg(short = 'e')]
    pub(crate) no_monitor: bool,
    /// Print the configuration on standard error
    #[arg(short = 'd')]
    pub(crate) debug: bool,
    /// Leave the domain paused
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// Make room for a domain that takes so many KiB, overhead included, before the sender does
    /// anything to it; without room it is refused. `rxl migrate` says it by itself [not in xl]
    #[arg(long, value_name = "KIB", conflicts_with = "listen")]
    pub(crate) need: Option<u64>,
    /// Wait for `rxl migrate --tls` on this port instead of standard input: PORT, ADDRESS:PORT or
    /// [IPV6-ADDRESS]:PORT; ends after one domain [not in xl]
    #[arg(long, value_name = "[ADDR:]PORT")]
    pub(crate) listen: Option<Place>,
    /// Go on listening [not in xl]
    #[arg(long, requires = "listen")]
    pub(crate) forever: bool,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

/// The name of a file that means standard input or output.
pub(crate) const STDIO: &str = "-";

/// Options of `save`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
The file is written under another name beside FILE and gets its own once it is complete and on \
the disk; only then the domain ends. A failure, Ctrl-C, SIGTERM or SIGHUP before that leaves the \
domain running and the file that was there. A saved domain of the same guest (the same UUID) is \
replaced, any other file only with --force.\n\n\
With `-` the domain ends as soon as all of it has been written to standard output, whatever \
becomes of it there: use -p as well, and destroy the domain once the copy is safe.\n\n\
Exit codes: 0 it is saved; 1 it failed, and standard error says how the domain is; 2 wrong usage; \
130 cancelled.")]
pub(crate) struct SaveArgs {
    /// Domain: name or number
    #[arg(value_name = "DOM")]
    pub(crate) domain: String,
    /// File, or - for standard output [-: not in xl]
    #[arg(value_name = "FILE")]
    pub(crate) file: String,
    /// Save this configuration (xl.cfg) with it; the guest keeps its name and UUID
    #[arg(value_name = "CONFIG")]
    pub(crate) config: Option<String>,
    /// Let the domain run on; its disks and the file then no longer belong together
    #[arg(short = 'c')]
    pub(crate) running: bool,
    /// Leave the domain paused
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// Keep the domain's number for when it is restored
    #[arg(short = 'D')]
    pub(crate) preserve_domid: bool,
    /// Replace FILE whatever it is [not in xl]
    #[arg(long)]
    pub(crate) force: bool,
    /// Who maps and writes memory: a number, also with `:process` or `:thread`; or auto
    /// [not in xl]
    #[arg(long, value_name = "N", default_value = "auto")]
    pub(crate) workers: WorkersWanted,
    /// What maps memory: privcmd; module, which is rxl's kernel module and lets threads map at the
    /// same time; or auto, the module where it is loaded [not in xl]
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) mapper: MapperWanted,
    /// Write a report to REPORT, also when the save fails: as a page with plots if it ends in
    /// .html, else as JSON; may be repeated [not in xl]
    #[arg(long, value_name = "REPORT")]
    pub(crate) report: Vec<PathBuf>,
    /// Count it for Prometheus in DIR, where node_exporter's textfile collector reads [not in xl]
    #[arg(long, value_name = "DIR")]
    pub(crate) prometheus: Option<PathBuf>,
}

/// Options of `restore`.
#[derive(Clone, Debug, Args)]
#[command(override_usage = "rxl restore [OPTIONS] [CONFIG] FILE")]
#[command(after_help = "\
Ctrl-C, SIGTERM and SIGHUP cancel it until the domain is complete; nothing of it is left then.\n\n\
Exit codes: 0 the domain is there; 1 it is not; 2 wrong usage; 130 cancelled.")]
pub(crate) struct RestoreArgs {
    /// A file from `save`, or - for standard input [-: not in xl]; before it, a configuration
    /// (xl.cfg) that takes the place of the saved one, name and UUID included
    #[arg(value_name = "FILE", required = true, num_args = 1..=2)]
    files: Vec<String>,
    /// Leave the domain paused
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// No monitoring process: nobody acts when the guest reboots or ends
    #[arg(short = 'e')]
    pub(crate) no_monitor: bool,
    /// Print the configuration on standard error
    #[arg(short = 'd')]
    pub(crate) debug: bool,
    /// Stay in the foreground, and be the monitoring process
    #[arg(short = 'F')]
    pub(crate) foreground: bool,
    /// Connect to the domain's console once it is there, by the real xl
    #[arg(short = 'c')]
    pub(crate) console: bool,
    /// Start a VNC viewer for it, by the real xl
    #[arg(short = 'V', long)]
    pub(crate) vncviewer: bool,
    /// The same, and give the viewer the password
    #[arg(short = 'A', long = "vncviewer-autopass")]
    pub(crate) autopass: bool,
}

impl RestoreArgs {
    /// The configuration file, if there is one, and the file to restore.
    pub(crate) fn files(&self) -> (Option<&str>, &str) {
        match self.files.as_slice() {
            [config, file] => (Some(config), file),
            [file, ..] => (None, file),
            [] => (None, ""),
        }
    }
}

/// Options of `evacuate`.
#[derive(Clone, Debug, Args)]
#[command(override_usage = "rxl evacuate [OPTIONS] --to HOST,… [-- OPTIONS of rxl migrate]")]
#[command(after_help = "\
Ctrl-C, SIGTERM and SIGHUP cancel the migrations under way, as far as they still can be, and start \
no more.\n\n\
Exit codes: 0 every domain was moved; 1 some were not, and the summary says why; 2 wrong usage; \
130 cancelled.")]
pub(crate) struct EvacuateArgs {
    /// Targets
    #[arg(long, value_name = "HOST,…", value_delimiter = ',', required = true)]
    pub(crate) to: Vec<String>,
    /// How many domains to move at a time
    #[arg(long, value_name = "N", default_value = "1")]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(crate) parallel: u8,
    /// Domains that stay
    #[arg(long, value_name = "DOM,…", value_delimiter = ',')]
    pub(crate) except: Vec<String>,
    /// How fast memory may go to the targets at most, all together, in Mbit/s; each of as many
    /// domains as are moved at a time has its share
    #[arg(long, value_name = "MBIT")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    /// Let targets decide whether there is memory for a domain: for those that take it from dom0
    #[arg(long)]
    pub(crate) ignore_memory: bool,
    /// Only show which domain would go where
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Command that runs a program on a target
    #[arg(short = 's', value_name = "SSH", default_value = "ssh")]
    pub(crate) ssh: String,
    /// Write the summary as JSON to FILE as well
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Options of `rxl migrate` for every domain
    #[arg(last = true, value_name = "OPTIONS of rxl migrate")]
    pub(crate) options: Vec<String>,
}

/// Options of `status`.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct StatusArgs {
    /// As JSON, in one line
    #[arg(long)]
    pub(crate) json: bool,
    /// Look again every second, until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,
}

/// What to do with a command line.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// One of rxl's verbs.
    Own(Box<Cli>),
    /// The real `xl`'s.
    Xl,
    /// Text for standard output, and that is all.
    Text(String),
    /// Text for standard error; exit code 2.
    Usage(String),
}

/// Options of `xl migrate-receive` for Remus and COLO, which rxl leaves to `xl`.
const REMUS: [&str; 4] = ["-r", "--colo", "--coloft-script", "--userspace-colo-proxy"];

/// Sorts out a command line; `args` begins with the program's name. `as_xl`: the program is
/// installed as `xl`, so `help` means xl's.
pub(crate) fn parse(args: &[OsString], as_xl: bool) -> Parsed {
    let words: Vec<&str> = args.iter().skip(1).map(|a| a.to_str().unwrap_or_default()).collect();
    let is_global = |w: &str| w.strip_prefix('-').is_some_and(is_global_flags);
    let Some(at) = words.iter().position(|w| !is_global(w)) else { return Parsed::Xl };
    let Some([verb, rest @ ..]) = words.get(at..) else { return Parsed::Xl };
    let (verb, rest) = (*verb, rest);
    match (verb, rest) {
        ("--version" | "-V", _) if !as_xl => Parsed::Text(Cli::command().render_version()),
        ("help" | "--help" | "-h", []) if !as_xl => {
            Parsed::Text(Cli::command().render_long_help().to_string())
        }
        ("help", [verb, ..]) if own(verb) => Parsed::Text(help_of(verb)),
        ("migrate-receive", rest) if rest.iter().any(|w| REMUS.contains(w)) => Parsed::Xl,
        (verb, _) if own(verb) => parse_own(args, verb, at + 1),
        _ => Parsed::Xl,
    }
}

/// A command line of the rxl verb that is word `at` of it.
fn parse_own(args: &[OsString], verb: &str, at: usize) -> Parsed {
    let mut cli = Cli::command();
    cli.build();
    let args = match defaults::apply(&cli, args, at) {
        Ok(args) => args,
        Err(error) => return Parsed::Usage(format!("rxl: {error:#}")),
    };
    match Cli::try_parse_from(&args) {
        Ok(cli) => Parsed::Own(Box::new(cli)),
        Err(error) => explain(&error, verb),
    }
}

fn is_global_flags(letters: &str) -> bool {
    !letters.is_empty() && letters.chars().all(|c| "vftTN".contains(c))
}

fn own(verb: &str) -> bool {
    Cli::command().find_subcommand(verb).is_some()
}

fn help_of(verb: &str) -> String {
    let mut cli = Cli::command();
    cli.build();
    match cli.find_subcommand_mut(verb) {
        Some(command) => command.render_long_help().to_string(),
        None => String::new(),
    }
}

/// A usage error in `xl`'s words, with the verb's usage; exit code 2, as `xl`'s.
fn explain(error: &clap::Error, verb: &str) -> Parsed {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(s)) => s.clone(),
        Some(ContextValue::Strings(s)) => s.join(" "),
        _ => String::new(),
    };
    let reason = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            return Parsed::Text(error.to_string());
        }
        ErrorKind::UnknownArgument if text(ContextKind::InvalidArg).starts_with('-') => {
            let option = text(ContextKind::InvalidArg);
            let letter = option.strip_prefix('-').filter(|o| o.len() == 1);
            words::fill(words::NO_OPTION, &[&letter.unwrap_or(&option)])
        }
        ErrorKind::MissingRequiredArgument if required_words(verb) > 0 => {
            let wanted = required_words(verb);
            let s = if wanted == 1 { "" } else { "s" };
            words::fill(words::TOO_FEW, &[&verb, &wanted, &s])
        }
        _ => return Parsed::Usage(error.to_string()),
    };
    let mut cli = Cli::command();
    cli.build();
    let usage = cli.find_subcommand_mut(verb).map(|c| c.render_usage().to_string());
    Parsed::Usage(format!("{reason}\n\n{}", usage.unwrap_or_default()))
}

/// How many words the verb needs that are no options.
fn required_words(verb: &str) -> usize {
    Cli::command()
        .find_subcommand(verb)
        .map_or(0, |c| c.get_positionals().filter(|p| p.is_required_set()).count())
}
