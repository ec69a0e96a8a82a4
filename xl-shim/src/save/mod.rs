//! `rxl save`: saves a running domain to a file.

mod driver;
mod file;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rxl_migrate::xl::leaving;
use rxl_migrate::xl::saving::{SaveEnd, Then};
use rxl_toolstack::libxl::Libxl;
use rxl_toolstack::lifecycle::{DomainState, Lifecycle};

use crate::Exit;
use crate::channel::Channel;
use crate::cli::{Globals, STDIO, SaveArgs};
use crate::events::EventsPipe;
use crate::gate::{Gate, SignalWatch};
use crate::guard::{Guard, Ward};
use crate::host::{self, Progress};
use crate::outgoing::{self, Ended, Guest, kept};
use crate::output::{self, Screen};
use crate::report::{Facts, Report, Target};
use crate::status::{Board, Doing, Runs};
use crate::stdio;
use crate::timeline::{Mark, Timeline};
use crate::ways::Ways;

pub(crate) use driver::{Save, ToFile};
pub(crate) use file::SaveFile;

/// Saves the domain.
pub(crate) fn run(globals: &Globals, args: &SaveArgs) -> anyhow::Result<Exit> {
    let mut timeline = Timeline::default();
    timeline.mark(Mark::Started);
    let screen = Screen::stderr();
    let to_stdout = args.file == STDIO;
    ensure!(
        !(to_stdout && output::stdout_is_terminal()),
        "standard output is a terminal; {STDIO} needs a file or a program there"
    );
    let (_, stdout) = stdio::take().context("taking standard output")?;
    // What changes the environment comes before all threads.
    host::become_save_helper()?;
    let pipe = EventsPipe::new()?;
    host::pass_events(&pipe)?;
    // Nobody who reads the file later could come to a link.
    Ways { workers: args.workers, mapper: args.mapper, ..Ways::default() }.pass_on()?;
    let host = host::open(globals, Progress::of_sender())?;
    let config = args.config.as_deref();
    let guest = Guest::find(&host, &args.domain, config, args.preserve_domid, false)?;
    let file = if to_stdout {
        SaveFile::of(stdout)
    } else {
        SaveFile::begin(Path::new(&args.file), &guest.config, args.force)?
    };
    let domain = (guest.name.as_str(), Some(guest.domid));
    let whither = Target::File(args.file.clone());
    let runs = Runs::of_this_host();
    timeline.show_on(Board::post(runs, Doing::Save, domain, &guest.config, Some(whither)));
    let ended = save(&host, &guest, args, file, pipe, &screen, &mut timeline)?;
    let conclusion = Conclusion { guest: &guest.name, file: &args.file, ended: &ended };
    conclusion.tell(&screen, || host.state(guest.domid).ok());
    let report = Report::new(&Facts {
        domain: &guest.name,
        target: Target::File(args.file.clone()),
        outcome: ended.end.into(),
        cause: &conclusion.causes(),
        timeline: &timeline,
        events: &ended.events,
    });
    outgoing::remember(&report, args.prometheus.as_deref());
    timeline.board().end(report.outcome.exit());
    report.publish(&screen, globals.verbose, &args.report)?;
    Ok(report.outcome.exit())
}

/// Starts what the save takes, and runs it.
fn save(
    host: &Libxl,
    guest: &Guest,
    args: &SaveArgs,
    file: SaveFile,
    pipe: EventsPipe,
    screen: &Screen,
    timeline: &mut Timeline,
) -> anyhow::Result<Ended<SaveEnd>> {
    let Guest { name, domid, .. } = guest;
    let gate = Arc::new(Gate::new()?);
    let too_late = format!("rxl: too late to cancel: {name} is saved");
    let _signals = SignalWatch::start(gate.clone(), host.canceller(), screen.clone(), too_late)?;
    let ward = Ward::Leaving { domid: *domid, name, draft: file.draft(), to: None, cap: None };
    let guard = Guard::start(ward, &guest.lock, screen);
    guest.lock.pass_on().context("passing on the domain's lock")?;
    let bar = Progress::of_sender() == Progress::Bar;
    let (events, writer) = pipe.open(screen.clone(), bar, timeline.board().clone())?;
    let mut save = Save {
        host,
        domid: *domid,
        name,
        header: &guest.header,
        debug: false,
        channel: Channel::to_file(file.writer()?, gate.clone())?,
        gate: &gate,
        guard,
        cap: None,
        screen,
        timeline,
        events: Some(writer),
        save_error: None,
        details: Vec::new(),
        way: ToFile { name: &args.file, file, then: args.then() },
    };
    let end = save.run();
    let Save { save_error, details, events: writer, mut guard, .. } = save;
    drop(writer);
    let events = events.finish();
    let here = matches!(end, SaveEnd::Kept(_) | SaveEnd::NotResumed(_));
    if here && leaving::may_suspend_yet(events.iter().map(|stamped| &stamped.event)) {
        outgoing::leave_to(&mut guard, name, screen);
    }
    let mut all: Vec<String> = outgoing::why_not_saved(&events, save_error).into_iter().collect();
    all.extend(details);
    Ok(Ended { end, details: all, events })
}

impl SaveArgs {
    fn then(&self) -> Then {
        // As xl: -p wins.
        if self.paused {
            Then::Pause
        } else if self.running {
            Then::Run
        } else {
            Then::Destroy
        }
    }
}

/// What the user is told at the end.
struct Conclusion<'a> {
    guest: &'a str,
    file: &'a str,
    ended: &'a Ended<SaveEnd>,
}

impl Conclusion<'_> {
    /// Why it did not succeed, the outermost reason first; empty if it did.
    fn causes(&self) -> Vec<String> {
        let cause = match self.ended.end {
            SaveEnd::Saved => None,
            SaveEnd::SavedWithRemains => Some("the domain could not be destroyed".to_owned()),
            SaveEnd::SavedNotResumed => Some("the domain could not be resumed".to_owned()),
            SaveEnd::Kept(cause) | SaveEnd::NotResumed(cause) => Some(cause.to_string()),
        };
        cause.into_iter().chain(self.ended.details.iter().cloned()).collect()
    }

    /// Prints it. `state` asks how the domain is now.
    fn tell(&self, screen: &Screen, state: impl FnOnce() -> Option<DomainState>) {
        let (guest, file) = (self.guest, self.file);
        let why = self.causes().join("; ");
        match self.ended.end {
            SaveEnd::Saved => {}
            SaveEnd::SavedWithRemains => screen.line(&format!(
                "rxl: {guest} is saved in {file}, but is still here, suspended ({why}).\n\
                 rxl: It must not run any more: xl destroy {guest}"
            )),
            SaveEnd::SavedNotResumed => screen.line(&format!(
                "rxl: {guest} is saved in {file}, but is SUSPENDED here ({why}).\n\
                 rxl: Try again: rxl resume {guest}"
            )),
            SaveEnd::Kept(_) => {
                screen.line(&format!("rxl: {guest} was not saved: {why}"));
                screen.line(&kept(guest, state()));
            }
            SaveEnd::NotResumed(_) => screen.line(&format!(
                "rxl: {guest} was not saved: {why}\n\
                 rxl: {guest} is SUSPENDED here and could not be resumed.\n\
                 rxl: Try again: rxl resume {guest}"
            )),
        }
    }
}
