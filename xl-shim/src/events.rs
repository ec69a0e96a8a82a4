//! The save helper's events: from its lines of JSON to the progress bar and the report.
//!
//! libxl starts the helper and has no message for events, so the helper writes them to a
//! descriptor that it inherits and whose number is in [`ENV_FD`].

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::{self, JoinHandle};

use rustix::io::FdFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rxl_migrate::report::{Event, Stamped};

use crate::output::Screen;

/// Names the descriptor that the helper writes its events to.
pub(crate) const ENV_FD: &str = "RXL_EVENTS_FD";
/// Longest line; the helper's are below 1 KiB but for an error text.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Most events that are kept; a migration has a dozen for each pass.
const EVENTS_MAX: usize = 100_000;

/// The pipe, before anybody reads or writes it.
#[derive(Debug)]
pub(crate) struct EventsPipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

/// The writing end, which the helper inherits. The reading ends when it is dropped and the helper
/// has ended.
#[derive(Debug)]
pub(crate) struct EventsWriter(#[expect(dead_code, reason = "kept open")] OwnedFd);

/// The thread that reads.
#[derive(Debug)]
pub(crate) struct Events {
    thread: JoinHandle<Vec<Stamped>>,
}

impl EventsPipe {
    /// A pipe that no child inherits yet.
    pub(crate) fn new() -> io::Result<EventsPipe> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(EventsPipe { reader, writer })
    }

    /// The end whose number the helper is told.
    pub(crate) fn writer(&self) -> BorrowedFd<'_> {
        self.writer.as_fd()
    }

    /// Starts to read, and lets every child inherit the writing end from now on. `bar`: progress
    /// is drawn on `screen`.
    pub(crate) fn open(self, screen: Screen, bar: bool) -> io::Result<(Events, EventsWriter)> {
        let EventsPipe { reader, writer } = self;
        rustix::io::fcntl_setfd(&writer, FdFlags::empty())?;
        let run = move || {
            let events = read_all(File::from(reader), |event| {
                if bar {
                    draw(&screen, event);
                }
            });
            screen.end_progress();
            events
        };
        let thread = thread::Builder::new().name("events".into()).spawn(run)?;
        Ok((Events { thread }, EventsWriter(writer)))
    }
}

impl Events {
    /// All events, once every writing end is closed.
    pub(crate) fn finish(self) -> Vec<Stamped> {
        self.thread.join().unwrap_or_default()
    }
}

/// Every event but those of progress, which are many and of no use afterwards but the last.
fn read_all(input: impl Read, mut seen: impl FnMut(&Stamped)) -> Vec<Stamped> {
    let mut input = BufReader::new(input);
    let mut events: Vec<Stamped> = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        match input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return events,
            Ok(_) => {}
        }
        let event: Stamped = match serde_json::from_slice(&line) {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(%error, "the save helper wrote a line that is no event");
                continue;
            }
        };
        seen(&event);
        let is_progress = |s: &Stamped| matches!(s.event, Event::PassProgress { .. });
        if events.last().is_some_and(is_progress) {
            events.pop();
        }
        if events.len() < EVENTS_MAX {
            events.push(event);
        }
    }
}

/// Shows one event.
fn draw(screen: &Screen, stamped: &Stamped) {
    match &stamped.event {
        Event::PassStarted { pass, last, pages } => {
            screen.progress(&label(*pass, *last), 0, *pages, "");
        }
        Event::PassProgress { pass, done, pages, bytes } => {
            let text = format!("{done}/{pages} pages, {} MiB sent", bytes >> 20);
            screen.progress(&label(*pass, false), *done, *pages, &text);
        }
        Event::Suspended => screen.progress("suspended", 0, 1, ""),
        Event::Finished { .. } | Event::Failed { .. } => screen.end_progress(),
        _ => {}
    }
}

fn label(pass: u32, last: bool) -> String {
    if last { "last pass".to_owned() } else { format!("pass {pass}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_kept_but_for_progress_and_lines_that_are_none_are_skipped() {
        let progress = |done| Event::PassProgress { pass: 0, done, pages: 9, bytes: 1 };
        let all = [Event::SuspendAsked, progress(1), progress(2), Event::Suspended, progress(3)];
        let mut text = String::new();
        for (t_ns, event) in (0..).zip(all) {
            text += &serde_json::to_string(&Stamped { t_ns, event }).unwrap();
            text += "\nrubbish\n";
        }
        let mut drawn = 0;
        let events = read_all(text.as_bytes(), |_| drawn += 1);
        assert_eq!(drawn, 5);
        let times: Vec<u64> = events.iter().map(|s| s.t_ns).collect();
        assert_eq!(times, [0, 3, 4], "a progress event is kept only as the last one");
    }

    #[test]
    fn reading_ends_when_the_helper_and_rxl_have_closed_the_pipe() {
        let pipe = EventsPipe::new().unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&pipe.writer());
        let (events, writer) = pipe.open(Screen::buffer(), true).unwrap();
        let child = std::process::Command::new("sh")
            .args(["-c", "echo '{\"t_ns\":5,\"event\":\"suspended\"}' >&$RXL_EVENTS_FD"])
            .env(ENV_FD, number.to_string())
            .status()
            .unwrap();
        assert!(child.success());
        drop(writer);
        assert_eq!(events.finish(), [Stamped { t_ns: 5, event: Event::Suspended }]);
    }
}
