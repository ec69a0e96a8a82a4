//! A domain on its way out of this host, to another ([`crate::migrate`]) or to a file
//! ([`crate::save`]): which domain that is, and what both do to it, to the channel and the screen.
//!
//! What it is not: it decides nothing. What follows what is [`rxl_migrate::xl::leaving`]'s,
//! [`departure`](rxl_migrate::xl::departure)'s and [`saving`](rxl_migrate::xl::saving)'s.

use std::path::Path;

use anyhow::{Context, bail};
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::CpuCap;
use rxl_migrate::report::{Event, Stamped};
use rxl_migrate::xl;
use rxl_migrate::xl::channel::{Said, Until};
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::leaving::Leaving;
use rxl_migrate::xl::movable::Unmovable;
use rxl_toolstack::lifecycle::{DomainState, Lifecycle, LifecycleError};

use crate::channel::Channel;
use crate::config;
use crate::events::EventsWriter;
use crate::gate::Gate;
use crate::guard::Guard;
use crate::history::History;
use crate::lock::Lock;
use crate::output::Screen;
use crate::passthrough;
use crate::prometheus;
use crate::report::Report;
use crate::timeline::{Mark, Timeline};
use crate::words;

/// How it ended, and what is known of it.
pub(crate) struct Ended<E> {
    pub(crate) end: E,
    /// What failed, in the words of whoever refused it.
    pub(crate) details: Vec<String>,
    pub(crate) events: Vec<Stamped>,
}

/// The domain that the user means.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) domid: DomId,
    pub(crate) name: String,
    /// Its configuration, wherever it goes.
    pub(crate) config: DomainConfig,
    /// The same in what goes before its stream.
    pub(crate) header: Header,
    /// Nobody else does anything to it meanwhile.
    pub(crate) lock: Lock,
}

impl Guest {
    /// Finds it by name or number. `config` (a file) takes the place of its configuration, but for
    /// name and UUID; with `preserve_domid` it is to have its number wherever it is made. `live`:
    /// it is to run meanwhile.
    pub(crate) fn find(
        host: &dyn Lifecycle,
        domain: &str,
        config: Option<&str>,
        preserve_domid: bool,
        live: bool,
    ) -> anyhow::Result<Guest> {
        let domid = resolve(host, domain)?;
        let name = host.name(domid)?;
        // Before looking how it is: a guard may be about to change that.
        let lock = Lock::of_domain(domid, &name)?;
        let name = host.name(domid)?;
        match host.state(domid)? {
            DomainState::Alive => {}
            DomainState::Suspended => bail!(
                "{name} is suspended; if that is left from an earlier migration, and it does not \
                 run at the target, or from a save, and the file is not there, let it run here \
                 first: rxl resume {name}"
            ),
            DomainState::Dead | DomainState::Gone => bail!("{name} is shutting down"),
        }
        let running = DomainConfig::parse(&host.config(domid)?)?;
        check_movable(host, domid, &running, live).with_context(|| format!("{name} stays here"))?;
        let mut config = match config {
            Some(file) => config::for_guest(&passthrough::find_xl()?, file, &running)?,
            None => running,
        };
        config.set_domid(preserve_domid.then_some(domid));
        let header = Header::new(&config.to_json())?;
        Ok(Guest { domid, name, config, header, lock })
    }
}

/// Refuses a domain that cannot be moved. What cannot be asked does not count: it fails later.
pub(crate) fn check_movable(
    host: &dyn Lifecycle,
    domid: DomId,
    config: &DomainConfig,
    live: bool,
) -> Result<(), Unmovable> {
    let facts = host.facts(domid);
    if let Err(error) = &facts {
        tracing::warn!("{error}");
    }
    let in_domain = || facts.ok().and_then(|facts| Unmovable::in_domain(config, &facts, live));
    Unmovable::in_config(config).or_else(in_domain).map_or(Ok(()), Err)
}

/// The domain of that name or number; if there is none, xl's words.
pub(crate) fn resolve(host: &dyn Lifecycle, domain: &str) -> anyhow::Result<DomId> {
    host.resolve(domain)
        .map_err(|error| anyhow::Error::msg(words::fill(words::NO_DOMAIN, &[&domain, &error.rc])))
}

/// Where a domain goes.
pub(crate) trait Way {
    /// Whether it runs while most of its memory goes out.
    const LIVE: bool;
    /// What xl says before the guest is resumed after a failure.
    const RESUMING: &'static str;
    /// What xl says where it was not suspended.
    const NOT_SUSPENDED: &'static str;

    /// What xl calls the stream.
    fn stream(&self) -> &str;
}

/// A domain on its way, and all that it takes.
pub(crate) struct Outgoing<'a, W> {
    pub(crate) host: &'a dyn Lifecycle,
    pub(crate) domid: DomId,
    pub(crate) name: &'a str,
    pub(crate) header: &'a Header,
    /// All memory is sent again at the end, to be compared.
    pub(crate) debug: bool,
    pub(crate) channel: Channel,
    pub(crate) gate: &'a Gate,
    pub(crate) guard: Guard,
    /// How much processor time the domain may have, if it may be slowed meanwhile.
    pub(crate) cap: Option<CpuCap>,
    pub(crate) screen: &'a Screen,
    pub(crate) timeline: &'a mut Timeline,
    /// Closed once the save helper has ended.
    pub(crate) events: Option<EventsWriter>,
    /// Why the save failed, as libxl sees it.
    pub(crate) save_error: Option<LifecycleError>,
    /// What else failed, in the words of whoever refused it.
    pub(crate) details: Vec<String>,
    pub(crate) way: W,
}

