//! What a guard does: it puts things right if the process that it belongs to is killed.
//!
//! Who sends or receives a domain holds it in a state that only it can end: suspended here, half
//! built there. Should that process die without a word (SIGKILL, out of memory), its guard sees
//! the end of the pipe between them:
//!
//! - at the source it waits until the guest has suspended, if it was asked to, and resumes it
//!   under its own name ([`keep`]);
//! - at the target it destroys the copy that has the name of [`super::incoming_name`] ([`clear`]).
//!
//! It does neither once it has been told to stand down, which its owner does *before* it tries to
//! write Go, and when it has received Go: from then on the other copy may run.
//!
//! What it is not: a process. It reads no clock.

use std::io::{self, Read};

/// Any byte on the pipe from the owner: nothing is left to put right.
pub const STAND_DOWN: &[u8] = b"x";

/// What a guard asks of its host.
pub trait Keeper {
    /// The host's refusal.
    type Error;

    /// Whether the domain is suspended.
    ///
    /// # Errors
    /// Nobody can say.
    fn is_suspended(&mut self) -> Result<bool, Self::Error>;
    /// Waits until asking again makes sense; `false`: a guest that was asked to suspend would
    /// have followed by now.
    fn wait(&mut self) -> bool;
    /// Gives the domain its own name back, if it has that of [`super::away_name`].
    ///
    /// # Errors
    /// The host's.
    fn restore_name(&mut self) -> Result<(), Self::Error>;
    /// Lets the domain run on.
    ///
    /// # Errors
    /// The host's.
    fn resume(&mut self) -> Result<(), Self::Error>;
}

/// Waits for a word or the end of `owner`. True: there is something to do.
pub fn is_needed(owner: &mut impl Read) -> bool {
    let mut word = [0];
    loop {
        match owner.read(&mut word) {
            Ok(0) => return true,
            Ok(_) => return false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
}

/// Puts the source right: the guest runs on under its own name.
///
/// # Errors
/// The host's; the guest is as it is then.
pub fn keep<K: Keeper>(host: &mut K) -> Result<(), K::Error> {
    while !host.is_suspended()? {
        if !host.wait() {
            return Ok(());
        }
    }
    host.restore_name()?;
    host.resume()
}

/// Puts the target right: no half-built copy is left. `find` looks for the copy by its name.
///
/// # Errors
/// The host's; the copy is still there then.
pub fn clear<C, E>(
    find: impl FnOnce() -> Option<C>,
    destroy: impl FnOnce(C) -> Result<(), E>,
) -> Result<(), E> {
    find().map_or(Ok(()), destroy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_acts_only_if_its_owner_goes_without_a_word() {
        assert!(is_needed(&mut io::empty()));
        assert!(!is_needed(&mut STAND_DOWN.repeat(2).as_slice()));
    }
}
