//! What grows with the guest: the time and the memory that rxl's save helper takes for guests of
//! 1 to 16 GiB (`tests/bench scale`, `tests/bench memory`).
//!
//! The guests have all their memory, and nothing in it: what a page holds does not matter here,
//! and the stream between the two ends can be kept without its zeros.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rxl_migrate::bitmap::PageBitmap;
use rxl_migrate::fake::WIRING;
use rxl_migrate::hypervisor::Domain;

use crate::bench::{Bench, Side};
use crate::helper::{Ended, Program};
use crate::migration::GuestKind;
use crate::usage::Usage;
use crate::ways::Ways;

const MIB_PER_GIB: u64 = 1024;
const PAGES_PER_GIB: u64 = 1 << 18;
/// What the stream is kept in, and read by.
const PIECE_BYTES: usize = 1 << 16;
/// Pages of the guest whose clean bitmap is looked through: 1 TiB.
const BITMAP_PAGES: u64 = 1 << 28;
/// How often it is.
const BITMAP_RUNS: u32 = 5;

/// One end, and one guest, in numbers.
#[derive(Clone, Debug)]
pub struct Growth {
    /// E.g. `save/pvh`.
    pub name: String,
    /// The guest's memory.
    pub gib: u64,
    /// From the start of the helper to its end.
    pub took: Duration,
    /// The helper's time on a processor.
    pub cpu: Duration,
    /// Processes that it was at its end, workers included.
    pub processes: u32,
    /// The most that they had resident, in KiB.
    pub peak_kib: u64,
    /// That without what they had mapped of the guest, in KiB.
    pub own_kib: u64,
    /// What this may be at most, in KiB.
    pub limit_kib: u64,
}

impl Growth {
    /// A line of JSON about the time.
    #[must_use]
    pub fn time_json(&self) -> String {
        let Growth { name, gib, .. } = self;
        let (took, cpu) = (self.ms_per_gib(self.took), self.ms_per_gib(self.cpu));
        format!(
            "{{\"name\":\"{name}\",\"gib\":{gib},\"ms_per_gib\":{took:.1},\
             \"cpu_ms_per_gib\":{cpu:.1}}}"
        )
    }

    /// A line of JSON about the memory.
    #[must_use]
    pub fn memory_json(&self) -> String {
        let Growth { name, gib, processes, peak_kib, own_kib, limit_kib, .. } = self;
        format!(
            "{{\"name\":\"{name}\",\"gib\":{gib},\"processes\":{processes},\
             \"peak_kib\":{peak_kib},\"own_kib\":{own_kib},\"limit_kib\":{limit_kib}}}"
        )
    }

    /// Takes the less of both times, and the more of both peaks.
    fn improve(&mut self, other: &Growth) {
        self.took = self.took.min(other.took);
        self.cpu = self.cpu.min(other.cpu);
        self.peak_kib = self.peak_kib.max(other.peak_kib);
        self.own_kib = self.own_kib.max(other.own_kib);
    }

    /// Of a time, the part for 1 GiB, in milliseconds.
    #[must_use]
    pub fn ms_per_gib(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1000.0 / self.gib as f64
    }
}

/// Saves and restores guests of as many GiB as `sizes` says, each `runs` times, every time on new
/// machines; `show` gets each end as it is there, with the least time that a run took: whatever
/// else a machine does, and memory that it has in small pieces only, adds to it.
///
/// # Errors
/// A helper fails, or this host has no room for the guests.
pub fn grow(
    bench: &Bench,
    sizes: &[u64],
    runs: usize,
    mut show: impl FnMut(&Growth),
) -> Result<()> {
    for (kind, guest) in [(GuestKind::Pvh, "pvh"), (GuestKind::PvLinear, "pv")] {
        for &gib in sizes {
            let bench = Bench { mib: gib * MIB_PER_GIB, ..bench.clone() };
            let (mut save, mut restore) = once(&bench, gib, kind, guest)?;
            for _ in 1..runs {
                let (again, restored_again) = once(&bench, gib, kind, guest)?;
                save.improve(&again);
                restore.improve(&restored_again);
            }
            show(&save);
            show(&restore);
        }
    }
    Ok(())
}

/// One save and one restore.
fn once(bench: &Bench, gib: u64, kind: GuestKind, guest: &str) -> Result<(Growth, Growth)> {
    let source = bench.source(kind)?;
    let (saved, stream) = save(bench, &source)?;
    let saved = described(&format!("save/{guest}"), gib, kind, &saved, false);
    let info = source.domain.info()?;
    // Two such guests need not have room at once.
    drop(source);
    let machine = bench.machine()?;
    let (pages, vcpus) = (info.total_pages + 600, info.max_vcpu_id + 1);
    let domain = machine.host().create(info.hvm, pages, vcpus);
    let restored = restore(bench, &Side { machine, domain }, &stream)?;
    Ok((saved, described(&format!("restore/{guest}"), gib, kind, &restored, true)))
}

fn described(name: &str, gib: u64, kind: GuestKind, ended: &Ended, restore: bool) -> Growth {
    let is_pv = kind != GuestKind::Pvh;
    let page_bits = if restore && is_pv { 4 + 12 * 8 } else { 4 };
    let of_pages = gib * PAGES_PER_GIB * page_bits / 8 / 1024;
    let limit_kib = (64 + 24 * u64::from(ended.used.processes)) * 1024 + of_pages;
    let (took, used) = (ended.took, ended.used);
    let Usage { cpu, peak_kib, own_kib, processes } = used;
    Growth { name: name.into(), gib, took, cpu, processes, peak_kib, own_kib, limit_kib }
}

