//! `rxl migrate`: moves a running domain to another host.

mod conclusion;
mod config;
mod driver;

use std::sync::Arc;

use anyhow::{Context, bail};
use rxl_migrate::frame::DomId;
use rxl_migrate::report::{Event, Stamped};
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::departure;
use rxl_migrate::xl::handshake::SenderEnd;
use rxl_migrate::xl::header::Header;
use rxl_toolstack::libxl::Libxl;
use rxl_toolstack::lifecycle::{DomainState, Lifecycle, LifecycleError};

use crate::Exit;
use crate::channel::Channel;
use crate::cli::{Globals, MigrateArgs};
use crate::events::EventsPipe;
use crate::gate::{Gate, SignalWatch};
use crate::guard::{Guard, Side};
use crate::history::History;
use crate::host::{self, Progress};
use crate::lock::Lock;
use crate::output::{self, Screen};
use crate::passthrough;
use crate::report::{Facts, Outcome, Report};
use crate::timeline::{Mark, Timeline};
use crate::transport::{self, Rune, Transport};

pub(crate) use conclusion::Conclusion;
pub(crate) use driver::Departure;

/// The domain to move.
struct Guest {
    domid: DomId,
    name: String,
    header: Header,
    /// Nobody else does anything to it meanwhile.
    lock: Lock,
}

/// How a migration ended, and what is known of it.
struct Departed {
    end: SenderEnd,
    details: Vec<String>,
    events: Vec<Stamped>,
}

/// Moves the domain. The exit code says where it runs: 0 at the target, else here (if anywhere).
pub(crate) fn run(globals: &Globals, args: &MigrateArgs) -> anyhow::Result<Exit> {
    let mut timeline = Timeline::default();
    timeline.mark(Mark::Started);
    let screen = Screen::stderr();
    // What changes the environment comes before all threads.
    host::become_save_helper()?;
    let pipe = EventsPipe::new()?;
    host::pass_events(&pipe)?;
    let history = History::of_this_host();
    args.ways(history.fixed_part(&args.domain, &args.host))?.pass_on()?;
    let host = host::open(globals, Progress::of_sender())?;
    let guest = find_guest(&host, args)?;
    let departed = depart(&host, &guest, &rune(globals, args), args, pipe, &screen, &mut timeline)?;
    let Departed { end, details, events } = departed;
    let (domain, target) = (guest.name.as_str(), args.host.as_str());
    let conclusion = Conclusion { guest: domain, target, end, details: &details };
    conclusion.tell(&screen, || host.state(guest.domid).ok());
    let report = Report::new(&Facts {
        domain,
        host: target,
        end,
        cause: &conclusion.causes(),
        timeline: &timeline,
        events: &events,
    });
    if report.outcome == Outcome::Moved {
        screen.line(&report.summary());
    }
    if globals.verbose > 0 {
        report.details().iter().for_each(|line| screen.line(line));
    }
    if let Err(error) = history.keep(&report) {
        tracing::warn!("the report is not kept: {error:#}");
    }
    if let Some(path) = &args.report {
        report.write(path)?;
    }
    Ok(exit_of(report.outcome))
}

