//! `rxl migrate`: moves a running domain to another host.

mod conclusion;
mod driver;
mod dry_run;

use std::env;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rxl_migrate::xl::departure;
use rxl_migrate::xl::handshake::SenderEnd;
use rxl_toolstack::libxl::Libxl;
use rxl_toolstack::lifecycle::Lifecycle;

use crate::Exit;
use crate::channel::Channel;
use crate::cli::{Globals, MigrateArgs};
use crate::events::EventsPipe;
use crate::gate::{Gate, SignalWatch};
use crate::guard::{Guard, Ward};
use crate::history::History;
use crate::host::{self, Progress};
use crate::outgoing::{self, Ended, Guest};
use crate::output::{self, Screen};
use crate::report::{Facts, Outcome, Report, Target};
use crate::status::{Board, Doing, Runs};
use crate::timeline::{Mark, Timeline};
use crate::tls;
use crate::transport::{self, Rune, Transport};

pub(crate) use conclusion::{Conclusion, by_hand};
pub(crate) use driver::{Departure, ToHost};

/// Moves the domain. The exit code says where it runs: 0 at the target, else here (if anywhere).
pub(crate) fn run(globals: &Globals, args: &MigrateArgs) -> anyhow::Result<Exit> {
    let mut timeline = Timeline::default();
    timeline.mark(Mark::Started);
    let screen = Screen::stderr();
    check_receiver(args)?;
    if args.dry_run {
        return dry_run::run(globals, args, &screen);
    }
    // What changes the environment comes before all threads.
    host::become_save_helper()?;
    let pipe = EventsPipe::new()?;
    host::pass_events(&pipe)?;
    let history = History::of_this_host();
    args.ways(history.fixed_part(&args.domain, &args.host))?.pass_on()?;
    let host = host::open(globals, Progress::of_sender())?;
    let config = args.config.as_deref();
    let guest = Guest::find(&host, &args.domain, config, args.preserve_domid, true)?;
    let rune = rune(globals, args, need(&host, &guest))?;
    let domain = (guest.name.as_str(), Some(guest.domid));
    let whither = Target::Host(args.host.clone());
    let runs = Runs::of_this_host();
    timeline.show_on(Board::post(runs, Doing::Migrate, domain, &guest.config, Some(whither)));
    let departed = depart(&host, &guest, &rune, args, pipe, &screen, &mut timeline)?;
    let Ended { end, details, events } = departed;
    let (domain, target) = (guest.name.as_str(), args.host.as_str());
    let conclusion = Conclusion { guest: domain, target, end, details: &details };
    conclusion.tell(&screen, || host.state(guest.domid).ok());
    let report = Report::new(&Facts {
        domain,
        target: Target::Host(target.to_owned()),
        outcome: end.into(),
        cause: &conclusion.causes(),
        timeline: &timeline,
        events: &events,
    });
    outgoing::remember(&report, args.prometheus.as_deref());
    timeline.board().end(report.outcome.exit());
    report.publish(&screen, globals.verbose, &args.report)?;
    Ok(report.outcome.exit())
}

/// Whether the receiver that was named can do what is asked for.
fn check_receiver(args: &MigrateArgs) -> anyhow::Result<()> {
    let program = args.receiver.as_deref().and_then(|command| command.split(' ').next());
    let is_xl = program.is_some_and(|path| Path::new(path).ends_with("xl"));
    ensure!(
        !(args.verify && is_xl),
        "--verify needs rxl at the target: leave out --receiver, or name rxl there"
    );
    Ok(())
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
) -> anyhow::Result<Ended<SenderEnd>> {
    let gate = Arc::new(Gate::new()?);
    let too_late = too_late(&guest.name, &args.host);
    let _signals = SignalWatch::start(gate.clone(), host.canceller(), screen.clone(), too_late)?;
    let Guest { name, domid, .. } = guest;
    // Before it is slowed, to give it back whatever happens.
    let cap = args.policy.throttles().then(|| host.cpu_cap(*domid)).transpose();
    let cap = cap.context("--throttle cannot be had here")?;
    let ward = Ward::Leaving { domid: *domid, name, draft: None, to: Some(&args.host), cap };
    let guard = Guard::start(ward, &guest.lock, screen);
    let (transport, input, output) = Transport::start(&rune.command())?;
    // To the save helper, not to the transport, which may stay.
    guest.lock.pass_on().context("passing on the domain's lock")?;
    // After the transport, which must not inherit the writing end.
    let bar = Progress::of_sender() == Progress::Bar;
    let (events, writer) = pipe.open(screen.clone(), bar, timeline.board().clone())?;
    let mut departure = Departure {
        host,
        domid: guest.domid,
        name: &guest.name,
        header: &guest.header,
        debug: args.debug,
        channel: Channel::new(input, output, gate.clone()),
        gate: &gate,
        guard,
        cap,
        screen,
        timeline,
        events: Some(writer),
        save_error: None,
        details: Vec::new(),
        way: ToHost { target: &args.host },
    };
    let end = departure.run();
    let Departure { save_error, details, channel, events: writer, mut guard, .. } = departure;
    drop((channel, writer));
    let status = transport.finish(!gate.is_cancelled());
    let events = events.finish();
    let end = end?;
    if departure::may_suspend_yet(end, events.iter().map(|stamped| &stamped.event)) {
        outgoing::leave_to(&mut guard, name, screen);
    }
    let mut all: Vec<String> = outgoing::why_not_saved(&events, save_error).into_iter().collect();
    all.extend(details);
    if Outcome::from(end) != Outcome::Moved {
        all.extend(status.and_then(|s| transport::explain(s, rune)));
    }
    Ok(Ended { end, details: all, events })
}

fn too_late(guest: &str, target: &str) -> String {
    format!("rxl: too late to cancel: {target} may have been permitted to start {guest} already")
}

/// How much memory it takes. Where that cannot be asked, the target finds out from its
/// configuration.
fn need(host: &dyn Lifecycle, guest: &Guest) -> Option<u64> {
    let need = host.needed_memory(&guest.header.config);
    need.map_err(|error| tracing::warn!("{error}")).ok()
}

/// How the receiver is reached, with the options that `xl` passes on.
fn rune<'a>(
    globals: &Globals,
    args: &'a MigrateArgs,
    need: Option<u64>,
) -> anyhow::Result<Rune<'a>> {
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
    let tls = args.tls.then(|| {
        let program = env::current_exe().context("finding rxl itself")?;
        tls::command(&program, &args.host, &args.tls_files)
    });
    Ok(Rune {
        tls: tls.transpose()?,
        ssh: &args.ssh,
        host: &args.host,
        receiver: args.receiver.as_deref(),
        rxl_only: args.verify,
        globals: globals.into_iter().flatten().collect(),
        options: options.into_iter().flatten().collect(),
        need,
    })
}
