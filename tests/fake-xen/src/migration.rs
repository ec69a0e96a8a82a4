//! One migration between two machines: a guest of some kind and habits is saved by one helper,
//! restored by another, and compared with what it was.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_migrate::fake::{FakeDomain, HvmSpec, P2mKind, PvSpec, WIRING, compare};
use rxl_migrate::hypervisor::Domain;

use crate::helper::{Ended, Helper, Libxl, Program, Programs};
use crate::machine::{Machine, MachineSpec};
use crate::ways::Ways;

/// Frames of a machine beyond those of its one guest.
const SPARE_FRAMES: u64 = 4096;
/// Pages that a restored domain may have more than it had when it was suspended: what it gave
/// back meanwhile comes along.
const BALLOONED_PAGES_MAX: u64 = 2000;
/// How often stock's sender may lose a race before it is not to be excused.
const GIVEN_UP_MAX: u32 = 10;
/// Between two times that the guests act by themselves.
const GUEST_PAUSE: Duration = Duration::from_micros(50);
/// Bytes that go from one helper to the other at a time.
const PIECE_BYTES: usize = 64 << 10;

/// What may be left out over links, by the seed: mostly everything, whether that pays here or not.
const REDUCE: [&str; 6] =
    ["all,always", "none", "all,always", "zero,delta,always", "all,always", "same,compress,always"];

/// What sort of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// PV, with its p2m in its address space.
    PvLinear,
    /// PV, with its p2m in a tree.
    PvTree,
    /// Translated, without a device model.
    Pvh,
}

impl std::fmt::Display for GuestKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            GuestKind::PvLinear => "PV with a linear p2m",
            GuestKind::PvTree => "PV with a p2m tree",
            GuestKind::Pvh => "PVH",
        })
    }
}

/// What the guest does while it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// It is suspended before anything is read.
    Stopped,
    /// It writes, starts and ends processes, maps grants.
    Writing,
    /// The same, and it gives memory back and takes some.
    Ballooning,
}

impl std::fmt::Display for Activity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Activity::Stopped => "not live",
            Activity::Writing => "live, writing",
            Activity::Ballooning => "live, ballooning",
        })
    }
}

/// How large a guest is, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// pfns that it has (PV) or may have memory at (PVH).
    pub pages: u64,
    /// It has given back all memory from this pfn on.
    pub memory: u64,
}

impl Size {
    /// As large as it has to be for everything to occur: 12 MiB.
    pub const SMALL: Size = Size { pages: 3000, memory: 3000 };
}

/// A migration to be done.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Who saves.
    pub from: Program,
    /// Who restores.
    pub to: Program,
    /// Which sort of guest.
    pub guest: GuestKind,
    /// What it does meanwhile.
    pub activity: Activity,
    /// How large the guest is.
    pub size: Size,
    /// What every call of the helpers takes at least.
    pub call_delay: Duration,
    /// How rxl's helpers move memory.
    pub ways: Ways,
    /// Determines guest and machines, and all but the moments at which the guest acts.
    pub seed: u64,
}

/// A migration that was done.
#[derive(Debug)]
pub struct Moved {
    /// All of the stream.
    pub stream: Vec<u8>,
    /// In what the copy differs from the guest as it was suspended: nothing, if all is well.
    pub differences: Vec<String>,
    /// How often stock's sender gave up before, because it had lost a race with the guest.
    pub given_up: u32,
}

/// What became of a guest that was saved to a file.
#[derive(Debug)]
pub enum Filed {
    /// In what the copy differs from the guest as it was suspended.
    Restored(Vec<String>),
    /// The helper did not restore it: what it says.
    Failed(String),
}

/// What a run needs: programs.
#[derive(Clone, Debug)]
pub struct Rig {
    /// Where they are.
    pub programs: Programs,
}

/// One end of a migration: a machine, and the domain on it.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) machine: Machine,
    pub(crate) domain: FakeDomain,
    /// How much slower the guest has become: its pauses have doubled so often.
    calm: u32,
}

impl Migration {
    /// Of a small guest, with calls that take no longer than they have to.
    #[must_use]
    pub fn new(
        (from, to): (Program, Program),
        guest: GuestKind,
        activity: Activity,
        seed: u64,
    ) -> Migration {
        let (size, call_delay, ways) = (Size::SMALL, Duration::ZERO, Ways::Alone);
        Migration { from, to, guest, activity, size, call_delay, ways, seed }
    }

