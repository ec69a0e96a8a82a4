//! How fast memory may go to the target at most: for the sake of others that use the network.
//!
//! The stream is held up by its writers ([`Rate::wait`]), connections beside it by the kernel
//! ([`crate::xc::limit_rate`]), each to its share.

use std::io;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use crate::abort;

/// Between two looks at whether somebody wants the end.
const PATIENCE: Duration = Duration::from_millis(200);
const BYTES_PER_S_IN_MBIT: u64 = 1_000_000 / 8;

/// Bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(NonZeroU64);

impl Rate {
    /// Of so many Mbit/s; none is no rate.
    #[must_use]
    pub fn of_mbit(mbit: u32) -> Option<Rate> {
        NonZeroU64::new(u64::from(mbit) * BYTES_PER_S_IN_MBIT).map(Rate)
    }

    /// The same in whole Mbit/s.
    #[must_use]
    pub fn mbit(self) -> u64 {
        self.0.get() / BYTES_PER_S_IN_MBIT
    }

    /// In bytes per second.
    #[must_use]
    pub fn bytes_per_s(self) -> u64 {
        self.0.get()
    }

    /// What one of `parts` may use. At least a byte.
    #[must_use]
    pub fn share(self, parts: u8) -> Rate {
        Rate(NonZeroU64::new(self.0.get() / u64::from(parts.max(1))).unwrap_or(NonZeroU64::MIN))
    }

    /// Waits until `bytes` that were begun to be written at `since` have taken their time.
    ///
    /// # Errors
    /// Somebody wants the end.
    pub(crate) fn wait(self, bytes: usize, since: Instant) -> io::Result<()> {
        #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
        let time = Duration::from_secs_f64(bytes as f64 / self.0.get() as f64);
        loop {
            let left = time.saturating_sub(since.elapsed());
            if abort::requested() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(PATIENCE));
        }
    }
}

/// In Mbit/s.
impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        let rate = text.parse().ok().and_then(Rate::of_mbit);
        rate.ok_or_else(|| "a number of Mbit/s above 0".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_in_mbit_and_can_be_shared() {
        let rate: Rate = "80".parse().unwrap();
        assert_eq!((rate.bytes_per_s(), rate.mbit()), (10_000_000, 80));
        assert_eq!(rate.share(4).bytes_per_s(), 2_500_000);
        assert_eq!(Rate(NonZeroU64::MIN).share(4).bytes_per_s(), 1);
        for text in ["", "0", "-3", "8m"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_written_takes_its_time_at_least() {
        let (rate, since) = (Rate::of_mbit(8).unwrap(), Instant::now());
        rate.wait(50_000, since).unwrap();
        assert!(since.elapsed() >= Duration::from_millis(50));
    }
}
