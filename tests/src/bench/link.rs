//! What the benchmarks over several NICs share: guests that write at a rate which is a multiple of
//! a NIC's, NICs of given rates, and one migration over them in figures.

use std::time::Duration;

use anyhow::{Result, ensure};
use rxl_lab::{GuestKind, GuestSpec, Measured, REPORT_PATH, Way};
use serde::Serialize;
use serde_json::Value;

use super::{hundredths, rounded};
use crate::lab::Session;

/// How long a migration may take: a slow NIC, a guest that writes as fast as it sends.
const TIMEOUT: Duration = Duration::from_secs(1200);

/// Memory that a guest rewrites; what is not rewritten is sent once.
const WORKING_SET_MIB: u32 = 32;

const PAGE_BITS: f64 = 4096.0 * 8.0;
const BITS_PER_MBIT: f64 = 1e6;
/// MiB/s to Mbit/s.
const MBIT_PER_MIB: f64 = 8.388_608;

/// Who migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// The stock xl, over the first NIC.
    Xl,
    /// rxl, over all NICs that are in use.
    Rxl,
}

/// One migration.
#[derive(Clone, Debug, Serialize)]
pub struct Move {
    /// Who did it.
    pub by: &'static str,
    /// Kind of guest.
    #[serde(rename = "type")]
    pub kind: String,
    /// Number of NICs.
    pub nics: usize,
    /// Their rates.
    pub rate_mbit: Vec<u32>,
    /// What the guest really wrote, from before the migration to after it.
    pub dirty_mbit: f64,
    /// From the start of the command to its end.
    pub total_ms: u64,
    /// As rxl saw it; the stock xl does not say.
    pub pause_ms: Option<u64>,
    /// Longest time without a tick in the guest.
    pub guest_gap_ms: u64,
    /// Passes over memory, the last one included: by rxl's report, or by stock's progress.
    pub passes: Option<usize>,
    /// Bytes that left the source host, over each NIC.
    pub sent: Vec<u64>,
    /// rxl's rate from the first to the last byte of memory.
    pub transfer_mbit: Option<f64>,
    /// Share of the time in which the source's processors were busy, 1 for all of them.
    pub cpu: f64,
    /// The same of the target.
    pub cpu_target: f64,
    /// Share of the time in which the source's had something to do, but this machine had no
    /// processor free: what else runs here disturbs the figure.
    pub cpu_waited: f64,
    /// Pages of the guest that did not hold what they should.
    pub bad_pages: u64,
    /// How often rxl's processes at the source took the lock of their address space for writing,
    /// and how long they waited for it, if that was counted.
    pub lock_acquisitions: Option<u64>,
    /// See above.
    pub lock_wait_ms: Option<f64>,
}

