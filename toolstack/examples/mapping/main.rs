//! Measures what mapping a guest's memory costs in dom0, for the benchmark `tests/bench mapping`.
//! It only reads the guest.
//!
//! ```text
//! mapping frames DOMID FILE           # finds the domain's frames, once
//! mapping run DOMID FILE BACKEND WORKERS WORK BATCH PASSES
//! mapping traps FILE                  # counts what changed page tables in a trace of Xen
//! ```
//!
//! A run prints one line of JSON ([`Outcome`]). `BACKEND` is a [`Backend`], `WORK` a [`Work`],
//! `BATCH` the pages of one mapping; all of the domain is mapped `PASSES` times. What comes before
//! and after the measured time is marked in the kernel's trace, so that events can be counted.

mod plan;
mod traps;
mod worker;

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::{BATCH_PAGES_MAX, Domain, ForeignPages, SourceDomain};
use rxl_toolstack::xc::{LiveDomain, want_mapper};
use serde_json::{Value, json};

use crate::plan::{Backend, Plan};
use crate::worker::{Spent, Worker};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Machine frames that a page of the machine-to-physical table describes.
const M2P_ENTRIES: u64 = 512;

/// Lines written here appear in the kernel's trace.
const TRACE_MARKER: &str = "/sys/kernel/tracing/trace_marker";

/// What a run took.
struct Outcome {
    /// From the start of the work to its end, in all workers.
    elapsed: Duration,
    /// From the start of the first worker until all can work.
    start: Duration,
    /// Sums over the workers.
    spent: Spent,
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["frames", domid, file] => find_frames(domid.parse()?, Path::new(file)),
        ["traps", file] => traps::print(Path::new(file)),
        ["run", plan @ ..] => run(&Plan::parse(plan)?),
        ["worker", index, plan @ ..] => worker::as_process(&Plan::parse(plan)?, index.parse()?),
        _ => Err("usage: mapping frames DOMID FILE, mapping run …, mapping traps FILE".into()),
    }
}

/// Writes the numbers of all frames that the domain owns, in order.
fn find_frames(domid: u16, file: &Path) -> Result<()> {
    let domain = LiveDomain::open(DomId(domid))?;
    let end = match domain.info()?.hvm {
        true => domain.maximum_gpfn()? + 1,
        false => domain.map_m2p()?.page_count() as u64 * M2P_ENTRIES,
    };
    let all: Vec<u64> = (0..end).collect();
    let mut own = Vec::new();
    for batch in all.chunks(BATCH_PAGES_MAX) {
        let types = domain.page_types(batch)?;
        let with_data = batch.iter().zip(types).filter(|(_, kind)| kind.has_data());
        own.extend(with_data.flat_map(|(frame, _)| frame.to_le_bytes()));
    }
    fs::write(file, own)?;
    Ok(())
}

fn run(plan: &Plan) -> Result<()> {
    want_mapper(plan.mapper());
    let outcome = match plan.backend {
        Backend::Thread | Backend::Module => in_threads(plan)?,
        Backend::Process | Backend::Keep | Backend::Exit => in_processes(plan)?,
    };
    let line = json!({
        "pages": plan.pages()? * plan.passes,
        "elapsed_ms": ms(outcome.elapsed),
        "start_ms": ms(outcome.start),
        "map_ms": ms(outcome.spent.map),
        "copy_ms": ms(outcome.spent.copy),
        "unmap_ms": ms(outcome.spent.unmap),
    });
    print(&line)
}

fn print(line: &Value) -> Result<()> {
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}

/// The workers are threads of this process.
fn in_threads(plan: &Plan) -> Result<Outcome> {
    let begun = Instant::now();
    // The workers and this thread.
    let gate = Barrier::new(plan.workers + 1);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.workers)
            .map(|index| {
                let gate = &gate;
                scope.spawn(move || {
                    let worker = Worker::new(plan, index);
                    gate.wait();
                    worker?.work()
                })
            })
            .collect();
        gate.wait();
        mark("begin");
        let (start, working) = (begun.elapsed(), Instant::now());
        let mut spent = Spent::default();
        for worker in workers {
            spent += worker.join().map_err(|_| "a worker panicked")??;
        }
        mark("end");
        Ok(Outcome { elapsed: working.elapsed(), start, spent })
    })
}

/// The workers are processes. Those that unmap are done when they say so, those that do not when
/// they are gone.
fn in_processes(plan: &Plan) -> Result<Outcome> {
    let begun = Instant::now();
    let mut children = (0..plan.workers)
        .map(|index| Process::start(plan, index))
        .collect::<Result<Vec<Process>>>()?;
    for child in &mut children {
        child.line()?;
    }
    mark("begin");
    let (start, working) = (begun.elapsed(), Instant::now());
    for child in &mut children {
        child.input.write_all(b"go\n")?;
    }
    let mut spent = Spent::default();
    for child in &mut children {
        spent += Spent::parse(&child.line()?)?;
    }
    if plan.backend == Backend::Exit {
        children.iter_mut().try_for_each(Process::end)?;
    }
    mark("end");
    let elapsed = working.elapsed();
    if plan.backend == Backend::Keep {
        for child in &mut children {
            spent += Spent::parse(&child.line()?)?;
        }
    }
    children.iter_mut().try_for_each(Process::end)?;
    Ok(Outcome { elapsed, start, spent })
}

/// A worker process.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(plan: &Plan, index: usize) -> Result<Process> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["worker", &index.to_string()])
            .args(plan.words())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("a worker has no input")?;
        let output = child.stdout.take().ok_or("a worker has no output")?;
        Ok(Process { child, input, output: BufReader::new(output) })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line)
    }

    /// Waits for its end; a second time, it has ended already.
    fn end(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("a worker: {status}").into()) }
    }
}

/// Without tracing there is nothing to mark.
fn mark(what: &str) {
    let file = fs::OpenOptions::new().write(true).open(TRACE_MARKER);
    let _ = file.and_then(|mut file| file.write_all(format!("mapping {what}\n").as_bytes()));
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
