//! What the user is told at the end: where the guest is, why, and what is left to do by hand.

use rxl_migrate::xl::away_name;
use rxl_migrate::xl::handshake::{SenderCause, SenderEnd};
use rxl_toolstack::lifecycle::DomainState;

use crate::outgoing::kept;
use crate::output::Screen;
use crate::words;

/// How a migration ended.
pub(crate) struct Conclusion<'a> {
    /// The domain's name.
    pub(crate) guest: &'a str,
    /// The target as given.
    pub(crate) target: &'a str,
    pub(crate) end: SenderEnd,
    /// What failed, in the words of whoever refused it.
    pub(crate) details: &'a [String],
}

impl Conclusion<'_> {
    /// Why it did not succeed, the outermost reason first; empty if it did.
    pub(crate) fn causes(&self) -> Vec<String> {
        let cause = match self.end {
            SenderEnd::Moved => None,
            SenderEnd::MovedWithRemains => Some("the copy here could not be destroyed".to_owned()),
            SenderEnd::Kept(c) | SenderEnd::NotResumed(c) | SenderEnd::Uncertain(c) => {
                Some(c.to_string())
            }
        };
        cause.into_iter().chain(self.details.iter().cloned()).collect()
    }

    /// Prints it. `state` asks how the domain is now.
    pub(crate) fn tell(&self, screen: &Screen, state: impl FnOnce() -> Option<DomainState>) {
        let (guest, target, away) = (self.guest, self.target, away_name(self.guest));
        let why = self.causes().join("; ");
        match self.end {
            SenderEnd::Moved => screen.line(words::SUCCESSFUL),
            SenderEnd::MovedWithRemains => {
                screen.line(words::SUCCESSFUL);
                screen.line(&format!(
                    "rxl: {guest} runs on {target}, but its suspended copy here is still there \
                     ({why}).\nrxl: It must never be resumed: xl destroy {away}"
                ));
            }
            SenderEnd::Kept(cause) => {
                if let SenderCause::TargetFailed(_) = cause {
                    screen.line(words::RESUMED);
                    screen.line(words::TARGET_FAILED);
                }
                screen.line(&format!("rxl: {guest} was not moved: {why}"));
                screen.line(&kept(guest, state()));
            }
            SenderEnd::NotResumed(_) => screen.line(&format!(
                "rxl: {guest} was not moved: {why}\n\
                 rxl: {guest} is SUSPENDED here and could not be resumed. It does not run on \
                 {target} either.\nrxl: Try again: rxl resume {guest}"
            )),
            SenderEnd::Uncertain(_) => {
                screen.line(words::UNDEFINED);
                screen.line(&format!("rxl: {why}\n{}", by_hand(guest, target, &away)));
            }
        }
    }
}

/// What is left to do for the user of a guest that may run on `target`, and is suspended here
/// under the name `here`.
pub(crate) fn by_hand(guest: &str, target: &str, here: &str) -> String {
    format!(
        "rxl: {guest} stays suspended here as {here}, because it may run on {target}.\n\
         rxl: Look there: xl list {guest}\n\
         rxl: - if it is there and runs, destroy the copy here: xl destroy {here}\n\
         rxl: - if not, destroy there what is left of it ({guest} or {guest}--incoming), then \
         here: rxl resume {here}"
    )
}