/// Starts what the migration takes, and runs it.
fn depart(
    host: &Libxl,
    guest: &Guest,
    rune: &Rune<'_>,
    args: &MigrateArgs,
    pipe: EventsPipe,
    screen: &Screen,
    timeline: &mut Timeline,
) -> anyhow::Result<Departed> {
    let gate = Arc::new(Gate::new()?);
    let too_late = too_late(&guest.name, &args.host);
    let _signals = SignalWatch::start(gate.clone(), host.canceller(), screen.clone(), too_late)?;
    let (name, domid) = (&guest.name, Some(guest.domid));
    let guard = Guard::start(Side::Source, name, domid, &guest.lock, screen);
    let (transport, input, output) = Transport::start(&rune.command())?;
    // To the save helper, not to the transport, which may stay.
    guest.lock.pass_on().context("passing on the domain's lock")?;
    // After the transport, which must not inherit the writing end.
    let bar = Progress::of_sender() == Progress::Bar;
    let (events, writer) = pipe.open(screen.clone(), bar)?;
    let mut departure = Departure {
        host,
        domid: guest.domid,
        name: &guest.name,
        target: &args.host,
        header: &guest.header,
        debug: args.debug,
        channel: Channel::new(input, output, gate.clone()),
        gate: &gate,
        guard,
        screen,
        timeline,
        events: Some(writer),
        save_error: None,
        details: Vec::new(),
    };
    let end = departure.run();
    let Departure { save_error, details, channel, events: writer, mut guard, .. } = departure;
    drop((channel, writer));
    let status = transport.finish(!gate.is_cancelled());
    let events = events.finish();
    let end = end?;
    if departure::may_suspend_yet(end, events.iter().map(|stamped| &stamped.event)) {
        screen.line(&format!(
            "rxl: {name} was asked to suspend and may follow yet; for a minute a guard watches, \
             and lets it run on"
        ));
        guard.abandon();
    }
    let mut all: Vec<String> = why_not_saved(&events, save_error).into_iter().collect();
    all.extend(details);
    if Outcome::from(end) != Outcome::Moved {
        all.extend(status.and_then(|s| transport::explain(s, rune)));
    }
    Ok(Departed { end, details: all, events })
}

/// What the save helper says of its failure, or else libxl, which takes every failure before the
/// guest has suspended for a guest that does not respond.
fn why_not_saved(events: &[Stamped], libxl: Option<LifecycleError>) -> Option<String> {
    let helper = events.iter().rev().find_map(|stamped| match &stamped.event {
        Event::Failed { why } => Some(why.clone()),
        _ => None,
    });
    libxl.map(|error| helper.unwrap_or_else(|| error.to_string()))
}

fn exit_of(outcome: Outcome) -> Exit {
    match outcome {
        Outcome::Moved => Exit::Success,
        Outcome::Cancelled => Exit::Cancelled,
        Outcome::Failed | Outcome::NotResumed | Outcome::Uncertain => Exit::Failed,
    }
}

fn too_late(guest: &str, target: &str) -> String {
    format!("rxl: too late to cancel: {target} may have been permitted to start {guest} already")
}

/// The domain that the user means, and what goes to the target before its stream.
fn find_guest(host: &dyn Lifecycle, args: &MigrateArgs) -> anyhow::Result<Guest> {
    let domid = host.resolve(&args.domain).map_err(|error| {
        anyhow::anyhow!("{} is an invalid domain identifier (rc={})", args.domain, error.rc)
    })?;
    let name = host.name(domid)?;
    // Before looking how it is: a guard may be about to change that.
    let lock = Lock::of_domain(domid, &name)?;
    let name = host.name(domid)?;
    match host.state(domid)? {
        DomainState::Alive => {}
        DomainState::Suspended => bail!(
            "{name} is suspended; if that is left from an earlier migration, and it does not run \
             at the target, let it run here first: rxl resume {name}"
        ),
        DomainState::Dead | DomainState::Gone => bail!("{name} is shutting down"),
    }
    let running = host.config(domid)?;
    let mut config = match &args.config {
        Some(file) => config::from_file(&passthrough::find_xl()?, file, &running)?,
        None => DomainConfig::parse(&running)?,
    };
    config.set_domid(args.preserve_domid.then_some(domid));
    let header = Header::new(&config.to_json())?;
    Ok(Guest { domid, name, header, lock })
}

/// How the receiver is reached, with the options that `xl` passes on.
fn rune<'a>(globals: &Globals, args: &'a MigrateArgs) -> Rune<'a> {
    let option = |on: bool, text: &'static str| on.then_some(text);
    let verbose = "v".repeat(usize::from(globals.verbose));
    let cr = globals.progress_cr || output::stderr_is_terminal();
    let globals = [
        option(cr, "-t").map(str::to_owned),
        option(globals.timestamps, "-T").map(str::to_owned),
        (!verbose.is_empty()).then(|| format!("-{verbose}")),
    ];
    let options = [
        option(args.no_monitor || args.foreground, "-e"),
        option(args.debug, "-d"),
        option(args.paused, "-p"),
    ];
    Rune {
        ssh: &args.ssh,
        host: &args.host,
        receiver: args.receiver.as_deref(),
        globals: globals.into_iter().flatten().collect(),
        options: options.into_iter().flatten().collect(),
    }
}
