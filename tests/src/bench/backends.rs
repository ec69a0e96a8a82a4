//! Whole migrations by each way to map: privcmd in processes, privcmd in threads, and threads by
//! rxl's kernel module, with the same guest and as many workers.
//!
//! Of the source the way is chosen by options; the target takes the module where it is loaded, so
//! it is loaded on both hosts or on none.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rxl_lab::{GuestKind, GuestSpec, Measured, REPORT_PATH, Shape, Way};
use serde::Serialize;
use serde_json::Value;

use super::{hundredths, locks, print, rounded, start};
use crate::lab::Session;

/// How long a migration may take.
const TIMEOUT: Duration = Duration::from_secs(420);

/// Removes the module, if it is there.
const WITHOUT_MODULE: &str = "! grep -q '^rxl_map ' /proc/modules || rmmod rxl_map";

const NS_PER_MS: f64 = 1e6;

/// What is asked for.
#[derive(Clone, Copy, Debug, Args)]
pub struct Options {
    /// Print a line of JSON for each run
    #[arg(long)]
    json: bool,
    /// How often each is measured, after one run in which the kernel counts
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Workers at the source
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// vCPUs of each host
    #[arg(long, default_value_t = 2)]
    vcpus: u8,
    /// Memory of the guests in MiB
    #[arg(long, default_value_t = 192)]
    mem: u32,
    /// Pages that the guest writes in a second
    #[arg(long, default_value_t = 500)]
    dirty: u64,
    /// pv or pvh; without it both
    #[arg(long = "type")]
    kind: Option<GuestKind>,
}

/// A way to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    PrivcmdProcess,
    PrivcmdThread,
    ModuleThread,
}

const BACKENDS: [Backend; 3] =
    [Backend::PrivcmdProcess, Backend::PrivcmdThread, Backend::ModuleThread];

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Backend::PrivcmdProcess => "privcmd-process",
            Backend::PrivcmdThread => "privcmd-thread",
            Backend::ModuleThread => "module-thread",
        }
    }

    /// What `--mapper` and rxl's report call it.
    fn mapper(self) -> &'static str {
        if self == Backend::ModuleThread { "module" } else { "privcmd" }
    }

    fn worker(self) -> &'static str {
        if self == Backend::PrivcmdProcess { "process" } else { "thread" }
    }
}

/// One run.
#[derive(Debug, Serialize)]
struct Figure {
    bench: &'static str,
    backend: &'static str,
    #[serde(rename = "type")]
    kind: String,
    workers: u32,
    vcpus: u8,
    total_ms: u64,
    pause_ms: Option<u64>,
    guest_gap_ms: u64,
    passes: usize,
    /// Of the source: sums over its workers.
    mapped_pages: u64,
    map_ms: f64,
    unmap_ms: f64,
    /// The same: of a run of its own, in which the kernel counts.
    lock_acquisitions: u64,
    lock_wait_ms: f64,
    bad_pages: u64,
    /// Share of the time in which a processor of the source had work, but this machine none free.
    cpu_waited: f64,
}

/// Measures a guest of each kind.
///
/// # Errors
/// Whatever keeps the lab or a migration from its end; bad pages.
pub fn run(options: Options) -> Result<()> {
    let session = Session::open_shaped(Shape { vcpus: options.vcpus, ..Shape::default() })?;
    session.lab().push_rxl()?;
    for number in [1, 2] {
        locks::prepare(session.host(number)?)?;
    }
    for kind in [GuestKind::Pvh, GuestKind::Pv] {
        if options.kind.is_none_or(|wanted| wanted == kind) {
            one_guest(&session, kind, options)?;
        }
    }
    Ok(())
}

fn one_guest(session: &Session, kind: GuestKind, options: Options) -> Result<()> {
    let mut spec = GuestSpec::new(&format!("bench-{kind}"), kind, options.mem);
    spec.dirty_pages_per_s = options.dirty;
    start(session, &spec)?;
    let bench = Bench { session, name: &spec.name, kind, options };
    let mut counted = Vec::new();
    for backend in BACKENDS {
        counted.push((backend, bench.count(backend)?));
    }
    for _ in 0..options.runs {
        for (backend, locks) in &counted {
            print(&bench.timed(*backend, *locks)?, options.json)?;
        }
    }
    session.remove(&spec.name)
}

