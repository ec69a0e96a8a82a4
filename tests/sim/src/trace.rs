//! What happened in a run, in order: always as a digest, and as text where somebody wants to read
//! it.

use std::fmt;

/// The trace of a run.
#[derive(Debug)]
pub(crate) struct Trace {
    digest: u64,
    now: u64,
    lines: Option<Vec<String>>,
}

/// FNV-1a's.
const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0100_0000_01b3;

impl Trace {
    /// `text`: keep lines, too.
    pub(crate) fn new(text: bool) -> Trace {
        Trace { digest: OFFSET, now: 0, lines: text.then(Vec::new) }
    }

    /// `who` did, or met with, `what`; `number` stands for all in the digest that `what` is not.
    pub(crate) fn note(&mut self, who: impl fmt::Debug, what: &'static str, number: u64) {
        for byte in what.bytes() {
            self.mix(byte.into());
        }
        self.mix(number);
        self.say(|| format!("{who:?} {what}"));
    }

    /// A line for the reader alone.
    pub(crate) fn say(&mut self, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{:>8} ms  {}", self.now, line()));
        }
    }

    /// A process goes on.
    pub(crate) fn tick(&mut self, role: u64, now: u64) {
        self.now = now;
        self.mix(role << 48 ^ now);
    }

    fn mix(&mut self, word: u64) {
        self.digest = (self.digest ^ word).wrapping_mul(PRIME).rotate_left(23);
    }

    pub(crate) fn digest(&self) -> u64 {
        self.digest
    }

    pub(crate) fn into_lines(self) -> Vec<String> {
        self.lines.unwrap_or_default()
    }
}
