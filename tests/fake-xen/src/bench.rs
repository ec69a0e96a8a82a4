//! How fast the save helpers are, side by side on the same machine: `tests/bench engine`.
//!
//! Each figure is the median of a few runs; stock's and rxl's alternate, and before each pair comes
//! a plain copy of the same bytes, which is what no helper can beat. docs/bench.md says what such
//! figures mean for a real host.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rxl_migrate::fake::{FakeDomain, HvmSpec, P2mKind, PvSpec, Rng, WIRING, compare};
use rxl_migrate::frame::PageBuf;
use rxl_migrate::hypervisor::Domain;

use crate::helper::{Ended, Helper, Libxl, Program, Programs};
use crate::machine::{Machine, MachineSpec};
use crate::migration::GuestKind;
use crate::ways::Ways;

/// Frames of a machine beyond those of its guest.
const SPARE_FRAMES: u64 = 8192;
/// The first frame that a fresh machine hands out.
const FIRST_FRAME: u64 = 2;
/// Between two times that a writing guest acts.
const GUEST_PAUSE: Duration = Duration::from_micros(200);
/// Bytes that the null reader takes at a time.
const READ_BYTES: usize = 1 << 20;
const PAGE_BYTES: u64 = 4096;
/// Debian's helper, from the package xen-utils-4.17.
const STOCK: &str = "/usr/lib/xen-4.17/bin/libxl-save-helper";
const PAGES_PER_MIB: u64 = 256;

/// What to measure with.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The helpers.
    pub programs: Programs,
    /// The program that copies.
    pub plain_copy: PathBuf,
    /// Memory of the guests.
    pub mib: u64,
    /// Runs of each helper for a figure.
    pub pairs: u32,
    /// What the names of the wanted figures begin with.
    pub only: String,
    /// How rxl's helper moves memory.
    pub ways: Ways,
}

/// What the memory of a guest holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Random,
    Zero,
    /// Half zeros, a quarter random, a quarter words in a row.
    Mixed,
}

impl Content {
    const ALL: [(Content, &str); 3] =
        [(Content::Random, "random"), (Content::Zero, "zero"), (Content::Mixed, "mixed")];

    fn page(self, pfn: u64, rng: &mut Rng) -> Box<PageBuf> {
        match (self, pfn % 4) {
            (Content::Zero, _) | (Content::Mixed, 0 | 1) => PageBuf::zeroed(),
            (Content::Mixed, 3) => {
                let mut numbers = pfn..;
                page_of(|| numbers.next().unwrap_or_default())
            }
            (Content::Random | Content::Mixed, _) => random_page(rng),
        }
    }
}

/// A page that cannot be compressed.
pub(crate) fn random_page(rng: &mut Rng) -> Box<PageBuf> {
    page_of(|| rng.next())
}

fn page_of(mut word: impl FnMut() -> u64) -> Box<PageBuf> {
    let mut page = PageBuf::zeroed();
    page.0.as_chunks_mut::<8>().0.iter_mut().for_each(|place| *place = word().to_le_bytes());
    page
}

/// One run of a helper.
#[derive(Clone, Copy, Debug)]
struct Run {
    took: Duration,
    cpu: Duration,
    /// Requests to the machine.
    requests: u64,
}

/// One figure. Speeds are in MiB of guest memory per second.
#[derive(Clone, Debug)]
pub struct Figure {
    /// E.g. `save/pvh/random/idle`.
    pub name: String,
    /// rxl's, the median.
    pub rxl: f64,
    /// Stock's, the median.
    pub stock: f64,
    /// rxl's to stock's, the median over the pairs.
    pub ratio: f64,
    /// The plain copy's, the median.
    pub limit: f64,
    /// Processor time that rxl's took to stock's, the median over the pairs.
    pub cpu_ratio: f64,
    /// Requests to the machine that rxl's made to stock's, the median over the pairs.
    pub requests_ratio: f64,
}

