//! How the time of a migration goes down with the number of NICs, and whether NICs of different
//! rates are all used to the full.

use std::fmt;

use anyhow::Result;
use clap::{Args, ValueEnum};
use rxl_lab::{GuestKind, Shape};
use serde::Serialize;

use super::link::{Move, Mover, guest, move_over};
use super::{hundredths, locks, median, print, rounded, start};
use crate::lab::Session;

/// Numbers of NICs that are compared.
const NICS: [usize; 3] = [1, 2, 4];

/// What the guest that writes writes, in parts of one NIC's rate.
const DIRTY_RATIO: f64 = 0.5;

/// What is asked for.
#[derive(Clone, Copy, Debug, Args)]
pub struct Options {
    /// Print a line of JSON for each run
    #[arg(long)]
    json: bool,
    /// How often each is measured
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Rate of each NIC in Mbit/s, a multiple of 3
    #[arg(long, default_value_t = 18)]
    rate: u32,
    /// Memory of the guests in MiB
    #[arg(long, default_value_t = 256)]
    mem: u32,
    /// pv or pvh; without it both
    #[arg(long = "type")]
    kind: Option<GuestKind>,
    /// idle or dirty; without it both
    #[arg(long)]
    workload: Option<Workload>,
    /// Only over NICs of different rates
    #[arg(long)]
    unequal: bool,
    /// Count how often locks of address spaces are taken and waited for (tracing takes time)
    #[arg(long)]
    locks: bool,
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Workload {
    /// Nothing.
    Idle,
    /// It writes.
    Dirty,
}

/// One run, beside what it is compared with.
#[derive(Debug, Serialize)]
struct Figure {
    bench: &'static str,
    workload: Workload,
    #[serde(flatten)]
    run: Move,
    /// The median time over one NIC to this one.
    speedup: Option<f64>,
    /// rxl's rate to the sum of the NICs' rates.
    of_rates: Option<f64>,
}

/// Measures both kinds of guest, one that stands still and one that writes.
///
/// # Errors
/// Whatever keeps the lab or a migration from its end.
pub fn run(options: Options) -> Result<()> {
    let most = NICS.into_iter().max().unwrap_or(1);
    let nics = u8::try_from(most)?;
    let session = Session::open_shaped(Shape { nics, ..Shape::default() })?;
    session.lab().push_rxl()?;
    for number in [1, 2] {
        if options.locks {
            locks::prepare(session.host(number)?)?;
        }
    }
    for kind in [GuestKind::Pvh, GuestKind::Pv] {
        for workload in [Workload::Idle, Workload::Dirty] {
            let is_wanted = options.kind.is_none_or(|wanted| wanted == kind)
                && options.workload.is_none_or(|wanted| wanted == workload);
            if is_wanted {
                one_guest(&session, kind, workload, options)?;
            }
        }
    }
    Ok(())
}

fn one_guest(
    session: &Session,
    kind: GuestKind,
    workload: Workload,
    options: Options,
) -> Result<()> {
    let name = format!("bench-{kind}");
    let dirty_mbit = match workload {
        Workload::Idle => 0.0,
        Workload::Dirty => f64::from(options.rate) * DIRTY_RATIO,
    };
    session.lab().set_nic_rates(&[])?;
    start(session, &guest(&name, kind, options.mem, dirty_mbit))?;
    measure(session, &name, kind, workload, options)?;
    session.remove(&name)
}

fn measure(
    session: &Session,
    name: &str,
    kind: GuestKind,
    workload: Workload,
    options: Options,
) -> Result<()> {
    let Options { rate, runs, json, unequal, locks, .. } = options;
    let differ = |rates: &Vec<u32>| rates.first() != rates.last();
    let mut plans = plans(rate);
    plans.retain(|rates| differ(rates) || !unequal);
    let mut one_nic = Vec::new();
    for _ in 0..runs {
        for rates in &plans {
            let run = if locks {
                counted(session, name, kind, rates)?
            } else {
                move_over(session, name, kind, Mover::Rxl, rates)?
            };
            if run.nics == 1 {
                one_nic.push(ms(run.total_ms));
            }
            let speedup = median(one_nic.clone()).map(|one| hundredths(one / ms(run.total_ms)));
            let sum = f64::from(rates.iter().sum::<u32>());
            let of_rates = run.transfer_mbit.map(|mbit| hundredths(mbit / sum));
            print(&Figure { bench: "nics", workload, run, speedup, of_rates }, json)?;
        }
    }
    Ok(())
}

/// The same with the locks of address spaces at the source.
fn counted(session: &Session, name: &str, kind: GuestKind, rates: &[u32]) -> Result<Move> {
    let (from, _) = session.here_and_there(name)?;
    locks::begin(from)?;
    let run = move_over(session, name, kind, Mover::Rxl, rates);
    let locks = locks::end(from, locks::RXL)?;
    let (lock_acquisitions, lock_wait_ms) =
        (Some(locks.acquisitions), Some(rounded(locks.wait_ms)));
    Ok(Move { lock_acquisitions, lock_wait_ms, ..run? })
}

/// Rates of the NICs in use: equal ones, and as much in two slow and two fast ones.
fn plans(rate: u32) -> Vec<Vec<u32>> {
    let mut plans: Vec<Vec<u32>> = NICS.iter().map(|nics| vec![rate; *nics]).collect();
    let (slow, fast) = (rate * 2 / 3, rate * 4 / 3);
    plans.push(vec![slow, slow, fast, fast]);
    plans
}

#[allow(clippy::cast_precision_loss, reason = "times are short of 2^53 ms")]
fn ms(ms: u64) -> f64 {
    ms as f64
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workload = if self.workload == Workload::Idle { "idle" } else { "dirty" };
        write!(f, "{workload:<5} {}", self.run)?;
        if let Some(speedup) = self.speedup {
            write!(f, ", {speedup:.2} times as fast")?;
        }
        if let Some(share) = self.of_rates {
            write!(f, ", {share:.2} of the rates")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unequal_nics_have_as_much_rate_as_equal_ones() {
        let plans = plans(18);
        assert_eq!(plans.last().map(|rates| rates.iter().sum()), Some(4 * 18));
    }
}
