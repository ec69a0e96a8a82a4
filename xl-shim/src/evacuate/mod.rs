//! `rxl evacuate`: moves every guest of this host to others.
//!
//! Each guest is moved by an `rxl migrate` of its own ([`mover`]), so whatever holds for one
//! migration holds here. [`plan`] decides who goes where and when, [`hosts`] asks hosts. Nothing is
//! remembered from one evacuation to the next: the guests that are still here are the ones that are
//! left to move, so running it again goes on where it ended.

mod hosts;
mod mover;
mod plan;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Exit;
use crate::cli::{EvacuateArgs, Globals};
use crate::output::{self, Screen};
use hosts::Staying;
use mover::{Ended, Figures, Mover};
use plan::{End, Health, Place, Plan};

/// What the main thread is told.
enum News {
    /// The migration of that guest is over; if it failed, its target was asked how it is.
    Ended(usize, Ended, Option<Health>),
    /// A signal that cancels.
    Signal,
}

/// Moves the guests. Success: none is left that could run elsewhere.
pub(crate) fn run(globals: &Globals, args: &EvacuateArgs) -> anyhow::Result<Exit> {
    ensure!(!args.ssh.is_empty(), "evacuate needs a command for -s: it asks the targets as well");
    let (mut guests, mut staying) = hosts::guests()?;
    for name in &args.except {
        let before = guests.len();
        guests.retain(|guest| guest.name != *name);
        ensure!(guests.len() < before, "--except {name}: there is no such guest here");
        staying.push(Staying { name: name.clone(), why: "--except" });
    }
    let plan = Plan::new(guests, ask_all(args)?, usize::from(args.parallel));
    let screen = Screen::stderr();
    let mut evacuation = Evacuation { plan, args, verbose: globals.verbose > 0, screen };
    if args.dry_run {
        return evacuation.show_plan(&staying);
    }
    let (figures, cancelled) = evacuation.run()?;
    let summary = Summary::new(&evacuation.plan, &figures, &staying);
    output::stdout(&summary.text(""));
    if let Some(path) = &args.report {
        let json = serde_json::to_string_pretty(&summary)? + "\n";
        fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(match summary.left {
        0 => Exit::Success,
        _ if cancelled => Exit::Cancelled,
        _ => Exit::Failed,
    })
}

/// How every target is; one at least has to answer.
fn ask_all(args: &EvacuateArgs) -> anyhow::Result<Vec<(String, Health)>> {
    let health = thread::scope(|scope| {
        let asked: Vec<_> = args.to.iter().map(|host| scope.spawn(|| health(args, host))).collect();
        let lost = || Health::Lost("asking it failed".to_owned());
        asked.into_iter().map(|one| one.join().unwrap_or_else(|_| lost())).collect::<Vec<_>>()
    });
    let targets: Vec<_> = args.to.iter().cloned().zip(health).collect();
    for (host, health) in &targets {
        if let Health::Lost(why) = health {
            output::stderr(&format!("rxl: {host} gets no guest: {why}"));
        }
    }
    let some = targets.iter().any(|(_, health)| !matches!(health, Health::Lost(_)));
    ensure!(some, "no target can be used");
    Ok(targets)
}

fn health(args: &EvacuateArgs, host: &str) -> Health {
    match hosts::ask(&args.ssh, host) {
        Health::Room(_) if args.ignore_memory => Health::Room(None),
        health => health,
    }
}

struct Evacuation<'a> {
    plan: Plan,
    args: &'a EvacuateArgs,
    verbose: bool,
    screen: Screen,
}

