//! Figures for Prometheus, by way of node_exporter's textfile collector: a file in the directory
//! that the user names (`--prometheus`), written anew after each migration and save.
//!
//! Nothing of rxl runs all the time, so the file itself is where the counters are kept: what is in
//! it is read, added to, and takes the file's place. Who is at it holds a lock on the directory.
//!
//! Format: Prometheus' text exposition format, version 0.0.4, as far as rxl writes it.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};

use crate::report::{Outcome, Report, Target};
use crate::status::now_unix_ms;

/// The file there.
const FILE: &str = "rxl.prom";
/// Longest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What is written, in this order: name, type, help.
const FAMILIES: &[(&str, &str, &str)] = &[
    ("rxl_transfers_total", "counter", "Migrations and saves from this host, by how they ended."),
    ("rxl_sent_bytes_total", "counter", "Bytes of memory streams, connections included."),
    ("rxl_passes_total", "counter", "Passes over memory."),
    ("rxl_connections_lost_total", "counter", "Connections that were lost on the way."),
    ("rxl_pause_seconds", "summary", "How long guests that were moved did not run."),
    ("rxl_duration_seconds", "summary", "Time of those that succeeded, from start to end."),
    ("rxl_last_end_timestamp_seconds", "gauge", "When the last one ended, in Unix time."),
    ("rxl_last_success", "gauge", "Whether the last one succeeded (1) or not (0)."),
    ("rxl_last_duration_seconds", "gauge", "Time that the last one took."),
    ("rxl_last_pause_seconds", "gauge", "Pause of the last one that had one."),
];

/// Counts what `report` says in `directory`.
pub(crate) fn count(directory: &Path, report: &Report) -> anyhow::Result<()> {
    update(directory, report, now_unix_ms())
}

fn update(directory: &Path, report: &Report, now_unix_ms: u64) -> anyhow::Result<()> {
    let lock = File::open(directory).with_context(|| format!("opening {}", directory.display()))?;
    flock(&lock, FlockOperation::LockExclusive).context("locking it")?;
    let path = directory.join(FILE);
    let mut series = read(&path);
    add(&mut series, report, now_unix_ms);
    let mut file = tempfile::NamedTempFile::new_in(directory)
        .with_context(|| format!("writing to {}", directory.display()))?;
    file.write_all(render(&series).as_bytes())?;
    // node_exporter is another user.
    file.as_file().set_permissions(Permissions::from_mode(0o644))?;
    file.persist(&path).with_context(|| format!("writing {}", path.display()))?;
    Ok(())
}

/// Values by name and labels, as they stand before the value.
type Series = BTreeMap<String, f64>;

/// What there is; nothing where it cannot be read. Lines that are not rxl's are left out.
fn read(path: &Path) -> Series {
    let small = fs::metadata(path).is_ok_and(|file| file.len() <= FILE_BYTES_MAX);
    let text = if small { fs::read_to_string(path).unwrap_or_default() } else { String::new() };
    let lines = text.lines().filter(|line| FAMILIES.iter().any(|family| belongs(line, family.0)));
    let parsed = lines.filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok().filter(|value: &f64| value.is_finite())?))
    });
    parsed.collect()
}

/// Whether a line is of that family, a summary's sum and count included.
fn belongs(line: &str, family: &str) -> bool {
    let rest = line.strip_prefix(family).unwrap_or_default();
    ["{", "_sum{", "_count{"].iter().any(|next| rest.starts_with(next))
}

fn add(series: &mut Series, report: &Report, now_unix_ms: u64) {
    let kind = match report.target {
        Target::Host(_) => "migrate",
        Target::File(_) => "save",
    };
    let of_kind = |name: &str| format!("{name}{{kind=\"{kind}\"}}");
    let mut add = |name: String, value: f64| *series.entry(name).or_default() += value;
    let all =
        [Outcome::Moved, Outcome::Saved, Outcome::Cancelled, Outcome::Failed, Outcome::NotResumed];
    // A counter that is there from the beginning shows its first step.
    for outcome in all.into_iter().chain([Outcome::Uncertain]) {
        let possible = match outcome {
            Outcome::Moved | Outcome::Uncertain => kind == "migrate",
            Outcome::Saved => kind == "save",
            _ => true,
        };
        if possible {
            let labels = format!("{{kind=\"{kind}\",outcome=\"{}\"}}", word(outcome));
            let one = f64::from(u8::from(outcome == report.outcome));
            add(format!("rxl_transfers_total{labels}"), one);
        }
    }
    let lost = report.links.iter().filter(|link| link.lost.is_some()).count();
    add(of_kind("rxl_sent_bytes_total"), report.bytes.unwrap_or_default() as f64);
    add(of_kind("rxl_passes_total"), report.passes.len() as f64);
    add(of_kind("rxl_connections_lost_total"), lost as f64);
    let success = report.outcome.exit() == crate::Exit::Success;
    let mut sum = |name: &str, ms: f64| {
        add(of_kind(&format!("{name}_sum")), ms / 1000.0);
        add(of_kind(&format!("{name}_count")), 1.0);
    };
    if success {
        sum("rxl_duration_seconds", report.total_ms);
    }
    if let Some(pause) = report.pause_ms {
        sum("rxl_pause_seconds", pause);
        series.insert(of_kind("rxl_last_pause_seconds"), pause / 1000.0);
    }
    series.insert(of_kind("rxl_last_end_timestamp_seconds"), now_unix_ms as f64 / 1000.0);
    series.insert(of_kind("rxl_last_success"), f64::from(u8::from(success)));
    series.insert(of_kind("rxl_last_duration_seconds"), report.total_ms / 1000.0);
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Moved => "moved",
        Outcome::Saved => "saved",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed => "failed",
        Outcome::NotResumed => "not_resumed",
        Outcome::Uncertain => "uncertain",
    }
}

