//! Command line of the lab. Everything it does is in the library.

use std::io::{IsTerminal, Write, stdin, stdout};
use std::os::unix::process::CommandExt;
use std::process::{ExitCode, Stdio};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use rxl_lab::{
    Content, GuestKind, GuestSpec, Images, Lab, Release, Shape, Store, demo, quote, status,
};

/// Builds and runs Xen hosts in nested QEMU, on a machine without hardware virtualisation.
#[derive(Parser)]
#[command(name = "lab", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build the images that a lab boots from, installing packages on this machine as needed.
    Build {
        /// Of which releases of Xen: 4.17 (Debian 12), 4.20 (Debian 13).
        #[arg(long, value_name = "RELEASE,…", value_delimiter = ',', default_value = "4.17")]
        xen: Vec<Release>,
    },
    /// Boot the hosts: host1, host2, … at 10.77.NIC.HOST, root's ssh between them with no question.
    Up(UpArgs),
    /// Show the hosts and their domains.
    Status,
    /// End the lab and remove every trace of it; nothing to remove is no error.
    Down,
    /// Run a command on a host as root; its exit code becomes ours.
    ///
    /// One argument is a line for the host's shell, several are one command word for word.
    Run {
        /// Name of the host.
        host: String,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Build this tree's rxl and install it on every host.
    Push,
    /// Set the hosts' wall clocks to this machine's, as before measuring a guest's gap.
    SyncClocks,
    /// Start, check and stop guests that verify their own memory.
    #[command(subcommand)]
    Guest(GuestVerb),
    /// Move a PV and a PVH guest there and back, by rxl and by the stock xl, and compare.
    ///
    /// Builds, boots and ends a lab of its own unless one is up. The last line is JSON. Fails
    /// unless every guest is alive on exactly one host with no bad page.
    Demo,
}

#[derive(Args)]
struct UpArgs {
    /// Number of hosts, 1 to 3.
    #[arg(long, default_value_t = 2)]
    hosts: u8,
    /// What host1, host2, … run: Xen 4.17 (on Debian 12) or 4.20 (13); the last is for the others.
    #[arg(long, value_name = "RELEASE,…", value_delimiter = ',', default_value = "4.17")]
    xen: Vec<Release>,
    /// Virtual CPUs of each host; more than 1 is slow in emulation.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// NICs of each host, each on a network of its own.
    #[arg(long, default_value_t = 1)]
    nics: u8,
    /// Rate at which each NIC receives, as tc writes it: 100mbit.
    #[arg(long)]
    nic_rate: Option<String>,
}

#[derive(Subcommand)]
enum GuestVerb {
    /// Start a guest and wait until it has filled its memory.
    Start(StartArgs),
    /// Have a guest verify all its memory; prints one line of JSON, fails if a page is bad.
    Check {
        /// Name of the guest.
        name: String,
    },
    /// Destroy a guest, wherever it runs.
    Stop {
        /// Name of the guest.
        name: String,
    },
}

