//! `rxl migrate` at the source, and its guard: the product's driver with its hands on the modelled
//! host.

use std::io;
use std::rc::Rc;

use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::SourceDomain;
use rxl_migrate::xl::channel::{self, Direction, Ends, Heard, Ready, Said, Until};
use rxl_migrate::xl::departure::{self, Departing};
use rxl_migrate::xl::guard::{self, Duty};
use rxl_migrate::xl::handshake::{Message, SenderEnd};
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::leaving::Leaving;
use rxl_migrate::xl::{Gate, away_name};

use crate::libxl;
use crate::machine::NAME;
use crate::pipe::{End, Pipe, PipeId};
use crate::plan::Landmark;
use crate::plant::Plant;
use crate::process::{File, Process};
use crate::ssh::{self, Kind};
use crate::world::{Cond, ProcId, Role, Side};

/// After so long without a word the user is told what is being waited for.
const SILENCE: u64 = 60_000;
/// How long the transport may take to end.
const GRACE: u64 = 2_000;
/// What a pipe between two processes holds.
const PIPE_BYTES: usize = 4096;

/// A control process's two descriptors to the other end.
pub(crate) struct Channel<'a, 'b> {
    pub(crate) process: &'a Process<'b>,
    pub(crate) input: PipeId,
    pub(crate) output: PipeId,
}

impl Ends for Channel<'_, '_> {
    fn wait(&self, direction: Direction, until: Until) -> io::Result<Ready> {
        let ready = match direction {
            Direction::Read => Cond::Readable(self.input),
            Direction::Write => Cond::Writable(self.output),
        };
        let cancelled = match until {
            Until::Cancelled => Cond::Cancelled,
            Until::TheEnd => Cond::Never,
        };
        let silence = Cond::At(self.process.world().now + SILENCE);
        self.process.wait([ready, cancelled, silence, Cond::Never]);
        Ok(if self.process.holds(cancelled) {
            Ready::Cancelled
        } else if self.process.holds(ready) {
            Ready::Now
        } else {
            Ready::Silence
        })
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.process.read(self.input, into)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.process.write(self.output, bytes)
    }
}

/// A guard and its owner's end of the pipe.
pub(crate) struct Guard {
    pipe: PipeId,
    process: ProcId,
}

impl Guard {
    pub(crate) fn start(
        owner: &Process<'_>,
        role: Role,
        body: impl FnOnce(&Process<'_>) + 'static,
    ) -> Guard {
        let pipe = owner.world().new_pipe(Pipe::new(PIPE_BYTES));
        owner.open(pipe, End::Write);
        let deaf = owner.world().plan.plant == Some(Plant::GuardIsDeaf);
        let body = move |p: &Process<'_>| {
            let mut input = File { process: p, pipe };
            while deaf && guard::duty(&mut input) == Duty::Nothing {}
            if guard::duty(&mut input) == Duty::Act {
                p.world().facts.coverage.count(format!("{role:?} acts"));
                body(p);
            }
        };
        let mut world = owner.world();
        if role == Role::SourceGuard {
            // What was said to the lock of an earlier migration went with it.
            world.guard_told = false;
        }
        let process = world.spawn(role, &[(pipe, End::Read)], Box::new(body));
        world.share_lock(role.side(), owner.id(), process);
        Guard { pipe, process }
    }

    pub(crate) fn stand_down(&self, owner: &Process<'_>) {
        let _ = owner.write(self.pipe, guard::STAND_DOWN);
    }

    pub(crate) fn abandon(&self, owner: &Process<'_>) {
        owner.close(self.pipe, End::Write);
    }

    /// Over, and nothing is left to put right.
    pub(crate) fn finish(self, owner: &Process<'_>) {
        let _ = owner.write(self.pipe, guard::OVER);
        owner.close(self.pipe, End::Write);
        owner.wait([Cond::Ended(self.process), Cond::Never, Cond::Never, Cond::Never]);
    }
}

/// The sender's guard.
fn keep(process: &Process<'_>, id: DomId) {
    process.step();
    let limit = process.world().now + guard_limit();
    let asked = process.world().guard_told;
    if !asked {
        process.world().facts.coverage.count("the guard knows that nobody asked the guest");
    }
    let kept = guard::keep(&mut Keeper { process, id, limit }, asked);
    process.world().trace.note(kept, "is what the guard comes to", 0);
}

/// A guest that was asked to suspend follows within libxl's limit, or never.
fn guard_limit() -> u64 {
    65_000
}

const POLL: u64 = 500;

struct Keeper<'a, 'b> {
    process: &'a Process<'b>,
    id: DomId,
    limit: u64,
}

impl guard::Keeper for Keeper<'_, '_> {
    type Error = u8;

    fn is_suspended(&mut self) -> Result<bool, u8> {
        self.process.step();
        is_suspended(self.process, self.id)
    }

