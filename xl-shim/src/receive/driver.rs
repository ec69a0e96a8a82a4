//! What the receiver does to this host, the channel and the screen.
//!
//! What it is not: it decides nothing; see [`rxl_migrate::xl::arrival`].

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::arrival::{self, Arriving, Done, FAILED};
use rxl_migrate::xl::channel::{Cancellable, Heard, Said, Until};
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::handshake::{Message, ReceiverEnd};
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::{self, incoming_name};
use rxl_toolstack::lifecycle::{Lifecycle, LifecycleError};

use crate::channel::Channel;
use crate::gate::Gate;
use crate::guard::{Guard, Side};
use crate::lock::Lock;
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
    lock: Option<Lock>,
    expected: Expected,
    copy: Option<DomId>,
}

/// Processes that accompany a domain; tests do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Helpers {
    /// A guard, while the copy may not run.
    pub(crate) guard: bool,
    /// A monitor, from then on.
    pub(crate) monitor: bool,
}

/// What the header says of the domain.
#[derive(Default)]
struct Expected {
    name: String,
    /// The configuration as it came, for the monitor.
    own: String,
    /// The same under the name of a copy that may not run yet.
    config: String,
}

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
            lock: None,
            expected: Expected::default(),
            copy: None,
        }
    }

    /// From the banner to the end.
    ///
    /// # Errors
    /// Only a bug: an event that the machine does not take.
    pub(crate) fn run(&mut self) -> rxl_migrate::Result<ReceiverEnd> {
        arrival::run(self)
    }

    fn tell(&self, text: &str) {
        self.screen.line(&format!("migration target: {text}"));
    }

    /// The name of the copy until it may run.
    fn incoming(&self) -> String {
        incoming_name(&self.expected.name)
    }

    /// A request about the copy.
    fn on_copy(
        &self,
        what: &str,
        request: impl FnOnce(&dyn Lifecycle, DomId) -> Result<(), LifecycleError>,
    ) -> Done {
        let copy = self.copy.ok_or(FAILED)?;
        request(self.host, copy).map_err(|error| {
            self.screen.line(&format!("rxl: {what}: {error}"));
            code_of(&error)
        })
    }
}

impl Arriving for Arrival<'_> {
    type Error = anyhow::Error;

    fn gate(&self) -> &xl::Gate {
        self.gate.gate()
    }

    fn stays_paused(&self) -> bool {
        self.paused
    }

    fn hear(&mut self, message: Message) -> Heard {
        self.channel.hear(message, Until::Cancelled, || {})
    }

    fn say(&mut self, message: Message, status: Option<u8>, until: Until) -> Said {
        match message {
            Message::Banner => self.tell("Ready to receive domain."),
            Message::Ready => {
                self.tell("Transfer complete, requesting permission to start domain.");
            }
            Message::Destroyed => self.tell("Cleanup OK, granting sender permission to resume."),
            Message::Report | Message::Go => {}
        }
        let bytes = [message.text(), status.as_slice()].concat();
        let said = self.channel.say(&bytes, until);
        if let Said::Failed(error) = &said {
            self.screen.line(&format!("rxl: writing to the sender: {error}"));
        }
        said
    }

    fn read_header(&mut self) -> anyhow::Result<()> {
        let header = Header::read_from(&mut Cancellable(&self.channel))?;
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
        let own = config.to_json();
        config.set_name(&incoming_name(&name));
        self.expected = Expected { name, own, config: config.to_json() };
        if self.print_config {
            self.screen.line(&self.expected.config);
        }
        Ok(())
    }

    fn claim_name(&mut self) -> anyhow::Result<()> {
        if self.helpers.guard {
            self.lock = Some(Lock::of_incoming(&self.expected.name)?);
        }
        Ok(())
    }

    fn check_name(&mut self) -> anyhow::Result<()> {
        let incoming = self.incoming();
        anyhow::ensure!(
            self.host.resolve(&incoming).is_err(),
            "a domain {incoming} is on this host already: another migration, or its remains"
        );
        Ok(())
    }

    fn reserve_memory(&mut self) -> anyhow::Result<()> {
        Ok(self.host.reserve_memory(&self.expected.config)?)
    }

    fn start_guard(&mut self) {
        if let Some(lock) = &self.lock {
            self.guard = Guard::start(Side::Target, &self.incoming(), None, lock, self.screen);
        }
    }

    fn restore(&mut self) -> anyhow::Result<()> {
        self.copy = Some(self.host.restore(&self.expected.config, self.channel.input())?);
        Ok(())
    }

    fn start_monitor(&mut self) {
        if let Some(copy) = self.copy.filter(|_| self.helpers.monitor) {
            let incoming = self.incoming();
            if let Err(error) = monitor::start(copy, &incoming, &self.expected.own) {
                self.screen.line(&format!(
                    "rxl: no monitor for {incoming}: {error:#}; nobody acts when the guest reboots \
                     or ends"
                ));
            }
        }
    }

    fn not_created(&mut self, error: anyhow::Error) -> u8 {
        let code = error.downcast_ref().map_or(FAILED, code_of);
        self.screen.line(&format!("rxl: {error:#}"));
        self.tell(&format!("Domain creation failed (code -{code})."));
        code
    }

    fn stand_down(&mut self) {
        self.guard.stand_down();
    }

    fn abandon(&mut self) {
        self.guard.abandon();
    }

    fn rename(&mut self) -> Done {
        self.tell("Got permission, starting domain.");
        self.on_copy("rename", |host, copy| {
            host.rename(copy, &self.incoming(), &self.expected.name)
        })
    }

    fn unpause(&mut self) -> Done {
        self.on_copy("unpause", |host, copy| host.unpause(copy))
    }

    fn destroy(&mut self) -> Done {
        self.tell("Failure, destroying our copy.");
        let done = self.on_copy("destroy", |host, copy| host.destroy(copy));
        done.inspect_err(|code| self.tell(&format!("Failed to destroy our copy (code -{code}).")))
    }
}

/// libxl's code without its sign, as it goes over the wire; never 0.
fn code_of(error: &LifecycleError) -> u8 {
    u8::try_from(error.rc.unsigned_abs()).ok().filter(|c| *c != 0).unwrap_or(FAILED)
}
