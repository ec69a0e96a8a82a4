//! Runs in which something goes wrong that is nobody's mistake: a hypercall fails, the stream
//! breaks, the guest does not suspend. Whatever the helper makes of it, nothing may be left
//! behind, the guest has to be as it was, and a helper that says that all is well must be right.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rxl_migrate::fake::Rng;
use rxl_migrate::frame::DomId;

use crate::helper::{Ended, Helper, Libxl, Program};
use crate::migration::{Activity, End, GuestKind, Migration, Rig, compared};

/// What is to go wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Trouble {
    /// The call of `op` after so many that succeed fails, and so many in a row.
    Fault { op: &'static str, succeed: u64, times: u64, errno: Errno },
    /// The stream ends after so many bytes.
    Cut(usize),
    /// The guest does not suspend.
    NoSuspend,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::Fault { op, succeed, times, errno } => {
                write!(f, "{op} fails {times} times after {succeed} ({errno})")
            }
            Trouble::Cut(bytes) => write!(f, "the stream ends after {bytes} bytes"),
            Trouble::NoSuspend => f.write_str("the guest does not suspend"),
        }
    }
}

/// A run with trouble, with nothing to complain of in rxl.
#[derive(Clone, Debug)]
pub struct Weathered {
    /// What went wrong.
    pub trouble: String,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a run with trouble.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The helper carried on to a good end all the same.
    Survived,
    /// It gave up, and said why.
    GaveUp(String),
    /// Stock's helper said that all was well, and the copy differs.
    Unnoticed(String),
}

impl std::fmt::Display for Weathered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; ", self.trouble)?;
        match &self.outcome {
            Outcome::Survived => f.write_str("survived"),
            Outcome::GaveUp(why) => write!(f, "it says: {why}"),
            Outcome::Unnoticed(what) => write!(f, "stock does not notice, and {what}"),
        }
    }
}

/// Calls whose failure is to be survived or reported. Switching log-dirty off is not among them:
/// who cannot do that cannot clean up.
const NOT_FAULTED: [&str; 1] = ["log_dirty_off"];
const ERRNOS: [Errno; 6] =
    [Errno::AGAIN, Errno::NOMEM, Errno::IO, Errno::INVAL, Errno::BUSY, Errno::PERM];
/// Failures in a row of a storm.
const STORM: u64 = 5;

fn pick<'a, T>(rng: &mut Rng, list: &'a [T]) -> Option<&'a T> {
    list.get(rng.index(list.len().max(1)))
}

/// All of a run is determined by its seed.
impl Rig {
    /// Lets something go wrong while `program` saves a guest, which stands still meanwhile.
    ///
    /// # Errors
    /// Something is left behind, the guest has changed, the helper has crashed, is stuck or
    /// fails without saying why, or it says that all is well and it is not.
    pub fn trouble_save(&self, program: Program, seed: u64) -> Result<Weathered> {
        let mut rng = Rng::new(seed);
        let guest = pick_guest(&mut rng);
        let pair = (program, Program::Rxl);
        let migration = Migration::new(pair, guest, Activity::Stopped, seed);

        let good = migration.source()?;
        let (saved, stream) = self.save_with(&migration, &good, Libxl::default(), usize::MAX)?;
        ensure!(saved.succeeded(), "without trouble: {}", saved.describe());

        let source = migration.source()?;
        let before = source.domain.fingerprint();
        let trouble = match rng.below(8) {
            0 => Trouble::NoSuspend,
            1 => Trouble::Cut(rng.index(stream.len())),
            _ => pick_fault(&mut rng, &good)?,
        };
        plant(&trouble, &source);
        let refuses_to_suspend = trouble == Trouble::NoSuspend;
        let libxl = Libxl { refuses_to_suspend, takes_fingerprint: true, ..Libxl::default() };
        let limit = if let Trouble::Cut(bytes) = trouble { bytes } else { usize::MAX };
        let (saved, stream) = self.save_with(&migration, &source, libxl, limit)?;
        source.machine.host().heal();
        source.check_left_behind().with_context(|| trouble.to_string())?;
        let unharmed = source.domain.fingerprint() == saved.fingerprint.unwrap_or(before);
        ensure!(unharmed, "{trouble}: the guest's memory has changed");
        if !saved.succeeded() {
            return failed_cleanly(&trouble, &saved);
        }
        ensure!(limit == usize::MAX, "{trouble}: it did not notice");
        let target = migration.target(&source.domain)?;
        let restored = self.restore_alone(&migration, &target, &stream)?;
        let differences = compared(&migration, &source, &target, &restored)?;
        survived(&trouble, program, &differences)
    }

