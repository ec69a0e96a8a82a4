//! libxl, as the engine sees it.

use std::io;
use std::time::Duration;

use super::domain::FakeDomain;
use crate::hypervisor::{LogLevel, Toolstack};
use crate::report::Event;

/// What the engine said or asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// [`Toolstack::suspend`].
    Suspend,
    /// [`Toolstack::qemu_log_dirty`].
    QemuLogDirty(bool),
    /// [`Toolstack::static_data_done`].
    StaticDataDone {
        /// As said.
        missing_cpuid: bool,
        /// As said.
        missing_msr: bool,
    },
    /// [`Toolstack::log`].
    Log(LogLevel, String),
    /// [`Toolstack::event`].
    Event(Event),
}

/// A toolstack for one domain, which does as it is asked and remembers it.
#[derive(Debug)]
pub struct FakeToolstack {
    domain: FakeDomain,
    /// All that was said, but progress.
    pub heard: Vec<Heard>,
    /// The guest does not follow the request to suspend.
    pub refuses_to_suspend: bool,
    /// The device model does not follow the request to log.
    pub qemu_fails: bool,
    /// Called at each [`Toolstack::progress`].
    pub on_progress: Option<fn(&FakeDomain)>,
    /// [`Toolstack::aborted`] is true after so many calls.
    pub abort_at: Option<u64>,
    /// What [`Toolstack::now`] says.
    pub clock: Duration,
    asked: std::cell::Cell<u64>,
}

impl FakeToolstack {
    /// For `domain`.
    #[must_use]
    pub fn new(domain: &FakeDomain) -> FakeToolstack {
        FakeToolstack {
            domain: domain.clone(),
            heard: Vec::new(),
            refuses_to_suspend: false,
            qemu_fails: false,
            on_progress: None,
            abort_at: None,
            clock: Duration::ZERO,
            asked: 0.into(),
        }
    }

    /// The lines logged at `level`.
    #[must_use]
    pub fn lines(&self, level: LogLevel) -> Vec<&str> {
        let line = |heard| match heard {
            &Heard::Log(at, ref line) if at == level => Some(line.as_str()),
            _ => None,
        };
        self.heard.iter().filter_map(line).collect()
    }
}

impl Toolstack for FakeToolstack {
    fn suspend(&mut self) -> io::Result<bool> {
        self.heard.push(Heard::Suspend);
        if !self.refuses_to_suspend {
            self.domain.suspend();
        }
        Ok(!self.refuses_to_suspend)
    }

    fn qemu_log_dirty(&mut self, on: bool) -> io::Result<()> {
        self.heard.push(Heard::QemuLogDirty(on));
        if self.qemu_fails {
            return Err(io::Error::other("no answer from the device model"));
        }
        self.domain.set_qemu_log_dirty(on);
        Ok(())
    }

    fn static_data_done(&mut self, missing_cpuid: bool, missing_msr: bool) -> io::Result<()> {
        self.heard.push(Heard::StaticDataDone { missing_cpuid, missing_msr });
        Ok(())
    }

    fn log(&mut self, level: LogLevel, text: &str) {
        self.heard.push(Heard::Log(level, text.to_owned()));
    }

    fn progress(&mut self, _what: &str, _done: u64, _total: u64) {
        if let Some(act) = self.on_progress {
            act(&self.domain);
        }
    }

    fn event(&mut self, event: &Event) {
        self.heard.push(Heard::Event(event.clone()));
    }

    fn aborted(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.abort_at.is_some_and(|at| self.asked.get() > at)
    }

    fn now(&self) -> Duration {
        self.clock
    }
}
