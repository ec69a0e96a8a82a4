//! Reports of earlier migrations and saves from this host, for those who look back, and for what
//! the next one can learn: how much of a pause is not memory.
//!
//! A file each, the newest [`KEPT`]. Their names are the time of the end, in milliseconds since
//! 1970, so that sorted by name they are sorted by time.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};

use crate::report::{Outcome, Report, Target};

/// Where they are.
const DIRECTORY: &str = "/var/lib/rxl/reports";
/// Reports that are kept.
const KEPT: usize = 100;
/// Longest report that is read, in bytes; a pass costs 0.3 KiB, a connection less.
const REPORT_BYTES_MAX: u64 = 1 << 20;

/// The reports of this host.
pub(crate) struct History(PathBuf);

/// What is read of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// When it was over, in milliseconds since 1970.
    #[serde(default)]
    pub(crate) ended_unix_ms: u64,
    pub(crate) domain: String,
    /// Where it went: `host` or `file`.
    #[serde(flatten)]
    pub(crate) target: Target,
    pub(crate) outcome: Outcome,
    #[serde(default)]
    pub(crate) cause: Vec<String>,
    #[serde(default)]
    pub(crate) total_ms: f64,
    pub(crate) pause_ms: Option<f64>,
    pub(crate) bytes: Option<u64>,
    pub(crate) rate_mib_s: Option<f64>,
    /// How many there were.
    #[serde(default, deserialize_with = "count")]
    pub(crate) passes: usize,
    /// How many connections beside the stream.
    #[serde(default, rename(deserialize = "links"), deserialize_with = "count")]
    pub(crate) connections: usize,
    /// The whole report.
    #[serde(default)]
    pub(crate) report: PathBuf,
    #[serde(default, skip_serializing)]
    pause: Option<KeptPause>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
struct KeptPause {
    last_pass_ms: f64,
    #[serde(default)]
    verify_ms: f64,
}

/// How many elements there are.
fn count<'de, D: Deserializer<'de>>(list: D) -> Result<usize, D::Error> {
    Ok(Vec::<IgnoredAny>::deserialize(list)?.len())
}

impl History {
    /// That of this host.
    pub(crate) fn of_this_host() -> History {
        History(DIRECTORY.into())
    }

    /// One for tests.
    #[cfg(test)]
    pub(crate) fn in_directory(directory: &Path) -> History {
        History(directory.to_owned())
    }

    /// Keeps `report`, and lets the oldest go.
    pub(crate) fn keep(&self, report: &Report) -> anyhow::Result<()> {
        let History(directory) = self;
        fs::create_dir_all(directory)
            .with_context(|| format!("creating {}", directory.display()))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let path = directory.join(format!("{:014}.json", now.as_millis()));
        let mut file = tempfile::NamedTempFile::new_in(directory)
            .with_context(|| format!("writing to {}", directory.display()))?;
        serde_json::to_writer_pretty(&mut file, report)?;
        file.write_all(b"\n")?;
        file.persist(&path).with_context(|| format!("writing {}", path.display()))?;
        for old in self.files().into_iter().skip(KEPT) {
            fs::remove_file(&old).with_context(|| format!("removing {}", old.display()))?;
        }
        Ok(())
    }

    /// How much of the pause was not memory when `domain` last went to `target`, or else any
    /// domain did.
    pub(crate) fn fixed_part(&self, domain: &str, target: &str) -> Option<Duration> {
        let reports = || self.moved_to(target);
        let fixed = |report: Entry| {
            let KeptPause { last_pass_ms, verify_ms } = report.pause?;
            let ms = report.pause_ms? - last_pass_ms - verify_ms;
            Duration::try_from_secs_f64(ms / 1000.0).ok()
        };
        let same = reports().filter(|report| report.domain == domain).find_map(fixed);
        same.or_else(|| reports().find_map(fixed))
    }

    /// How fast memory went when any domain last went to `target`, in MiB/s.
    pub(crate) fn rate(&self, target: &str) -> Option<f64> {
        self.moved_to(target).find_map(|report| report.rate_mib_s)
    }