    /// Lets something go wrong while `program` restores a guest.
    ///
    /// # Errors
    /// As [`Rig::trouble_save`].
    pub fn trouble_restore(&self, program: Program, seed: u64) -> Result<Weathered> {
        let mut rng = Rng::new(seed);
        let guest = pick_guest(&mut rng);
        let pair = (Program::Rxl, program);
        let migration = Migration::new(pair, guest, Activity::Stopped, seed);
        let source = migration.source()?;
        let (saved, stream) = self.save_alone(&migration, &source)?;
        ensure!(saved.succeeded(), "saving: {}", saved.describe());

        let good = migration.target(&source.domain)?;
        let restored = self.restore_alone(&migration, &good, &stream)?;
        ensure!(restored.succeeded(), "without trouble: {}", restored.describe());

        let target = migration.target(&source.domain)?;
        let trouble = match rng.below(8) {
            0 => Trouble::Cut(rng.index(stream.len())),
            _ => pick_fault(&mut rng, &good)?,
        };
        plant(&trouble, &target);
        let limit = if let Trouble::Cut(bytes) = trouble { bytes } else { stream.len() };
        let part = stream.get(..limit).unwrap_or(&stream);
        let restored = self.restore_alone(&migration, &target, part)?;
        target.machine.host().heal();
        target.check_left_behind().with_context(|| trouble.to_string())?;
        if !restored.succeeded() {
            return failed_cleanly(&trouble, &restored);
        }
        ensure!(limit == stream.len(), "{trouble}: it did not notice");
        let differences = compared(&migration, &source, &target, &restored)?;
        survived(&trouble, program, &differences)
    }

    /// Saves live, and reads no more than `limit` bytes of the stream.
    fn save_with(
        &self,
        migration: &Migration,
        source: &End,
        libxl: Libxl,
        limit: usize,
    ) -> Result<(Ended, Vec<u8>)> {
        let (save_end, from) = UnixStream::pair().context("Cannot make a socket")?;
        thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut stream = Vec::new();
                // An error is as good as an end.
                let _ = from.take(limit as u64).read_to_end(&mut stream);
                stream
            });
            let helper = self.helper(migration.from, source);
            let saved = Helper { libxl, ..helper }.save(save_end.into(), true);
            let stream = reader.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
            Ok((saved?, stream))
        })
    }
}

fn pick_guest(rng: &mut Rng) -> GuestKind {
    let guests = [GuestKind::PvLinear, GuestKind::PvTree, GuestKind::Pvh];
    pick(rng, &guests).copied().unwrap_or(GuestKind::Pvh)
}

/// One of the calls that were made where all went well, each kind as likely as any other.
fn pick_fault(rng: &mut Rng, good: &End) -> Result<Trouble> {
    let mut calls = good.machine.host().calls();
    let DomId(domain) = rxl_migrate::hypervisor::Domain::domid(&good.domain);
    calls.retain(|(id, op)| id.0 == domain && !NOT_FAULTED.contains(op));
    let mut ops: Vec<&'static str> = calls.iter().map(|(_, op)| *op).collect();
    ops.sort_unstable();
    ops.dedup();
    let mut op = *pick(rng, &ops).context("no call was made")?;
    let mut count = calls.iter().filter(|(_, other)| *other == op).count();
    if op == "map" && rng.one_in(2) {
        (op, count) = ("map_page", 2000);
    }
    let succeed = u64::try_from(rng.index(count))?;
    let times = if rng.one_in(3) { STORM } else { 1 };
    let errno = pick(rng, &ERRNOS).copied().unwrap_or(Errno::IO);
    Ok(Trouble::Fault { op, succeed, times, errno })
}

fn plant(trouble: &Trouble, end: &End) {
    if let Trouble::Fault { op, succeed, times, errno } = trouble {
        let host = end.machine.host();
        (0..*times).for_each(|more| host.fail(op, succeed + more, errno.raw_os_error()));
    }
}

/// What a helper has to do that gives up.
fn failed_cleanly(trouble: &Trouble, ended: &Ended) -> Result<Weathered> {
    let said = ended.describe();
    ensure!(matches!(ended.complete, Some((-1, _))), "{trouble}: it ended with {said}");
    ensure!(ended.status.success(), "{trouble}: it ended with {said}");
    ensure!(!ended.errors.is_empty(), "{trouble}: it does not say why: {said}");
    let outcome = Outcome::GaveUp(ended.errors.join("; "));
    Ok(Weathered { trouble: trouble.to_string(), outcome })
}

/// What is to be said of a helper that says that all is well. Stock's is known to ignore that it
/// could not clear the pages of an HVM guest's rings.
fn survived(trouble: &Trouble, program: Program, differences: &[String]) -> Result<Weathered> {
    let outcome = match differences.first() {
        None => Outcome::Survived,
        Some(first) if program == Program::Stock => Outcome::Unnoticed(first.clone()),
        Some(first) => {
            anyhow::bail!("{trouble}: the copy differs in {} things: {first}", differences.len())
        }
    };
    Ok(Weathered { trouble: trouble.to_string(), outcome })
}