    fn wait(&mut self) -> bool {
        let on = self.process.world().now < self.limit;
        if on {
            self.process.sleep(POLL);
        }
        on
    }

    fn log_dirty_off(&mut self) {
        self.process.step();
        log_dirty_off(self.process);
    }

    fn speed_up(&mut self) {
        self.process.step();
        speed_up(self.process);
    }

    fn restore_name(&mut self) -> Result<(), u8> {
        self.process.step();
        let away = away_name(NAME);
        let has = {
            let mut world = self.process.world();
            let entry = world.machine(Side::Source).domains.get(&self.id.0);
            entry.is_some_and(|entry| entry.name == away)
        };
        if !has {
            return Ok(());
        }
        self.process.step();
        self.process.world().rename(Side::Source, self.id, &away, NAME)
    }

    fn resume(&mut self) -> Result<(), u8> {
        self.process.step();
        self.process.world().resume(Side::Source, self.id)
    }
}

fn is_suspended(process: &Process<'_>, id: DomId) -> Result<bool, u8> {
    let mut world = process.world();
    world.state_is_known(Side::Source)?;
    let entry = world.machine(Side::Source).domains.get(&id.0);
    Ok(entry.is_some_and(|entry| entry.domain.is_suspended()))
}

fn log_dirty_off(process: &Process<'_>) {
    let guest = process.world().machine(Side::Source).guest().clone();
    let _ = guest.log_dirty_off();
}

/// What it had before, as rxl reads it when it begins.
fn speed_up(process: &Process<'_>) {
    let plant = process.world().plan.plant;
    let cap = process.world().plan.cpu_cap;
    if plant != Some(Plant::SlowForEver) {
        let guest = process.world().machine(Side::Source).guest().clone();
        let _ = guest.set_cpu_cap(cap);
    }
}

/// The sender.
struct Departure<'a, 'b> {
    process: &'a Process<'b>,
    channel: Channel<'a, 'b>,
    gate: Rc<Gate>,
    id: DomId,
    header: Header,
    guard: Option<Guard>,
    plant: Option<Plant>,
}

/// `rxl migrate NAME TARGET`. `far` is what runs at the target.
pub(crate) fn migrate(
    process: &Process<'_>,
    far: impl FnOnce(&Process<'_>, PipeId, PipeId) + 'static,
) {
    process.step();
    let Some(id) = find_guest(process) else { return };
    let config = process.world().plan.config();
    let Ok(header) = Header::new(&config) else { return };
    let gate = Rc::new(Gate::new());
    {
        let mut world = process.world();
        world.proc(process.id()).gate = Some(gate.clone());
    }
    let guard = Guard::start(process, Role::SourceGuard, move |p| keep(p, id));
    process.step();
    let (input, output, transport) = start_transport(process, far);
    process.world().events = Rc::default();
    let plant = process.world().plan.plant;
    let channel = Channel { process, input, output };
    let gate_of_mine = gate.clone();
    let mut departure = Departure { process, channel, gate, id, header, guard: Some(guard), plant };
    let end = departure::run(&mut departure);
    {
        let mut world = process.world();
        match &end {
            Ok(end) => {
                world.trace.say(|| format!("the sender ends: {end:?}"));
                world.facts.sender_end = Some(*end);
            }
            Err(bug) => world.facts.violated(&format!("the sender: {bug}")),
        }
    }
    if plant == Some(Plant::SenderResumesAfterGo) && matches!(end, Ok(SenderEnd::Uncertain(_))) {
        process.step();
        let _ = process.world().resume(Side::Source, id);
    }
    process.close(input, End::Read);
    process.close(output, End::Write);
    let wait = if gate_of_mine.is_cancelled() { 0 } else { GRACE };
    let until = Cond::At(process.world().now + wait);
    process.wait([Cond::Ended(transport), until, Cond::Never, Cond::Never]);
    if !process.holds(Cond::Ended(transport)) {
        process.world().kill(transport);
        process.wait([Cond::Ended(transport), Cond::Never, Cond::Never, Cond::Never]);
    }
    let events = process.world().events.clone();
    let late = end.is_ok_and(|end| departure::may_suspend_yet(end, &*events.borrow()))
        && plant != Some(Plant::GuardLeavesEarly);
    match departure.guard.take() {
        Some(guard) if late => guard.abandon(process),
        Some(guard) => guard.finish(process),
        None => {}
    }
}

/// The guest, if it is there under its name and not suspended.
fn find_guest(process: &Process<'_>) -> Option<DomId> {
    let mut world = process.world();
    let id = world.machine(Side::Source).find(NAME)?;
    if world.plan.plant != Some(Plant::LockIgnored) && !world.lock(Side::Source, process.id()) {
        return None;
    }
    if world.machine(Side::Source).guest().is_suspended() {
        world.facts.coverage.count("refused: the guest is suspended");
        return None;
    }
    world.facts.begin();
    Some(id)
}

/// Starts ssh, and what it starts at the target: what it says, and where to write to it.
pub(crate) fn start_transport(
    process: &Process<'_>,
    far: impl FnOnce(&Process<'_>, PipeId, PipeId) + 'static,
) -> (PipeId, PipeId, ProcId) {
    let (input, output, transport) = {
        let mut world = process.world();
        let world = &mut *world;
        let bytes = world.plan.pipe_bytes;
        let pipe = |world: &mut crate::world::World| world.new_pipe(Pipe::new(bytes));
        let (output, input) = (pipe(world), pipe(world));
        let (stdin, stdout) = (pipe(world), pipe(world));
        let (there, back) = world.plan.links();
        let (there, back) = (world.new_pipe(there), world.new_pipe(back));
        world.link = [Some(there), Some(back)];
        let ssh =
            [(output, End::Read), (input, End::Write), (there, End::Write), (back, End::Read)];
        let client = Box::new(move |p: &Process<'_>| {
            ssh::relay(p, Kind::Client, output, there, back, input);
        });
        let transport = world.spawn(Role::Ssh, &ssh, client);
        let sshd =
            [(stdout, End::Read), (stdin, End::Write), (there, End::Read), (back, End::Write)];
        let server = Box::new(move |p: &Process<'_>| {
            ssh::relay(p, Kind::Server, stdout, back, there, stdin);
        });
        world.spawn(Role::Sshd, &sshd, server);
        let ends = [(stdin, End::Read), (stdout, End::Write)];
        world.spawn(Role::Receiver, &ends, Box::new(move |p| far(p, stdin, stdout)));
        (input, output, transport)
    };
    process.open(input, End::Read);
    process.open(output, End::Write);
    (input, output, transport)
}