#[derive(Args)]
struct StartArgs {
    /// Name of the host to start on.
    host: String,
    /// Name of the guest.
    name: String,
    /// pv, pvh or hvm.
    #[arg(long = "type")]
    kind: GuestKind,
    /// Memory in MiB; pv needs 128 and pvh 192 at least.
    #[arg(long = "mem")]
    memory_mib: u32,
    /// Pages that the guest rewrites per second.
    #[arg(long, default_value_t = 0)]
    dirty: u64,
    /// Memory in MiB that is rewritten; without it, all.
    #[arg(long)]
    working_set: Option<u32>,
    /// Memory in MiB that its program leaves alone, so that it can be given back.
    #[arg(long)]
    leave: Option<u32>,
    /// What pages hold: zero, random or text.
    #[arg(long, default_value = "random")]
    content: Content,
    /// Virtual CPUs of the guest.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Never answer a request to suspend, though running on.
    #[arg(long)]
    no_suspend: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            // The chain of causes, without the backtrace that `{:?}` may add.
            eprintln!("lab: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let store = Store::open()?;
    match cli.command {
        Verb::Build { xen } => drop(Images::build(&store, &xen)?),
        Verb::Up(arguments) => drop(Lab::up(&store, arguments.into())?),
        Verb::Status => return show_status(&store),
        Verb::Down => Lab::down(&store)?,
        Verb::Run { host, command } => return run_on_host(&store, &host, &command),
        Verb::Push => Lab::attach(&store)?.push_rxl()?,
        Verb::SyncClocks => sync_clocks(&store)?,
        Verb::Guest(verb) => return guest(&store, verb),
        Verb::Demo => anyhow::ensure!(demo::run(&store)? == 0, "a guest has bad pages"),
    }
    Ok(ExitCode::SUCCESS)
}

fn guest(store: &Store, verb: GuestVerb) -> Result<ExitCode> {
    let lab = Lab::attach(store)?;
    match verb {
        GuestVerb::Start(arguments) => {
            let host = arguments.host.clone();
            lab.start_guest(lab.host(&host)?, &arguments.into())?;
        }
        GuestVerb::Stop { name } => lab.stop_guest(&name)?,
        GuestVerb::Check { name } => {
            let report = lab.check_guest(&name)?;
            print_line(&serde_json::to_string(&report)?)?;
            if report.bad_pages > 0 {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run_on_host(store: &Store, host: &str, words: &[String]) -> Result<ExitCode> {
    let lab = Lab::attach(store)?;
    let script = match words {
        [line] => line.clone(),
        words => words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
    };
    let mut command = lab.host(host)?.command(&script);
    if stdin().is_terminal() {
        command.stdin(Stdio::null());
    }
    // Only returns if it cannot be started.
    Err(command.exec()).context("Cannot start ssh")
}

fn show_status(store: &Store) -> Result<ExitCode> {
    let Some((shape, is_up, hosts)) = status(store)? else {
        print_line("no lab")?;
        return Ok(ExitCode::FAILURE);
    };
    let condition = if is_up { "up" } else { "not (fully) up" };
    print_line(&format!(
        "lab is {condition}: {} hosts, {} vCPUs and {} NICs each",
        shape.hosts, shape.vcpus, shape.nics
    ))?;
    for host in hosts {
        let condition = if host.is_alive { "runs" } else { "has ended" };
        print_line(&format!("{}: QEMU {} {condition}", host.name, host.pid))?;
        print_line(host.domains.trim_end())?;
    }
    Ok(if is_up { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn sync_clocks(store: &Store) -> Result<()> {
    let lab = Lab::attach(store)?;
    let offsets = lab.sync_clocks()?;
    for (host, offset) in lab.hosts().iter().zip(offsets) {
        let ahead = offset.nanoseconds / 1000;
        let error = offset.round_trip.as_micros() / 2;
        print_line(&format!("{}: {ahead} us ahead (± {error} us)", host.name()))?;
    }
    Ok(())
}

fn print_line(line: &str) -> Result<()> {
    writeln!(stdout(), "{line}").context("Cannot write to standard output")
}

impl From<UpArgs> for Shape {
    fn from(arguments: UpArgs) -> Self {
        let UpArgs { hosts, xen: releases, vcpus, nics, nic_rate } = arguments;
        Self { hosts, releases, vcpus, nics, nic_rate }
    }
}

impl From<StartArgs> for GuestSpec {
    fn from(arguments: StartArgs) -> Self {
        Self {
            name: arguments.name,
            kind: arguments.kind,
            memory_mib: arguments.memory_mib,
            vcpus: arguments.vcpus,
            dirty_pages_per_s: arguments.dirty,
            working_set_mib: arguments.working_set,
            leave_mib: arguments.leave,
            content: arguments.content,
            ignores_suspend: arguments.no_suspend,
            has_devices: false,
        }
    }
}
