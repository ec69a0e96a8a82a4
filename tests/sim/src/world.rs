//! The world of one run: processes, pipes, two hosts, a clock, and the scheduler.
//!
//! A process is a coroutine that runs the product's own code. It gives way before each hypercall
//! and wherever a system call would block, and the seed alone decides who goes on. So a run is
//! one thread's work and is the same each time. A process that is killed is unwound where it
//! stands: what the kernel would release (mappings, descriptors) is released, and nothing that the
//! process itself would have done is done.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::time::Duration;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult};
use rxl_migrate::fake::Rng;
use rxl_migrate::report::Event;
use rxl_migrate::xl::Gate;

use crate::door::{Connection, Door};
use crate::facts::Facts;
use crate::machine::Machine;
use crate::pipe::{End, Pipe, PipeId};
use crate::plan::Plan;
use crate::plant::Plant;
use crate::process::{Process, Switch};
use crate::trace::Trace;
use crate::{receiver, sender};

/// A host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Target,
}

pub(crate) const SIDES: [Side; 2] = [Side::Source, Side::Target];

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    Sender,
    SaveHelper,
    SourceGuard,
    Ssh,
    Sshd,
    Receiver,
    RestoreHelper,
    TargetGuard,
    /// Sends batches for the save helper.
    SaveWorker,
    /// Places what comes over a link, for the restore helper.
    RestoreWorker,
}

/// Those of every migration.
pub(crate) const ROLES: [Role; 8] = [
    Role::Sender,
    Role::SaveHelper,
    Role::SourceGuard,
    Role::Ssh,
    Role::Sshd,
    Role::Receiver,
    Role::RestoreHelper,
    Role::TargetGuard,
];

/// Those of a migration that has workers.
pub(crate) const WORKERS: [Role; 2] = [Role::SaveWorker, Role::RestoreWorker];

impl Role {
    /// Where it runs.
    pub(crate) fn side(self) -> Side {
        match self {
            Role::Sender | Role::SaveHelper | Role::SourceGuard | Role::Ssh | Role::SaveWorker => {
                Side::Source
            }
            _ => Side::Target,
        }
    }
}

/// Which process of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcId(usize);

/// What a process waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cond {
    Never,
    Now,
    Readable(PipeId),
    Writable(PipeId),
    /// Nobody reads the other end of the pipe.
    Hangup(PipeId),
    /// Nothing more comes through the pipe than is there.
    Over(PipeId),
    At(u64),
    /// Its gate has been closed by a signal.
    Cancelled,
    /// It got SIGTERM, which it handles.
    Terminated,
    /// Its libxl operation was asked to end a second time.
    Aborted,
    /// The domain at the source is suspended.
    Suspended,
    Ended(ProcId),
    /// Nobody who lives has this turn.
    Free(usize),
    /// One of its sockets can be read, or somebody calls at its door.
    Sockets,
}

/// Any of these.
pub(crate) type Wait = [Cond; 4];

/// Waits for one thing.
pub(crate) fn only(cond: Cond) -> Wait {
    [cond, Cond::Never, Cond::Never, Cond::Never]
}

/// The program of a process.
pub(crate) type Body = Box<dyn FnOnce(&Process<'_>)>;

/// What the kernel, and libxl in it, know of a process.
pub(crate) struct Proc {
    pub(crate) role: Role,
    pub(crate) alive: bool,
    wait: Wait,
    /// The ends of pipes that it holds.
    pub(crate) ends: Vec<(PipeId, End)>,
    /// Up to when signals cancel.
    pub(crate) gate: Option<Rc<Gate>>,
    /// SIGTERM came, and the process handles it.
    pub(crate) terminated: bool,
    /// How often the end of a libxl operation was asked for.
    pub(crate) requests: u32,
    /// A libxl operation is under way; its helper, once there is one.
    pub(crate) operation: Option<Option<ProcId>>,
    pub(crate) aborted: bool,
    /// Whether it ended by itself.
    pub(crate) exited: bool,
    pub(crate) steps: u32,
    /// What it waits for with [`Cond::Sockets`].
    pub(crate) sockets: Vec<PipeId>,
    /// It dies with this one.
    dies_with: Option<ProcId>,
    /// It has been killed, and the kernel has yet to get to it.
    doomed: bool,
    /// How often it gets the processor, relative to others.
    weight: u64,
}

/// Something that happens by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Happening {
    /// The guest follows the request to suspend of that number.
    GuestSuspends(u64),
    /// The user tries again.
    Retry,
}

