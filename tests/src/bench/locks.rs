//! How often a program takes the lock of its address space for writing, and how long it waits for
//! it and holds it: counted from the kernel's tracepoints `mmap_lock:*`
//! (`include/trace/events/mmap_lock.h` of Linux).

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use rxl_lab::Host;

/// rxl's processes, and its threads that map, by what the kernel's trace calls them.
pub const RXL: &str = "(rxl|worker|mapper)";

/// Where the kernel's trace is.
const TRACING: &str = "/sys/kernel/tracing";

/// The kernel's buffer for each CPU. An event takes some 100 bytes.
const BUFFER_KIB: u32 = 8192;

/// A trace of some million events is read in that time.
const TRACE_TIMEOUT: Duration = Duration::from_secs(300);

/// What was counted between the marks that the program writes, `begin` and `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Locks {
    /// Times that the lock was taken for writing.
    pub acquisitions: u64,
    /// From asking for it until having it, summed over all threads.
    pub wait_ms: f64,
    /// From having it until giving it up, or keeping it for reading only.
    pub held_ms: f64,
}

/// Makes the kernel ready to count. The tracepoints stay on, and only the trace is stopped between
/// counts: switching tracepoints patches the running kernel, during which all processors wait for
/// each other, and an emulated host with two of them has hung in it.
///
/// # Errors
/// The kernel has no such tracepoints.
pub fn prepare(host: &Host) -> Result<()> {
    host.run(&format!(
        "mountpoint -q {TRACING} || mount -t tracefs tracefs {TRACING}\n\
         cd {TRACING} && echo 0 > tracing_on && echo mono > trace_clock && \
         echo {BUFFER_KIB} > buffer_size_kb && echo 1 > events/mmap_lock/enable"
    ))
    .map(drop)
}

/// Runs `command`, which starts `program`, and gives what that did between its marks.
///
/// # Errors
/// The command fails, or the trace cannot be read or is not complete.
pub fn during(host: &Host, program: &str, command: &str, timeout: Duration) -> Result<Locks> {
    let trace = host.run_within(
        &format!(
            "cd {TRACING} && echo > trace && echo 1 > tracing_on; \
             {command} > /dev/null; done=$?; echo 0 > tracing_on; \
             [ $done = 0 ] && grep -E '^ *{program}-|LOST' trace"
        ),
        timeout,
    )?;
    count(&trace, true)
}

/// Begins to count what happens on `host`, which [`prepare`] has made ready.
///
/// # Errors
/// The host cannot be asked.
pub fn begin(host: &Host) -> Result<()> {
    host.run(&format!("cd {TRACING} && echo > trace && echo 1 > tracing_on")).map(drop)
}

/// What all threads did since [`begin`] whose names match `program`, a pattern. `held_ms` is too
/// long where a lock that was taken for writing was kept for reading.
///
/// # Errors
/// The trace cannot be read or is not complete.
pub fn end(host: &Host, program: &str) -> Result<Locks> {
    let trace = host.run_within(
        &format!(
            "cd {TRACING} && echo 0 > tracing_on && \
             {{ grep -E '^ *{program}-.*write=true|LOST' trace || true; }}"
        ),
        TRACE_TIMEOUT,
    )?;
    count(&trace, false)
}

/// One line of the trace.
struct Event<'a> {
    /// The name of the thread and its number.
    thread: &'a str,
    time_s: f64,
    name: &'a str,
    fields: &'a str,
}

