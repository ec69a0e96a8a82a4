//! libxl, as the control plane uses it: saving through a helper, restoring through one, and the
//! guest's suspension.
//!
//! It is modelled on what libxl does and not more: the libxl stream around the helper's part, the
//! helper's protocol (the product's own messages), who is told what when somebody asks for the
//! end, and that a failed restore destroys its domain.

use std::io::Read;

use rxl_migrate::frame::DomId;
use rxl_migrate::helper::Message;
use rxl_migrate::source::Verify;
use rxl_migrate::target::Outcome;

use crate::helper;
use crate::machine::{ABORTED, FAIL};
use crate::pipe::{End, Pipe, PipeId};
use crate::plan::{Landmark, Suspension};
use crate::plant::Plant;
use crate::process::{File, Process};
use crate::world::{Cond, Happening, ProcId, Role, Side, only};

/// The stream's header and its first record, after which the helper writes.
pub(crate) const HEAD: [u8; 24] = *b"LibxlFmt\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0";
/// The record at the end.
pub(crate) const END: [u8; 8] = [0; 8];

/// How long libxl waits for a guest to follow the request to suspend.
const SUSPEND_LIMIT: u64 = 60_000;
/// What a pipe between two processes holds.
const PIPE_BYTES: usize = 4096;

/// What a domain takes at the target, from its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) hvm: bool,
    pub(crate) pages: u64,
    pub(crate) vcpus: u32,
}

/// A helper and libxl's ends of its pipes.
struct Helper {
    process: ProcId,
    messages: PipeId,
    replies: PipeId,
}

/// Runs `operation` as one that signals can end; libxl's code on failure.
fn run<T>(process: &Process<'_>, operation: impl FnOnce() -> Result<T, u8>) -> Result<T, u8> {
    let cancelled = {
        let mut world = process.world();
        let proc = world.proc(process.id());
        proc.operation = Some(None);
        proc.requests > 0
    };
    let result = if cancelled { Err(ABORTED) } else { operation() };
    let mut world = process.world();
    let proc = world.proc(process.id());
    let asked = std::mem::take(&mut proc.requests) > 0;
    (proc.operation, proc.aborted) = (None, false);
    result.map_err(|code| if asked { ABORTED } else { code })
}