impl Evacuation<'_> {
    /// Moves all that can be moved. The figures by guest, and whether it was cancelled.
    fn run(&mut self) -> anyhow::Result<(BTreeMap<usize, Figures>, bool)> {
        let (sender, news) = mpsc::channel();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("signals")?;
        let handle = signals.handle();
        let signalled = sender.clone();
        let thread = thread::spawn(move || {
            for _ in signals.forever() {
                if signalled.send(News::Signal).is_err() {
                    break;
                }
            }
        });
        let result = self.follow(&sender, &news);
        handle.close();
        let _ = thread.join();
        result
    }

    fn follow(
        &mut self,
        sender: &Sender<News>,
        news: &Receiver<News>,
    ) -> anyhow::Result<(BTreeMap<usize, Figures>, bool)> {
        let (mut figures, mut pids) = (BTreeMap::new(), BTreeMap::new());
        let mut cancelled = false;
        loop {
            while let Some((guest, target)) = self.plan.next() {
                match self.start(guest, target, sender.clone()) {
                    Ok(pid) => drop(pids.insert(guest, pid)),
                    Err(error) => self.plan.ended(guest, End::Failed(format!("{error:#}")), None),
                }
            }
            if self.plan.moving() == 0 {
                return Ok((figures, cancelled));
            }
            match news.recv().context("waiting for migrations")? {
                News::Ended(guest, ended, health) => {
                    pids.remove(&guest);
                    self.say_end(guest, &ended);
                    figures.insert(guest, ended.figures);
                    self.plan.ended(guest, ended.end, health);
                    if cancelled {
                        self.plan.stop();
                    }
                }
                News::Signal => {
                    cancelled = true;
                    self.plan.stop();
                    self.screen.line("rxl: cancelling");
                    for pid in pids.values().filter_map(|pid| i32::try_from(*pid).ok()) {
                        // One that has just ended is no error.
                        let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::TERM));
                    }
                }
            }
        }
    }

    /// Starts a migration, and a thread that tells of its end.
    fn start(&self, guest: usize, target: usize, news: Sender<News>) -> anyhow::Result<u32> {
        let (name, host) = self.plan.names(guest, target);
        let (name, host) = (name.to_owned(), host.to_owned());
        self.screen.line(&format!("rxl: {name} -> {host}"));
        let mut options = self.args.options.clone();
        options.extend(["-s".to_owned(), self.args.ssh.clone()]);
        if let Some(rate) = self.args.rate {
            let share = (rate / u32::from(self.args.parallel)).max(1);
            options.extend(["--rate".to_owned(), share.to_string()]);
        }
        let mover = Mover::start(&name, &host, &options)?;
        let pid = mover.pid();
        let (args, screen, verbose) = (self.args.clone(), self.screen.clone(), self.verbose);
        thread::spawn(move || {
            let ended = mover.wait(&name, verbose, &screen);
            let failed = matches!(ended.end, End::Failed(_));
            let health = failed.then(|| health(&args, &host));
            // The receiver is gone only if everything is.
            let _ = news.send(News::Ended(guest, ended, health));
        });
        Ok(pid)
    }

    fn say_end(&self, guest: usize, ended: &Ended) {
        let Some((guest, _)) = self.plan.guests().get(guest) else { return };
        let text = match &ended.end {
            End::Moved => "moved".to_owned(),
            End::Failed(why) => format!("not moved: {why}"),
            End::Suspended(why) => format!("NEEDS A LOOK: {why}"),
            End::Cancelled => "cancelled".to_owned(),
        };
        self.screen.line(&format!("rxl: {}: {text}", guest.name));
    }

    /// What would be done if all went well.
    fn show_plan(&mut self, staying: &[Staying]) -> anyhow::Result<Exit> {
        while let Some((guest, _)) = self.plan.next() {
            self.plan.ended(guest, End::Moved, None);
        }
        let summary = Summary::new(&self.plan, &BTreeMap::new(), staying);
        output::stdout(&summary.text("would be "));
        Ok(if summary.left == 0 { Exit::Success } else { Exit::Failed })
    }
}

/// The end of it, as a table and as JSON.
#[derive(Debug, Serialize)]
struct Summary {
    /// Guests that run elsewhere now.
    moved: usize,
    /// Guests that should.
    left: usize,
    guests: Vec<Line>,
}

/// One guest.
#[derive(Debug, Default, Serialize)]
struct Line {
    guest: String,
    /// Where it is: a target, or `here`.
    place: String,
    /// Whether it is suspended there, or nobody knows.
    suspended: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
}

impl Summary {
    fn new(plan: &Plan, figures: &BTreeMap<usize, Figures>, staying: &[Staying]) -> Summary {
        let (mut moved, mut left, mut guests) = (0, 0, Vec::new());
        for (at, (guest, place)) in plan.guests().iter().enumerate() {
            let here = |why: String, suspended| Line {
                place: "here".to_owned(),
                suspended,
                why: Some(why),
                ..Line::default()
            };
            let line = match place {
                Place::Moved(target) => {
                    let figures = figures.get(&at).cloned().unwrap_or_default();
                    Line {
                        place: plan.target_name(*target).to_owned(),
                        total_ms: figures.total_ms,
                        pause_ms: figures.pause_ms,
                        bytes: figures.bytes,
                        ..Line::default()
                    }
                }
                Place::Left(reasons) => here(reasons.join("; "), false),
                Place::Suspended(why) => here(format!("NEEDS A LOOK: {why}"), true),
                Place::Waiting | Place::Moving(_) => here("not started".to_owned(), false),
            };
            *(if line.why.is_none() { &mut moved } else { &mut left }) += 1;
            guests.push(Line { guest: guest.name.clone(), ..line });
        }
        guests.extend(staying.iter().map(|Staying { name, why }| Line {
            guest: name.clone(),
            place: "here".to_owned(),
            why: Some((*why).to_owned()),
            ..Line::default()
        }));
        Summary { moved, left, guests }
    }

    /// `would`: how what it says stands to what is.
    fn text(&self, would: &str) -> String {
        let width = |column: fn(&Line) -> &str, least: usize| {
            self.guests.iter().map(|line| column(line).chars().count()).fold(least, usize::max)
        };
        let (name, place) = (width(|l| &l.guest, 5), width(|l| &l.place, 5));
        let mut out =
            format!("{:name$}  {:place$}  {:>9}  {:>9}\n", "guest", "where", "total", "pause");
        for line in &self.guests {
            let total = line.total_ms.map_or("-".to_owned(), |ms| format!("{:.1} s", ms / 1000.0));
            let pause = line.pause_ms.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
            let why = line.why.as_deref().unwrap_or_default();
            let text = format!(
                "{:name$}  {:place$}  {total:>9}  {pause:>9}  {why}",
                line.guest, line.place
            );
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{}", text.trim_end());
        }
        let _ = writeln!(out, "{} {would}moved, {} {would}left", self.moved, self.left);
        out
    }
}
