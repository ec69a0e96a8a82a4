//! The save helper: what libxl runs to write or read the stream of a domain.
//!
//! libxl starts it as `rxl --save-domain …` or `rxl --restore-domain …`, because `rxl` (or the
//! user, by `LIBXL_SAVE_HELPER`) has named this program; under the name `libxl-save-helper` it
//! is the same. Here is only what connects the parts: the arguments and the protocol are
//! [`rxl_migrate::helper`]'s, the engine is [`rxl_migrate::source`] and
//! [`rxl_migrate::target`], Xen is [`rxl_toolstack::xc`].

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::{env, iter};

use anyhow::Context;
use rustix::fs::{FileType, fstat};
use rxl_migrate::frame::DomId;
use rxl_migrate::helper::{
    Callbacks, EventSink, HelperChannel, Invocation, InvocationError, RestoreArgs, SaveArgs,
};
use rxl_migrate::hypervisor::{LogLevel, Toolstack};
use rxl_migrate::report::Stamped;
use rxl_migrate::source::workers::Workers;
use rxl_migrate::{source, target};
use rxl_toolstack::receivers::{self, Openers};
use rxl_toolstack::senders::{self, Pool, SharedOut, Staff};
use rxl_toolstack::xc::{FdIn, FdOut, LiveDomain, want_mapper};
use rxl_toolstack::{abort, inherit};

use crate::Exit;
use crate::events;
use crate::lock;
use crate::passthrough;
use crate::timeline::{now, now_ns};
use crate::ways::Ways;

/// The name under which any program is libxl's helper.
pub(crate) const NAME: &str = "libxl-save-helper";

/// What libxl's own helper says in `complete` where it has no errno.
const EIO: i32 = 5;

type Channel = HelperChannel<File, File>;

/// Whether these are arguments of the helper.
pub(crate) fn is_meant(args: &[OsString], program: &str) -> bool {
    let ours = ["--save-domain", "--restore-domain", senders::ARGUMENT, receivers::ARGUMENT];
    program == NAME || args.get(1).is_some_and(|first| ours.iter().any(|own| first == own))
}

/// Saves or restores a domain. A failure of the transfer is no failure of the process: libxl is
/// told in its own way.
pub(crate) fn run(args: &[OsString]) -> anyhow::Result<Exit> {
    let args = args.get(1..).unwrap_or_default();
    // In workers too, which have the same environment.
    want_mapper(Ways::from_environment().mapper);
    let words: Vec<&str> = args.iter().filter_map(|arg| arg.to_str()).collect();
    match words.as_slice() {
        [senders::ARGUMENT, rest @ ..] => {
            senders::run(rest)?;
            return Ok(Exit::Success);
        }
        [receivers::ARGUMENT, rest @ ..] => {
            receivers::run(rest)?;
            return Ok(Exit::Success);
        }
        _ => {}
    }
    match Invocation::parse(args) {
        Ok(Invocation::Save(save)) => run_save(&save)?,
        Ok(Invocation::Restore(restore)) => run_restore(&restore)?,
        // Nothing has been read or written yet: the stock helper finds all as libxl has left it.
        Err(InvocationError::Checkpointed(_)) => return Err(passthrough::exec_stock_helper(args)),
        Err(error) => return Err(error.into()),
    }
    Ok(Exit::Success)
}

fn run_save(args: &SaveArgs) -> anyhow::Result<()> {
    let stream = inherit::descriptor(args.io_fd).context("the stream's descriptor")?;
    abort::install(stream.as_fd())?;
    let mut channel = channel(args.domain, args.callbacks)?;
    if let Some(sink) = event_sink() {
        channel = channel.with_events(sink);
    }
    let domain = args.domain;
    channel = channel.with_notice(Box::new(move || lock::say_asked(domain)));
    let ways = Ways::from_environment();
    let policy = ways.policy.0;
    let verify = match (args.debug, ways.verify && !is_file(&stream)?) {
        (_, true) => source::Verify::Digests,
        (true, false) => source::Verify::Again,
        (false, false) => source::Verify::No,
    };
    let options = source::Options { live: args.live, verify, policy };
    let result = save(args.domain, &stream, &mut channel, &ways, &options);
    complete(channel, result.err(), "saving")
}

