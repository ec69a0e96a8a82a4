//! `rxl migrate-receive`: the target's end of a migration, on standard input and output, or
//! ([`listen`]) where it listens.

mod driver;
mod listen;

use std::sync::Arc;

use anyhow::Context;
use rxl_migrate::xl::handshake::ReceiverEnd;
use rxl_toolstack::lifecycle::Lifecycle;

use crate::Exit;
use crate::channel::Channel;
use crate::cli::{Globals, ReceiveArgs};
use crate::gate::{Gate, SignalWatch};
use crate::host::{self, Progress};
use crate::output::Screen;
use crate::status::Runs;
use crate::stdio;
use crate::words;

pub(crate) use driver::{Arrival, Helpers, Saved};
pub(crate) use listen::Place;

/// Receives one domain.
pub(crate) fn run(globals: &Globals, args: &ReceiveArgs) -> anyhow::Result<Exit> {
    if let Some(place) = args.listen {
        return listen::run(globals, args, place);
    }
    let screen = Screen::stderr();
    let (input, output) = stdio::take().context("taking standard input and output")?;
    host::become_save_helper()?;
    let host = host::open(globals, Progress::Silent)?;
    let gate = Arc::new(Gate::new()?);
    let too_late = "rxl: too late to cancel: the domain is being started".to_owned();
    let _signals = SignalWatch::start(gate.clone(), host.canceller(), screen.clone(), too_late)?;
    if let Some(kib) = args.need {
        // Before the banner, which the sender waits for.
        host.make_room(kib)?;
    }
    let channel = Channel::new(input, output, gate.clone());
    let monitor = !(args.no_monitor || args.foreground);
    let helpers = Helpers { guard: true, monitor };
    let mut arrival = Arrival::new(&host, channel, &gate, &screen, helpers);
    arrival.paused = args.paused;
    arrival.print_config = args.debug;
    arrival.runs = Some(Runs::of_this_host());
    let end = arrival.run()?;
    tell(&screen, end);
    let exit = match end {
        ReceiverEnd::Running | ReceiverEnd::RunningUnreported => Exit::Success,
        _ => Exit::Failed,
    };
    arrival.board.end(exit);
    Ok(exit)
}

fn tell(screen: &Screen, end: ReceiverEnd) {
    match end {
        ReceiverEnd::Running => screen.line(words::STARTED),
        ReceiverEnd::RunningUnreported => {
            screen.line(words::STARTED);
            screen.line(
                "rxl: the sender could not be told; its copy stays suspended and must be destroyed",
            );
        }
        ReceiverEnd::Nothing(cause) => screen.line(&format!("rxl: not received: {cause}")),
        ReceiverEnd::GivenBack { told: true } => {
            screen.line("rxl: the domain could not be started here; the sender may resume it");
        }
        ReceiverEnd::GivenBack { told: false } => screen.line(
            "rxl: the domain could not be started here and is gone here; the sender could not be \
             told, so resume it there by hand",
        ),
        ReceiverEnd::Remains => screen.line(
            "rxl: a copy that must not run could not be destroyed: find it with xl list and \
             destroy it",
        ),
    }
}
