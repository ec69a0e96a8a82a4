//! The console: whole lines out from any thread, and a terminal that echoes nothing back.

use std::io::{Write, stdin, stdout};

use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// Handle for printing; standard output locks per line.
#[derive(Clone, Debug)]
pub(crate) struct Console;

impl Console {
    /// Switches echo and line editing off, if the console is a terminal.
    pub(crate) fn open() -> Self {
        if let Ok(mut attributes) = tcgetattr(stdin()) {
            attributes.make_raw();
            // A console that refuses is still usable; it only echoes.
            let _ = tcsetattr(stdin(), OptionalActions::Now, &attributes);
        }
        Self
    }

    /// Prints one line.
    pub(crate) fn line(&self, text: &str) {
        let mut out = stdout().lock();
        // There is nowhere else to complain to.
        let _ = write!(out, "{text}\r\n").and_then(|()| out.flush());
    }
}