/// Starts a helper for a stream of which it holds `end`.
fn start(
    process: &Process<'_>,
    role: Role,
    stream: (PipeId, End),
    body: impl FnOnce(&Process<'_>, PipeId, PipeId) + 'static,
) -> Helper {
    process.step();
    let (messages, replies) = {
        let mut world = process.world();
        (world.new_pipe(Pipe::new(PIPE_BYTES)), world.new_pipe(Pipe::new(PIPE_BYTES)))
    };
    process.open(messages, End::Read);
    process.open(replies, End::Write);
    let ends = [(messages, End::Write), (replies, End::Read), stream];
    let mut world = process.world();
    let helper = world.spawn(role, &ends, Box::new(move |p| body(p, replies, messages)));
    if role == Role::SaveHelper {
        world.share_lock(Side::Source, process.id(), helper);
    }
    let proc = world.proc(process.id());
    proc.operation = Some(Some(helper));
    if proc.requests > 0 {
        world.terminate(helper);
    }
    Helper { process: helper, messages, replies }
}

impl Helper {
    fn hear(&self, process: &Process<'_>) -> Option<Message> {
        Message::read_from(&mut File { process, pipe: self.messages }).ok().flatten()
    }

    fn answer(&self, process: &Process<'_>, code: i32) {
        let mut bytes = &code.to_ne_bytes()[..];
        while !bytes.is_empty() {
            match process.write(self.replies, bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(_) => return,
            }
        }
    }

    /// Waits for its end; whether it exited.
    fn reap(self, process: &Process<'_>) -> bool {
        process.close(self.messages, End::Read);
        process.close(self.replies, End::Write);
        process.wait(only(Cond::Ended(self.process)));
        process.world().proc(self.process).exited
    }
}

/// Writes the stream of the guest to `out`.
pub(crate) fn save(process: &Process<'_>, out: PipeId, verify: Verify) -> Result<(), u8> {
    if !process.world().pipe(out).is_open(End::Read) {
        return Err(FAIL);
    }
    run(process, || {
        write_all(process, out, &HEAD)?;
        let domain = process.world().machine(Side::Source).guest().clone();
        let helper =
            start(process, Role::SaveHelper, (out, End::Write), move |p, replies, messages| {
                helper::save(p, domain, out, replies, messages, verify);
            });
        let mut complete = None;
        while let Some(message) = helper.hear(process) {
            match message {
                Message::Suspend => {
                    let suspended = suspend(process);
                    helper.answer(process, i32::from(suspended));
                }
                Message::SwitchQemuLogdirty { enable, .. } => {
                    process.step();
                    let guest = process.world().machine(Side::Source).guest().clone();
                    guest.set_qemu_log_dirty(enable && process.world().plan.device_model);
                    helper.answer(process, 0);
                }
                Message::Complete { retval, .. } => {
                    complete = Some(retval);
                    helper.answer(process, 0);
                    break;
                }
                _ => {}
            }
        }
        let exited = helper.reap(process);
        if complete != Some(0) || !exited {
            return Err(FAIL);
        }
        write_all(process, out, &END)
    })
}

fn write_all(process: &Process<'_>, out: PipeId, bytes: &[u8]) -> Result<(), u8> {
    let mut left = bytes;
    while !left.is_empty() {
        match process.try_write(out, left) {
            Some(Ok(n)) => left = &left[n..],
            Some(Err(_)) => return Err(FAIL),
            None if process.holds(Cond::Aborted) => return Err(ABORTED),
            None => {
                process.wait([Cond::Writable(out), Cond::Aborted, Cond::Never, Cond::Never]);
            }
        }
    }
    Ok(())
}

/// Asks the guest to suspend and waits until it has.
fn suspend(process: &Process<'_>) -> bool {
    process.step();
    let limit = {
        let mut world = process.world();
        world.suspend_request += 1;
        let (now, number) = (world.now, world.suspend_request);
        if let Suspension::After(time) = world.plan.suspension {
            world.at(now + time, Happening::GuestSuspends(number));
        }
        world.landmark(Landmark::SuspendAsked);
        now + SUSPEND_LIMIT
    };
    process.wait([Cond::Suspended, Cond::At(limit), Cond::Aborted, Cond::Never]);
    let mut world = process.world();
    let suspended = world.machine(Side::Source).guest().is_suspended();
    if !suspended {
        // A guest that has taken note of the request may follow it yet; else it is taken back.
        if world.plan.acknowledges {
            world.facts.suspension_given_up = true;
        } else {
            world.suspend_request += 1;
        }
    }
    suspended
}

/// Makes a paused domain called `name` from the stream on `input`.
pub(crate) fn restore(
    process: &Process<'_>,
    input: PipeId,
    name: &str,
    shape: Shape,
) -> Result<DomId, u8> {
    let side = Side::Target;
    look_at_start(process, input)?;
    run(process, || {
        let mut head = HEAD;
        File { process, pipe: input }.read_exact(&mut head).map_err(|_| FAIL)?;
        process.step();
        let (domain, id) = {
            let mut world = process.world();
            let machine = world.machine(side);
            if machine.find(name).is_some() {
                return Err(FAIL);
            }
            let domain = machine.host.create(shape.hvm, shape.pages, shape.vcpus);
            machine.enter(domain.clone(), name);
            world.trace.note(side, "makes the domain", 0);
            let id = rxl_migrate::hypervisor::Domain::domid(&domain);
            (domain, id)
        };
        match receive(process, input, domain) {
            Ok(outcome) => {
                let mut world = process.world();
                if let Some(entry) = world.machine(side).domains.get_mut(&id.0) {
                    entry.restored = Some(outcome);
                }
                Ok(id)
            }
            Err(_) if process.world().plan.plant == Some(Plant::FailedRestoreIgnored) => {
                let _ = File { process, pipe: input }.read_exact(&mut [0; END.len()]);
                Ok(id)
            }
            Err(code) => {
                process.step();
                let mut world = process.world();
                world.trace.note(side, "destroys the failed domain", 0);
                if let Some(entry) = world.machine(side).domains.remove(&id.0) {
                    entry.domain.destroy();
                }
                Err(code)
            }
        }
    })
}

/// What rxl does before libxl sees the stream: waits for a start that is one.
fn look_at_start(process: &Process<'_>, input: PipeId) -> Result<(), u8> {
    loop {
        let mut start = [0; HEAD.len()];
        let (there, ended) = {
            let mut world = process.world();
            let now = world.now;
            let there = world.pipe(input).peek(&mut start, now);
            (there, !world.pipe(input).is_open(End::Write))
        };
        if there == HEAD.len() {
            return if start == HEAD { Ok(()) } else { Err(FAIL) };
        }
        if ended {
            return Err(FAIL);
        }
        // What was cancelled ends when the operation begins.
        if process.world().proc(process.id()).requests > 0 {
            return Ok(());
        }
        process.sleep(20);
    }
}

fn receive(
    process: &Process<'_>,
    input: PipeId,
    domain: rxl_migrate::fake::FakeDomain,
) -> Result<Outcome, u8> {
    let helper =
        start(process, Role::RestoreHelper, (input, End::Read), move |p, replies, messages| {
            helper::restore(p, domain, input, replies, messages);
        });
    let (mut complete, mut outcome) = (None, None);
    while let Some(message) = helper.hear(process) {
        match message {
            Message::StaticDataDone { .. } => helper.answer(process, 0),
            Message::RestoreResults { store, console } => {
                outcome = Some(Outcome { store_frame: store, console_frame: console });
            }
            Message::Complete { retval, .. } => {
                complete = Some(retval);
                helper.answer(process, 0);
                break;
            }
            _ => {}
        }
    }
    let exited = helper.reap(process);
    if complete != Some(0) || !exited {
        return Err(FAIL);
    }
    let mut end = [0xff; END.len()];
    File { process, pipe: input }.read_exact(&mut end).map_err(|_| FAIL)?;
    if end != END {
        return Err(FAIL);
    }
    outcome.ok_or(FAIL)
}