    /// The reports of what went to `target`, the newest first.
    fn moved_to(&self, target: &str) -> impl Iterator<Item = Entry> {
        let all = self.files().into_iter().filter_map(|path| read(&path));
        let went = Target::Host(target.to_owned());
        all.filter(move |report| report.outcome == Outcome::Moved && report.target == went)
    }

    /// What there is, the newest first.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        self.files().into_iter().filter_map(|path| read(&path)).collect()
    }

    /// Those that there are, the newest first.
    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let is_report = |path: &PathBuf| path.extension().is_some_and(|end| end == "json");
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_report).collect();
        files.sort_unstable_by(|a, b| b.cmp(a));
        files
    }
}

/// `None`: it is no report that this version understands.
fn read(path: &Path) -> Option<Entry> {
    let size = fs::metadata(path).ok()?.len();
    let text = (size <= REPORT_BYTES_MAX).then(|| fs::read(path).ok()).flatten()?;
    let entry = serde_json::from_slice(&text);
    let entry: Entry =
        entry.inspect_err(|error| tracing::debug!(%error, "{}", path.display())).ok()?;
    let ended = path.file_stem().and_then(|name| name.to_str()?.parse().ok());
    Some(Entry { ended_unix_ms: ended.unwrap_or_default(), report: path.to_owned(), ..entry })
}

#[cfg(test)]
pub(crate) fn example() -> Entry {
    Entry {
        ended_unix_ms: 1000,
        domain: "web".to_owned(),
        target: Target::Host("host2".to_owned()),
        outcome: Outcome::Moved,
        cause: Vec::new(),
        total_ms: 2000.0,
        pause_ms: Some(850.0),
        bytes: Some(3 << 20),
        rate_mib_s: Some(1.5),
        passes: 2,
        connections: 0,
        report: PathBuf::new(),
        pause: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Facts;
    use crate::timeline::Timeline;

    fn report() -> Report {
        Report::new(&Facts {
            domain: "a",
            target: Target::Host("one".to_owned()),
            outcome: Outcome::Moved,
            cause: &[],
            timeline: &Timeline::default(),
            events: &[],
        })
    }

    /// Writes a report by hand, as one of time `at`.
    fn write(directory: &Path, at: u64, domain: &str, host: &str, outcome: &str, fixed: f64) {
        let text = format!(
            r#"{{"version":1,"domain":"{domain}","host":"{host}","outcome":"{outcome}",
                 "pause_ms":{},"pause":{{"last_pass_ms":50.0,"verify_ms":30.0}}}}"#,
            80.0 + fixed
        );
        fs::write(directory.join(format!("{at:014}.json")), text).unwrap();
    }

    #[test]
    fn the_fixed_part_is_that_of_the_last_time_the_domain_went_there_or_any_did() {
        let directory = tempfile::tempdir().unwrap();
        let history = History(directory.path().to_owned());
        let part = |domain, host| history.fixed_part(domain, host).map(|part| part.as_millis());
        assert_eq!(part("a", "one"), None);
        write(directory.path(), 1, "a", "one", "moved", 100.0);
        write(directory.path(), 2, "a", "one", "moved", 200.0);
        write(directory.path(), 3, "a", "one", "failed", 300.0);
        write(directory.path(), 4, "b", "one", "moved", 400.0);
        write(directory.path(), 5, "b", "two", "moved", 500.0);
        fs::write(directory.path().join("9.json"), "{").unwrap();
        assert_eq!(part("a", "one"), Some(200));
        assert_eq!(part("c", "one"), Some(400));
        assert_eq!(part("a", "two"), Some(500));
        assert_eq!(part("a", "three"), None);
    }

    #[test]
    fn the_newest_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let history = History(directory.path().join("new"));
        history.keep(&report()).unwrap();
        for at in 0..150 {
            write(&history.0, at, "a", "one", "moved", 1.0);
        }
        history.keep(&report()).unwrap();
        let files = history.files();
        assert_eq!(files.len(), KEPT);
        assert_eq!(files.last().unwrap().file_name().unwrap(), "00000000000052.json");
        let entries = history.entries();
        assert_eq!(entries.len(), KEPT);
        let first = entries.first().unwrap();
        assert_eq!((first.domain.as_str(), first.passes), ("a", 0));
        assert!(first.ended_unix_ms > 1 << 40 && first.report == *files.first().unwrap());
    }
}
