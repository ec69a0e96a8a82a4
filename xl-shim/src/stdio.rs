//! Standard input and output as the place of a stream.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Moves them away from descriptors 0 and 1, which whatever libxl starts would inherit: a script
/// that prints a word would speak to the sender or into the file, and one that stays would keep
/// ssh's connection open. Input, then output.
pub(crate) fn take() -> io::Result<(OwnedFd, OwnedFd)> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    rustix::stdio::dup2_stdout(io::stderr())?;
    Ok((input, output))
}
