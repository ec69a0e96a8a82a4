//! The lab's guest: the first and only program of a small Linux domain.
//!
//! It fills the memory that it can get with content that it can verify, keeps rewriting part of it
//! at a steady rate, measures the longest time for which it did not run, and answers one-line
//! commands on its console. So it tells, from inside, whether a migration lost a page and how
//! long the guest stood still.
//!
//! ```text
//! > check 17
//! < rxl-answer 17 {"uptime_s":…,"pages_checked":…,"bad_pages":0,"longest_gap_ms":…,…}
//! ```
//!
//! Its options come from the kernel's command line, see [`options`].

mod console;
mod devices;
mod memory;
mod options;
mod pattern;
mod report;
mod suspend;
mod system;
mod ticker;
mod writer;

use std::io::BufRead;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::console::Console;
use crate::devices::Disk;
use crate::memory::GuestMemory;
use crate::options::Options;
use crate::report::Reporter;
use crate::ticker::Ticker;
use crate::writer::Writer;

fn main() -> Result<()> {
    system::mount_filesystems()?;
    let console = Console::open();
    let outcome = run(&console);
    if let Err(error) = &outcome {
        console.line(&format!("rxl-guest: failed: {error:#}"));
        // The first program must not end: the kernel would panic and hide the message.
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    }
    outcome
}

fn run(console: &Console) -> Result<()> {
    let options = Options::parse(&system::command_line()?);
    console.line(&format!("rxl-guest: {options:?}"));
    if options.ignore_suspend {
        suspend::ignore_requests().context("Cannot stop listening for suspend requests")?;
        console.line("rxl-guest: suspend requests are not listened to");
    }
    let has_devices = devices::prepare().context("No devices")?;
    let bytes = system::memory_to_take(options.leave_mib)?;
    let memory = Arc::new(GuestMemory::allocate(bytes, options.content, options.seed)?);
    memory.fill();
    let writer = Arc::new(Writer::new(Arc::clone(&memory), &options));
    let ticker = Arc::new(Ticker::new(options.tick));

    spawn("ticker", {
        let ticker = Arc::clone(&ticker);
        move || ticker.run()
    })?;
    spawn("writer", {
        let writer = Arc::clone(&writer);
        move || writer.run()
    })?;
    spawn("checker", {
        let memory = Arc::clone(&memory);
        move || memory.check_in_background()
    })?;
    let disk = Arc::new(Disk::default());
    if has_devices {
        devices::echo()?;
        let disk = Arc::clone(&disk);
        spawn("disk", move || disk.run())?;
    }
    let reporter = Arc::new(Reporter::new(memory, writer, ticker, disk));
    spawn("status", {
        let (console, reporter) = (console.clone(), Arc::clone(&reporter));
        move || loop {
            thread::sleep(options.status_interval);
            console.line(&format!("rxl-guest: status {}", reporter.status()));
        }
    })?;
    console.line("rxl-guest: ready");
    answer_commands(console, &reporter)
}

fn answer_commands(console: &Console, reporter: &Reporter) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.context("The console is gone")?;
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some("check"), id) => {
                console.line(&format!("rxl-answer {} {}", id.unwrap_or("-"), reporter.check()));
            }
            (Some(_), _) => console.line("rxl-guest: the one command is: check ID"),
            (None, _) => {}
        }
    }
    anyhow::bail!("The console has ended")
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .with_context(|| format!("Cannot start the {name} thread"))?;
    Ok(())
}
