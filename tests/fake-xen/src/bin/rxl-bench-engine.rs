//! `tests/bench engine`: see [`rxl_fake_xen::Bench`].
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this is the output of the benchmark")]

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use rxl_fake_xen::{Bench, Programs};

/// Debian's helper, from the package xen-utils-4.17.
const STOCK: &str = "/usr/lib/xen-4.17/bin/libxl-save-helper";
const USAGE: &str =
    "usage: tests/bench engine [--json] [--mib N (4096)] [--pairs N (5)] [--only FIGURE]";

fn main() -> Result<()> {
    let (mut json, mut mib, mut pairs, mut only) = (false, 4096, 5, String::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0);
        match arg.as_str() {
            "--json" => json = true,
            "--mib" => mib = number().context(USAGE)?,
            "--pairs" => pairs = number().context(USAGE)?,
            "--only" => only = args.next().context(USAGE)?,
            _ => bail!(USAGE),
        }
    }
    // Cargo puts all that it builds into one directory.
    let here = std::env::current_exe().context("Cannot find this program")?;
    let beside = |name: &str| here.with_file_name(name);
    let programs = Programs {
        stock: PathBuf::from(STOCK),
        rxl: beside("rxl"),
        preload: beside("librxl_fake_xen_preload.so"),
    };
    let pairs = u32::try_from(pairs).context(USAGE)?;
    let bench = Bench { programs, plain_copy: beside("rxl-plain-copy"), mib, pairs, only };
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