impl Departure<'_, '_> {
    fn request(&self, request: impl FnOnce(&mut crate::world::World) -> Result<(), u8>) -> bool {
        self.process.step();
        request(&mut self.process.world()).is_ok()
    }
}

impl Leaving for Departure<'_, '_> {
    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn write_header(&mut self) -> Said {
        channel::say(&self.channel, &self.header.to_bytes(), Until::Cancelled)
    }

    fn save(&mut self) -> bool {
        let verify = self.process.world().plan.verify;
        libxl::save(self.process, self.channel.output, verify).is_ok()
    }

    fn log_dirty_off(&mut self) {
        self.process.step();
        log_dirty_off(self.process);
    }

    fn speed_up(&mut self) {
        self.process.step();
        speed_up(self.process);
    }

    fn is_suspended(&mut self) -> Option<bool> {
        self.process.step();
        is_suspended(self.process, self.id).ok()
    }

    fn stand_down(&mut self) {
        if self.plant == Some(Plant::GuardStandsDownLate) {
            return;
        }
        if let Some(guard) = &self.guard {
            guard.stand_down(self.process);
        }
    }

    fn destroy(&mut self) -> bool {
        let id = self.id;
        self.request(|world| world.destroy(Side::Source, id))
    }

    fn resume(&mut self) -> bool {
        let id = self.id;
        self.request(|world| world.resume(Side::Source, id))
    }
}

impl Departing for Departure<'_, '_> {
    fn hear(&mut self, message: Message, until: Until) -> Heard {
        let mut heard = channel::hear(&self.channel, message, until, || {});
        if let Heard::Bytes(bytes) = &mut heard {
            if message == Message::Report {
                self.process.world().landmark(Landmark::ReportHeard);
            }
            if message == Message::Report
                && self.plant == Some(Plant::ReportIgnored)
                && let Some(status) = bytes.last_mut()
            {
                *status = 0;
            }
            if message == Message::Destroyed && bytes == message.text() {
                self.process.world().facts.given_back = true;
            }
        }
        heard
    }

    fn rename_away(&mut self) -> bool {
        let id = self.id;
        self.request(|world| world.rename(Side::Source, id, NAME, &away_name(NAME)))
    }

    fn abandon(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.abandon(self.process);
        }
    }

    fn write_go(&mut self) -> bool {
        {
            let mut world = self.process.world();
            world.facts.go_tried = true;
            world.landmark(Landmark::GoTried);
        }
        let said = channel::say(&self.channel, Message::Go.text(), Until::TheEnd);
        if let Some(guard) = self.guard.as_ref().filter(|_| self.plant.is_some()) {
            guard.stand_down(self.process);
        }
        matches!(said, Said::Done)
    }

    fn rename_back(&mut self) -> bool {
        let id = self.id;
        self.request(|world| world.rename(Side::Source, id, &away_name(NAME), NAME))
    }
}
