//! The save helper's events: from its descriptor to the progress bar and the report.
//!
//! libxl starts the helper and has no message for events, so the helper writes them to a
//! descriptor that it inherits and whose number is in [`ENV_FD`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::{self, JoinHandle};

use rustix::io::FdFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rxl_migrate::report::{self, Event, Stamped};

use crate::output::Screen;
use crate::status::Board;

/// Names the descriptor that the helper writes its events to.
pub(crate) const ENV_FD: &str = "RXL_EVENTS_FD";

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
    /// is drawn on `screen`. `board` is shown every event.
    pub(crate) fn open(
        self,
        screen: Screen,
        bar: bool,
        board: Board,
    ) -> io::Result<(Events, EventsWriter)> {
        let EventsPipe { reader, writer } = self;
        rustix::io::fcntl_setfd(&writer, FdFlags::empty())?;
        let run = move || {
            let events = report::read_lines(File::from(reader), |event| {
                board.see(event);
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

/// Shows one event.
fn draw(screen: &Screen, stamped: &Stamped) {
    match &stamped.event {
        Event::PassStarted { pass, last, pages } => {
            screen.progress(&label(*pass, *last), 0, *pages, "");
        }
        Event::PassProgress { pass, done, pages, bytes, .. } => {
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
    fn reading_ends_when_the_helper_and_rxl_have_closed_the_pipe() {
        let pipe = EventsPipe::new().unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&pipe.writer());
        let (events, writer) = pipe.open(Screen::buffer(), true, Board::default()).unwrap();
        let child = std::process::Command::new("sh")
            .args([
                "-c",
                "echo '{\"t_ns\":5,\"event\":\"suspended\"}' > /proc/self/fd/$RXL_EVENTS_FD",
            ])
            .env(ENV_FD, number.to_string())
            .status()
            .unwrap();
        assert!(child.success());
        drop(writer);
        assert_eq!(events.finish(), [Stamped { t_ns: 5, event: Event::Suspended }]);
    }
}
