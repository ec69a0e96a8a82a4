//! `tests/bench content`: see [`rxl_fake_xen::content`].
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this is the output of the benchmark")]

use std::str::FromStr;

use anyhow::{Context, Result, bail};
use rxl_fake_xen::{Bench, content};

const USAGE: &str = "usage: tests/bench content [--json] [--mib N (256)] [--pairs N (3)] \
                     [--only CONTENT] [--rate MBIT,... (200)]";

fn main() -> Result<()> {
    let (mut json, mut rates) = (false, vec![200]);
    let mut bench = Bench { mib: 256, pairs: 3, ..Bench::here()? };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--json" {
            json = true;
            continue;
        }
        let value = args.next().context(USAGE)?;
        match arg.as_str() {
            "--mib" => bench.mib = number(&value)?,
            "--pairs" => bench.pairs = number(&value)?,
            "--only" => bench.only = value,
            "--rate" => rates = value.split(',').map(number).collect::<Result<_>>()?,
            _ => bail!(USAGE),
        }
    }
    content(&bench, &rates, |sent| match json {
        true => println!("{}", sent.json()),
        false => println!("{}", sent.text()),
    })
}

/// A number above 0.
fn number<T: FromStr + PartialOrd + Default>(text: &str) -> Result<T> {
    text.parse().ok().filter(|number| *number > T::default()).context(USAGE)
}