/// All of a run but the coroutines.
pub(crate) struct World {
    pub(crate) rng: Rng,
    /// Milliseconds.
    pub(crate) now: u64,
    pub(crate) pipes: Vec<Pipe>,
    pub(crate) procs: Vec<Proc>,
    machines: [Machine; 2],
    pub(crate) plan: Plan,
    pub(crate) facts: Facts,
    pub(crate) trace: Trace,
    happenings: BinaryHeap<Reverse<(u64, Happening)>>,
    spawned: Vec<(ProcId, Body)>,
    kills: Vec<ProcId>,
    /// Number of the last request to suspend; those before it are void.
    pub(crate) suspend_request: u64,
    /// Whether the save helper has told the guard of it.
    pub(crate) guard_told: bool,
    /// What the save helper of the last migration has reported.
    pub(crate) events: Rc<RefCell<Vec<Event>>>,
    /// Who holds the guest's lock on each host.
    locks: [Vec<ProcId>; 2],
    /// The two directions of the link.
    pub(crate) link: [Option<PipeId>; 2],
    /// Who writes to a stream that several write.
    pub(crate) turns: Vec<Option<ProcId>>,
    /// Where save helpers let links in.
    pub(crate) doors: Vec<Door>,
    /// Links that have been opened.
    pub(crate) connections: Vec<Connection>,
}

impl World {
    pub(crate) fn new(plan: Plan, machines: [Machine; 2], rng: Rng, trace: Trace) -> World {
        World {
            rng,
            now: 0,
            pipes: Vec::new(),
            procs: Vec::new(),
            machines,
            plan,
            facts: Facts::default(),
            trace,
            happenings: BinaryHeap::new(),
            spawned: Vec::new(),
            kills: Vec::new(),
            suspend_request: 0,
            guard_told: false,
            events: Rc::default(),
            locks: [Vec::new(), Vec::new()],
            link: [None; 2],
            turns: Vec::new(),
            doors: Vec::new(),
            connections: Vec::new(),
        }
    }

    pub(crate) fn machine(&mut self, side: Side) -> &mut Machine {
        let [source, target] = &mut self.machines;
        match side {
            Side::Source => source,
            Side::Target => target,
        }
    }

    pub(crate) fn pipe(&mut self, id: PipeId) -> &mut Pipe {
        &mut self.pipes[id.0]
    }

    pub(crate) fn proc(&mut self, id: ProcId) -> &mut Proc {
        &mut self.procs[id.0]
    }

    pub(crate) fn new_pipe(&mut self, pipe: Pipe) -> PipeId {
        self.pipes.push(pipe);
        PipeId(self.pipes.len() - 1)
    }

    /// Starts a process that holds `ends`.
    pub(crate) fn spawn(&mut self, role: Role, ends: &[(PipeId, End)], body: Body) -> ProcId {
        let id = ProcId(self.procs.len());
        for (pipe, end) in ends {
            self.pipe(*pipe).open(*end);
        }
        let weight = 1 + self.rng.below(8);
        self.procs.push(Proc {
            role,
            alive: true,
            wait: only(Cond::Now),
            ends: ends.to_vec(),
            gate: None,
            terminated: false,
            requests: 0,
            operation: None,
            aborted: false,
            exited: false,
            steps: 0,
            sockets: Vec::new(),
            dies_with: None,
            doomed: false,
            weight,
        });
        self.spawned.push((id, body));
        self.trace.note(role, "starts", role as u64);
        id
    }

