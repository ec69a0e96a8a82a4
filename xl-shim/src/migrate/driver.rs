//! What the sender does to its domain, the channel and the screen.
//!
//! What it is not: it decides nothing. The order of steps, what may follow a failure and what may
//! be cancelled is [`rxl_migrate::xl::departure`]'s.

use std::io;

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::channel::{Heard, Said, Until};
use rxl_migrate::xl::departure::{self, Departing};
use rxl_migrate::xl::handshake::{Message, SenderEnd};
use rxl_migrate::xl::header::Header;
use rxl_migrate::xl::{self, away_name};
use rxl_toolstack::lifecycle::{DomainState, Lifecycle, LifecycleError};

use crate::channel::Channel;
use crate::events::EventsWriter;
use crate::gate::Gate;
use crate::guard::Guard;
use crate::output::Screen;
use crate::timeline::{Mark, Timeline};

/// A domain on its way, and all that it takes.
pub(crate) struct Departure<'a> {
    pub(crate) host: &'a dyn Lifecycle,
    pub(crate) domid: DomId,
    pub(crate) name: &'a str,
    /// Name of the target, for messages.
    pub(crate) target: &'a str,
    pub(crate) header: &'a Header,
    pub(crate) debug: bool,
    pub(crate) channel: Channel,
    pub(crate) gate: &'a Gate,
    pub(crate) guard: Guard,
    pub(crate) screen: &'a Screen,
    pub(crate) timeline: &'a mut Timeline,
    /// Closed once the save helper has ended.
    pub(crate) events: Option<EventsWriter>,
    /// Why the save failed, as libxl sees it.
    pub(crate) save_error: Option<LifecycleError>,
    /// What else failed, in the words of whoever refused it.
    pub(crate) details: Vec<String>,
}

impl Departure<'_> {
    /// From the banner to the end.
    ///
    /// # Errors
    /// Only a bug: an event that the machine does not take. The domain then is as it is.
    pub(crate) fn run(&mut self) -> rxl_migrate::Result<SenderEnd> {
        let end = departure::run(self)?;
        self.timeline.mark(Mark::Ended);
        Ok(end)
    }

    fn say(&self, text: &str) {
        self.screen.line(text);
    }

    /// A request to the toolstack; if it fails, its words are kept.
    fn try_to(
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

    /// Writes to the target; if it fails, why is kept.
    fn write(&mut self, what: &str, bytes: &[u8], until: Until) -> Said {
        let said = self.channel.say(bytes, until);
        if let Said::Failed(error) = &said {
            self.details.push(format!("writing {what}: {error}"));
        }
        said
    }

    fn heard(&mut self, message: Message, bytes: &[u8]) {
        match message {
            Message::Banner => self.timeline.mark(Mark::Answered),
            Message::Ready => self.timeline.mark(Mark::Ready),
            Message::Report => {
                self.timeline.mark(Mark::Reported);
                if let Some(status @ 1..) = bytes.last() {
                    self.say(&format!(
                        "migration sender: Target reports startup failure (status code {status})."
                    ));
                }
            }
            Message::Destroyed => self.say("migration sender: Trying to resume at our end."),
            Message::Go => {}
        }
    }
}

impl Departing for Departure<'_> {
    fn gate(&self) -> &xl::Gate {
        self.gate.gate()
    }

    fn hear(&mut self, message: Message, until: Until) -> Heard {
        let waiting = match message {
            Message::Banner => "answered (is ssh asking for a password?)",
            Message::Ready => "said that it has the domain",
            _ => "reported",
        };
        let heard = self.channel.hear(message, until, || {
            self.screen.line(&format!("rxl: {} has not {waiting} yet; waiting", self.target));
        });
        match &heard {
            Heard::Bytes(bytes) if !bytes.starts_with(message.text()) => {
                let said = String::from_utf8_lossy(bytes);
                self.details.push(format!("{} said {said:?}", self.target));
            }
            Heard::Bytes(bytes) => self.heard(message, bytes),
            Heard::Lost(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                self.details.push(format!("reading from {}: {error}", self.target));
            }
            Heard::Lost(_) | Heard::Cancelled => {}
        }
        heard
    }

    fn write_header(&mut self) -> Said {
        let (mandatory, optional, length) = self.header.info;
        self.say(&format!(
            "Saving to migration stream new xl format (info {mandatory:#x}/{optional:#x}/{length})"
        ));
        self.write("the header", &self.header.to_bytes(), Until::Cancelled)
    }

    fn save(&mut self) -> bool {
        let saved = self.host.save(self.domid, self.channel.output(), true, self.debug);
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

    fn is_suspended(&mut self) -> Option<bool> {
        match self.host.state(self.domid) {
            Ok(DomainState::Suspended) => {
                self.say("Migration failed, resuming at sender.");
                Some(true)
            }
            Ok(_) => {
                if !self.gate.is_cancelled() {
                    self.say("Migration failed, failed to suspend at sender.");
                }
                Some(false)
            }
            Err(error) => {
                self.details.push(error.to_string());
                None
            }
        }
    }

    fn rename_away(&mut self) -> bool {
        self.say("migration sender: Target has acknowledged transfer.");
        let (from, to) = (self.name.to_owned(), away_name(self.name));
        self.try_to(|host, domid| host.rename(domid, &from, &to))
    }

    fn stand_down(&mut self) {
        self.guard.stand_down();
    }

    fn abandon(&mut self) {
        self.guard.abandon();
    }

    fn write_go(&mut self) -> bool {
        self.say("migration sender: Giving target permission to start.");
        let go = Message::Go.text();
        matches!(self.write("the permission to start", go, Until::TheEnd), Said::Done)
    }

    fn destroy(&mut self) -> bool {
        self.say("migration sender: Target reports successful startup.");
        self.try_to(|host, domid| host.destroy(domid))
    }

    fn rename_back(&mut self) -> bool {
        let (from, to) = (away_name(self.name), self.name.to_owned());
        self.try_to(|host, domid| host.rename(domid, &from, &to))
    }

    fn resume(&mut self) -> bool {
        self.try_to(|host, domid| host.resume(domid))
    }
}