impl Figure {
    /// One line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let Figure { name, rxl, stock, ratio, limit, cpu_ratio, requests_ratio } = self;
        let of_limit = rxl / limit;
        format!(
            "{{\"name\":\"{name}\",\"unit\":\"MiB/s\",\"rxl\":{rxl:.1},\"stock\":{stock:.1},\
             \"ratio\":{ratio:.3},\"limit\":{limit:.1},\"of_limit\":{of_limit:.3},\
             \"cpu_ratio\":{cpu_ratio:.3},\"requests_ratio\":{requests_ratio:.3}}}"
        )
    }
}

/// A machine as after a boot, and its one domain.
pub(crate) struct Side {
    pub(crate) machine: Machine,
    pub(crate) domain: FakeDomain,
}

impl Side {
    /// A run that ended so, before which there had been that many requests.
    fn run(&self, ended: &Ended, requests_before: u64) -> Run {
        let requests = self.machine.requests() - requests_before;
        Run { took: ended.took, cpu: ended.used.cpu, requests }
    }
}

impl Bench {
    /// The full-size one, with the programs that Cargo has put beside this one.
    ///
    /// # Errors
    /// Nobody knows where this program is.
    pub fn here() -> Result<Bench> {
        let here = std::env::current_exe().context("Cannot find this program")?;
        let beside = |name: &str| here.with_file_name(name);
        let programs = Programs {
            stock: PathBuf::from(STOCK),
            rxl: beside("rxl"),
            preload: beside("librxl_fake_xen_preload.so"),
        };
        let plain_copy = beside("rxl-plain-copy");
        let (only, ways) = (String::new(), Ways::Alone);
        Ok(Bench { programs, plain_copy, mib: 4096, pairs: 5, only, ways })
    }

    /// Measures everything; `show` gets each figure as it is there.
    ///
    /// # Errors
    /// A helper fails, or a restored guest is not what was saved.
    pub fn run(&self, mut show: impl FnMut(&Figure)) -> Result<()> {
        for (kind, guest) in [(GuestKind::Pvh, "pvh"), (GuestKind::PvLinear, "pv")] {
            for (content, what) in Content::ALL {
                self.run_guest(kind, content, &format!("{guest}/{what}"), &mut show)?;
            }
        }
        Ok(())
    }

    /// Measures what concerns one guest.
    fn run_guest(
        &self,
        kind: GuestKind,
        content: Content,
        guest: &str,
        show: &mut impl FnMut(&Figure),
    ) -> Result<()> {
        let saves = ["idle", "writing"].map(|activity| format!("save/{guest}/{activity}"));
        let restore = format!("restore/{guest}");
        if !saves.iter().chain([&restore]).any(|name| self.is_wanted(name)) {
            return Ok(());
        }
        let source = self.source(kind)?;
        let mut rng = Rng::new(1);
        source.domain.fill(|pfn| Some(content.page(pfn, &mut rng)));
        for (name, writing) in saves.into_iter().zip([false, true]) {
            if self.is_wanted(&name) {
                let save = |program| self.save(&source, program, writing);
                show(&self.figure(name, save, || self.copy_out(&source))?);
            }
        }
        if self.is_wanted(&restore) {
            let file = tempfile::tempfile().context("Cannot make a file")?;
            let stream = file.try_clone().context("Cannot duplicate a descriptor")?;
            let saved = self.helper(Program::Stock, &source).save(stream.into(), true)?;
            ensure!(saved.succeeded(), "stock: {}", saved.describe());
            let run = |program| self.restore(&source, program, &file);
            show(&self.figure(restore, run, || self.copy_in(&file))?);
        }
        Ok(())
    }

    fn is_wanted(&self, name: &str) -> bool {
        name.starts_with(&self.only)
    }