    /// A machine with the guest.
    pub(crate) fn source(&self) -> Result<End> {
        let Migration { seed, size: Size { pages, memory }, .. } = *self;
        let machine = self.machine(memory, seed)?;
        let host = machine.host();
        host.let_guests_balloon(self.activity == Activity::Ballooning);
        let pv = |p2m| PvSpec {
            pages,
            one_hole_in: 20,
            p2m,
            long_tail: seed.is_multiple_of(2),
            vcpus: 3,
            processes: 3,
            seed,
        };
        let domain = match self.guest {
            GuestKind::PvLinear => pv(P2mKind::Linear).build_ballooned(host, memory),
            GuestKind::PvTree => pv(P2mKind::Tree).build_ballooned(host, memory),
            GuestKind::Pvh => HvmSpec { pages, seed }.build_ballooned(host, memory),
        };
        domain.remove_device_model();
        Ok(End { machine, domain, calm: 0 })
    }

    /// An empty domain for the guest, on a machine of its own.
    pub(crate) fn target(&self, source: &FakeDomain) -> Result<End> {
        let info = source.info()?;
        let pages = info.total_pages + BALLOONED_PAGES_MAX;
        let machine = self.machine(pages, !self.seed)?;
        let domain = machine.host().create(info.hvm, pages, info.max_vcpu_id + 1);
        Ok(End { machine, domain, calm: 0 })
    }

    fn machine(&self, pages: u64, seed: u64) -> Result<Machine> {
        let frames = pages + SPARE_FRAMES;
        let machine = Machine::start(MachineSpec { frames, seed, fresh: false })?;
        machine.slow_down(self.call_delay);
        Ok(machine)
    }
}

impl Rig {
    /// Does a migration, both ends at once.
    ///
    /// Stock's sender fails if a guest gives a page back, or makes data of a page table, between
    /// two of its steps. Then it is tried again, as a user would, when the guest is calmer.
    ///
    /// # Errors
    /// A helper fails, breaks the protocol, asks for what is not modelled, or leaves something
    /// behind.
    pub fn migrate(&self, migration: &Migration) -> Result<Moved> {
        let mut source = migration.source()?;
        loop {
            let target = migration.target(&source.domain)?;
            let (saved, restored, stream) = self.both_ends(migration, &source, &target)?;
            source.check_left_behind()?;
            target.check_left_behind()?;
            if is_stocks_race(migration, &saved) && source.calm < GIVEN_UP_MAX {
                source.calm += 1;
                continue;
            }
            ensure!(saved.succeeded(), "saving by {}: {}", migration.from, saved.describe());
            let odd = saved.warnings.join("; ");
            ensure!(migration.ways.may_lose() || odd.is_empty(), "{}: {odd}", migration.from);
            let differences = compared(migration, &source, &target, &restored)?;
            return Ok(Moved { stream, differences, given_up: source.calm });
        }
    }

    /// Saves to a file, alone, and restores from it as `migration` says.
    ///
    /// # Errors
    /// As [`Rig::migrate`], but for saving by stock: a guest that acts may lose it the save. The
    /// file is not read to its end, or something is left behind.
    pub fn through_file(&self, migration: &Migration) -> Result<Filed> {
        let source = migration.source()?;
        let mut file = tempfile::tempfile().context("Cannot make a file")?;
        let alone = Migration { ways: Ways::Alone, ..*migration };
        let saved = self.save(&alone, &source, same_file(&file)?)?;
        ensure!(saved.succeeded(), "saving by {}: {}", migration.from, saved.describe());
        source.check_left_behind()?;
        // What libxl has behind the helper's part.
        let end = file.stream_position().context("Cannot ask for the place in the file")?;
        file.write_all(b"libxl reads on here").context("Cannot write to the file")?;
        file.rewind().context("Cannot go to the start of the file")?;

        let target = migration.target(&source.domain)?;
        let helper = self.helper_for(migration, migration.to, &target);
        let restored = helper.restore(same_file(&file)?, &WIRING)?;
        target.check_left_behind()?;
        if !restored.succeeded() {
            return Ok(Filed::Failed(restored.describe()));
        }
        let position = file.stream_position().context("Cannot ask for the place in the file")?;
        ensure!(position == end, "the file is read to {position}, and its part ends at {end}");
        compared(migration, &source, &target, &restored).map(Filed::Restored)
    }

    /// The two ends at the same time.
    fn both_ends(
        &self,
        migration: &Migration,
        source: &End,
        target: &End,
    ) -> Result<(Ended, Ended, Vec<u8>)> {
        let (save_end, from) = UnixStream::pair().context("Cannot make a socket")?;
        let (to, restore_end) = UnixStream::pair().context("Cannot make a socket")?;
        thread::scope(|scope| {
            let wire = scope.spawn(|| carry(from, Some(to)));
            let helper = self.helper_for(migration, migration.to, target);
            let restore = scope.spawn(move || helper.restore(restore_end.into(), &WIRING));
            let saved = self.save(migration, source, save_end.into());
            let (restored, stream) = (joined(restore), joined(wire));
            Ok((saved?, restored?, stream?))
        })
    }

