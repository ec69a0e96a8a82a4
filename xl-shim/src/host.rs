//! This host's toolstack, and rxl itself as libxl's save helper.

use std::env;
use std::os::fd::AsRawFd;

use anyhow::Context;
use rxl_toolstack::inherit;
use rxl_toolstack::libxl::{Libxl, LogOptions, use_save_helper};

use crate::cli::Globals;
use crate::events::{self, EventsPipe};
use crate::output;

/// Who prints how far a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// libxl's logger, line by line, as under `xl`.
    Lines,
    /// rxl's bar.
    Bar,
    /// Nobody: the other end does.
    Silent,
}

impl Progress {
    /// For the sender: a bar on a terminal.
    pub(crate) fn of_sender() -> Progress {
        if output::stderr_shows_bars() { Progress::Bar } else { Progress::Lines }
    }
}

/// Makes this program the save helper of all that this process lets libxl do. To be called while
/// there is one thread.
pub(crate) fn become_save_helper() -> anyhow::Result<()> {
    let me = env::current_exe().context("finding rxl itself")?;
    use_save_helper(me.as_os_str()).context("choosing the save helper")
}

/// Tells the save helper where its events go. To be called while there is one thread.
pub(crate) fn pass_events(pipe: &EventsPipe) -> anyhow::Result<()> {
    let number = pipe.writer().as_raw_fd().to_string();
    inherit::set_variable(events::ENV_FD, number.as_ref()).context("passing the events' pipe")
}

/// Connects to libxl, which logs to standard error from now on.
pub(crate) fn open(globals: &Globals, progress: Progress) -> anyhow::Result<Libxl> {
    let options = LogOptions {
        verbosity: globals.verbose,
        progress: progress == Progress::Lines,
        carriage_return: globals.progress_cr,
        timestamps: globals.timestamps,
    };
    Ok(Libxl::open(options)?)
}
