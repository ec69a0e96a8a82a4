//! Does what the receiver's state machine says.
//!
//! What it is not: it decides nothing; see [`rxl_migrate::xl::handshake`].

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::handshake::{Message, Receiver, ReceiverAction, ReceiverEnd, ReceiverEvent};
use rxl_migrate::xl::header::Header;
use rxl_toolstack::libxl::config::DomainConfig;
use rxl_toolstack::lifecycle::{Lifecycle, LifecycleError};

use crate::channel::{Channel, Heard, Said, Until};
use crate::gate::Gate;
use crate::guard::{Guard, Side};
use crate::monitor;
use crate::output::Screen;

/// A domain that arrives, and all that it takes.
pub(crate) struct Arrival<'a> {
    pub(crate) host: &'a dyn Lifecycle,
    pub(crate) channel: Channel,
    pub(crate) gate: &'a Gate,
    pub(crate) screen: &'a Screen,
    /// Leave it paused.
    pub(crate) paused: bool,
    /// Print its configuration.
    pub(crate) print_config: bool,
    /// How to make what must outlive this process, or stand in for it.
    pub(crate) helpers: Helpers,
    guard: Guard,
    domain: Option<Copy>,
}

/// Processes that accompany a domain; tests do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Helpers {
    /// A guard, while the copy may not run.
    pub(crate) guard: bool,
    /// A monitor, from then on.
    pub(crate) monitor: bool,
}

/// The copy here.
struct Copy {
    domid: DomId,
    name: String,
}

/// The name of a copy that may not run yet.
pub(crate) fn incoming_name(name: &str) -> String {
    format!("{name}--incoming")
}

/// The status that says "failed" where libxl gave no code of its own (`ERROR_FAIL`).
const FAILED: u8 = 3;

