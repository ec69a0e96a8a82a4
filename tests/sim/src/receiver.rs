//! `rxl migrate-receive` at the target, and its guard: the product's driver with its hands on the
//! modelled host.

use std::rc::Rc;

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::arrival::{self, Arriving};
use rxl_migrate::xl::channel::{self, Cancellable, Heard, Said, Until};
use rxl_migrate::xl::handshake::Message;
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::making::{Done, FAILED, Making};
use rxl_migrate::xl::{Gate, guard, incoming_name};
use serde_json::Value;

use crate::libxl::{self, Shape};
use crate::machine::FAIL;
use crate::pipe::PipeId;
use crate::plan::Landmark;
use crate::plant::Plant;
use crate::process::Process;
use crate::sender::{Channel, Guard};
use crate::world::{Role, Side, World};

/// The receiver.
struct Arrival<'a, 'b> {
    process: &'a Process<'b>,
    channel: Channel<'a, 'b>,
    gate: Rc<Gate>,
    name: String,
    shape: Option<Shape>,
    guard: Option<Guard>,
    copy: Option<DomId>,
    plant: Option<Plant>,
}

/// `rxl migrate-receive`.
pub(crate) fn receive(process: &Process<'_>, input: PipeId, output: PipeId) {
    let gate = Rc::new(Gate::new());
    let (plant, attempt) = {
        let mut world = process.world();
        world.proc(process.id()).gate = Some(gate.clone());
        (world.plan.plant, world.facts.attempt)
    };
    let channel = Channel { process, input, output };
    let mut arrival = Arrival {
        process,
        channel,
        gate,
        name: String::new(),
        shape: None,
        guard: None,
        copy: None,
        plant,
    };
    let end = arrival::run(&mut arrival);
    {
        let mut world = process.world();
        match end {
            Ok(end) => {
                world.trace.say(|| format!("the receiver ends: {end:?}"));
                if world.facts.attempt == attempt {
                    world.facts.receiver_end = Some(end);
                }
            }
            Err(bug) => world.facts.violated(&format!("the receiver: {bug}")),
        }
    }
    if let Some(guard) = arrival.guard.take() {
        guard.finish(process);
    }
}

/// The receiver's guard.
fn clear(process: &Process<'_>, incoming: &str) {
    process.step();
    let find = || {
        let found = process.world().machine(Side::Target).find(incoming);
        process.step();
        found
    };
    let cleared = guard::clear(find, |id| process.world().destroy(Side::Target, id));
    process.world().trace.note(cleared, "is what the guard comes to", 0);
}

impl Arrival<'_, '_> {
    fn request(&self, request: impl FnOnce(&mut World, DomId) -> Done) -> Done {
        let copy = self.copy.ok_or(FAILED)?;
        self.process.step();
        request(&mut self.process.world(), copy)
    }
}

/// What a configuration says of a domain's size.
fn shape(config: &str) -> Option<(String, Shape)> {
    let config: Value = serde_json::from_str(config).ok()?;
    let name = config.get("c_info")?.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let build = config.get("b_info")?;
    let shape = Shape {
        hvm: config.get("c_info")?.get("type")?.as_str()? != "pv",
        pages: build.get("max_pages")?.as_u64()?,
        vcpus: u32::try_from(build.get("max_vcpus")?.as_u64()?).ok()?.clamp(1, 128),
    };
    Some((name.to_owned(), shape))
}

impl Making for Arrival<'_, '_> {
    type Error = u8;

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn stays_paused(&self) -> bool {
        self.process.world().plan.stays_paused
    }

    fn read_header(&mut self) -> Result<(), u8> {
        let header = Header::read_from(&mut Cancellable(&self.channel)).map_err(|_| FAIL)?;
        let (name, shape) = shape(&header.config).ok_or(FAIL)?;
        (self.name, self.shape) = (name, Some(shape));
        Ok(())
    }

    fn claim_name(&mut self) -> Result<(), u8> {
        self.process.step();
        let mut world = self.process.world();
        let ignored = world.plan.plant == Some(Plant::LockIgnored);
        if ignored || world.lock(Side::Target, self.process.id()) { Ok(()) } else { Err(FAIL) }
    }

    fn check_name(&mut self) -> Result<(), u8> {
        self.process.step();
        let taken = self.process.world().machine(Side::Target).find(&incoming_name(&self.name));
        taken.map_or(Ok(()), |_| Err(FAIL))
    }

    fn reserve_memory(&mut self) -> Result<(), u8> {
        self.process.step();
        self.process.world().reserve_memory(Side::Target)
    }

    fn start_guard(&mut self) {
        let incoming = incoming_name(&self.name);
        self.guard =
            Some(Guard::start(self.process, Role::TargetGuard, move |p| clear(p, &incoming)));
        self.process.step();
    }

    fn restore(&mut self) -> Result<(), u8> {
        let shape = self.shape.ok_or(FAIL)?;
        let incoming = incoming_name(&self.name);
        self.copy = Some(libxl::restore(self.process, self.channel.input, &incoming, shape)?);
        if self.plant == Some(Plant::ReceiverUnpausesBeforeGo) {
            return self.request(|world, copy| world.unpause(Side::Target, copy));
        }
        Ok(())
    }

    fn start_monitor(&mut self) {}

    fn stand_down(&mut self) {
        if let Some(guard) = &self.guard {
            guard.stand_down(self.process);
        }
    }

    fn rename(&mut self) -> Done {
        let (incoming, name) = (incoming_name(&self.name), &self.name);
        self.request(|world, copy| world.rename(Side::Target, copy, &incoming, name))
    }

    fn unpause(&mut self) -> Done {
        self.request(|world, copy| world.unpause(Side::Target, copy))
    }

    fn destroy(&mut self) -> Done {
        if self.plant == Some(Plant::CopyKept) {
            return Ok(());
        }
        self.request(|world, copy| world.destroy(Side::Target, copy))
    }
}

impl Arriving for Arrival<'_, '_> {
    fn hear(&mut self, message: Message) -> Heard {
        let heard = channel::hear(&self.channel, message, Until::Cancelled, || {});
        if let Heard::Bytes(bytes) = &heard {
            let go = bytes == Message::Go.text();
            let mut world = self.process.world();
            world.landmark(Landmark::GoHeard);
            world.facts.go_heard |= go;
        }
        heard
    }

    fn say(&mut self, message: Message, status: Option<u8>, until: Until) -> Said {
        let bytes = [message.text(), status.as_slice()].concat();
        let landmark = match message {
            Message::Ready => Some(Landmark::ReadySaid),
            Message::Report => Some(Landmark::ReportSaid),
            _ => None,
        };
        if let Some(landmark) = landmark {
            self.process.world().landmark(landmark);
        }
        channel::say(&self.channel, &bytes, until)
    }

    fn not_created(&mut self, error: u8) -> u8 {
        error
    }

    fn abandon(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.abandon(self.process);
        }
    }
}