impl<'a> Event<'a> {
    /// `mapping-123   [000] d..1.   12.345678: mmap_lock_released: mm=… write=true`
    fn parse(line: &'a str) -> Option<Event<'a>> {
        let (thread, rest) = line.trim_start().split_once(' ')?;
        let (head, rest) = rest.split_once(": ")?;
        let time_s = head.split_whitespace().next_back()?.parse().ok()?;
        let (name, fields) = rest.split_once(": ")?;
        Some(Event { thread, time_s, name, fields })
    }

    fn is_for_writing(&self) -> bool {
        self.fields.contains("write=true")
    }
}

/// What a thread does with the lock.
#[derive(Clone, Copy, Default)]
struct Thread {
    asked_s: Option<f64>,
    has_since_s: Option<f64>,
}

/// `marked`: only what is between the marks of the program.
fn count(trace: &str, marked: bool) -> Result<Locks> {
    let mut locks = Locks::default();
    let mut threads: BTreeMap<&str, Thread> = BTreeMap::new();
    let mut is_between = !marked;
    let mut has_ended = !marked;
    for line in trace.lines() {
        if line.contains("LOST") {
            bail!("The kernel's trace is not complete: {line}");
        }
        let Some(event) = Event::parse(line) else { continue };
        if event.name == "tracing_mark_write" {
            if !marked {
                continue;
            }
            is_between = event.fields == "mapping begin";
            has_ended = event.fields == "mapping end";
            continue;
        }
        let thread = threads.entry(event.thread).or_default();
        thread.see(&event, if is_between { Some(&mut locks) } else { None });
    }
    if has_ended { Ok(locks) } else { bail!("The kernel's trace has no end") }
}

impl Thread {
    fn see(&mut self, event: &Event<'_>, locks: Option<&mut Locks>) {
        let since = |start: Option<f64>| start.map_or(0.0, |start| (event.time_s - start) * 1e3);
        match event.name {
            "mmap_lock_start_locking" if event.is_for_writing() => {
                self.asked_s = Some(event.time_s);
            }
            "mmap_lock_acquire_returned" if event.is_for_writing() => {
                let asked = self.asked_s.take();
                self.has_since_s = Some(event.time_s);
                if let Some(locks) = locks {
                    locks.acquisitions += 1;
                    locks.wait_ms += since(asked);
                }
            }
            // Given up, or kept for reading only.
            "mmap_lock_released" | "mmap_lock_acquire_returned" => {
                let start = self.has_since_s.take();
                if let Some(locks) = locks {
                    locks.held_ms += since(start);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
 mapping-7 [000] ..... 1.000: mmap_lock_start_locking: mm=1 memcg_path= write=true
 mapping-7 [000] ..... 1.001: mmap_lock_acquire_returned: mm=1 memcg_path= write=true
 mapping-7 [000] ..... 1.002: mmap_lock_released: mm=1 memcg_path= write=true
 mapping-6 [001] ..... 1.500: tracing_mark_write: mapping begin
 mapping-7 [000] ..... 2.000: mmap_lock_start_locking: mm=1 memcg_path= write=true
 mapping-8 [001] ..... 2.001: mmap_lock_start_locking: mm=1 memcg_path= write=true
 mapping-7 [000] ..... 2.000: mmap_lock_acquire_returned: mm=1 memcg_path= write=true
 mapping-7 [000] ..... 2.004: mmap_lock_acquire_returned: mm=1 memcg_path= write=false
 mapping-7 [000] ..... 2.006: mmap_lock_released: mm=1 memcg_path= write=false
 mapping-8 [001] ..... 2.006: mmap_lock_acquire_returned: mm=1 memcg_path= write=true
 mapping-8 [001] ..... 2.007: mmap_lock_released: mm=1 memcg_path= write=true
";

    #[test]
    fn the_lock_is_held_for_writing_until_it_is_kept_for_reading() {
        let end = " mapping-6 [001] ..... 3.0: tracing_mark_write: mapping end\n";
        let locks = count(&format!("{TRACE}{end}"), true).expect("a whole trace");
        assert_eq!(locks.acquisitions, 2);
        assert!((locks.wait_ms - 5.0).abs() < 1e-6, "{locks:?}");
        assert!((locks.held_ms - 5.0).abs() < 1e-6, "{locks:?}");
    }

    #[test]
    fn a_trace_without_its_end_or_with_a_hole_is_refused() {
        assert!(count(TRACE, true).is_err());
        assert!(count("CPU:0 [LOST 12 EVENTS]", false).is_err());
    }

    #[test]
    fn without_marks_all_of_the_trace_counts() {
        let locks = count(TRACE, false).expect("a whole trace");
        assert_eq!(locks.acquisitions, 3);
        assert!((locks.wait_ms - 6.0).abs() < 1e-6, "{locks:?}");
    }
}
