//! The save helper's events: from its descriptor to the screen, the board and the report.
//!
//! libxl starts the helper and has no message for events, so the helper writes them to a
//! descriptor that it inherits and whose number is in [`ENV_FD`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rxl_migrate::report::{self, Event, Stamped};

use crate::output::Screen;
use crate::status::{Board, view};

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
            let mut view = View { screen, bar, board, began: (0, 0) };
            let events = report::read_lines(File::from(reader), |event| view.show(event));
            view.screen.end_progress();
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

/// Shows events as they come: figures below a bar, and what each pass was above it; where no bar
/// can be seen, all in lines.
struct View {
    screen: Screen,
    bar: bool,
    board: Board,
    /// When the pass began, and the bytes of then.
    began: (u64, u64),
}

impl View {
    fn show(&mut self, stamped: &Stamped) {
        self.board.see(stamped);
        let Some(figures) = self.board.figures() else { return };
        let lines = || view::figures(&figures);
        match &stamped.event {
            Event::PassStarted { .. } => self.began = (stamped.t_ns, figures.bytes),
            Event::PassEnded { pass, last, pages, bytes } => {
                let (began, before) = self.began;
                let took = Duration::from_nanos(stamped.t_ns.saturating_sub(began));
                let sent = view::sent(pages.sent(), bytes.saturating_sub(before), took);
                self.screen.line(&format!("rxl: {}: {sent}", label(*pass, *last)));
            }
            Event::Throttled { percent } => {
                self.screen.line(&format!("rxl: guest slowed to {percent} %"));
            }
            Event::PauseExpected { .. } if !self.bar => {
                self.screen.line(&format!("rxl: so far {}", lines().join("; ")));
            }
            Event::Finished { .. } | Event::Failed { .. } => {
                self.screen.end_progress();
                return;
            }
            _ => {}
        }
        if self.bar
            && let Some(pass) = figures.pass
        {
            let label = label(pass, figures.last);
            self.screen.progress(&label, figures.done, figures.pages, &lines().join("\n"));
        }
    }
}

fn label(pass: u32, last: bool) -> String {
    if last { "last pass".to_owned() } else { format!("pass {pass}") }
}

#[cfg(test)]
mod tests {
    use expect_test::expect_file;
    use indicatif::InMemoryTerm;
    use rxl_migrate::report::PassPages;
    use rxl_migrate::xl::config::DomainConfig;

    use super::*;
    use crate::status::{Doing, Runs};

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

    const MS: u64 = 1_000_000;

    /// A migration over two connections, up to the middle of its second pass.
    fn half_way() -> Vec<Stamped> {
        let mib = |count: u64| count << 20;
        let part = |pass, done, pages, bytes, links: [u64; 2]| Event::PassProgress {
            pass,
            done,
            pages,
            bytes: mib(bytes),
            links: vec![(0, mib(links[0])), (1, mib(links[1]))],
        };
        let pages = PassPages { wanted: 262_144, plain: 131_072, ..PassPages::default() };
        [
            (0, Event::Started { pid: 7, hvm: true, total_pages: 131_072, p2m_pages: 262_144 }),
            (1, Event::PassStarted { pass: 0, last: false, pages: 262_144 }),
            (2, Event::LinkJoined { link: 0 }),
            (3, Event::LinkJoined { link: 1 }),
            (1000, part(0, 52_000, 262_144, 100, [50, 50])),
            (3000, part(0, 150_000, 262_144, 300, [160, 140])),
            (5100, Event::PassEnded { pass: 0, last: false, pages, bytes: mib(512) }),
            (5110, Event::Dirty { pages: 12_800 }),
            (5111, Event::PauseExpected { ms: 640 }),
            (5112, Event::PassStarted { pass: 1, last: false, pages: 12_800 }),
            (5113, part(1, 0, 12_800, 512, [262, 250])),
            (5400, part(1, 7_000, 12_800, 539, [276, 263])),
        ]
        .map(|(ms, event)| Stamped { t_ns: ms * MS, event })
        .to_vec()
    }

    fn show(screen: &Screen, bar: bool) {
        let directory = tempfile::tempdir().unwrap();
        let config = DomainConfig::parse(r#"{"c_info":{"name":"web"}}"#).unwrap();
        let runs = Runs::at(directory.path());
        let board = Board::post(runs, Doing::Migrate, ("web", None), &config, None);
        let mut view = View { screen: screen.clone(), bar, board, began: (0, 0) };
        half_way().iter().for_each(|event| view.show(event));
    }

    #[test]
    fn a_terminal_shows_the_pass_and_below_it_rates_and_estimates() {
        let terminal = InMemoryTerm::new(20, 90);
        let screen = Screen::on(&terminal);
        show(&screen, true);
        expect_file!["../../docs/live-view.txt"].assert_eq(&(terminal.contents() + "\n"));
    }

    #[test]
    fn without_a_terminal_there_are_lines_of_each_pass() {
        let screen = Screen::buffer();
        show(&screen, false);
        let text = screen.text();
        let lines: Vec<&str> = text.lines().collect();
        let sent = "rxl: pass 0: 131072 pages sent, 512.0 MiB in 5.1 s, 100.4 MiB/s";
        assert_eq!((lines.len(), lines[0]), (2, sent));
        for part in ["512.0 MiB sent", "the guest writes 9.8 MiB/s", "a pause of 640 ms"] {
            assert!(lines[1].starts_with("rxl: so far ") && lines[1].contains(part), "{text}");
        }
    }
}
