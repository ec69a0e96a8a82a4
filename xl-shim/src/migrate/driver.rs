//! Does what the sender's state machine says: the one place that touches the domain on its way.
//!
//! What it is not: it decides nothing. The order of steps, and what may follow a failure, is
//! [`rxl_migrate::xl::handshake`]'s.

use std::io;

use rxl_migrate::frame::DomId;
use rxl_migrate::xl::handshake::{Message, Sender, SenderAction, SenderEnd, SenderEvent};
use rxl_migrate::xl::header::Header;
use rxl_toolstack::lifecycle::{DomainState, Lifecycle, LifecycleError};

use crate::channel::{Channel, Heard, Said, Until};
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

/// The name that says that a domain is on its way.
pub(crate) fn away_name(name: &str) -> String {
    format!("{name}{AWAY}")
}

/// What [`away_name`] appends.
pub(crate) const AWAY: &str = "--migratedaway";

impl Departure<'_> {
    /// From the banner to the end.
    ///
    /// # Errors
    /// Only a bug: an event that the machine does not take. The domain then is as it is.
    pub(crate) fn run(&mut self) -> rxl_migrate::Result<SenderEnd> {
        let mut machine = Sender::new();
        let mut action = machine.step(SenderEvent::Begin)?;
        loop {
            let heard;
            let event = match action {
                SenderAction::Finish(end) => {
                    self.timeline.mark(Mark::Ended);
                    return Ok(end);
                }
                SenderAction::Receive(message) => {
                    heard = self.hear(message);
                    match &heard {
                        Heard::Bytes(bytes) => SenderEvent::Received(bytes),
                        Heard::Lost(_) => SenderEvent::Lost,
                        Heard::Cancelled => SenderEvent::Cancelled,
                    }
                }
                SenderAction::SendDomain => self.send_domain(),
                SenderAction::AskWhetherSuspended => self.ask_state(),
                SenderAction::RenameAway => self.rename_away(),
                SenderAction::SendGo => self.send_go(),
                SenderAction::Destroy => {
                    self.say("migration sender: Target reports successful startup.");
                    done(self.try_to(|host, domid| host.destroy(domid)))
                }
                SenderAction::RenameBack => {
                    let (from, to) = (away_name(self.name), self.name.to_owned());
                    done(self.try_to(|host, domid| host.rename(domid, &from, &to)))
                }
                SenderAction::Resume => done(self.try_to(|host, domid| host.resume(domid))),
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

    fn hear(&mut self, message: Message) -> Heard {
        let until = match message {
            Message::Report | Message::Destroyed => Until::TheEnd,
            _ => Until::Cancelled,
        };
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

    fn send_domain(&mut self) -> SenderEvent<'static> {
        let (mandatory, optional, length) = self.header.info;
        self.say(&format!(
            "Saving to migration stream new xl format (info {mandatory:#x}/{optional:#x}/{length})"
        ));
        let result = match self.channel.say(&self.header.to_bytes(), Until::Cancelled) {
            Said::Done => self.save(),
            Said::Cancelled => SenderEvent::Cancelled,
            Said::Failed(error) => {
                self.details.push(format!("writing the header: {error}"));
                SenderEvent::Failed
            }
        };
        // The helper is over, or never began: nobody writes events any more.
        self.events = None;
        result
    }

    fn save(&mut self) -> SenderEvent<'static> {
        if self.gate.is_cancelled() {
            return SenderEvent::Cancelled;
        }
        match self.host.save(self.domid, self.channel.output(), true, self.debug) {
            Ok(()) => {
                self.timeline.mark(Mark::Sent);
                SenderEvent::Done
            }
            Err(_) if self.gate.is_cancelled() => SenderEvent::Cancelled,
            Err(error) => {
                self.save_error = Some(error);
                SenderEvent::Failed
            }
        }
    }

    fn ask_state(&mut self) -> SenderEvent<'static> {
        match self.host.state(self.domid) {
            Ok(DomainState::Suspended) => {
                self.say("Migration failed, resuming at sender.");
                SenderEvent::Suspended(true)
            }
            Ok(_) => {
                if !self.gate.is_cancelled() {
                    self.say("Migration failed, failed to suspend at sender.");
                }
                SenderEvent::Suspended(false)
            }
            Err(error) => {
                self.details.push(error.to_string());
                SenderEvent::Failed
            }
        }
    }

    fn rename_away(&mut self) -> SenderEvent<'static> {
        if self.gate.is_cancelled() {
            return SenderEvent::Cancelled;
        }
        self.say("migration sender: Target has acknowledged transfer.");
        let (from, to) = (self.name.to_owned(), away_name(self.name));
        done(self.try_to(|host, domid| host.rename(domid, &from, &to)))
    }

    fn send_go(&mut self) -> SenderEvent<'static> {
        if !self.gate.commit() {
            return SenderEvent::Cancelled;
        }
        // Before the try: whoever finds this process dead must not resume from now on.
        self.guard.stand_down();
        self.say("migration sender: Giving target permission to start.");
        match self.channel.say(Message::Go.text(), Until::TheEnd) {
            Said::Done => SenderEvent::Done,
            Said::Cancelled => SenderEvent::Failed,
            Said::Failed(error) => {
                self.details.push(format!("writing the permission to start: {error}"));
                SenderEvent::Failed
            }
        }
    }
}

fn done(ok: bool) -> SenderEvent<'static> {
    if ok { SenderEvent::Done } else { SenderEvent::Failed }
}