    /// Runs the copy and both helpers in turn, and takes medians. The copy comes first because the
    /// first to read a new file takes longer.
    fn figure(
        &self,
        name: String,
        mut run: impl FnMut(Program) -> Result<Run>,
        mut copy: impl FnMut() -> Result<Duration>,
    ) -> Result<Figure> {
        let (mut rxl, mut stock, mut limit) = (vec![], vec![], vec![]);
        for pair in 0..self.pairs {
            limit.push(self.speed(copy().with_context(|| format!("{name} by a plain copy"))?));
            let order = match pair % 2 {
                0 => [Program::Rxl, Program::Stock],
                _ => [Program::Stock, Program::Rxl],
            };
            for program in order {
                let run = run(program).with_context(|| format!("{name} by {program}"))?;
                match program {
                    Program::Rxl => rxl.push(run),
                    Program::Stock => stock.push(run),
                }
            }
        }
        let speeds = |runs: &[Run]| median(runs.iter().map(|run| self.speed(run.took)).collect());
        let over_pairs = |of: fn(&Run, &Run) -> f64| {
            median(rxl.iter().zip(&stock).map(|(rxl, stock)| of(rxl, stock)).collect())
        };
        Ok(Figure {
            name,
            rxl: speeds(&rxl),
            stock: speeds(&stock),
            ratio: over_pairs(|rxl, stock| stock.took.div_duration_f64(rxl.took)),
            limit: median(limit),
            cpu_ratio: over_pairs(|rxl, stock| rxl.cpu.div_duration_f64(stock.cpu)),
            requests_ratio: over_pairs(|rxl, stock| rxl.requests as f64 / stock.requests as f64),
        })
    }

    fn speed(&self, took: Duration) -> f64 {
        self.mib as f64 / took.as_secs_f64()
    }

    fn pages(&self) -> u64 {
        self.mib * PAGES_PER_MIB
    }

    /// A machine as after a boot.
    pub(crate) fn machine(&self) -> Result<Machine> {
        self.machine_that_is(true)
    }

    /// One whose frames hold what other guests have left in them.
    pub(crate) fn used_machine(&self) -> Result<Machine> {
        self.machine_that_is(false)
    }

    fn machine_that_is(&self, fresh: bool) -> Result<Machine> {
        let frames = self.pages() + SPARE_FRAMES;
        let machine = Machine::start(MachineSpec { frames, seed: 1, fresh })?;
        // A machine has its memory. Nobody is to be charged for what this host has to do for it.
        let backed = Command::new(&self.plain_copy)
            .arg("back")
            .arg(machine.memory_path())
            .args(["0".to_owned(), frames.to_string()])
            .status()
            .context("Cannot start the plain copy")?;
        ensure!(backed.success(), "the machine's memory cannot be had: {backed}");
        Ok(machine)
    }

    pub(crate) fn source(&self, kind: GuestKind) -> Result<Side> {
        let (machine, pages, seed) = (self.machine()?, self.pages(), 1);
        let host = machine.host();
        host.let_guests_balloon(false);
        let domain = match kind {
            GuestKind::Pvh => HvmSpec { pages, seed }.build(host),
            GuestKind::PvLinear | GuestKind::PvTree => {
                let p2m = if kind == GuestKind::PvTree { P2mKind::Tree } else { P2mKind::Linear };
                let (one_hole_in, long_tail) = (u64::MAX, false);
                let (vcpus, processes) = (2, 4);
                PvSpec { pages, one_hole_in, p2m, long_tail, vcpus, processes, seed }.build(host)
            }
        };
        domain.remove_device_model();
        Ok(Side { machine, domain })
    }

    pub(crate) fn helper<'a>(&'a self, program: Program, side: &'a Side) -> Helper<'a> {
        let Side { machine, domain } = side;
        let libxl = Libxl { ways: self.ways, ..Libxl::default() };
        Helper { programs: &self.programs, program, machine, domain, libxl }
    }

    /// Saves live into a pipe that is read and forgotten. Then the guest runs on.
    fn save(&self, source: &Side, program: Program, writing: bool) -> Result<Run> {
        let before = source.machine.requests();
        let ended = into_nothing(|stream| {
            let _guest = writing.then(|| source.machine.run_guests(GUEST_PAUSE));
            self.helper(program, source).save(stream, true)
        })?;
        ensure!(ended.succeeded(), "{}", ended.describe());
        source.domain.resume();
        Ok(source.run(&ended, before))
    }