fn render(series: &Series) -> String {
    let mut out = String::new();
    for (name, kind, help) in FAMILIES {
        let mut lines = series.iter().filter(|(line, _)| belongs(line, name)).peekable();
        if lines.peek().is_some() {
            out += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        }
        lines.for_each(|(line, value)| out += &format!("{line} {value}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::report::example;

    #[test]
    fn counters_go_on_from_what_the_file_has_and_what_is_not_rxls_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        update(directory.path(), &example(), 1_700_000_000_000).unwrap();
        let mut text = fs::read_to_string(&path).unwrap();
        text += "other{a=\"b\"} 7\nrxl_passes_total{kind=\"migrate\"\nrxl_passes_totals{} 1\n";
        fs::write(&path, text).unwrap();
        update(directory.path(), &example(), 1_700_000_060_500).unwrap();
        expect![[r#"
            # HELP rxl_transfers_total Migrations and saves from this host, by how they ended.
            # TYPE rxl_transfers_total counter
            rxl_transfers_total{kind="migrate",outcome="cancelled"} 0
            rxl_transfers_total{kind="migrate",outcome="failed"} 0
            rxl_transfers_total{kind="migrate",outcome="moved"} 2
            rxl_transfers_total{kind="migrate",outcome="not_resumed"} 0
            rxl_transfers_total{kind="migrate",outcome="uncertain"} 0
            # HELP rxl_sent_bytes_total Bytes of memory streams, connections included.
            # TYPE rxl_sent_bytes_total counter
            rxl_sent_bytes_total{kind="migrate"} 1191182336
            # HELP rxl_passes_total Passes over memory.
            # TYPE rxl_passes_total counter
            rxl_passes_total{kind="migrate"} 8
            # HELP rxl_connections_lost_total Connections that were lost on the way.
            # TYPE rxl_connections_lost_total counter
            rxl_connections_lost_total{kind="migrate"} 2
            # HELP rxl_pause_seconds How long guests that were moved did not run.
            # TYPE rxl_pause_seconds summary
            rxl_pause_seconds_count{kind="migrate"} 2
            rxl_pause_seconds_sum{kind="migrate"} 0.424
            # HELP rxl_duration_seconds Time of those that succeeded, from start to end.
            # TYPE rxl_duration_seconds summary
            rxl_duration_seconds_count{kind="migrate"} 2
            rxl_duration_seconds_sum{kind="migrate"} 12.8
            # HELP rxl_last_end_timestamp_seconds When the last one ended, in Unix time.
            # TYPE rxl_last_end_timestamp_seconds gauge
            rxl_last_end_timestamp_seconds{kind="migrate"} 1700000060.5
            # HELP rxl_last_success Whether the last one succeeded (1) or not (0).
            # TYPE rxl_last_success gauge
            rxl_last_success{kind="migrate"} 1
            # HELP rxl_last_duration_seconds Time that the last one took.
            # TYPE rxl_last_duration_seconds gauge
            rxl_last_duration_seconds{kind="migrate"} 6.4
            # HELP rxl_last_pause_seconds Pause of the last one that had one.
            # TYPE rxl_last_pause_seconds gauge
            rxl_last_pause_seconds{kind="migrate"} 0.212
        "#]]
        .assert_eq(&fs::read_to_string(&path).unwrap());
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644, "node_exporter is another user");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_counts_as_one_and_adds_no_duration() {
        let mut series = Series::new();
        let report = Report { outcome: Outcome::Failed, pause_ms: None, ..example() };
        add(&mut series, &report, 0);
        assert_eq!(series["rxl_transfers_total{kind=\"migrate\",outcome=\"failed\"}"], 1.0);
        assert_eq!(series["rxl_last_success{kind=\"migrate\"}"], 0.0);
        assert!(!series.keys().any(|name| name.contains("_count")), "{series:?}");
    }
}