    /// Takes the guest's lock on a host, if nobody who has it lives.
    pub(crate) fn lock(&mut self, side: Side, id: ProcId) -> bool {
        let held = self.locks[side as usize].iter().any(|holder| self.procs[holder.0].alive);
        if held {
            self.facts.coverage.count(format!("refused: the guest is locked at the {side:?}"));
        } else {
            self.locks[side as usize] = vec![id];
        }
        !held
    }

    /// `id` inherits the guest's lock from `owner`, if that has it.
    pub(crate) fn share_lock(&mut self, side: Side, owner: ProcId, id: ProcId) {
        let holders = &mut self.locks[side as usize];
        if holders.contains(&owner) {
            holders.push(id);
        }
    }

    /// The process of that role, if it lives.
    pub(crate) fn find(&self, role: Role) -> Option<ProcId> {
        self.procs.iter().position(|proc| proc.role == role && proc.alive).map(ProcId)
    }

    /// All processes that live.
    pub(crate) fn alive(&self) -> Vec<ProcId> {
        (0..self.procs.len()).filter(|index| self.procs[*index].alive).map(ProcId).collect()
    }

    /// All processes of that role that live.
    pub(crate) fn all(&self, role: Role) -> Vec<ProcId> {
        let alive = self.alive().into_iter();
        alive.filter(|id| self.procs[id.0].role == role).collect()
    }

    pub(crate) fn at(&mut self, time: u64, happening: Happening) {
        self.happenings.push(Reverse((time, happening)));
    }

    /// From now on `id` dies with `parent`; one whose parent has died before does not.
    pub(crate) fn die_with(&mut self, id: ProcId, parent: ProcId) {
        self.procs[id.0].dies_with = Some(parent);
    }

    /// `id` closes one of its descriptors.
    pub(crate) fn close_end(&mut self, id: ProcId, end: (PipeId, End)) {
        let ends = &mut self.procs[id.0].ends;
        if let Some(at) = ends.iter().position(|held| *held == end) {
            ends.swap_remove(at);
            self.pipe(end.0).close(end.1);
            self.reset_abandoned();
        }
    }

    /// SIGKILL, and the kernel gets to it when it likes.
    pub(crate) fn doom(&mut self, id: ProcId) {
        self.procs[id.0].doomed = true;
    }

    /// SIGKILL, or a signal that a process does not handle.
    pub(crate) fn kill(&mut self, id: ProcId) {
        self.kills.push(id);
    }

    pub(crate) fn holds(&mut self, id: ProcId, cond: Cond) -> bool {
        let now = self.now;
        match cond {
            Cond::Never => false,
            Cond::Now => true,
            Cond::Readable(pipe) => self.pipe(pipe).is_readable(now),
            Cond::Writable(pipe) => self.pipe(pipe).is_writable(now),
            Cond::Hangup(pipe) => self.pipe(pipe).is_hung_up(now),
            Cond::Over(pipe) => self.pipe(pipe).is_over(now),
            Cond::At(time) => now >= time,
            Cond::Cancelled => self.proc(id).gate.as_ref().is_some_and(|g| g.is_cancelled()),
            Cond::Terminated => self.proc(id).terminated,
            Cond::Aborted => self.proc(id).aborted,
            Cond::Suspended => self.machine(Side::Source).guest().is_suspended(),
            Cond::Ended(other) => !self.proc(other).alive,
            Cond::Free(turn) => self.turns[turn].is_none_or(|holder| {
                self.plan.plant != Some(Plant::TurnKept) && !self.proc(holder).alive
            }),
            Cond::Sockets => self.is_spoken_to(id),
        }
    }

    fn can_run(&mut self, index: usize) -> bool {
        let Some(proc) = self.procs.get(index).filter(|proc| proc.alive) else { return false };
        proc.doomed || proc.wait.into_iter().any(|cond| self.holds(ProcId(index), cond))
    }

