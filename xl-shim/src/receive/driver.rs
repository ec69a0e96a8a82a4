//! What the receiver, or who restores from a file, does to this host, the channel and the screen.
//!
//! What it is not: it decides nothing; see [`rxl_migrate::xl::arrival`] and
//! [`rxl_migrate::xl::restoring`].

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::arrival::{self, Arriving};
use rxl_migrate::xl::channel::{Cancellable, Heard, Said, Until};
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::handshake::{Message, ReceiverEnd};
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::making::{Done, FAILED, Making};
use rxl_migrate::xl::movable::Unmovable;
use rxl_migrate::xl::restoring::{self, RestoreEnd};
use rxl_migrate::xl::{self, incoming_name};
use rxl_toolstack::lifecycle::{Lifecycle, LifecycleError};

use crate::channel::Channel;
use crate::config;
use crate::gate::Gate;
use crate::guard::{Guard, Ward};
use crate::lock::Lock;
use crate::monitor::Monitor;
use crate::output::Screen;
use crate::passthrough;
use crate::report::Target;
use crate::status::{Board, Doing, Phase, Runs};
use crate::words;

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
    /// The file that it comes from; `None`: another host.
    pub(crate) saved: Option<Saved<'a>>,
    /// Where others are told of it.
    pub(crate) runs: Option<Runs>,
    /// What they are told.
    pub(crate) board: Board,
    /// How to make what must outlive this process, or stand in for it.
    pub(crate) helpers: Helpers,
    guard: Guard,
    monitor: Option<Monitor>,
    lock: Option<Lock>,
    expected: Expected,
    copy: Option<DomId>,
}

