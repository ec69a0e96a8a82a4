//! What a process hands to the ones that it starts besides arguments: descriptors by number, and
//! variables of the environment.
//!
//! libxl starts the save helper, so `rxl` cannot: it passes what the helper needs beyond libxl's
//! own arguments this way.
//!
//! # Safety
//! A number is turned into a descriptor only to duplicate it, so nobody else's descriptor is
//! closed; the environment is changed only while the process has one thread.
#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// A duplicate of the inherited descriptor `number`, which later children do not inherit.
///
/// # Errors
/// `EBADF`: it is not open.
pub fn descriptor(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: used for one fcntl, which fails where no such descriptor is open; -1 is excluded.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned()
}

/// Sets a variable of this process's environment, for the processes that it will start.
///
/// # Errors
/// Other threads run already, which might read the environment meanwhile.
pub fn set_variable(name: &str, value: &OsStr) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other(format!("{name} has to be set before threads start")));
    }
    // SAFETY: this is the only thread, so nobody reads or writes the environment meanwhile.
    unsafe { std::env::set_var(name, value) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write, pipe};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_descriptor_is_found_by_its_number_and_a_closed_one_is_an_error() {
        let (mut reader, writer) = pipe().unwrap();
        let mut found = std::fs::File::from(descriptor(writer.as_raw_fd()).unwrap());
        drop(writer);
        found.write_all(b"x").unwrap();
        drop(found);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"x");
        for number in [-1, i32::MAX] {
            let error = descriptor(number).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        }
    }
}