    fn is_spoken_to(&mut self, id: ProcId) -> bool {
        let now = self.now;
        let called = self.doors.iter().any(|door| door.owner == id && !door.calls.is_empty());
        called || {
            let Proc { sockets, .. } = &self.procs[id.0];
            sockets.iter().any(|pipe| self.pipes[pipe.0].is_readable(now))
        }
    }

    /// Which process goes on; `None`: none can.
    fn choose(&mut self) -> Option<ProcId> {
        let mut ready = [0_usize; 24];
        let (mut count, mut weights) = (0, 0);
        for index in 0..self.procs.len() {
            if count < ready.len() && self.can_run(index) {
                ready[count] = index;
                count += 1;
                weights += self.procs[index].weight;
            }
        }
        if count == 0 {
            return None;
        }
        let mut left = self.rng.below(weights);
        for &index in &ready[..count] {
            let weight = self.procs[index].weight;
            if left < weight {
                return Some(ProcId(index));
            }
            left -= weight;
        }
        None
    }

    /// For the reader of a run that does not end.
    fn say_who_waits(&mut self) {
        for proc in self.procs.iter().filter(|proc| proc.alive) {
            self.trace.say(|| format!("{:?} waits for {:?}", proc.role, proc.wait));
        }
    }

    /// The next moment at which something changes by itself.
    fn next_moment(&self) -> Option<u64> {
        let waits = self.procs.iter().filter(|proc| proc.alive).flat_map(|proc| proc.wait);
        let timers =
            waits.filter_map(|cond| if let Cond::At(time) = cond { Some(time) } else { None });
        let links = self.pipes.iter().flat_map(Pipe::changes);
        let happenings = self.happenings.iter().map(|Reverse((time, _))| *time);
        timers.chain(links).chain(happenings).filter(|time| *time > self.now).min()
    }

    fn will_retry(&self) -> bool {
        self.happenings.iter().any(|Reverse((_, happening))| *happening == Happening::Retry)
    }

    fn happen(&mut self) {
        while let Some(Reverse((time, happening))) = self.happenings.peek().copied() {
            if time > self.now {
                break;
            }
            self.happenings.pop();
            match happening {
                Happening::GuestSuspends(number) if number == self.suspend_request => {
                    self.machine(Side::Source).guest_suspends();
                    self.trace.note(Side::Source, "guest suspends", 0);
                }
                Happening::GuestSuspends(_) => {}
                Happening::Retry if self.facts.is_down(Side::Source) => {}
                Happening::Retry => {
                    let again: Body = Box::new(|p| sender::migrate(p, receiver::receive));
                    self.spawn(Role::Sender, &[], again);
                }
            }
        }
        if let Some(pipe) = self.pipes.iter().position(Pipe::is_due_to_be_cut) {
            self.cut_of(PipeId(pipe));
        }
    }

    /// The kernel's part of the end of a process.
    fn end(&mut self, id: ProcId, exited: bool) {
        let proc = self.proc(id);
        (proc.alive, proc.exited) = (false, exited);
        let role = proc.role;
        for (pipe, end) in std::mem::take(&mut proc.ends) {
            self.pipe(pipe).close(end);
        }
        self.reset_abandoned();
        self.doors.retain(|door| door.owner != id);
        for proc in self.procs.iter_mut().filter(|proc| proc.alive && proc.dies_with == Some(id)) {
            proc.doomed = true;
            if exited {
                self.facts.violated("a helper leaves a worker behind");
            }
        }
        self.trace.note(role, if exited { "exits" } else { "is killed" }, role as u64);
        if role == Role::Sender
            && let Some(delay) = self.plan.retry.take()
        {
            self.at(self.now + delay, Happening::Retry);
        }
    }
}

thread_local! {
    /// Whether the process that runs now got SIGTERM: the engine asks by a plain function.
    static TERMINATED: Cell<bool> = const { Cell::new(false) };
    /// The clock, for the same reason.
    static NOW: Cell<u64> = const { Cell::new(0) };
    /// Stacks of processes that have ended.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Whether the process that asks got SIGTERM.
pub(crate) fn terminated() -> bool {
    TERMINATED.get()
}

/// The clock of the process that asks, which is that of the world.
pub(crate) fn now() -> Duration {
    Duration::from_millis(NOW.get())
}

type Running = Coroutine<(), Wait, (), DefaultStack>;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// All processes have ended.
    Well,
    /// Processes wait for what never comes.
    Stuck,
    /// More steps than any run takes.
    Endless,
}

