//! The runner behind `tests/run`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rxl_lab::GuestKind;
use rxl_tests::lab::Session;
use rxl_tests::tally::Tally;
use rxl_tests::{
    bad_input, devices, dkms, drop_in, evacuate, extents, failures, fake, fuzz, interop, kmod,
    readme, report, restless, sim, smoke, soak, unit, virsh,
};

/// Seeds of the simulator that CI runs: some ten seconds.
const SIM_SEEDS: u64 = 2_000;

/// Runs rxl's tests; without a suite, those of CI: unit, fake and sim (short), then smoke.
///
/// Suites that need the lab use the one that is up, or boot one and take it down at the end.
#[derive(Parser)]
#[command(name = "tests/run", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    suite: Option<Suite>,
}

#[derive(Subcommand)]
enum Suite {
    /// Formatting, lints, and the tests of all crates; needs no lab
    Unit,
    /// Moves guests between stock's save helper and rxl's on a modelled Xen; needs no lab
    Fake {
        /// How many migrations
        #[arg(long, default_value_t = 216)]
        runs: u64,
        /// Seed of the first; each has the next
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Simulates migrations in which anything goes wrong; needs no lab
    Sim {
        /// How many, each determined by its number
        #[arg(long, default_value_t = SIM_SEEDS)]
        seeds: u64,
        /// Show what happens in this one
        #[arg(long, conflicts_with = "seeds")]
        seed: Option<u64>,
    },
    /// Moves a PV and a PVH guest between rxl and rxl, and between rxl and the stock xl
    Smoke,
    /// Every pairing of rxl and the stock xl: migrate, save and restore
    Interop {
        /// An HVM guest instead of a PV and a PVH guest
        #[arg(long)]
        hvm: bool,
        /// From a host with Xen 4.17 to one with 4.20
        #[arg(long, conflicts_with = "hvm")]
        newer: bool,
    },
    /// Moves both guests there and back many times, then counts what is left behind
    Soak {
        /// How many times
        #[arg(long, default_value_t = 20)]
        rounds: u32,
    },
    /// Guests with a network card and a disk: a TCP session goes on over every move
    Devices,
    /// A script that drives xl, with the stock xl and with rxl in its place
    DropIn {
        /// Write docs/drop-in.md anew
        #[arg(long)]
        update: bool,
    },
    /// Migrations that have to fail without harm to the guest
    BadInput,
    /// Six guests leave a host for two others, one of which fails
    Evacuate,
    /// Everything that takes part in a migration is killed or cut at each of its phases; then
    /// workers, connections and NICs are lost while guests move over four NICs
    Failures(failures::Options),
    /// Guests that balloon, boot, or write too fast while they move
    Restless {
        /// pv or pvh; without it both
        #[arg(long = "type")]
        kind: Option<GuestKind>,
    },
    /// Counts the extents of memory that a PVH guest gets at the target
    Extents,
    /// Threads map and unmap guests' memory by the kernel module, while all goes wrong around them
    Kmod {
        /// How long, one process a minute
        #[arg(long, default_value_t = 30)]
        minutes: u32,
    },
    /// The kernel module is installed, upgraded and removed by DKMS on both releases of Debian
    Dkms,
    /// libvirt saves and restores guests, with the stock helper and with rxl's in its place
    Virsh,
    /// A first-time user's walk through the README, command by command
    Readme,
    /// Looks at the report's page and the live view with Chromium; needs no lab
    Report {
        /// Write the pictures in docs/ anew
        #[arg(long)]
        update: bool,
    },
    /// Searches for inputs that break a parser; needs no lab, but a C++ compiler
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let mut tally = Tally::new();
    match Arguments::parse().suite {
        None => {
            unit::run(&mut tally);
            fake::run_short(&mut tally);
            sim::run(&mut tally, SIM_SEEDS);
            in_lab(&mut tally, smoke::run);
        }
        Some(Suite::Unit) => unit::run(&mut tally),
        Some(Suite::Fake { runs, seed }) => fake::run(&mut tally, runs, seed),
        Some(Suite::Sim { seed: Some(seed), .. }) => sim::show(&mut tally, seed),
        Some(Suite::Sim { seeds, .. }) => sim::run(&mut tally, seeds),
        Some(Suite::Smoke) => in_lab(&mut tally, smoke::run),
        Some(Suite::Interop { newer: true, .. }) => {
            let opened = tally.case("the lab is up, with rxl on it", interop::open_newer);
            if let Some(session) = opened {
                interop::run_newer(&mut tally, &session);
            }
        }
        Some(Suite::Interop { hvm, .. }) => in_lab(&mut tally, |tally, session| {
            interop::run(tally, session, hvm);
        }),
        Some(Suite::Soak { rounds }) => in_lab(&mut tally, |tally, session| {
            soak::run(tally, session, rounds);
        }),
        Some(Suite::Devices) => {
            if let Some(session) = tally.case("the lab is up, with rxl on it", devices::open) {
                devices::run(&mut tally, &session);
            }
        }
        Some(Suite::DropIn { update }) => in_lab(&mut tally, |tally, session| {
            drop_in::run(tally, session, update);
        }),
        Some(Suite::BadInput) => in_lab(&mut tally, bad_input::run),
        Some(Suite::Evacuate) => {
            if let Some(session) = tally.case("the lab is up, with rxl on it", evacuate::open) {
                evacuate::run(&mut tally, &session);
            }
        }
        Some(Suite::Failures(options)) => failures::run(&mut tally, &options),
        Some(Suite::Restless { kind }) => in_lab(&mut tally, |tally, session| {
            restless::run(tally, session, kind);
        }),
        Some(Suite::Extents) => in_lab(&mut tally, extents::run),
        Some(Suite::Kmod { minutes }) => {
            if let Some(session) = tally.case("the lab is up, with the module", kmod::open) {
                kmod::run(&mut tally, &session, minutes);
            }
        }
        Some(Suite::Dkms) => {
            if let Some(session) = tally.case("the lab is up, with rxl on it", dkms::open) {
                dkms::run(&mut tally, &session);
            }
        }
        Some(Suite::Virsh) => {
            if let Some(session) = tally.case("the lab is up, with rxl on it", virsh::open) {
                virsh::run(&mut tally, &session);
            }
        }
        Some(Suite::Readme) => {
            if let Some(session) = tally.case("the lab is up", readme::open) {
                readme::run(&mut tally, &session);
            }
        }
        Some(Suite::Report { update }) => report::run(&mut tally, update),
        Some(Suite::Fuzz(options)) => fuzz::run(&mut tally, &options),
    }
    tally.finish()
}

fn in_lab(tally: &mut Tally, suite: impl FnOnce(&mut Tally, &Session)) {
    if let Some(session) = tally.case("the lab is up, with rxl on it", Session::open) {
        suite(tally, &session);
    }
}