    /// Saves the guest, and nothing else.
    pub(crate) fn save_alone(
        &self,
        migration: &Migration,
        source: &End,
    ) -> Result<(Ended, Vec<u8>)> {
        let (save_end, from) = UnixStream::pair().context("Cannot make a socket")?;
        thread::scope(|scope| {
            let wire = scope.spawn(|| carry(from, None));
            let saved = self.save(migration, source, save_end.into());
            let stream = joined(wire);
            Ok((saved?, stream?))
        })
    }

    /// Restores `stream`, or what there is of it, into `target`.
    pub(crate) fn restore_alone(
        &self,
        migration: &Migration,
        target: &End,
        stream: &[u8],
    ) -> Result<Ended> {
        let (mut to, restore_end) = UnixStream::pair().context("Cannot make a socket")?;
        thread::scope(|scope| {
            // Who restores says itself why it reads no more.
            scope.spawn(move || drop(to.write_all(stream)));
            self.helper(migration.to, target).restore(restore_end.into(), &WIRING)
        })
    }

    /// Saves the guest, which does meanwhile what it does.
    pub(crate) fn save(
        &self,
        migration: &Migration,
        source: &End,
        stream: OwnedFd,
    ) -> Result<Ended> {
        let live = migration.activity != Activity::Stopped;
        let _guests = live.then(|| {
            source.machine.host().run_guests(1 << source.calm);
            source.machine.run_guests(GUEST_PAUSE * (1 << source.calm))
        });
        self.helper_for(migration, migration.from, source).save(stream, live)
    }

    fn helper_for<'a>(
        &'a self,
        migration: &Migration,
        program: Program,
        end: &'a End,
    ) -> Helper<'a> {
        let turn = usize::try_from(migration.seed % 7).unwrap_or(0);
        let reduce = REDUCE.get(turn).copied().unwrap_or_default();
        self.helper_of(migration, program, end, reduce)
    }

    /// The same, where that may be left out over links.
    pub(crate) fn helper_of<'a>(
        &'a self,
        migration: &Migration,
        program: Program,
        end: &'a End,
        reduce: &'static str,
    ) -> Helper<'a> {
        let Migration { ways, seed, .. } = *migration;
        let libxl = Libxl { ways, reduce, seed, ..Libxl::default() };
        Helper { libxl, ..self.helper(program, end) }
    }

    pub(crate) fn helper<'a>(&'a self, program: Program, end: &'a End) -> Helper<'a> {
        let (machine, domain) = (&end.machine, &end.domain);
        Helper { programs: &self.programs, program, machine, domain, libxl: Libxl::default() }
    }
}

impl End {
    /// That no helper is there any more, that none has asked for what is not modelled, that
    /// nothing is mapped, and that log-dirty is off.
    pub(crate) fn check_left_behind(&self) -> Result<()> {
        self.machine.settle()?;
        let unknown = self.machine.unknown_calls();
        ensure!(unknown.is_empty(), "not modelled: {}", unknown.join(", "));
        let mapped = self.machine.host().mapped_pages();
        ensure!(mapped == 0, "{mapped} pages are still mapped");
        ensure!(!self.domain.is_logging(), "log-dirty is still on");
        Ok(())
    }
}

/// In what the copy differs; an error if it was not made.
pub(crate) fn compared(
    migration: &Migration,
    source: &End,
    target: &End,
    restored: &Ended,
) -> Result<Vec<String>> {
    ensure!(restored.succeeded(), "restoring by {}: {}", migration.to, restored.describe());
    let rings = restored.rings.context("no word of the rings")?;
    Ok(compare(&source.domain, &target.domain, &WIRING, &rings))
}

/// What stock's sender says when the guest has done something between two of its steps: given a
/// page back, or made data of what was a page table.
const STOCKS_RACES: [&str; 2] = ["Mapping of pfn", "Cannot migrate superpage"];

/// Whether stock's sender has lost a race that it can lose.
fn is_stocks_race(migration: &Migration, saved: &Ended) -> bool {
    let lost = |line: &String| STOCKS_RACES.iter().any(|start| line.starts_with(start));
    migration.from == Program::Stock
        && migration.activity != Activity::Stopped
        && saved.errors.first().is_some_and(lost)
}

/// Another descriptor of an open file, which shares its place in it.
fn same_file(file: &File) -> Result<OwnedFd> {
    Ok(file.try_clone().context("Cannot duplicate a descriptor")?.into())
}

/// Carries all that comes to the other side, if there is one, and keeps a copy.
fn carry(mut from: UnixStream, mut to: Option<UnixStream>) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = from.read(&mut piece).context("Cannot read the stream")?;
        let got = piece.get(..count).unwrap_or_default();
        if got.is_empty() {
            return Ok(all);
        }
        all.extend_from_slice(got);
        if let Some(to) = &mut to
            && to.write_all(got).is_err()
        {
            // Who restores says itself why it reads no more.
            return Ok(all);
        }
    }
}

/// What a thread gave; its panic goes on.
pub(crate) fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
