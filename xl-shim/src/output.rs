//! Where all text goes that the program prints. What `xl` prints at the same points is printed as
//! `xl` prints it ([`crate::words`]), because scripts read it; rxl's own lines begin with `rxl: `.
//!
//! Standard output belongs to `rxl help`, `man`, `completions`, `divert`, `status` and to nothing
//! else: for `migrate-receive` it is the channel to the sender, for `save` it may be the file.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where lines for the user go: standard error, around the progress bar if there is one.
#[derive(Clone, Debug)]
pub(crate) struct Screen(Arc<Kind>);

#[derive(Debug)]
enum Kind {
    Stderr {
        bar: Mutex<Option<ProgressBar>>,
    },
    #[cfg(test)]
    Buffer(Mutex<Vec<String>>),
}

impl Screen {
    pub(crate) fn stderr() -> Screen {
        Screen(Arc::new(Kind::Stderr { bar: Mutex::new(None) }))
    }

    /// Prints a line, or several.
    pub(crate) fn line(&self, text: &str) {
        match &*self.0 {
            Kind::Stderr { bar } => {
                let bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
                match bar.as_ref().filter(|bar| !bar.is_hidden()) {
                    Some(bar) => bar.println(text),
                    None => stderr(text),
                }
            }
            #[cfg(test)]
            Kind::Buffer(lines) => {
                lines.lock().unwrap().extend(text.lines().map(str::to_owned));
            }
        }
    }

    /// Shows a bar, or moves it; `text` is what stands below it.
    pub(crate) fn progress(&self, label: &str, done: u64, total: u64, text: &str) {
        let bar = match &*self.0 {
            Kind::Stderr { bar } => bar,
            #[cfg(test)]
            Kind::Buffer(_) => return,
        };
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = bar.get_or_insert_with(|| new_bar(ProgressDrawTarget::stderr_with_hz(5)));
        bar.set_length(total);
        bar.set_position(done);
        bar.set_prefix(label.to_owned());
        bar.set_message(text.to_owned());
    }

    /// Takes the bar away.
    pub(crate) fn end_progress(&self) {
        let bar = match &*self.0 {
            Kind::Stderr { bar } => bar,
            #[cfg(test)]
            Kind::Buffer(_) => return,
        };
        let bar = bar.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
    }

    #[cfg(test)]
    pub(crate) fn buffer() -> Screen {
        Screen(Arc::new(Kind::Buffer(Mutex::new(Vec::new()))))
    }

    /// A terminal that keeps what is drawn.
    #[cfg(test)]
    pub(crate) fn on(terminal: &indicatif::InMemoryTerm) -> Screen {
        let bar = new_bar(ProgressDrawTarget::term_like(Box::new(terminal.clone())));
        Screen(Arc::new(Kind::Stderr { bar: Mutex::new(Some(bar)) }))
    }

    #[cfg(test)]
    pub(crate) fn text(&self) -> String {
        match &*self.0 {
            Kind::Buffer(lines) => lines.lock().unwrap().join("\n"),
            Kind::Stderr { .. } => String::new(),
        }
    }
}

fn new_bar(target: ProgressDrawTarget) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {percent:>3}%\n{msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(0), target).with_style(style)
}

/// Writes to standard output. `false`: nobody reads it any more.
pub(crate) fn stdout(text: &str) -> bool {
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}

/// Writes a line to standard error, where there is no [`Screen`] yet. In one piece: the receiver
/// writes to the same place.
pub(crate) fn stderr(text: &str) {
    // Nothing can be done about a standard error that is gone.
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Whether standard error is a terminal.
pub(crate) fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Whether standard input is a terminal.
pub(crate) fn stdin_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Whether standard output is a terminal.
pub(crate) fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether a progress bar can be seen: standard error is a terminal that can redraw a line
/// (`TERM` is set, and not to `dumb`). If not, xl's lines say how far a migration is.
pub(crate) fn stderr_shows_bars() -> bool {
    !ProgressDrawTarget::stderr().is_hidden()
}