struct Bench<'a> {
    session: &'a Session,
    name: &'a str,
    kind: GuestKind,
    options: Options,
}

impl Bench<'_> {
    /// What the source does with locks of address spaces.
    fn count(&self, backend: Backend) -> Result<locks::Locks> {
        let (from, _) = self.session.here_and_there(self.name)?;
        locks::begin(from)?;
        let moved = self.migrate(backend);
        let counted = locks::end(from, locks::RXL)?;
        moved.map(|_| counted)
    }

    fn timed(&self, backend: Backend, locks: locks::Locks) -> Result<Figure> {
        let (from, _) = self.session.here_and_there(self.name)?;
        let measured = self.migrate(backend)?;
        let report = measured.report.as_ref().context("rxl left no report")?;
        let load = measured.loads.get(usize::from(from.number()) - 1).copied().unwrap_or_default();
        let waited = load.waited.as_secs_f64() / measured.total.as_secs_f64();
        let counter = |name: &str| report.pointer(&format!("/counters/{name}"));
        let ms = |name: &str| counter(name).and_then(Value::as_f64).unwrap_or(0.0) / NS_PER_MS;
        let passes = report.get("passes").and_then(Value::as_array);
        Ok(Figure {
            bench: "backends",
            backend: backend.name(),
            kind: self.kind.to_string(),
            workers: self.options.workers,
            vcpus: self.options.vcpus,
            total_ms: measured.migration.total_ms,
            pause_ms: measured.migration.pause_ms,
            guest_gap_ms: measured.migration.guest_gap_ms,
            passes: passes.map_or(0, Vec::len),
            mapped_pages: counter("mapped_pages").and_then(Value::as_u64).unwrap_or(0),
            map_ms: rounded(ms("map_ns")),
            unmap_ms: rounded(ms("unmap_ns")),
            lock_acquisitions: locks.acquisitions,
            lock_wait_ms: rounded(locks.wait_ms),
            bad_pages: measured.migration.bad_pages,
            cpu_waited: hundredths(waited / f64::from(self.options.vcpus)),
        })
    }

    /// Moves the guest to the other host.
    fn migrate(&self, backend: Backend) -> Result<Measured> {
        let lab = self.session.lab();
        match backend {
            Backend::ModuleThread => lab.push_module()?,
            _ => lab.on_all_hosts(|host| host.run(WITHOUT_MODULE)).map(drop)?,
        }
        let (from, to) = self.session.here_and_there(self.name)?;
        let way = self.way(backend, &to.name());
        let measured = lab.measure(self.name, self.kind, from, to, &way)?;
        ensure!(measured.migration.bad_pages == 0, "pages of {} are bad", self.name);
        self.session.settle(self.name)?;
        let by = measured.report.as_ref().and_then(|report| report.get("mapper"));
        ensure!(by.and_then(Value::as_str) == Some(backend.mapper()), "mapped by {by:?}");
        Ok(measured)
    }

    fn way(&self, backend: Backend, target: &str) -> Way {
        let (mapper, worker) = (backend.mapper(), backend.worker());
        let workers = self.options.workers;
        let command = format!(
            "rxl migrate --report {REPORT_PATH} -s lab-rsh --no-encrypt --mapper {mapper} \
             --workers {workers}:{worker} {} {target}",
            self.name
        );
        Way { by: backend.name().to_owned(), command, reports: true, timeout: TIMEOUT }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figure { kind, backend, workers, map_ms, unmap_ms, passes, .. } = self;
        let seconds = Duration::from_millis(self.total_ms).as_secs_f64();
        let pause = self.pause_ms.map_or("?".to_owned(), |ms| ms.to_string());
        write!(
            f,
            "{kind:<4} {backend:<15} {workers} workers: {seconds:>5.1} s, pause {pause} ms (guest \
             {}), {passes} passes; {} pages, {map_ms:.0} ms to map, {unmap_ms:.0} to unmap; lock \
             taken {} times, waited for {:.1} ms",
            self.guest_gap_ms, self.mapped_pages, self.lock_acquisitions, self.lock_wait_ms
        )
    }
}
