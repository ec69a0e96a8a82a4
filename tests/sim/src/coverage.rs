//! What the runs have exercised: how many had what.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// Numbers of runs, by what happened in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<Cow<'static, str>, u64>);

impl Coverage {
    /// This run had `what`.
    pub(crate) fn count(&mut self, what: impl Into<Cow<'static, str>>) {
        self.0.insert(what.into(), 1);
    }

    /// Adds the runs of `other`.
    pub fn add(&mut self, other: &Coverage) {
        for (what, count) in &other.0 {
            *self.0.entry(what.clone()).or_default() += count;
        }
    }

    /// How many runs had `what`.
    #[must_use]
    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(what, count)| writeln!(f, "{count:>9}  {what}"))
    }
}
