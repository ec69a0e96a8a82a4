//! One migration of a lab guest, measured from outside: by the clock of this machine, the bytes
//! that left the source host's NICs, and what the guest itself says before and after.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::guest::GuestKind;
use crate::host::{Finished, Host};
use crate::lab::Lab;
use crate::network::{inside, tap_name};
use crate::plain::CLIENT;
use crate::process::output;

/// Time that a migration may take in emulation.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(420);

/// Where rxl on the source host leaves its report.
const REPORT_PATH: &str = "/run/rxl-lab-report.json";

/// Who migrates, at the source and at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// rxl at both ends.
    Rxl,
    /// The same by ssh, as a user would; all others go without encryption (`lab-rsh`).
    RxlBySsh,
    /// The stock xl at both ends.
    Xl,
    /// rxl sends, the stock xl receives.
    RxlToXl,
    /// The stock xl sends, rxl receives.
    XlToRxl,
}

/// One migration in figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Migration {
    /// Kind of guest.
    #[serde(rename = "type")]
    pub kind: String,
    /// Source host.
    pub from: String,
    /// Target host.
    pub to: String,
    /// Who did it.
    pub by: String,
    /// From the start of the command to its end.
    pub total_ms: u64,
    /// Pause as the toolstack saw it; the stock xl does not say.
    pub pause_ms: Option<u64>,
    /// Longest time without a tick in the guest.
    pub guest_gap_ms: u64,
    /// Bytes that left the source host while it ran, headers and all.
    pub bytes: u64,
    /// Pages of the guest that did not hold what they should.
    pub bad_pages: u64,
}

impl Route {
    /// The command that moves `guest` to `target`, for the source host's shell.
    fn command(self, guest: &str, target: &str) -> String {
        let rxl = format!("rxl migrate --report {REPORT_PATH}");
        match self {
            Route::Rxl => format!("{rxl} -s {CLIENT} {guest} {target}"),
            Route::RxlBySsh => format!("{rxl} {guest} {target}"),
            Route::Xl => format!("xl migrate -s {CLIENT} {guest} {target}"),
            Route::RxlToXl => format!("{rxl} -s {CLIENT} --receiver xl {guest} {target}"),
            Route::XlToRxl => {
                format!("xl migrate -s '' {guest} 'exec {CLIENT} {target} rxl migrate-receive'")
            }
        }
    }

    fn sender_is_rxl(self) -> bool {
        matches!(self, Route::Rxl | Route::RxlBySsh | Route::RxlToXl)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Route::Rxl => "rxl",
            Route::RxlBySsh => "rxl (ssh)",
            Route::Xl => "xl",
            Route::RxlToXl => "rxl->xl",
            Route::XlToRxl => "xl->rxl",
        })
    }
}

impl Lab {
    /// Migrates a guest that runs on `from` and has it verify all of its memory afterwards.
    ///
    /// # Errors
    /// The command fails, or the guest is not alive on exactly `to` afterwards. Bad pages are no
    /// error here: they are in the result.
    pub fn migrate(
        &self,
        guest: &str,
        kind: GuestKind,
        from: &Host,
        to: &Host,
        route: Route,
    ) -> Result<Migration> {
        // The gap is measured with the hosts' clocks, which drift apart in emulation; and every
        // check begins a new gap.
        self.sync_clocks()?;
        let before = self.check_guest(guest)?;
        ensure!(before.host == from.name(), "{guest} is on {}, not {}", before.host, from.name());
        let sent_before = self.bytes_sent(from)?;
        let started = Instant::now();
        let finished = from.finish(&route.command(guest, &to.name()), MIGRATION_TIMEOUT)?;
        let total = started.elapsed();
        let bytes = self.bytes_sent(from)? - sent_before;
        require_success(&finished, guest, route)?;
        let after = self.check_guest(guest)?;
        ensure!(after.host == to.name(), "{guest} is on {}, not {}", after.host, to.name());
        Ok(Migration {
            kind: kind.to_string(),
            from: from.name(),
            to: to.name(),
            by: route.to_string(),
            total_ms: millis(total),
            pause_ms: if route.sender_is_rxl() { Some(reported_pause(from)?) } else { None },
            guest_gap_ms: whole_ms(after.longest_gap_ms),
            bytes,
            bad_pages: after.bad_pages,
        })
    }

    /// Bytes that have left a host over all of its NICs.
    pub fn bytes_sent(&self, host: &Host) -> Result<u64> {
        let mut sum = 0;
        for nic in 0..self.shape().nics {
            let path =
                format!("/sys/class/net/{}/statistics/rx_bytes", tap_name(nic, host.number()));
            let text = output(inside("cat").arg(&path))?;
            let count: u64 = text.trim().parse().with_context(|| format!("{path}: `{text}`"))?;
            sum += count;
        }
        Ok(sum)
    }
}

fn require_success(finished: &Finished, guest: &str, route: Route) -> Result<()> {
    if !finished.status.success() {
        bail!(
            "The migration of {guest} by {route} ended with {}:\n{}{}",
            finished.status,
            finished.stdout,
            finished.stderr
        );
    }
    Ok(())
}

/// The pause in rxl's own report.
fn reported_pause(host: &Host) -> Result<u64> {
    let text = host.run(&format!("cat {REPORT_PATH}"))?;
    let report: serde_json::Value = serde_json::from_str(&text)?;
    let pause = report.get("pause_ms").and_then(serde_json::Value::as_f64);
    Ok(whole_ms(pause.with_context(|| format!("rxl's report says no pause: {text}"))?))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds, rounded; what is no number of them counts as 0.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast saturates")]
fn whole_ms(ms: f64) -> u64 {
    ms.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_command_names_the_transport_and_the_receiver_that_the_route_wants() {
        assert_eq!(Route::Xl.command("g", "host2"), "xl migrate -s lab-rsh g host2");
        assert!(Route::RxlToXl.command("g", "host2").contains(" -s lab-rsh --receiver xl "));
        assert!(Route::XlToRxl.command("g", "host2").contains("lab-rsh host2 rxl migrate-receive"));
        assert!(!Route::RxlBySsh.command("g", "host2").contains("-s"));
    }
}
