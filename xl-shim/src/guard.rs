//! A process that puts things right if the migration it belongs to is killed.
//!
//! Who sends or receives a domain holds it in a state that only it can end: suspended here, half
//! built there. Should that process die without a word (SIGKILL, out of memory), its guard sees
//! the end of the pipe between them:
//!
//! - at the source it waits until the guest has suspended, if it was asked to, and resumes it
//!   under its own name;
//! - at the target it destroys the copy that is called `NAME--incoming`.
//!
//! It does neither once it has been told to stand down, which its owner does *before* it tries to
//! write Go, and when it has received Go: from then on the other copy may run.

use std::env;
use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rxl_migrate::frame::DomId;
use rxl_toolstack::lifecycle::{DomainState, Lifecycle};

use crate::Exit;
use crate::cli::Globals;
use crate::host::{self, Progress};
use crate::migrate::AWAY;
use crate::output::{self, Screen};

/// Which end a guard belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Side {
    /// The domain is being sent.
    Source,
    /// It is being received.
    Target,
}

/// Any byte on the pipe: nothing is left to put right.
const STAND_DOWN: &[u8] = b"x";
/// A guest that was asked to suspend follows within libxl's limit, or never.
const SUSPEND_LIMIT: Duration = Duration::from_secs(65);
const POLL: Duration = Duration::from_millis(500);

/// The owner's end.
#[derive(Debug)]
pub(crate) struct Guard(Option<(Child, ChildStdin)>);

impl Guard {
    /// No guard: in tests, and where none could be started.
    pub(crate) fn none() -> Guard {
        Guard(None)
    }

    /// Starts a guard. Without one a migration is as safe as with `xl`, so that is no error.
    pub(crate) fn start(side: Side, name: &str, domid: Option<DomId>, screen: &Screen) -> Guard {
        match Guard::spawn(side, name, domid) {
            Ok(guard) => guard,
            Err(error) => {
                screen.line(&format!("rxl: going on without a guard process: {error}"));
                Guard::none()
            }
        }
    }

    fn spawn(side: Side, name: &str, domid: Option<DomId>) -> io::Result<Guard> {
        let side = match side {
            Side::Source => "source",
            Side::Target => "target",
        };
        let mut child = Command::new(env::current_exe()?)
            .args(["domain-guard", side, "--", name])
            .args(domid.map(|d| d.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let pipe = child.stdin.take();
        Ok(Guard(pipe.map(|pipe| (child, pipe))))
    }

    /// It may no longer do anything.
    pub(crate) fn stand_down(&mut self) {
        if let Some((_, pipe)) = &mut self.0 {
            // A guard that is gone does nothing either.
            let _ = pipe.write_all(STAND_DOWN);
        }
    }

    /// It has to act, unless it has been told to stand down: its owner does not know how to go on.
    pub(crate) fn abandon(&mut self) {
        self.0 = None;
    }
}

/// It is over, and nothing is left to put right.
impl Drop for Guard {
    fn drop(&mut self) {
        self.stand_down();
        if let Some((mut child, pipe)) = self.0.take() {
            drop(pipe);
            let _ = child.wait();
        }
    }
}

/// The guard process.
pub(crate) fn run(
    globals: &Globals,
    side: Side,
    name: &str,
    domid: Option<u16>,
) -> anyhow::Result<Exit> {
    // Away from the terminal, whose Ctrl-C is for the owner to judge.
    rustix::process::setsid().context("leaving the session")?;
    if !wait(&mut io::stdin()) {
        return Ok(Exit::Success);
    }
    let host = host::open(globals, Progress::Silent)?;
    match (side, domid) {
        (Side::Source, Some(domid)) => keep(&host, DomId(domid), name)?,
        (Side::Source, None) => bail!("which domain?"),
        (Side::Target, _) => clear(&host, name)?,
    }
    output::stderr(&format!("rxl: the migration of {name} was killed; its guard has cleaned up"));
    Ok(Exit::Success)
}

/// Waits for a word or the end of `owner`. True: there is something to do.
pub(crate) fn wait(owner: &mut impl Read) -> bool {
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
pub(crate) fn keep(host: &dyn Lifecycle, domid: DomId, name: &str) -> anyhow::Result<()> {
    let limit = Instant::now() + SUSPEND_LIMIT;
    while host.state(domid)? != DomainState::Suspended {
        if Instant::now() >= limit {
            return Ok(());
        }
        thread::sleep(POLL);
    }
    let away = format!("{name}{AWAY}");
    if host.name(domid)? == away {
        host.rename(domid, &away, name)?;
    }
    Ok(host.resume(domid)?)
}

/// Puts the target right: no half-built copy is left. `incoming` is its name.
pub(crate) fn clear(host: &dyn Lifecycle, incoming: &str) -> anyhow::Result<()> {
    match host.resolve(incoming) {
        Ok(domid) => Ok(host.destroy(domid)?),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Condition, FakeHost};

    #[test]
    fn a_guard_acts_only_if_its_owner_goes_without_a_word() {
        assert!(wait(&mut io::empty()));
        assert!(!wait(&mut STAND_DOWN.repeat(2).as_slice()));
    }

    #[test]
    fn at_the_source_the_guest_runs_on_under_its_own_name() {
        for name in ["web", "web--migratedaway"] {
            let host = FakeHost::default();
            let domid = host.add(name, Condition::Suspended);
            keep(&host, domid, "web").unwrap();
            assert_eq!(host.domains(), [("web".to_owned(), Condition::Runs)]);
        }
    }

    #[test]
    fn at_the_target_only_the_incoming_copy_goes() {
        let host = FakeHost::default();
        host.add("web", Condition::Runs);
        clear(&host, "web--incoming").unwrap();
        host.add("web--incoming", Condition::Paused);
        clear(&host, "web--incoming").unwrap();
        assert_eq!(host.domains(), [("web".to_owned(), Condition::Runs)]);
    }
}
