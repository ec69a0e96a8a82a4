//! What saving does to the file and the domain beside [`Outgoing`]'s part.
//!
//! What it is not: it decides nothing; see [`rxl_migrate::xl::saving`].

use std::io;

use rxl_migrate::xl::saving::{self, SaveEnd, Saving, Then};

use super::file::SaveFile;
use crate::outgoing::{Outgoing, Way};
use crate::timeline::Mark;
use crate::words;

/// To a file.
pub(crate) struct ToFile<'a> {
    /// Its name, for messages.
    pub(crate) name: &'a str,
    pub(crate) file: SaveFile,
    /// What becomes of the domain.
    pub(crate) then: Then,
}

/// A domain on its way to a file.
pub(crate) type Save<'a> = Outgoing<'a, ToFile<'a>>;

impl Way for ToFile<'_> {
    // As xl: what a guest writes meanwhile would be written twice.
    const LIVE: bool = false;
    const RESUMING: &'static str = words::NOT_SAVED;
    const NOT_SUSPENDED: &'static str = words::NOT_SAVED;

    fn stream(&self) -> &str {
        self.name
    }
}

impl Save<'_> {
    /// From the header to the end.
    pub(crate) fn run(&mut self) -> SaveEnd {
        let end = saving::run(self);
        self.timeline.mark(Mark::Ended);
        end
    }

    /// If it failed, why is kept.
    fn is_done(&mut self, what: &str, result: io::Result<()>) -> bool {
        result.map_err(|error| self.details.push(format!("{what} the file: {error}"))).is_ok()
    }
}

impl Saving for Save<'_> {
    fn then(&self) -> Then {
        self.way.then
    }

    fn sync(&mut self) -> bool {
        let synced = self.way.file.sync();
        self.is_done("bringing to the disk", synced)
    }

    fn publish(&mut self) -> bool {
        self.timeline.mark(Mark::Committed);
        let published = self.way.file.publish();
        self.is_done("naming", published)
    }

    fn pause(&mut self) -> bool {
        self.try_to(|host, domid| host.pause(domid))
    }
}