/// Runs `world` until all processes have ended, or for `steps_max` steps.
pub(crate) fn run(world: &Rc<RefCell<World>>, steps_max: u64) -> Ended {
    let mut coroutines: Vec<Option<Running>> = Vec::new();
    let mut ended = Ended::Endless;
    for _ in 0..steps_max {
        world.borrow_mut().happen();
        start(world, &mut coroutines);
        let Some(id) = world.borrow_mut().choose() else {
            let mut world = world.borrow_mut();
            let alive = world.procs.iter().any(|proc| proc.alive) || world.will_retry();
            match world.next_moment().filter(|_| alive) {
                Some(moment) => {
                    world.now = moment;
                    continue;
                }
                None => {
                    ended = if alive { Ended::Stuck } else { Ended::Well };
                    break;
                }
            }
        };
        step(world, &mut coroutines, id);
        bury(world, &mut coroutines);
    }
    if ended != Ended::Well {
        world.borrow_mut().say_who_waits();
    }
    for coroutine in coroutines.iter_mut().filter_map(Option::take) {
        retire(coroutine);
    }
    ended
}

/// Makes coroutines of the processes that were spawned.
fn start(world: &Rc<RefCell<World>>, coroutines: &mut Vec<Option<Running>>) {
    let spawned = std::mem::take(&mut world.borrow_mut().spawned);
    for (id, body) in spawned {
        let world = world.clone();
        let stack = STACKS.with_borrow_mut(Vec::pop).unwrap_or_default();
        let coroutine = Coroutine::with_stack(stack, move |switch: &Switch, ()| {
            body(&Process::new(world, id, switch));
        });
        coroutines.resize_with(id.0, || None);
        coroutines.push(Some(coroutine));
    }
}

/// Lets one process go on until it gives way.
fn step(world: &Rc<RefCell<World>>, coroutines: &mut [Option<Running>], id: ProcId) {
    {
        let mut world = world.borrow_mut();
        if world.proc(id).doomed {
            return world.kill(id);
        }
        TERMINATED.set(world.proc(id).terminated);
        // Work takes time.
        world.now += u64::from(world.rng.one_in(4));
        let (now, role) = (world.now, world.proc(id).role as u64);
        NOW.set(now);
        world.trace.tick(role, now);
    }
    let Some(coroutine) = coroutines[id.0].as_mut() else { return };
    let result = coroutine.resume(());
    let mut world = world.borrow_mut();
    match result {
        CoroutineResult::Yield(wait) => {
            let proc = world.proc(id);
            proc.wait = wait;
            proc.steps += 1;
            let (role, steps) = (proc.role, proc.steps);
            world.follow_plan(id, role, steps);
        }
        CoroutineResult::Return(()) => {
            world.end(id, true);
            if let Some(coroutine) = coroutines[id.0].take() {
                retire(coroutine);
            }
        }
    }
}

/// Unwinds the processes that were killed.
fn bury(world: &Rc<RefCell<World>>, coroutines: &mut [Option<Running>]) {
    let kills = std::mem::take(&mut world.borrow_mut().kills);
    for id in kills {
        if world.borrow_mut().proc(id).alive {
            // A process that was spawned a moment ago has no coroutine yet: it never ran.
            world.borrow_mut().spawned.retain(|(spawned, _)| *spawned != id);
            if let Some(coroutine) = coroutines.get_mut(id.0).and_then(Option::take) {
                retire(coroutine);
            }
            world.borrow_mut().end(id, false);
        }
    }
}

/// Unwinds a coroutine if it has not ended, and keeps its stack.
fn retire(mut coroutine: Running) {
    coroutine.force_unwind();
    STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
}
