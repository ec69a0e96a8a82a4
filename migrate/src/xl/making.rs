//! How a domain is made from a header and a stream, wherever they come from: another host
//! ([`arrival`](super::arrival)) or a file ([`restoring`](super::restoring)).
//!
//! Here is what making it consists of and when the guard begins to watch. Until it may run the
//! copy has the name of [`super::incoming_name`], so that a guard can tell it from every other
//! domain.
//!
//! What it is not: it does nothing to a domain, a descriptor or a screen but through [`Making`].

use super::gate::Gate;

/// The status that says "failed" where libxl gave no code of its own (`ERROR_FAIL`).
pub const FAILED: u8 = 3;

/// What came of a request: a failure is libxl's code without its sign, never 0.
pub type Done = std::result::Result<(), u8>;

/// What there is to do it with: the stream, this host, the guard. Requests block; the user hears
/// of failures from the implementor.
pub trait Making {
    /// Why no domain could be made.
    type Error;

    /// Up to when it can be cancelled.
    fn gate(&self) -> &Gate;
    /// Leave the domain paused.
    fn stays_paused(&self) -> bool;
    /// Reads the header; can be cancelled. From here on the domain's name is known.
    ///
    /// # Errors
    /// It is no header, or has no usable configuration.
    fn read_header(&mut self) -> Result<(), Self::Error>;
    /// From now on, until this process and its guard have ended, nobody else makes a domain of
    /// that name here or puts right what is left of one.
    ///
    /// # Errors
    /// Somebody does: a guard may take its time, and would take this copy for its own.
    fn claim_name(&mut self) -> Result<(), Self::Error>;
    /// Makes sure that no domain has the name of [`super::incoming_name`].
    ///
    /// # Errors
    /// There is one: another migration, or its remains.
    fn check_name(&mut self) -> Result<(), Self::Error>;
    /// Makes room.
    ///
    /// # Errors
    /// There is not enough.
    fn reserve_memory(&mut self) -> Result<(), Self::Error>;
    /// From now on, should this process die, a guard destroys the domain of that name. All
    /// processes that accompany the domain are started here, before a guest waits for them.
    fn start_guard(&mut self);
    /// Makes the domain, paused, from the stream. On an error nothing is left of it.
    ///
    /// # Errors
    /// libxl's.
    fn restore(&mut self) -> Result<(), Self::Error>;
    /// From now on somebody acts when the domain reboots or ends.
    fn start_monitor(&mut self);
    /// The guard may no longer do anything.
    fn stand_down(&mut self);
    /// Gives the copy the domain's own name.
    ///
    /// # Errors
    /// libxl's code.
    fn rename(&mut self) -> Done;
    /// Lets the copy run.
    ///
    /// # Errors
    /// libxl's code.
    fn unpause(&mut self) -> Done;
    /// Destroys the copy.
    ///
    /// # Errors
    /// libxl's code.
    fn destroy(&mut self) -> Done;
}

/// Header, room, stream: a paused copy.
pub(super) fn make<M: Making>(side: &mut M) -> Result<(), M::Error> {
    side.read_header()?;
    side.claim_name()?;
    // Before the guard, which would destroy what has that name.
    side.check_name()?;
    side.reserve_memory()?;
    side.start_guard();
    side.restore()
}
