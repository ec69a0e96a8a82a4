//! `tests/bench engine`: see [`rxl_fake_xen::Bench`].
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this is the output of the benchmark")]

use anyhow::{Context, Result, bail};
use rxl_fake_xen::{Bench, Ways};

const USAGE: &str = "usage: tests/bench engine [--json] [--mib N (4096)] [--pairs N (5)] \
                     [--only FIGURE] [--workers N (1)]";

fn main() -> Result<()> {
    let (mut json, mut bench) = (false, Bench::here()?);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse::<u32>().ok()).filter(|n| *n > 0);
        match arg.as_str() {
            "--json" => json = true,
            "--mib" => bench.mib = number().context(USAGE)?.into(),
            "--pairs" => bench.pairs = number().context(USAGE)?,
            "--workers" => {
                let count = number().and_then(|count| u8::try_from(count).ok());
                bench.ways = Ways::Workers(count.context(USAGE)?);
            }
            "--only" => bench.only = args.next().context(USAGE)?,
            _ => bail!(USAGE),
        }
    }
    if !json {
        let head = ["MiB/s", "rxl", "stock", "ratio", "limit", "cpu", "requests"];
        let [name, rest @ ..] = head;
        println!("{name:<26}{}", rest.map(|title| format!("{title:>9}")).concat());
    }
    bench.run(|figure| match json {
        true => println!("{}", figure.json()),
        false => println!(
            "{:<26}{:>9.0}{:>9.0}{:>9.2}{:>9.0}{:>9.2}{:>9.2}",
            figure.name,
            figure.rxl,
            figure.stock,
            figure.ratio,
            figure.limit,
            figure.cpu_ratio,
            figure.requests_ratio
        ),
    })
}
