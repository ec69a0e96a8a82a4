//! `tests/bench scale` and `tests/bench memory`: see [`rxl_fake_xen::grow`].
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this is the output of the benchmark")]

use anyhow::{Context, Result, bail};
use rxl_fake_xen::{Bench, Growth, Ways, clean_pass, grow};

const USAGE: &str = "usage: tests/bench scale|memory [--json] [--gib N (16)] [--runs N (3, 1)] \
                     [--workers N (1)]";
/// Sizes of guests, in GiB.
const SCALE: [u64; 5] = [1, 2, 4, 8, 16];
const MEMORY: [u64; 3] = [1, 4, 16];

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let what = args.next().context(USAGE)?;
    let (mut json, mut gib_max, mut runs) = (false, 16, None);
    let mut bench = Bench::here()?;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--json" => json = true,
            "--gib" => gib_max = args.next().and_then(|n| n.parse().ok()).context(USAGE)?,
            "--runs" => runs = Some(args.next().and_then(|n| n.parse().ok()).context(USAGE)?),
            "--workers" => {
                let count = args.next().and_then(|n| n.parse().ok()).context(USAGE)?;
                bench.ways = Ways::Workers(count);
            }
            _ => bail!(USAGE),
        }
    }
    let (sizes, usual_runs, show): (&[u64], usize, fn(&Growth, bool)) = match what.as_str() {
        "scale" => (&SCALE, 3, show_time),
        "memory" => (&MEMORY, 1, show_memory),
        _ => bail!(USAGE),
    };
    let sizes: Vec<u64> = sizes.iter().copied().filter(|gib| *gib <= gib_max).collect();
    let runs = runs.unwrap_or(usual_runs);
    grow(&bench, &sizes, runs, |growth| show(growth, json))?;
    if what == "scale" {
        let ms = clean_pass().as_secs_f64() * 1000.0;
        match json {
            true => println!("{{\"name\":\"clean-pass\",\"gib\":1024,\"ms\":{ms:.2}}}"),
            false => println!("a pass over 1 TiB without a dirty page: {ms:.2} ms"),
        }
    }
    Ok(())
}

fn show_time(growth: &Growth, json: bool) {
    let Growth { name, gib, took, cpu, .. } = growth;
    match json {
        true => println!("{}", growth.time_json()),
        false => println!(
            "{name:<14}{gib:>4} GiB {:>8.0} ms a GiB, {:>6.0} ms of a processor",
            growth.ms_per_gib(*took),
            growth.ms_per_gib(*cpu)
        ),
    }
}

fn show_memory(growth: &Growth, json: bool) {
    let Growth { name, gib, processes, peak_kib, own_kib, limit_kib, .. } = growth;
    match json {
        true => println!("{}", growth.memory_json()),
        false => println!(
            "{name:<14}{gib:>4} GiB {processes:>3} processes, {:>4} MiB resident at most, {:>4} \
             without the guest's, allowed {} MiB",
            peak_kib.div_ceil(1024),
            own_kib.div_ceil(1024),
            limit_kib / 1024
        ),
    }
}
