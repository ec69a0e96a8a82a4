//! What a host runs: a release of Xen, with the release of Debian that has it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// By the release of Xen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Release {
    /// Debian 12.
    #[default]
    #[serde(rename = "4.17")]
    Xen417,
    /// Debian 13.
    #[serde(rename = "4.20")]
    Xen420,
}

impl Release {
    /// Xen's number.
    #[must_use]
    pub fn xen(self) -> &'static str {
        match self {
            Release::Xen417 => "4.17",
            Release::Xen420 => "4.20",
        }
    }

    /// Debian's name.
    #[must_use]
    pub fn suite(self) -> &'static str {
        match self {
            Release::Xen417 => "bookworm",
            Release::Xen420 => "trixie",
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.xen())
    }
}

impl FromStr for Release {
    type Err = String;

    fn from_str(text: &str) -> Result<Release, String> {
        let all = [Release::Xen417, Release::Xen420];
        let found = all.into_iter().find(|release| release.xen() == text);
        found.ok_or_else(|| format!("{} or {}", Release::Xen417, Release::Xen420))
    }
}