impl<'a> Arrival<'a> {
    pub(crate) fn new(
        host: &'a dyn Lifecycle,
        channel: Channel,
        gate: &'a Gate,
        screen: &'a Screen,
        helpers: Helpers,
    ) -> Arrival<'a> {
        Arrival {
            host,
            channel,
            gate,
            screen,
            paused: false,
            print_config: false,
            helpers,
            guard: Guard::none(),
            domain: None,
        }
    }

    /// From the banner to the end.
    ///
    /// # Errors
    /// Only a bug: an event that the machine does not take.
    pub(crate) fn run(&mut self) -> rxl_migrate::Result<ReceiverEnd> {
        let mut machine = Receiver::new(self.paused);
        let mut action = machine.step(ReceiverEvent::Begin)?;
        loop {
            let heard;
            let event = match action {
                ReceiverAction::Finish(end) => return Ok(end),
                ReceiverAction::Receive(message) => {
                    heard = self.channel.hear(message, Until::Cancelled, || {});
                    match &heard {
                        Heard::Bytes(bytes) => ReceiverEvent::Received(bytes),
                        Heard::Lost(_) => ReceiverEvent::Lost,
                        Heard::Cancelled => ReceiverEvent::Cancelled,
                    }
                }
                ReceiverAction::Send(message) => self.send(message),
                ReceiverAction::SendReport(status) => {
                    let report = [Message::Report.text(), &[status]].concat();
                    self.write(&report, Until::TheEnd)
                }
                ReceiverAction::Create => self.create(),
                ReceiverAction::Rename => self.rename(),
                ReceiverAction::Unpause => {
                    self.on_copy("unpause", |host, copy| host.unpause(copy.domid))
                }
                ReceiverAction::Destroy => self.destroy(),
            };
            action = match machine.step(event) {
                Ok(action) => action,
                Err(bug) => {
                    self.guard.abandon();
                    return Err(bug);
                }
            };
        }
    }

    fn say(&self, text: &str) {
        self.screen.line(&format!("migration target: {text}"));
    }

    fn send(&mut self, message: Message) -> ReceiverEvent<'static> {
        let until = match message {
            Message::Banner => {
                self.say("Ready to receive domain.");
                Until::Cancelled
            }
            Message::Ready => {
                self.say("Transfer complete, requesting permission to start domain.");
                Until::Cancelled
            }
            _ => {
                self.say("Cleanup OK, granting sender permission to resume.");
                Until::TheEnd
            }
        };
        self.write(message.text(), until)
    }

    fn write(&mut self, bytes: &[u8], until: Until) -> ReceiverEvent<'static> {
        match self.channel.say(bytes, until) {
            Said::Done => ReceiverEvent::Done,
            Said::Cancelled => ReceiverEvent::Cancelled,
            Said::Failed(error) => {
                self.screen.line(&format!("rxl: writing to the sender: {error}"));
                ReceiverEvent::Failed(FAILED)
            }
        }
    }

    fn create(&mut self) -> ReceiverEvent<'static> {
        match self.receive() {
            Ok(()) => ReceiverEvent::Done,
            Err(_) if self.gate.is_cancelled() => ReceiverEvent::Cancelled,
            Err(error) => {
                let code = error.downcast_ref().map_or(FAILED, code_of);
                self.screen.line(&format!("rxl: {error:#}"));
                self.say(&format!("Domain creation failed (code -{code})."));
                ReceiverEvent::Failed(code)
            }
        }
    }

    /// Header, room, stream: a paused copy.
    fn receive(&mut self) -> anyhow::Result<()> {
        let header = Header::read_from(&mut &self.channel)?;
        let (mandatory, optional, length) = header.info;
        self.screen.line(&format!(
            "Loading new save file <incoming migration stream> \
             (new xl fmt info {mandatory:#x}/{optional:#x}/{length})\n \
             Savefile contains xl domain config in JSON format\n\
             Parsing config from <saved>"
        ));
        let mut config = DomainConfig::parse(&header.config)?;
        let name = config.name().unwrap_or_default().to_owned();
        anyhow::ensure!(!name.is_empty(), "the domain's configuration has no name");
        let incoming = incoming_name(&name);
        let own = config.to_json();
        config.set_name(&incoming);
        let config = config.to_json();
        if self.print_config {
            self.screen.line(&config);
        }
        // Before the guard, which would destroy it.
        anyhow::ensure!(
            self.host.resolve(&incoming).is_err(),
            "a domain {incoming} is on this host already: another migration, or its remains"
        );
        self.host.reserve_memory(&config)?;
        if self.helpers.guard {
            self.guard = Guard::start(Side::Target, &incoming, None, self.screen);
        }
        let domid = self.host.restore(&config, self.channel.input())?;
        self.domain = Some(Copy { domid, name });
        if self.helpers.monitor
            && let Err(error) = monitor::start(domid, &incoming, &own)
        {
            self.screen.line(&format!(
                "rxl: no monitor for {incoming}: {error:#}; nobody acts when the guest reboots \
                 or ends"
            ));
        }
        Ok(())
    }

    fn rename(&mut self) -> ReceiverEvent<'static> {
        if !self.gate.commit() {
            return ReceiverEvent::Cancelled;
        }
        self.guard.stand_down();
        self.say("Got permission, starting domain.");
        self.on_copy("rename", |host, copy| {
            host.rename(copy.domid, &incoming_name(&copy.name), &copy.name)
        })
    }

    fn destroy(&mut self) -> ReceiverEvent<'static> {
        self.say("Failure, destroying our copy.");
        let event = self.on_copy("destroy", |host, copy| host.destroy(copy.domid));
        if let ReceiverEvent::Failed(code) = event {
            self.say(&format!("Failed to destroy our copy (code -{code})."));
        }
        event
    }

    /// A request about the copy.
    fn on_copy(
        &self,
        what: &str,
        request: impl FnOnce(&dyn Lifecycle, &Copy) -> Result<(), LifecycleError>,
    ) -> ReceiverEvent<'static> {
        let Some(copy) = &self.domain else { return ReceiverEvent::Failed(FAILED) };
        match request(self.host, copy) {
            Ok(()) => ReceiverEvent::Done,
            Err(error) => {
                self.screen.line(&format!("rxl: {what}: {error}"));
                ReceiverEvent::Failed(code_of(&error))
            }
        }
    }
}

/// libxl's code without its sign, as it goes over the wire; never 0.
fn code_of(error: &LifecycleError) -> u8 {
    u8::try_from(error.rc.unsigned_abs()).ok().filter(|c| *c != 0).unwrap_or(FAILED)
}
