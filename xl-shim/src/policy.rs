//! When a guest is suspended, as the user says it: options of `rxl migrate`, and the variable by
//! which they reach the save helper. Under stock `xl` or libvirt the variable is the user's.
//!
//! What the words mean is [`rxl_migrate::source::precopy`]'s.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use rxl_migrate::source::precopy::{AtLimit, Limits, Policy};

/// `stock`, or any of `pause=MS`, `fixed=MS`, `time=S`, `passes=N`, `limit=force|cancel`,
/// `throttle=0|1` with commas between them.
pub(crate) const ENV: &str = "RXL_POLICY";

/// Options of a live migration that say when the guest is suspended.
#[derive(Clone, Debug, Args)]
pub(crate) struct PolicyArgs {
    /// When the guest is suspended: `time`, once the pause is expected to be short enough, or
    /// `stock`, after five passes or with fewer than 50 pages left, as xl does [not in xl]
    #[arg(long, value_enum, default_value = "time", value_name = "RULE")]
    policy: Rule,
    /// How long the guest may be suspended, in milliseconds [not in xl]
    #[arg(long, value_name = "MS", default_value = "300")]
    max_pause: u64,
    /// For how many seconds the guest's memory is sent before it is suspended, at most
    /// [not in xl]
    #[arg(long, value_name = "S")]
    max_time: Option<u64>,
    /// How many times at most what the guest has written is sent before it is suspended
    /// [not in xl]
    #[arg(long, value_name = "N", default_value = "30")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    max_passes: u32,
    /// What to do if the pause would be too long even so: suspend the guest nevertheless, or
    /// cancel. The same goes for a guest that writes faster than its memory can be sent
    /// [not in xl]
    #[arg(long, value_enum, default_value = "force", value_name = "WHAT")]
    on_limit: OnLimit,
    /// Slow a guest that writes faster than its memory can be sent, in steps, down to a tenth of
    /// its processors, until it is suspended [not in xl]
    #[arg(long)]
    throttle: bool,
}

/// Rules, by their names on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rule {
    Time,
    Stock,
}

/// What to do at a limit, by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnLimit {
    Force,
    Cancel,
}

impl PolicyArgs {
    /// Whether the guest may be slowed.
    pub(crate) fn throttles(&self) -> bool {
        self.throttle && self.policy == Rule::Time
    }

    /// What they mean. `fixed_part` of the pause is not memory, if that is known.
    pub(crate) fn policy(&self, fixed_part: Option<Duration>) -> PolicyWanted {
        if self.policy == Rule::Stock {
            return PolicyWanted(Policy::Stock);
        }
        let usual = Limits::default();
        PolicyWanted(Policy::ByTime(Limits {
            pause: Duration::from_millis(self.max_pause),
            time: self.max_time.map(Duration::from_secs),
            passes: self.max_passes,
            at_limit: match self.on_limit {
                OnLimit::Force => AtLimit::Force,
                OnLimit::Cancel => AtLimit::Cancel,
            },
            fixed: fixed_part.unwrap_or(usual.fixed),
            throttle: self.throttle,
        }))
    }
}

/// A policy that can be told in a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PolicyWanted(pub(crate) Policy);

impl FromStr for PolicyWanted {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<PolicyWanted> {
        if text == "stock" {
            return Ok(PolicyWanted(Policy::Stock));
        }
        let mut limits = Limits::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').context("NAME=VALUE is wanted")?;
            let number = || value.parse::<u64>().with_context(|| format!("{part}: no number"));
            match name {
                "pause" => limits.pause = Duration::from_millis(number()?),
                "fixed" => limits.fixed = Duration::from_millis(number()?),
                "time" => limits.time = Some(Duration::from_secs(number()?)),
                "passes" => limits.passes = value.parse().context("passes: no number")?,
                "throttle" => limits.throttle = number()? != 0,
                "limit" => limits.at_limit = at_limit(value)?,
                other => bail!("there is no {other}"),
            }
        }
        Ok(PolicyWanted(Policy::ByTime(limits)))
    }
}

fn at_limit(text: &str) -> anyhow::Result<AtLimit> {
    match text {
        "force" => Ok(AtLimit::Force),
        "cancel" => Ok(AtLimit::Cancel),
        other => bail!("the limit is \"force\" or \"cancel\", not \"{other}\""),
    }
}

impl fmt::Display for PolicyWanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Policy::ByTime(limits) = &self.0 else { return f.write_str("stock") };
        let (pause, fixed) = (limits.pause.as_millis(), limits.fixed.as_millis());
        write!(f, "pause={pause},fixed={fixed},passes={}", limits.passes)?;
        if let Some(time) = limits.time {
            write!(f, ",time={}", time.as_secs())?;
        }
        if limits.throttle {
            f.write_str(",throttle=1")?;
        }
        f.write_str(match limits.at_limit {
            AtLimit::Force => ",limit=force",
            AtLimit::Cancel => ",limit=cancel",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_what_it_says() {
        for text in [
            "stock",
            "pause=300,fixed=100,passes=30,limit=force",
            "pause=0,fixed=7,passes=1,time=60,limit=cancel",
            "pause=300,fixed=100,passes=30,throttle=1,limit=force",
        ] {
            assert_eq!(text.parse::<PolicyWanted>().unwrap().to_string(), text);
        }
        assert_eq!("".parse::<PolicyWanted>().unwrap(), PolicyWanted::default());
        for text in ["pause", "pause=x", "limit=never", "speed=1", "passes=-1"] {
            assert!(text.parse::<PolicyWanted>().is_err(), "{text}");
        }
    }
}