impl<W> Outgoing<'_, W> {
    pub(crate) fn say(&self, text: &str) {
        self.screen.line(text);
    }

    /// A request to the toolstack; if it fails, its words are kept.
    pub(crate) fn try_to(
        &mut self,
        request: impl FnOnce(&dyn Lifecycle, DomId) -> rxl_toolstack::lifecycle::Result<()>,
    ) -> bool {
        match request(self.host, self.domid) {
            Ok(()) => true,
            Err(error) => {
                self.details.push(error.to_string());
                false
            }
        }
    }

    /// Writes to where the domain goes; if it fails, why is kept.
    pub(crate) fn write(&mut self, what: &str, bytes: &[u8], until: Until) -> Said {
        let said = self.channel.say(bytes, until);
        if let Said::Failed(error) = &said {
            self.details.push(format!("writing {what}: {error}"));
        }
        said
    }
}

impl<W: Way> Leaving for Outgoing<'_, W> {
    fn gate(&self) -> &xl::Gate {
        self.gate.gate()
    }

    fn write_header(&mut self) -> Said {
        let (mandatory, optional, length) = self.header.info;
        let (mandatory, optional) = (format!("{mandatory:#x}"), format!("{optional:#x}"));
        let values: [&dyn std::fmt::Display; 4] =
            [&self.way.stream(), &mandatory, &optional, &length];
        self.say(&words::fill(words::SAVING, &values));
        self.write("the header", &self.header.to_bytes(), Until::Cancelled)
    }

    fn save(&mut self) -> bool {
        let saved = self.host.save(self.domid, self.channel.output(), W::LIVE, self.debug);
        // The helper is over: nobody writes events any more.
        self.events = None;
        match saved {
            Ok(()) => self.timeline.mark(Mark::Sent),
            // Whoever cancelled knows why it ended.
            Err(_) if self.gate.is_cancelled() => return false,
            Err(error) => {
                self.save_error = Some(error);
                return false;
            }
        }
        true
    }

    fn log_dirty_off(&mut self) {
        // It is off already, unless the save helper was killed.
        if let Err(error) = self.host.log_dirty_off(self.domid) {
            tracing::warn!("{error}");
        }
    }

    fn speed_up(&mut self) {
        if let Some(cap) = self.cap
            && let Err(error) = self.host.set_cpu_cap(self.domid, cap)
        {
            self.say(&format!("rxl: {error}"));
        }
    }

    fn is_suspended(&mut self) -> Option<bool> {
        match self.host.state(self.domid) {
            Ok(DomainState::Suspended) => {
                self.say(W::RESUMING);
                Some(true)
            }
            Ok(_) => {
                if !self.gate.is_cancelled() {
                    self.say(W::NOT_SUSPENDED);
                }
                Some(false)
            }
            Err(error) => {
                self.details.push(error.to_string());
                None
            }
        }
    }

    fn stand_down(&mut self) {
        self.guard.stand_down();
    }

    fn destroy(&mut self) -> bool {
        self.try_to(|host, domid| host.destroy(domid))
    }

    fn resume(&mut self) -> bool {
        let resumed = self.try_to(|host, domid| host.resume(domid));
        if resumed {
            self.timeline.mark(Mark::Resumed);
        }
        resumed
    }
}

/// What the save helper says of its failure, or else libxl, which takes every failure before the
/// guest has suspended for a guest that does not respond.
pub(crate) fn why_not_saved(events: &[Stamped], libxl: Option<LifecycleError>) -> Option<String> {
    let helper = events.iter().rev().find_map(|stamped| match &stamped.event {
        Event::Failed { why } => Some(why.clone()),
        _ => None,
    });
    libxl.map(|error| helper.unwrap_or_else(|| error.to_string()))
}

/// Keeps the figures for whoever looks later, in `prometheus` too if that is wanted. A migration
/// has not failed for it.
pub(crate) fn remember(report: &Report, prometheus: Option<&Path>) {
    if let Err(error) = History::of_this_host().keep(report) {
        tracing::warn!("the report is not kept: {error:#}");
    }
    if let Some(directory) = prometheus
        && let Err(error) = prometheus::count(directory, report)
    {
        tracing::warn!("Prometheus gets no figures: {error:#}");
    }
}

/// Leaves a guest that may suspend yet to its guard.
pub(crate) fn leave_to(guard: &mut Guard, name: &str, screen: &Screen) {
    screen.line(&format!(
        "rxl: {name} was asked to suspend and may follow yet; for a minute a guard watches, and \
         lets it run on"
    ));
    guard.abandon();
}

/// Where a domain is that did not leave; asked of the host, not guessed.
pub(crate) fn kept(guest: &str, state: Option<DomainState>) -> String {
    match state {
        Some(DomainState::Alive) => format!("rxl: {guest} keeps running here."),
        Some(DomainState::Suspended) => {
            format!("rxl: {guest} is suspended here, because of itself or of someone else.")
        }
        Some(DomainState::Dead) => format!("rxl: {guest} has shut down meanwhile."),
        Some(DomainState::Gone) => format!("rxl: {guest} has gone meanwhile."),
        None => format!("rxl: How {guest} is here could not be asked."),
    }
}
