//! How often mapping goes to Xen: hypercalls that change page tables, and writes to page tables
//! that trap. Xen's own trace (`xentrace`) counts them.
//!
//! Starting a program, and whatever else runs in dom0, changes page tables too. So the same is done
//! once and three times, and the difference counts.

use std::time::Duration;

use anyhow::{Context, Result};
use rxl_lab::Host;
use serde::Deserialize;

/// Where a trace is put. An event takes 8 to 40 bytes.
const FILE: &str = "/run/rxl-mapping-trace";

/// Pages of Xen's buffer for each processor.
const BUFFER_PAGES: u32 = 1024;

/// Events of PV domains: hypercalls, and what Xen emulates.
const EVENTS: &str = "0x0020f000";

const TIMEOUT: Duration = Duration::from_secs(180);

/// Counts for one page that is mapped and unmapped.
#[derive(Clone, Copy, Debug)]
pub struct PerPage {
    /// Hypercalls that change page tables.
    pub hypercalls: f64,
    /// Writes to page tables that Xen does for the kernel.
    pub traps: f64,
}

#[derive(Debug, Deserialize)]
struct Counts {
    hypercalls: f64,
    traps: f64,
}

/// Counts what `program` does more in `thrice` than in `once`, and divides by as many pages as
/// `frames_file` has words of 64 bits.
///
/// # Errors
/// The host has no `xentrace`, or a command fails.
pub fn per_page(
    host: &Host,
    program: &str,
    frames_file: &str,
    once: &str,
    thrice: &str,
) -> Result<PerPage> {
    let bytes: f64 = host.run(&format!("stat -c %s {frames_file}"))?.trim().parse()?;
    let pages = bytes / 8.0 * 2.0;
    let few = traced(host, program, once)?;
    let many = traced(host, program, thrice)?;
    Ok(PerPage {
        hypercalls: (many.hypercalls - few.hypercalls) / pages,
        traps: (many.traps - few.traps) / pages,
    })
}

fn traced(host: &Host, program: &str, command: &str) -> Result<Counts> {
    let script = format!(
        "xentrace -D -S {BUFFER_PAGES} -e {EVENTS} {FILE} > /dev/null 2>&1 & \
         tracer=$!; sleep 0.3; {command} > /dev/null; done=$?; sleep 0.3; kill -INT $tracer; \
         wait $tracer; {program} traps {FILE}; rm -f {FILE}; exit $done"
    );
    let line = host.run_within(&script, TIMEOUT)?;
    serde_json::from_str(&line).with_context(|| format!("`{program} traps` says `{line}`"))
}
