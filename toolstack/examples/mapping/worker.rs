//! One worker: its share of the batches, mapped, copied, unmapped.

use std::io::{BufRead, Write, stdin, stdout};
use std::mem;
use std::ops::AddAssign;
use std::time::{Duration, Instant};

use rxl_migrate::frame::PageBuf;
use rxl_migrate::hypervisor::{Access, Domain, ForeignPages};
use rxl_toolstack::xc::{LiveDomain, Mapping, want_mapper};

use crate::Result;
use crate::plan::{Backend, Plan, Work};

/// Where a worker's time went.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    pub(crate) map: Duration,
    pub(crate) copy: Duration,
    pub(crate) unmap: Duration,
}

/// A worker that is ready to work.
pub(crate) struct Worker {
    domain: LiveDomain,
    /// The frames of each of its mappings.
    batches: Vec<Vec<u64>>,
    plan: Plan,
}

/// A worker process: says that it is ready, waits for a line, works, says what it spent.
pub(crate) fn as_process(plan: &Plan, index: usize) -> Result<()> {
    want_mapper(plan.mapper());
    let worker = Worker::new(plan, index)?;
    if plan.backend == Backend::Keep {
        return keep(&worker);
    }
    await_go()?;
    let spent = worker.work()?;
    say(&spent.line())?;
    if plan.backend == Backend::Exit {
        // Nothing that would unmap is dropped.
        std::process::exit(0);
    }
    Ok(())
}

/// Maps first, copies in the measured time, unmaps last.
fn keep(worker: &Worker) -> Result<()> {
    let mut outside = Spent::default();
    let start = Instant::now();
    let mappings = worker.batches.iter().map(|batch| worker.map(batch));
    let mappings = mappings.collect::<Result<Vec<Mapping>>>()?;
    outside.map = start.elapsed();
    await_go()?;
    let start = Instant::now();
    for _ in 0..worker.plan.passes {
        mappings.iter().for_each(copy);
    }
    say(&Spent { copy: start.elapsed(), ..Spent::default() }.line())?;
    let start = Instant::now();
    drop(mappings);
    outside.unmap = start.elapsed();
    say(&outside.line())
}

fn await_go() -> Result<()> {
    say("ready\n")?;
    let mut line = String::new();
    stdin().lock().read_line(&mut line)?;
    if line == "go\n" { Ok(()) } else { Err("the process that started this one is gone".into()) }
}

fn say(line: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(line.as_bytes())?;
    Ok(out.flush()?)
}

impl Worker {
    /// Opens the way to the domain; the batches of worker `index` are every so many-th.
    pub(crate) fn new(plan: &Plan, index: usize) -> Result<Worker> {
        let frames = plan.frames()?;
        let batches = frames.chunks(plan.batch_pages).skip(index).step_by(plan.workers);
        Ok(Worker {
            domain: LiveDomain::open(plan.domid)?,
            batches: batches.map(<[u64]>::to_vec).collect(),
            plan: plan.clone(),
        })
    }

    /// All passes over its batches.
    pub(crate) fn work(&self) -> Result<Spent> {
        let mut spent = Spent::default();
        for _ in 0..self.plan.passes {
            for batch in &self.batches {
                self.batch(batch, &mut spent)?;
            }
        }
        Ok(spent)
    }

    fn batch(&self, frames: &[u64], spent: &mut Spent) -> Result<()> {
        let start = Instant::now();
        let mapping = self.map(frames)?;
        let mapped = Instant::now();
        if self.plan.work == Work::Copy {
            copy(&mapping);
        }
        let copied = Instant::now();
        match self.plan.backend {
            Backend::Exit => mem::forget(mapping),
            _ => drop(mapping),
        }
        spent.map += mapped - start;
        spent.copy += copied - mapped;
        spent.unmap += copied.elapsed();
        Ok(())
    }

    fn map(&self, frames: &[u64]) -> Result<Mapping> {
        Ok(self.domain.map(frames, Access::Read)?)
    }
}

fn copy(mapping: &Mapping) {
    let mut page = PageBuf::zeroed();
    for index in 0..mapping.page_count() {
        mapping.read_page(index, &mut page);
        std::hint::black_box(&page);
    }
}

impl Spent {
    fn line(&self) -> String {
        let [map, copy, unmap] = [self.map, self.copy, self.unmap].map(|time| time.as_nanos());
        format!("{map} {copy} {unmap}\n")
    }

    /// Reads what [`Spent::line`] wrote.
    pub(crate) fn parse(line: &str) -> Result<Spent> {
        let mut words = line.split_whitespace();
        let mut next = || -> Result<Duration> {
            Ok(Duration::from_nanos(words.next().ok_or("a worker ended early")?.parse()?))
        };
        Ok(Spent { map: next()?, copy: next()?, unmap: next()? })
    }
}

impl AddAssign for Spent {
    fn add_assign(&mut self, other: Spent) {
        self.map += other.map;
        self.copy += other.copy;
        self.unmap += other.unmap;
    }
}
