//! What mapping a guest's memory costs on real Xen, by who maps: threads of one process, by privcmd
//! or rxl's kernel module, or processes, that unmap, keep what they mapped, or end instead of
//! unmapping.
//!
//! The program that maps is `toolstack/examples/mapping`. The guest is paused meanwhile: it has
//! nothing to do here, and would take its share of the processors.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use rxl_lab::{GuestKind, Host, Load, Shape};
use serde::{Deserialize, Serialize};

use super::{hundredths, locks, print, rounded, start, traps};
use crate::lab::{Session, spec};

/// The name of the program, and of its threads in the kernel's trace.
const PROGRAM: &str = "mapping";

/// Where a host keeps the list of the guest's frames.
const FRAMES_FILE: &str = "/run/rxl-mapping-frames";

const RUN_TIMEOUT: Duration = Duration::from_secs(180);

/// How often a run maps all of the guest: once takes some 200 ms.
const PASSES: u32 = 3;

/// Pages of a mapping where their number is not what is compared.
const BATCH_PAGES: u32 = 1024;

const PAGES_PER_MIB: f64 = 256.0;

/// What is asked for.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Print a line of JSON for each run
    #[arg(long)]
    json: bool,
    /// How often each is measured, after one run in which the kernel counts
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// vCPUs of the host
    #[arg(long, default_value_t = 2)]
    vcpus: u8,
    /// Only these backends: thread, module, process, exit, keep
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    only: Vec<String>,
}

/// Who maps how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    backend: &'static str,
    work: &'static str,
    workers: u32,
    batch: u32,
}

/// What the program says.
#[derive(Debug, Deserialize)]
struct Outcome {
    pages: f64,
    elapsed_ms: f64,
    start_ms: f64,
    map_ms: f64,
    copy_ms: f64,
    unmap_ms: f64,
}

/// One run.
#[derive(Debug, Serialize)]
struct Figure {
    bench: &'static str,
    backend: String,
    #[serde(rename = "type")]
    kind: String,
    workers: u32,
    vcpus: u8,
    work: String,
    /// Pages of a mapping.
    batch: u32,
    pages: f64,
    mib_s: f64,
    /// Time until all workers could work, not part of `mib_s`.
    start_ms: f64,
    /// Sums over the workers. For `keep`, mapping and unmapping are not part of `mib_s`.
    map_ms: f64,
    copy_ms: f64,
    unmap_ms: f64,
    /// Of a run of its own: counting slows it down.
    lock_acquisitions: u64,
    lock_wait_ms: f64,
    lock_held_ms: f64,
    /// Hypercalls that changed page tables; counted for one worker that copies nothing.
    hypercalls_per_1000_pages: Option<f64>,
    /// Writes to page tables that Xen had to do for the kernel, each a trap.
    traps_per_1000_pages: Option<f64>,
    /// Share of the time in which a processor of the host had work, but this machine none free.
    cpu_waited: f64,
}

/// What the kernel and Xen counted in runs of their own.
#[derive(Clone, Copy, Debug)]
struct Counted {
    locks: locks::Locks,
    traps: Option<traps::PerPage>,
}

/// Measures everything, a PVH and a PV guest after each other.
///
/// # Errors
/// Whatever keeps the lab or a run from its end.
pub fn run(options: &Options) -> Result<()> {
    let session =
        Session::open_shaped(Shape { hosts: 1, vcpus: options.vcpus, ..Shape::default() })?;
    let program = session.lab().push_example("rxl-toolstack", PROGRAM)?;
    session.lab().push_module()?;
    locks::prepare(session.host(1)?)?;
    for kind in [GuestKind::Pvh, GuestKind::Pv] {
        let guest = format!("bench-{kind}");
        start(&session, &spec(&guest, kind))?;
        let subject = Subject::new(&session, &program, &guest, kind)?;
        subject.measure(options).with_context(|| format!("The memory of {guest}"))?;
        session.remove(&guest)?;
    }
    Ok(())
}

/// The guest whose memory is mapped.
struct Subject<'a> {
    session: &'a Session,
    host: &'a Host,
    program: &'a str,
    domid: String,
    kind: GuestKind,
}

