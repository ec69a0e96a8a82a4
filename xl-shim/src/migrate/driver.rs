//! What the sender does to its domain, the channel and the screen beside
//! [`Outgoing`](crate::outgoing::Outgoing)'s part.
//!
//! What it is not: it decides nothing. The order of steps, what may follow a failure and what may
//! be cancelled is [`rxl_migrate::xl::departure`]'s.

use std::io;

use rxl_migrate::xl::away_name;
use rxl_migrate::xl::channel::{Heard, Said, Until};
use rxl_migrate::xl::departure::{self, Departing};
use rxl_migrate::xl::handshake::{Message, SenderEnd};

use crate::outgoing::{Outgoing, Way};
use crate::timeline::Mark;
use crate::words;

/// To another host.
pub(crate) struct ToHost<'a> {
    /// Its name, for messages.
    pub(crate) target: &'a str,
}

/// A domain on its way to another host.
pub(crate) type Departure<'a> = Outgoing<'a, ToHost<'a>>;

impl Way for ToHost<'_> {
    const LIVE: bool = true;
    const RESUMING: &'static str = words::RESUMING;
    const NOT_SUSPENDED: &'static str = words::NOT_SUSPENDED;

    fn stream(&self) -> &'static str {
        "migration stream"
    }
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

    fn heard(&mut self, message: Message, bytes: &[u8]) {
        match message {
            Message::Banner => self.timeline.mark(Mark::Answered),
            Message::Ready => {
                self.timeline.mark(Mark::Ready);
                self.say(words::ACKNOWLEDGED);
            }
            Message::Report => {
                self.timeline.mark(Mark::Reported);
                match bytes.last() {
                    Some(status @ 1..) => {
                        self.say(&words::fill(words::NOT_STARTED_THERE, &[status]));
                    }
                    _ => self.say(words::STARTED_THERE),
                }
            }
            Message::Destroyed => self.say(words::TRYING_TO_RESUME),
            Message::Go => {}
        }
    }
}

impl Departing for Departure<'_> {
    fn hear(&mut self, message: Message, until: Until) -> Heard {
        let waiting = match message {
            Message::Banner => "answered (is ssh asking for a password?)",
            Message::Ready => "said that it has the domain",
            _ => "reported",
        };
        let target = self.way.target;
        let heard = self.channel.hear(message, until, || {
            self.screen.line(&format!("rxl: {target} has not {waiting} yet; waiting"));
        });
        match &heard {
            Heard::Bytes(bytes) if !bytes.starts_with(message.text()) => {
                let said = String::from_utf8_lossy(bytes);
                self.details.push(format!("{target} said {said:?}"));
            }
            Heard::Bytes(bytes) => self.heard(message, bytes),
            Heard::Lost(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                self.details.push(format!("reading from {target}: {error}"));
            }
            Heard::Lost(_) | Heard::Cancelled => {}
        }
        heard
    }

    fn rename_away(&mut self) -> bool {
        let (from, to) = (self.name.to_owned(), away_name(self.name));
        self.try_to(|host, domid| host.rename(domid, &from, &to))
    }

    fn abandon(&mut self) {
        self.guard.abandon();
    }

    fn write_go(&mut self) -> bool {
        self.timeline.mark(Mark::Committed);
        self.say(words::GIVING);
        let go = Message::Go.text();
        matches!(self.write("the permission to start", go, Until::TheEnd), Said::Done)
    }

    fn rename_back(&mut self) -> bool {
        let (from, to) = (away_name(self.name), self.name.to_owned());
        self.try_to(|host, domid| host.rename(domid, &from, &to))
    }
}