    /// The same bytes by a plain copy.
    fn copy_out(&self, source: &Side) -> Result<Duration> {
        let pages = self.pages();
        into_nothing(|stream| {
            self.copy("out", pages, &source.machine, Stdio::null(), stream.into())
        })
    }

    /// Restores into a new domain, which has to be what `source` was.
    fn restore(&self, source: &Side, program: Program, file: &File) -> Result<Run> {
        let machine = self.machine()?;
        let info = source.domain.info()?;
        let domain = machine.host().create(info.hvm, info.total_pages + 600, info.max_vcpu_id + 1);
        let target = Side { machine, domain };
        let stream = from_start(file)?;
        let ended = self.helper(program, &target).restore(stream.into(), &WIRING)?;
        ensure!(ended.succeeded(), "{}", ended.describe());
        let run = target.run(&ended, 0);
        target.machine.settle()?;
        let rings = ended.rings.context("no word of the rings")?;
        let differences = compare(&source.domain, &target.domain, &WIRING, &rings);
        ensure!(differences.is_empty(), "the copy differs: {differences:?}");
        Ok(run)
    }

    /// As many bytes of the same file, into the memory of a machine. The file may have a few pages
    /// less than the guest has pfns, and a little more than pages.
    fn copy_in(&self, file: &File) -> Result<Duration> {
        let in_file = file.metadata().context("Cannot ask for the file's size")?.len() / PAGE_BYTES;
        let pages = in_file.min(self.pages());
        self.copy("in", pages, &self.machine()?, from_start(file)?.into(), Stdio::null())
    }

    fn copy(
        &self,
        direction: &str,
        pages: u64,
        machine: &Machine,
        input: Stdio,
        output: Stdio,
    ) -> Result<Duration> {
        let started = Instant::now();
        let status = Command::new(&self.plain_copy)
            .arg(direction)
            .arg(machine.memory_path())
            .args([FIRST_FRAME.to_string(), pages.to_string()])
            .stdin(input)
            .stdout(output)
            .status()
            .context("Cannot start the plain copy")?;
        ensure!(status.success(), "the plain copy ended with {status}");
        Ok(started.elapsed())
    }
}

/// Gives `write` a pipe, as `xl migrate` gives one to the helper and the other end to ssh. What
/// comes is read and forgotten.
fn into_nothing<T>(write: impl FnOnce(OwnedFd) -> Result<T>) -> Result<T> {
    let (theirs, ours) = rustix::pipe::pipe().context("Cannot make a pipe")?;
    let mut theirs = File::from(theirs);
    let reader = thread::spawn(move || {
        let mut piece = vec![0; READ_BYTES];
        while theirs.read(&mut piece).is_ok_and(|count| count > 0) {}
    });
    let result = write(ours);
    // It ends with the last descriptor of the other end.
    let _ = reader.join();
    result
}

/// The same file, to be read from its start.
fn from_start(file: &File) -> Result<File> {
    let mut file = file.try_clone().context("Cannot duplicate a descriptor")?;
    file.rewind().context("Cannot go to the start of the stream")?;
    Ok(file)
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_one_line_with_the_fields_in_order() {
        let name = "save/pvh/zero/idle".to_owned();
        let (rxl, stock, ratio, limit) = (300.0, 200.0, 1.5, 1000.0);
        let (cpu_ratio, requests_ratio) = (0.75, 0.5);
        let figure = Figure { name, rxl, stock, ratio, limit, cpu_ratio, requests_ratio };
        let expected = r#"{"name":"save/pvh/zero/idle","unit":"MiB/s","rxl":300.0,"stock":200.0,"#
            .to_owned()
            + r#""ratio":1.500,"limit":1000.0,"of_limit":0.300,"#
            + r#""cpu_ratio":0.750,"requests_ratio":0.500}"#;
        assert_eq!(figure.json(), expected);
    }

    #[test]
    fn a_median_is_in_the_middle_whatever_the_order() {
        assert!((median(vec![5.0, 1.0, 3.0]) - 3.0).abs() < 1e-9);
        assert!(median(vec![]).is_nan());
    }
}
