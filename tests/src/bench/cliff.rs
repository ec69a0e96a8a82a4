//! A guest that writes as fast as one NIC carries, or faster, does not converge over one. Over
//! four it does: the stock xl over one NIC against rxl over all.

use std::fmt;

use anyhow::Result;
use clap::Args;
use rxl_lab::{GuestKind, Shape};
use serde::Serialize;

use super::link::{Move, Mover, guest, move_over};
use super::{print, rounded, start};
use crate::lab::Session;

/// NICs that rxl uses.
const NICS: u8 = 4;

/// What is asked for.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Print a line of JSON for each run
    #[arg(long)]
    json: bool,
    /// How often each is measured
    #[arg(long, default_value_t = 1)]
    runs: u32,
    /// Rate of each NIC in Mbit/s
    #[arg(long, default_value_t = 18)]
    rate: u32,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 256)]
    mem: u32,
    /// pv or pvh
    #[arg(long = "type", default_value = "pvh")]
    kind: GuestKind,
    /// What the guest writes, in parts of one NIC's rate; more than one with commas
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 1.0, 2.0, 3.0])]
    ratios: Vec<f64>,
}

/// One run.
#[derive(Debug, Serialize)]
struct Figure {
    bench: &'static str,
    /// What the guest was asked to write, in parts of one NIC's rate.
    dirty_ratio: f64,
    #[serde(flatten)]
    run: Move,
}

/// Two runs after each other: how many times more stock needed.
#[derive(Debug, Serialize)]
struct Ratio {
    bench: &'static str,
    dirty_ratio: f64,
    #[serde(rename = "type")]
    kind: String,
    total_ratio: f64,
    guest_gap_ratio: f64,
    bytes_ratio: f64,
}

/// Measures a guest at each rate.
///
/// # Errors
/// Whatever keeps the lab or a migration from its end.
pub fn run(options: &Options) -> Result<()> {
    let session = Session::open_shaped(Shape { nics: NICS, ..Shape::default() })?;
    session.lab().push_rxl()?;
    let kind = options.kind;
    for &dirty_ratio in &options.ratios {
        let name = "bench-cliff";
        let dirty_mbit = f64::from(options.rate) * dirty_ratio;
        session.lab().set_nic_rates(&[])?;
        start(&session, &guest(name, kind, options.mem, dirty_mbit))?;
        for _ in 0..options.runs {
            pair(&session, name, kind, dirty_ratio, options)?;
        }
        session.remove(name)?;
    }
    Ok(())
}

fn pair(
    session: &Session,
    name: &str,
    kind: GuestKind,
    dirty_ratio: f64,
    options: &Options,
) -> Result<()> {
    let Options { rate, json, .. } = *options;
    let one = |mover, nics| {
        let run = move_over(session, name, kind, mover, &vec![rate; usize::from(nics)])?;
        let figure = Figure { bench: "cliff", dirty_ratio, run };
        print(&figure, json)?;
        Ok::<_, anyhow::Error>(figure.run)
    };
    let (stock, rxl) = (one(Mover::Xl, 1)?, one(Mover::Rxl, NICS)?);
    let bytes = |run: &Move| run.sent.iter().sum::<u64>();
    let ratio = Ratio {
        bench: "cliff-ratio",
        dirty_ratio,
        kind: kind.to_string(),
        total_ratio: ratio(stock.total_ms, rxl.total_ms),
        guest_gap_ratio: ratio(stock.guest_gap_ms, rxl.guest_gap_ms),
        bytes_ratio: ratio(bytes(&stock), bytes(&rxl)),
    };
    print(&ratio, json)
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people to read")]
fn ratio(of: u64, to: u64) -> f64 {
    rounded(of as f64 / to.max(1) as f64)
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "writes {} of a NIC: {}", self.dirty_ratio, self.run)
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "writes {} of a NIC: stock to rxl: time {}, gap {}, bytes {}",
            self.dirty_ratio, self.total_ratio, self.guest_gap_ratio, self.bytes_ratio
        )
    }
}