fn save(
    domain: DomId,
    stream: &OwnedFd,
    channel: &mut Channel,
    ways: &Ways,
    options: &source::Options,
) -> rxl_migrate::Result<()> {
    let failed = |source| rxl_migrate::Error::Worker { what: "starting workers", source };
    let workers = start_workers(domain, stream, ways).map_err(failed)?;
    let turn = workers.as_ref().map(Pool::turn).transpose().map_err(failed)?;
    let mut out = SharedOut::new(FdOut::new(stream), turn, ways.rate);
    let workers = workers.map(|pool| Box::new(pool) as Box<dyn Workers>);
    let domain = LiveDomain::open(domain)?;
    source::save_with(&domain, &mut out, channel, workers, options)?;
    Ok(())
}

/// As many as the environment asks for, or help; `None`: this process does the work alone.
fn start_workers(domain: DomId, stream: &OwnedFd, ways: &Ways) -> io::Result<Option<Pool>> {
    let (count, mode) = (ways.stream_workers(), ways.mode());
    // Nobody who reads a file later could come to a link.
    let doorman = if is_file(stream)? { None } else { ways.doorman() };
    if count == 0 && doorman.is_none() {
        return Ok(None);
    }
    let program = env::current_exe()?.into_os_string();
    let (stream, rate) = (stream.as_fd(), ways.rate);
    Pool::start(Staff { program, domain, mode, count, stream, doorman, rate }).map(Some)
}

fn is_file(stream: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(stream)?.st_mode) == FileType::RegularFile)
}

fn run_restore(args: &RestoreArgs) -> anyhow::Result<()> {
    let stream = inherit::descriptor(args.io_fd).context("the stream's descriptor")?;
    abort::ignore_terminal()?;
    let mut channel = channel(args.domain, args.callbacks)?;
    let options = target::Options {
        store_evtchn: args.store_port,
        store_domid: args.store_domain,
        console_evtchn: args.console_port,
        console_domid: args.console_domain,
    };
    let result = restore(args.domain, &stream, &mut channel, &options);
    // libxl wants the results before the end, after a failure too.
    let (store, console) = result.as_ref().map_or((0, 0), |o| (o.store_frame, o.console_frame));
    channel.restore_results(store, console)?;
    complete(channel, result.err(), "restoring")
}

fn restore(
    domain: DomId,
    stream: &OwnedFd,
    channel: &mut Channel,
    options: &target::Options,
) -> rxl_migrate::Result<target::Outcome> {
    let failed = |source| rxl_migrate::Error::Worker { what: "starting workers", source };
    let links = Box::new(receiving_workers(domain, stream).map_err(failed)?);
    let domain = LiveDomain::open(domain)?;
    target::restore_with(&domain, &mut FdIn::new(stream), channel, Some(links), options)
}

/// Those that read a file, as many as the environment asks for, or help; from anything else, those
/// that open links if some are offered.
fn receiving_workers(domain: DomId, stream: &OwnedFd) -> io::Result<Openers<'_>> {
    let program = env::current_exe()?.into_os_string();
    let mut openers = Openers::new(program, domain, stream.as_fd());
    if is_file(stream)? {
        let ways = Ways::from_environment();
        openers.read_file(ways.stream_workers(), ways.mode())?;
    }
    Ok(openers)
}

/// The channel to libxl: descriptors 0 and 1, unbuffered.
fn channel(domain: DomId, callbacks: Callbacks) -> io::Result<Channel> {
    let replies = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let messages = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    Ok(HelperChannel::new(replies, messages, domain, callbacks, abort::requested, now))
}

/// Tells libxl how it ended.
fn complete(
    mut channel: Channel,
    error: Option<rxl_migrate::Error>,
    what: &str,
) -> anyhow::Result<()> {
    let (retval, errno) = match error {
        None => (0, 0),
        Some(error) => {
            channel.log(LogLevel::Error, &format!("{what} failed: {}", chain(&error)));
            (-1, errno_of(&error))
        }
    };
    channel.complete(retval, errno).context("telling libxl the result")
}

/// An error and its causes in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn errno_of(error: &(dyn Error + 'static)) -> i32 {
    causes(error)
        .find_map(|e| e.downcast_ref::<io::Error>()?.raw_os_error())
        .filter(|errno| *errno != 0)
        .unwrap_or(EIO)
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |e| (*e).source())
}

/// Writes events for the program that wants them, if there is one.
fn event_sink() -> Option<EventSink> {
    let number = env::var(events::ENV_FD).ok()?.parse().ok()?;
    let mut pipe = File::from(inherit::descriptor(number).ok()?);
    Some(Box::new(move |event| {
        let stamped = Stamped { t_ns: now_ns(), event: event.clone() };
        if let Ok(mut line) = serde_json::to_vec(&stamped) {
            line.push(b'\n');
            // A report is not worth a migration.
            let _ = pipe.write_all(&line);
        }
    }))
}