/// A file with a domain in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saved<'a> {
    /// Its name, for messages.
    pub(crate) name: &'a str,
    /// A file (xl.cfg) whose configuration takes the place of the saved one.
    pub(crate) config: Option<&'a str>,
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
            saved: None,
            runs: None,
            board: Board::default(),
            helpers,
            guard: Guard::none(),
            monitor: None,
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

    /// Makes the domain from the file that [`Arrival::saved`] says.
    pub(crate) fn restore_from_file(&mut self) -> RestoreEnd<anyhow::Error> {
        restoring::run(self)
    }

    /// The domain that was made, and its configuration for who watches it.
    pub(crate) fn made(&self) -> Option<(DomId, &str)> {
        Some((self.copy?, &self.expected.own))
    }

    /// What xl says of a migration; of a restore it says nothing there.
    fn tell(&self, text: &str) {
        if self.saved.is_none() {
            self.screen.line(text);
        }
    }

    /// The configuration of the domain to make.
    fn configuration(&self, header: &Header) -> anyhow::Result<DomainConfig> {
        let file = self.saved.and_then(|saved| saved.config);
        self.screen.line(&words::fill(words::PARSING, &[&file.unwrap_or("<saved>")]));
        Ok(match file {
            Some(file) => config::from_file(&passthrough::find_xl()?, file)?,
            None => DomainConfig::parse(&header.config)?,
        })
    }

    /// Tells others of it.
    fn post(&self, runs: Runs) -> anyhow::Result<Board> {
        let doing = if self.saved.is_some() { Doing::Restore } else { Doing::Receive };
        let file = self.saved.map(|saved| Target::File(saved.name.to_owned()));
        let config = DomainConfig::parse(&self.expected.own)?;
        Ok(Board::post(runs, doing, (&self.expected.name, None), &config, file))
    }

    /// The name of the copy until it may run.
    fn incoming(&self) -> String {
        incoming_name(&self.expected.name)
    }

    fn no_monitor(&self, error: &anyhow::Error) {
        let name = &self.expected.name;
        self.screen.line(&format!(
            "rxl: no monitor for {name}: {error:#}; nobody acts when the guest reboots or ends"
        ));
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

impl Making for Arrival<'_> {
    type Error = anyhow::Error;

    fn gate(&self) -> &xl::Gate {
        self.gate.gate()
    }

    fn stays_paused(&self) -> bool {
        self.paused
    }

    fn read_header(&mut self) -> anyhow::Result<()> {
        let header = Header::read_from(&mut Cancellable(&self.channel))?;
        let (mandatory, optional, length) = header.info;
        let stream = self.saved.map_or("<incoming migration stream>", |saved| saved.name);
        let (mandatory, optional) = (format!("{mandatory:#x}"), format!("{optional:#x}"));
        let values: [&dyn std::fmt::Display; 4] = [&stream, &mandatory, &optional, &length];
        self.screen.line(&words::fill(words::LOADING, &values));
        self.screen.line(&words::fill(words::HAS_CONFIG, &[&" in JSON format"]));
        let mut config = self.configuration(&header)?;
        // A file is another matter: it may be the only copy.
        if let Some(reason) = Unmovable::in_config(&config).filter(|_| self.saved.is_none()) {
            return Err(reason.into());
        }
        let name = config.name().unwrap_or_default().to_owned();
        anyhow::ensure!(!name.is_empty(), "the domain's configuration has no name");
        let own = config.to_json();
        config.set_name(&incoming_name(&name));
        self.expected = Expected { name, own, config: config.to_json() };
        if self.print_config {
            let Expected { own, config, .. } = &self.expected;
            self.screen.line(if self.saved.is_some() { own } else { config });
        }
        Ok(())
    }

    fn claim_name(&mut self) -> anyhow::Result<()> {
        if self.helpers.guard {
            self.lock = Some(Lock::of_incoming(&self.expected.name)?);
        }
        if let Some(runs) = self.runs.take() {
            self.board = self.post(runs)?;
        }
        Ok(())
    }

    fn check_name(&mut self) -> anyhow::Result<()> {
        let incoming = self.incoming();
        anyhow::ensure!(
            self.host.resolve(&incoming).is_err(),
            "a domain {incoming} is on this host already: another migration, or its remains"
        );
        // A migration may wait: the domain may be one that is about to leave.
        let name = &self.expected.name;
        anyhow::ensure!(
            self.saved.is_none() || self.host.resolve(name).is_err(),
            "a domain {name} is on this host already: shut it down or rename it (xl rename), or \
             restore with a configuration file that has another name"
        );
        Ok(())
    }

    fn reserve_memory(&mut self) -> anyhow::Result<()> {
        Ok(self.host.reserve_memory(&self.expected.config)?)
    }

    fn start_guard(&mut self) {
        if let Some(lock) = &self.lock {
            self.guard = Guard::start(Ward::Copy(&self.incoming()), lock, self.screen);
        }
        if self.helpers.monitor {
            let migrated = self.saved.is_none();
            let name = if migrated { self.incoming() } else { self.expected.name.clone() };
            self.monitor = Monitor::start(&name).map_err(|error| self.no_monitor(&error)).ok();
        }
    }

    fn restore(&mut self) -> anyhow::Result<()> {
        self.copy = Some(self.host.restore(&self.expected.config, self.channel.input())?);
        Ok(())
    }

    fn start_monitor(&mut self) {
        let Some((monitor, copy)) = self.monitor.take().zip(self.copy) else { return };
        if let Err(error) = monitor.watch(copy, &self.expected.own) {
            self.no_monitor(&error);
        }
    }

    fn stand_down(&mut self) {
        self.board.reach(Phase::Committed);
        self.guard.stand_down();
    }

    fn rename(&mut self) -> Done {
        self.tell(words::PERMITTED);
        self.on_copy("rename", |host, copy| {
            host.rename(copy, &self.incoming(), &self.expected.name)
        })
    }

    fn unpause(&mut self) -> Done {
        self.on_copy("unpause", |host, copy| host.unpause(copy))
    }

    fn destroy(&mut self) -> Done {
        self.tell(words::DESTROYING);
        let done = self.on_copy("destroy", |host, copy| host.destroy(copy));
        done.inspect_err(|code| self.tell(&words::fill(words::NOT_DESTROYED, &[&minus(*code)])))
    }
}

impl Arriving for Arrival<'_> {
    fn hear(&mut self, message: Message) -> Heard {
        self.channel.hear(message, Until::Cancelled, || {})
    }

    fn say(&mut self, message: Message, status: Option<u8>, until: Until) -> Said {
        match message {
            Message::Banner => self.tell(words::TARGET_READY),
            Message::Ready => {
                self.board.reach(Phase::Ready);
                self.tell(words::COMPLETE);
            }
            Message::Destroyed => self.tell(words::GIVING_BACK),
            Message::Report | Message::Go => {}
        }
        let bytes = [message.text(), status.as_slice()].concat();
        let said = self.channel.say(&bytes, until);
        if let Said::Failed(error) = &said {
            self.screen.line(&format!("rxl: writing to the sender: {error}"));
        }
        said
    }

    fn not_created(&mut self, error: anyhow::Error) -> u8 {
        let code = error.downcast_ref().map_or(FAILED, code_of);
        self.screen.line(&format!("rxl: {error:#}"));
        self.tell(&words::fill(words::NOT_CREATED, &[&minus(code)]));
        code
    }

    fn abandon(&mut self) {
        self.guard.abandon();
    }
}

/// libxl's code, as xl prints it.
fn minus(code: u8) -> i16 {
    -i16::from(code)
}

/// libxl's code without its sign, as it goes over the wire; never 0.
fn code_of(error: &LifecycleError) -> u8 {
    u8::try_from(error.rc.unsigned_abs()).ok().filter(|c| *c != 0).unwrap_or(FAILED)
}
