//! One migration of a lab guest, measured from outside: by the clock of this machine, the bytes
//! that left the source host's NICs, and what the guest itself says before and after.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::guest::{GuestKind, GuestReport};
use crate::host::{Finished, Host};
use crate::lab::Lab;
use crate::load::Load;
use crate::network::{inside, tap_name};
use crate::plain::CLIENT;
use crate::process::output;

/// Time that a migration may take in emulation.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(420);

/// Where rxl on the source host leaves its report.
pub const REPORT_PATH: &str = "/run/rxl-lab-report.json";

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

/// A command that moves a guest, and what is known of it.
#[derive(Clone, Debug)]
pub struct Way {
    /// Who migrates, for a reader.
    pub by: String,
    /// For the source host's shell.
    pub command: String,
    /// Whether it leaves rxl's report at [`REPORT_PATH`].
    pub reports: bool,
    /// How long it may take.
    pub timeout: Duration,
}

/// A migration with all that was seen of it.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The usual figures.
    pub migration: Migration,
    /// From the start of the command to its end.
    pub total: Duration,
    /// rxl's report.
    pub report: Option<Value>,
    /// What the command wrote to its standard error.
    pub said: String,
    /// What the processors of each host did meanwhile, in the order of hosts.
    pub loads: Vec<Load>,
    /// Bytes that left the source host over each of its NICs.
    pub sent: Vec<u64>,
    /// Pages that the guest wrote per second, from the check before to the one after.
    pub dirty_pages_per_s: f64,
}

impl Route {
    /// The command that moves `guest` to `target`, for the source host's shell.
    fn command(self, guest: &str, target: &str) -> String {
        let rxl = format!("rxl migrate --report {REPORT_PATH}");
        match self {
            Route::Rxl => format!("{rxl} -s {CLIENT} --no-encrypt {guest} {target}"),
            Route::RxlBySsh => format!("{rxl} {guest} {target}"),
            Route::Xl => format!("xl migrate -s {CLIENT} {guest} {target}"),
            Route::RxlToXl => format!("{rxl} -s {CLIENT} --receiver xl {guest} {target}"),
            Route::XlToRxl => {
                format!("xl migrate -s '' {guest} 'exec {CLIENT} {target} rxl migrate-receive'")
            }
        }
    }

    /// The program at the source.
    pub(crate) fn sender(self) -> &'static str {
        if self.sender_is_rxl() { "rxl" } else { "xl" }
    }

    /// The program at the target.
    pub(crate) fn receiver(self) -> &'static str {
        match self {
            Route::Rxl | Route::RxlBySsh | Route::XlToRxl => "rxl",
            Route::Xl | Route::RxlToXl => "xl",
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

impl Way {
    /// The way of a route.
    #[must_use]
    pub fn of(route: Route, guest: &str, to: &Host) -> Way {
        Way {
            by: route.to_string(),
            command: route.command(guest, &to.name()),
            reports: route.sender_is_rxl(),
            timeout: MIGRATION_TIMEOUT,
        }
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
        self.measure(guest, kind, from, to, &Way::of(route, guest, to)).map(|done| done.migration)
    }

    /// The same by any command, with more figures.
    ///
    /// # Errors
    /// As [`Lab::migrate`].
    pub fn measure(
        &self,
        guest: &str,
        kind: GuestKind,
        from: &Host,
        to: &Host,
        way: &Way,
    ) -> Result<Measured> {
        // The gap is measured with the hosts' clocks, which drift apart in emulation; and every
        // check begins a new gap.
        self.sync_clocks()?;
        let before = self.check_guest(guest)?;
        ensure!(before.host == from.name(), "{guest} is on {}, not {}", before.host, from.name());
        let (sent_before, loads_before) = (self.bytes_sent_by_nic(from)?, self.loads()?);
        let started = Instant::now();
        let finished = from.finish(&way.command, way.timeout)?;
        let total = started.elapsed();
        let loads = self.loads()?.into_iter().zip(loads_before).map(|(now, then)| now - then);
        let sent = self.bytes_sent_by_nic(from)?.into_iter().zip(sent_before);
        let sent: Vec<u64> = sent.map(|(now, then)| now.saturating_sub(then)).collect();
        require_success(&finished, guest, &way.by)?;
        let after = self.check_guest(guest)?;
        ensure!(after.host == to.name(), "{guest} is on {}, not {}", after.host, to.name());
        let report = if way.reports { Some(report(from)?) } else { None };
        let migration = Migration {
            kind: kind.to_string(),
            from: from.name(),
            to: to.name(),
            by: way.by.clone(),
            total_ms: millis(total),
            pause_ms: report.as_ref().map(reported_pause).transpose()?,
            guest_gap_ms: whole_ms(after.longest_gap_ms),
            bytes: sent.iter().sum(),
            bad_pages: after.bad_pages,
        };
        Ok(Measured {
            migration,
            total,
            report,
            said: finished.stderr,
            loads: loads.collect(),
            sent,
            dirty_pages_per_s: dirty_rate(&before, &after),
        })
    }

    /// Bytes that have left a host over each of its NICs.
    pub fn bytes_sent_by_nic(&self, host: &Host) -> Result<Vec<u64>> {
        (0..self.shape().nics)
            .map(|nic| {
                let path =
                    format!("/sys/class/net/{}/statistics/rx_bytes", tap_name(nic, host.number()));
                let text = output(inside("cat").arg(&path))?;
                text.trim().parse().with_context(|| format!("{path}: `{text}`"))
            })
            .collect()
    }
}

/// Pages that a guest wrote per second between two of its reports.
#[allow(clippy::cast_precision_loss, reason = "a rate for people to read")]
fn dirty_rate(before: &GuestReport, after: &GuestReport) -> f64 {
    let written = after.pages_written.saturating_sub(before.pages_written);
    written as f64 / (after.uptime_s - before.uptime_s).max(f64::EPSILON)
}

fn require_success(finished: &Finished, guest: &str, by: &str) -> Result<()> {
    if !finished.status.success() {
        bail!(
            "The migration of {guest} by {by} ended with {}:\n{}{}",
            finished.status,
            finished.stdout,
            finished.stderr
        );
    }
    Ok(())
}

/// What rxl left on the source host.
fn report(host: &Host) -> Result<Value> {
    let text = host.run(&format!("cat {REPORT_PATH}"))?;
    serde_json::from_str(&text).with_context(|| format!("rxl's report is `{text}`"))
}

/// The pause in rxl's own report.
fn reported_pause(report: &Value) -> Result<u64> {
    let pause = report.get("pause_ms").and_then(Value::as_f64);
    Ok(whole_ms(pause.with_context(|| format!("rxl's report says no pause: {report}"))?))
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