/// Saves live, and keeps the stream.
fn save(bench: &Bench, source: &Side) -> Result<(Ended, Vec<Piece>)> {
    let (theirs, ours) = rustix::pipe::pipe().context("Cannot make a pipe")?;
    let reader = thread::spawn(move || kept(&mut File::from(theirs)));
    let ended = bench.helper(Program::Rxl, source).save(ours, true)?;
    ensure!(ended.succeeded(), "{}", ended.describe());
    let stream = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
    Ok((ended, stream))
}

/// Restores from a pipe, or if workers are to do it, from a file, which they all can read.
fn restore(bench: &Bench, target: &Side, stream: &[Piece]) -> Result<Ended> {
    if matches!(bench.ways, Ways::Workers(_)) {
        let mut file = tempfile::tempfile().context("Cannot make a file")?;
        write_sparse(stream, &mut file).context("Cannot write the stream to a file")?;
        let ended = bench.helper(Program::Rxl, target).restore(file.into(), &WIRING)?;
        ensure!(ended.succeeded(), "{}", ended.describe());
        return Ok(ended);
    }
    let (theirs, ours) = rustix::pipe::pipe().context("Cannot make a pipe")?;
    thread::scope(|scope| {
        // If the helper reads no more, it says itself why.
        scope.spawn(move || drop(write(stream, ours)));
        let ended = bench.helper(Program::Rxl, target).restore(theirs, &WIRING)?;
        ensure!(ended.succeeded(), "{}", ended.describe());
        Ok(ended)
    })
}

/// A piece of a stream.
enum Piece {
    Bytes(Vec<u8>),
    /// So many zeros.
    Zeros(usize),
}

/// All that comes from `from`. An error is an end.
fn kept(from: &mut File) -> Vec<Piece> {
    let (mut pieces, mut piece) = (Vec::new(), vec![0; PIECE_BYTES]);
    while let Ok(count @ 1..) = from.read(&mut piece) {
        let bytes = piece.get(..count).unwrap_or_default();
        match pieces.last_mut() {
            Some(Piece::Zeros(zeros)) if is_zero(bytes) => *zeros += count,
            _ if is_zero(bytes) => pieces.push(Piece::Zeros(count)),
            _ => pieces.push(Piece::Bytes(bytes.to_vec())),
        }
    }
    pieces
}

fn is_zero(bytes: &[u8]) -> bool {
    // As fast as memory can be compared.
    bytes.first() == Some(&0) && bytes.get(1..) == bytes.get(..bytes.len() - 1)
}

/// The whole stream, with holes instead of zeros; `to` is at its start then.
fn write_sparse(stream: &[Piece], to: &mut File) -> std::io::Result<()> {
    for piece in stream {
        match piece {
            Piece::Bytes(bytes) => to.write_all(bytes)?,
            Piece::Zeros(count) => {
                to.seek_relative(i64::try_from(*count).unwrap_or(i64::MAX))?;
            }
        }
    }
    let end = to.stream_position()?;
    to.set_len(end)?;
    to.rewind()
}

fn write(stream: &[Piece], to: OwnedFd) -> std::io::Result<()> {
    let (mut to, nothing) = (File::from(to), vec![0; PIECE_BYTES]);
    for piece in stream {
        match piece {
            Piece::Bytes(bytes) => to.write_all(bytes)?,
            Piece::Zeros(count) => {
                for _ in 0..count / nothing.len() {
                    to.write_all(&nothing)?;
                }
                to.write_all(nothing.get(..count % nothing.len()).unwrap_or_default())?;
            }
        }
    }
    Ok(())
}

/// What a pass over a guest of 1 TiB costs in which no page is dirty: taking over what Xen has
/// written, counting it, and looking for pages. The best of a few.
#[must_use]
pub fn clean_pass() -> Duration {
    let bytes = vec![0; usize::try_from(BITMAP_PAGES / 8).unwrap_or_default()];
    let mut bitmap = PageBitmap::new(BITMAP_PAGES);
    let one = |_| {
        let started = Instant::now();
        bitmap.add_le_bytes(black_box(&bytes));
        black_box(bitmap.count());
        black_box(bitmap.iter().next());
        started.elapsed()
    };
    (0..BITMAP_RUNS).map(one).min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_kept_as_it_is_and_its_zeros_cost_nothing() {
        let mut bytes = vec![0; 3 << 20];
        bytes[PIECE_BYTES + 7] = 1;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        let pieces = kept(&mut file);
        assert_eq!(pieces.len(), 3);
        let (mut sparse, mut from_file) = (tempfile::tempfile().unwrap(), Vec::new());
        write_sparse(&pieces, &mut sparse).unwrap();
        sparse.read_to_end(&mut from_file).unwrap();
        assert!(from_file == bytes);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let written = thread::spawn(move || write(&pieces, writer));
        let mut again = Vec::new();
        File::from(reader).read_to_end(&mut again).unwrap();
        written.join().unwrap().unwrap();
        assert!(again == bytes);
    }

    #[test]
    fn lines_have_their_fields_in_order() {
        let growth = Growth {
            name: "save/pv".into(),
            gib: 2,
            took: Duration::from_secs(1),
            cpu: Duration::from_millis(100),
            processes: 3,
            peak_kib: 10,
            own_kib: 9,
            limit_kib: 20,
        };
        let time = r#"{"name":"save/pv","gib":2,"ms_per_gib":500.0,"cpu_ms_per_gib":50.0}"#;
        let memory = concat!(
            r#"{"name":"save/pv","gib":2,"processes":3,"peak_kib":10,"#,
            r#""own_kib":9,"limit_kib":20}"#
        );
        assert_eq!((growth.time_json(), growth.memory_json()), (time.into(), memory.into()));
    }
}