/// A guest that writes `dirty_mbit`; 0 for one that does not write.
#[must_use]
pub fn guest(name: &str, kind: GuestKind, memory_mib: u32, dirty_mbit: f64) -> GuestSpec {
    let mut spec = GuestSpec::new(name, kind, memory_mib);
    spec.dirty_pages_per_s = pages_per_s(dirty_mbit);
    spec.working_set_mib = Some(WORKING_SET_MIB);
    spec
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast saturates")]
fn pages_per_s(mbit: f64) -> u64 {
    (mbit * BITS_PER_MBIT / PAGE_BITS).round() as u64
}

/// Moves the guest to the other host over NICs of those rates, the first NICs of the hosts.
///
/// # Errors
/// The migration failed, or pages are bad.
pub fn move_over(
    session: &Session,
    name: &str,
    kind: GuestKind,
    mover: Mover,
    rates: &[u32],
) -> Result<Move> {
    let lab = session.lab();
    let (from, to) = session.here_and_there(name)?;
    lab.set_nic_rates(&rates.iter().map(|mbit| format!("{mbit}mbit")).collect::<Vec<_>>())?;
    let way = way(mover, name, &to.name(), rates.len());
    let measured = lab.measure(name, kind, from, to, &way)?;
    ensure!(measured.migration.bad_pages == 0, "pages of {name} are bad: {measured:?}");
    session.settle(name)?;
    let share = |number: u8| {
        let load = measured.loads.get(usize::from(number) - 1).copied().unwrap_or_default();
        let vcpus = f64::from(lab.shape().vcpus);
        (
            load.share(measured.total, lab.shape().vcpus),
            load.waited.as_secs_f64() / measured.total.as_secs_f64() / vcpus,
        )
    };
    let (cpu, cpu_waited) = share(from.number());
    let cpu_target = share(to.number()).0;
    Ok(figures(mover, kind, rates, &measured, [cpu, cpu_target, cpu_waited]))
}

fn way(mover: Mover, guest: &str, target: &str, nics: usize) -> Way {
    let (by, command) = match mover {
        Mover::Xl => ("xl", format!("xl migrate -s lab-rsh {guest} {target}")),
        Mover::Rxl => {
            let names: Vec<String> = (0..nics).map(|nic| format!("eth{nic}")).collect();
            // What is left out of the memory is for another benchmark.
            let links = format!("--no-encrypt --reduce none --nics {}", names.join(","));
            let rxl = format!("rxl migrate --report {REPORT_PATH} -s lab-rsh");
            ("rxl", format!("{rxl} {links} {guest} {target}"))
        }
    };
    Way { by: by.to_owned(), command, reports: mover == Mover::Rxl, timeout: TIMEOUT }
}

fn figures(
    mover: Mover,
    kind: GuestKind,
    rates: &[u32],
    measured: &Measured,
    cpu: [f64; 3],
) -> Move {
    let migration = &measured.migration;
    let report = measured.report.as_ref();
    let [cpu, cpu_target, cpu_waited] = cpu.map(hundredths);
    let rate = report.and_then(|report| report.get("rate_mib_s")).and_then(Value::as_f64);
    let passes = report.and_then(|report| report.get("passes")).and_then(Value::as_array);
    let passes = passes.map(Vec::len).or_else(|| stock_passes(&measured.said));
    Move {
        by: if mover == Mover::Xl { "xl" } else { "rxl" },
        kind: kind.to_string(),
        nics: rates.len(),
        rate_mbit: rates.to_vec(),
        dirty_mbit: rounded(measured.dirty_pages_per_s * PAGE_BITS / BITS_PER_MBIT),
        total_ms: migration.total_ms,
        pause_ms: migration.pause_ms,
        guest_gap_ms: migration.guest_gap_ms,
        passes,
        sent: measured.sent.clone(),
        transfer_mbit: rate.map(|mib| rounded(mib * MBIT_PER_MIB)),
        cpu,
        cpu_target,
        cpu_waited,
        bad_pages: migration.bad_pages,
        lock_acquisitions: None,
        lock_wait_ms: None,
    }
}

/// The highest number of stock's `Frames iteration 3: 1024/49152`, which counts from 0.
fn stock_passes(said: &str) -> Option<usize> {
    let counts = said.split("iteration ").skip(1);
    let numbers = counts.filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    numbers.filter_map(|number| number.parse::<usize>().ok()).max().map(|last| last + 1)
}

impl std::fmt::Display for Move {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Move { by, kind, nics, rate_mbit, dirty_mbit, guest_gap_ms, cpu, .. } = self;
        let seconds = Duration::from_millis(self.total_ms).as_secs_f64();
        let pause = self.pause_ms.map_or("?".to_owned(), |ms| ms.to_string());
        let passes = self.passes.map_or("?".to_owned(), |passes| passes.to_string());
        write!(
            f,
            "{kind:<4} {by:<3} over {nics} NICs of {rate_mbit:?} Mbit/s, writing {dirty_mbit:.1}: \
             {seconds:>6.1} s, pause {pause} ms (guest {guest_gap_ms}), {passes} passes, {:.0} MB, \
             CPU {cpu:.2}",
            megabytes(&self.sent)
        )?;
        match self.lock_acquisitions.zip(self.lock_wait_ms) {
            Some((times, ms)) => write!(f, ", lock taken {times} times, waited for {ms:.1} ms"),
            None => Ok(()),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people to read")]
fn megabytes(sent: &[u64]) -> f64 {
    sent.iter().sum::<u64>() as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_writes_as_many_pages_as_a_nic_of_its_rate_carries() {
        assert_eq!(pages_per_s(32.768), 1000);
        assert_eq!(guest("g", GuestKind::Pvh, 256, 0.0).dirty_pages_per_s, 0);
    }

    #[test]
    fn stock_tells_its_passes_while_it_goes_on() {
        let said = "xc: Frames iteration 0: 0/9 0%\rxc: Frames iteration 2: 9/9 100%\n";
        assert_eq!(stock_passes(said), Some(3));
        assert_eq!(stock_passes("xc: error"), None);
    }

    #[test]
    fn nics_are_named_to_rxl_or_it_would_use_all() {
        let command = |nics| way(Mover::Rxl, "g", "host2", nics).command;
        assert!(command(1).contains(" --nics eth0 g host2"));
        let two = command(2);
        assert!(two.contains(" --no-encrypt --reduce none --nics eth0,eth1 g host2"), "{two}");
    }
}