impl<'a> Subject<'a> {
    /// Pauses the guest, and finds its frames.
    fn new(
        session: &'a Session,
        program: &'a str,
        guest: &str,
        kind: GuestKind,
    ) -> Result<Subject<'a>> {
        let host = session.host(1)?;
        let domid = host.run(&format!("xl pause {guest} && xl domid {guest}"))?.trim().to_owned();
        host.run_within(&format!("{program} frames {domid} {FRAMES_FILE}"), RUN_TIMEOUT)?;
        Ok(Subject { session, host, program, domid, kind })
    }

    /// Counts for each case first; then rounds over all of them, so that whatever else the machine
    /// does meanwhile is spread over the cases.
    fn measure(&self, options: &Options) -> Result<()> {
        let mut counted = Vec::new();
        let wanted = |case: &Case| {
            options.only.is_empty() || options.only.iter().any(|name| name == case.backend)
        };
        for case in cases().into_iter().filter(wanted) {
            let count = self.count(case).with_context(|| format!("Counting for {case:?}"))?;
            counted.push((case, count));
        }
        for _ in 0..options.runs {
            for (case, count) in &counted {
                print(&self.timed(*case, *count)?, options.json)?;
            }
        }
        Ok(())
    }

    fn count(&self, case: Case) -> Result<Counted> {
        let command = self.command(case, PASSES);
        let locks = locks::during(self.host, PROGRAM, &command, RUN_TIMEOUT)?;
        // A worker traps as often with others beside it, and whatever it does with the pages.
        let traps =
            if case.workers == 1 && matches!((case.backend, case.work), ("keep", _) | (_, "map")) {
                let [once, thrice] = [1, 3].map(|passes| self.command(case, passes));
                Some(traps::per_page(self.host, self.program, FRAMES_FILE, &once, &thrice)?)
            } else {
                None
            };
        Ok(Counted { locks, traps })
    }

    fn command(&self, case: Case, passes: u32) -> String {
        let Case { backend, work, workers, batch } = case;
        let Subject { program, domid, .. } = self;
        format!("{program} run {domid} {FRAMES_FILE} {backend} {workers} {work} {batch} {passes}")
    }

    fn timed(&self, case: Case, counted: Counted) -> Result<Figure> {
        let command = self.command(case, PASSES);
        let (before, start) = (self.load()?, Instant::now());
        let line = self.host.run_within(&command, RUN_TIMEOUT)?;
        let waited = (self.load()? - before).waited.as_secs_f64() / start.elapsed().as_secs_f64();
        let outcome: Outcome =
            serde_json::from_str(&line).with_context(|| format!("`{command}` says `{line}`"))?;
        Ok(self.figure(case, counted, &outcome, waited))
    }

    fn load(&self) -> Result<Load> {
        let loads = self.session.lab().loads()?;
        loads.first().copied().context("The lab has no host")
    }

    fn figure(&self, case: Case, counted: Counted, outcome: &Outcome, waited: f64) -> Figure {
        let seconds = outcome.elapsed_ms / 1e3;
        let vcpus = self.session.lab().shape().vcpus;
        let Counted { locks, traps } = counted;
        Figure {
            bench: "mapping",
            backend: match case.backend {
                "thread" | "process" => format!("privcmd-{}", case.backend),
                "module" => "module-thread".to_owned(),
                other => other.to_owned(),
            },
            kind: self.kind.to_string(),
            workers: case.workers,
            vcpus,
            work: if case.work == "copy" { "map+copy+unmap" } else { "map+unmap" }.to_owned(),
            batch: case.batch,
            pages: outcome.pages,
            mib_s: rounded(outcome.pages / PAGES_PER_MIB / seconds),
            start_ms: rounded(outcome.start_ms),
            map_ms: rounded(outcome.map_ms),
            copy_ms: rounded(outcome.copy_ms),
            unmap_ms: rounded(outcome.unmap_ms),
            lock_acquisitions: locks.acquisitions,
            lock_wait_ms: rounded(locks.wait_ms),
            lock_held_ms: rounded(locks.held_ms),
            hypercalls_per_1000_pages: traps.map(|traps| rounded(traps.hypercalls * 1e3)),
            traps_per_1000_pages: traps.map(|traps| rounded(traps.traps * 1e3)),
            cpu_waited: hundredths(waited / f64::from(vcpus)),
        }
    }
}

/// All that is compared: who maps, with batches as stock has them; then sizes of batches.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for work in ["map", "copy"] {
        for workers in [1, 2, 4, 8] {
            for backend in ["thread", "module", "process", "exit", "keep"] {
                // What is kept is neither mapped nor unmapped: nothing would be left.
                if (backend, work) != ("keep", "map") {
                    cases.push(Case { backend, work, workers, batch: BATCH_PAGES });
                }
            }
        }
    }
    for (backend, workers) in [("process", 1), ("process", 2), ("thread", 2), ("module", 2)] {
        for batch in [256, 4096] {
            cases.push(Case { backend, work: "map", workers, batch });
        }
    }
    cases
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figure { kind, backend, work, workers, batch, mib_s, .. } = self;
        write!(
            f,
            "{kind:<4} {backend:<16} {work:<15} {workers} workers, {batch:>4} pages: {mib_s:>7.1} \
             MiB/s; lock taken {} times, waited for {:.1} ms, held {:.1} ms",
            self.lock_acquisitions, self.lock_wait_ms, self.lock_held_ms
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_case_comes_twice() {
        let cases = cases();
        for (index, case) in cases.iter().enumerate() {
            assert!(!cases.iter().skip(index + 1).any(|other| other == case), "{case:?}");
        }
    }
}
