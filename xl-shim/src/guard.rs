//! The process that puts things right if the rxl that it belongs to is killed. What it does, and
//! when, is [`rxl_migrate::xl::guard`]'s.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, bail};
use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::CpuCap;
use rxl_migrate::xl::away_name;
use rxl_migrate::xl::guard::{self, Duty};
use rxl_toolstack::inherit;
use rxl_toolstack::lifecycle::{DomainState, Lifecycle, LifecycleError};

use crate::Exit;
use crate::cli::{Globals, GuardArgs};
use crate::host::{self, Progress};
use crate::lock::{self, Lock};
use crate::migrate::by_hand;
use crate::output::{self, Screen};
use crate::status::Runs;

/// Which end a guard belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Side {
    /// The domain is being sent or saved.
    Source,
    /// It is being received or restored.
    Target,
}

/// What a guard watches over.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ward<'a> {
    /// A domain that is sent or saved.
    Leaving {
        domid: DomId,
        name: &'a str,
        /// The file that it is written to and that has no name of its own yet.
        draft: Option<&'a Path>,
        /// The host that it is sent to.
        to: Option<&'a str>,
        /// How much processor time it may have, if it may be slowed meanwhile.
        cap: Option<CpuCap>,
    },
    /// A copy of that name that is made.
    Copy(&'a str),
}

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

    /// Starts a guard. Without one rxl is as safe as `xl`, so that is no error. It holds `lock`
    /// with its owner.
    pub(crate) fn start(ward: Ward<'_>, lock: &Lock, screen: &Screen) -> Guard {
        match Guard::spawn(ward, lock) {
            Ok(guard) => guard,
            Err(error) => {
                screen.line(&format!("rxl: going on without a guard process: {error}"));
                Guard::none()
            }
        }
    }

    fn spawn(ward: Ward<'_>, lock: &Lock) -> io::Result<Guard> {
        let mut command = Command::new(env::current_exe()?);
        command.arg("domain-guard").arg("--lock").arg(lock.number().to_string());
        match ward {
            Ward::Leaving { domid, name, draft, to, cap } => {
                if let Some(CpuCap(cap)) = cap {
                    command.arg("--cpu-cap").arg(cap.to_string());
                }
                if let Some(draft) = draft {
                    command.arg("--draft").arg(draft);
                }
                if let Some(to) = to {
                    command.arg("--to").arg(to);
                }
                command.args(["source", "--", name, &domid.to_string()]);
            }
            Ward::Copy(name) => {
                command.args(["target", "--", name]);
            }
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = lock.inherited_by(|| command.spawn())?;
        let pipe = child.stdin.take();
        Ok(Guard(pipe.map(|pipe| (child, pipe))))
    }

    /// It may no longer do anything, but tell the user if its owner dies.
    pub(crate) fn stand_down(&mut self) {
        self.say(guard::STAND_DOWN);
    }

    fn say(&mut self, word: &[u8]) {
        if let Some((_, pipe)) = &mut self.0 {
            // A guard that is gone does nothing either.
            let _ = pipe.write_all(word);
        }
    }

    /// It has to act, or to tell if it has stood down: its owner does not know how to go on.
    pub(crate) fn abandon(&mut self) {
        self.0 = None;
    }
}

/// It is over, and nothing is left to put right.
impl Drop for Guard {
    fn drop(&mut self) {
        self.say(guard::OVER);
        if let Some((mut child, pipe)) = self.0.take() {
            drop(pipe);
            let _ = child.wait();
        }
    }
}

/// The guard process.
pub(crate) fn run(globals: &Globals, ward: &GuardArgs) -> anyhow::Result<Exit> {
    // Away from the terminal, whose Ctrl-C is for the owner to judge.
    rustix::process::setsid().context("leaving the session")?;
    let owner = rustix::process::getppid();
    let duty = guard::duty(&mut io::stdin());
    if duty == Duty::Nothing {
        return Ok(Exit::Success);
    }
    let done = stand_in(globals, ward, duty);
    if let Some(owner) = owner.and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok()) {
        Runs::of_this_host().forget(owner);
    }
    done
}

/// Does what is to be done once the owner is gone.
fn stand_in(globals: &Globals, ward: &GuardArgs, duty: Duty) -> anyhow::Result<Exit> {
    let GuardArgs { side, name, domid, draft, to, cpu_cap, lock } = ward;
    if duty == Duty::Tell && *side == Side::Target {
        // What a receiver leaves there, the sender's user is told of.
        return Ok(Exit::Success);
    }
    if let Some(draft) = draft.as_deref().filter(|_| duty == Duty::Act) {
        remove(draft);
    }
    let host = host::open(globals, Progress::Silent)?;
    match (side, domid.map(DomId)) {
        (Side::Source, Some(domid)) if duty == Duty::Tell => {
            if let Some(advice) = advice(&host, domid, name, to.as_deref()) {
                output::stderr(&advice);
            }
            return Ok(Exit::Success);
        }
        (Side::Source, Some(domid)) => {
            // Without the lock nothing could be said.
            let lock = lock.and_then(|number| inherit::descriptor(number).ok());
            let asked = lock.is_none_or(lock::was_asked);
            keep(&host, domid, name, cpu_cap.map(CpuCap), asked)?;
        }
        (Side::Source, None) => bail!("which domain?"),
        (Side::Target, _) => clear(&host, name)?,
    }
    output::stderr(&format!(
        "rxl: the rxl that moved, saved or restored {name} was killed; its guard has cleaned up"
    ));
    Ok(Exit::Success)
}

/// What the user has to do with a domain whose rxl was killed when the other copy could run
/// already; `None` if the domain is not suspended here.
fn advice(host: &dyn Lifecycle, domid: DomId, name: &str, to: Option<&str>) -> Option<String> {
    if matches!(host.state(domid), Ok(state) if state != DomainState::Suspended) {
        return None;
    }
    let here = host.name(domid).unwrap_or_else(|_| away_name(name));
    Some(match to {
        Some(target) => format!(
            "rxl: the rxl that moved {name} was killed after {target} had been permitted to start \
             it\n{}",
            by_hand(name, target, &here)
        ),
        None => format!(
            "rxl: the rxl that saved {name} was killed when the file was complete; {name} is \
             still here, suspended.\nrxl: It must not run any more if the file is to be used: xl \
             destroy {here}\nrxl: If not, remove the file, then: rxl resume {here}"
        ),
    })
}

/// Removes an unfinished file, if it has not got its name; the save helper may write to it for a
/// moment yet.
fn remove(draft: &Path) {
    match fs::remove_file(draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            output::stderr(&format!("rxl: removing {}: {error}", draft.display()));
        }
        _ => {}
    }
}

/// Puts the source right. `cap`: how much processor time it had, if it may have been slowed.
/// `asked`: whether it may have been asked to suspend.
pub(crate) fn keep(
    host: &dyn Lifecycle,
    domid: DomId,
    name: &str,
    cap: Option<CpuCap>,
    asked: bool,
) -> anyhow::Result<()> {
    let limit = Instant::now() + SUSPEND_LIMIT;
    Ok(guard::keep(&mut Source { host, domid, name, cap, limit }, asked)?)
}

/// The domain that is being sent.
struct Source<'a> {
    host: &'a dyn Lifecycle,
    domid: DomId,
    name: &'a str,
    cap: Option<CpuCap>,
    limit: Instant,
}

impl guard::Keeper for Source<'_> {
    type Error = LifecycleError;

    fn is_suspended(&mut self) -> Result<bool, LifecycleError> {
        Ok(self.host.state(self.domid)? == DomainState::Suspended)
    }

    fn wait(&mut self) -> bool {
        let on = Instant::now() < self.limit;
        if on {
            thread::sleep(POLL);
        }
        on
    }

    fn log_dirty_off(&mut self) {
        if let Err(error) = self.host.log_dirty_off(self.domid) {
            output::stderr(&format!("rxl: {error}"));
        }
    }

    fn speed_up(&mut self) {
        if let Some(cap) = self.cap
            && let Err(error) = self.host.set_cpu_cap(self.domid, cap)
        {
            output::stderr(&format!("rxl: {error}"));
        }
    }

    fn restore_name(&mut self) -> Result<(), LifecycleError> {
        let away = away_name(self.name);
        if self.host.name(self.domid)? == away {
            self.host.rename(self.domid, &away, self.name)?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), LifecycleError> {
        self.host.resume(self.domid)
    }
}

/// Puts the target right. `incoming` is the copy's name.
pub(crate) fn clear(host: &dyn Lifecycle, incoming: &str) -> anyhow::Result<()> {
    Ok(guard::clear(|| host.resolve(incoming).ok(), |domid| host.destroy(domid))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Condition, FakeHost};

    #[test]
    fn at_the_source_the_guest_runs_on_under_its_own_name() {
        for name in ["web", "web--migratedaway"] {
            let host = FakeHost::default();
            let domid = host.add(name, Condition::Suspended);
            host.set_cpu_cap(domid, CpuCap(10)).unwrap();
            keep(&host, domid, "web", Some(CpuCap(70)), true).unwrap();
            assert_eq!(host.cpu_cap(domid).unwrap(), CpuCap(70));
            assert_eq!(host.domains(), [("web".to_owned(), Condition::Runs)]);
        }
    }

    #[test]
    fn an_unfinished_file_goes_and_one_that_has_its_name_already_is_no_matter() {
        let dir = tempfile::tempdir().unwrap();
        let draft = dir.path().join("web.save.x.partial");
        fs::write(&draft, b"half").unwrap();
        remove(&draft);
        assert!(!draft.exists());
        remove(&draft);
    }

    #[test]
    fn after_the_permission_to_start_the_user_is_told_what_only_the_user_can_find_out() {
        let host = FakeHost::default();
        let domid = host.add("web--migratedaway", Condition::Suspended);
        let text = advice(&host, domid, "web", Some("host2")).unwrap();
        assert!(text.contains("was killed after host2 had been permitted"), "{text}");
        assert!(text.contains("Look there: xl list web\n"), "{text}");
        assert!(text.ends_with("then here: rxl resume web--migratedaway"), "{text}");
        let saved = advice(&host, domid, "web", None).unwrap();
        assert!(saved.contains("remove the file, then: rxl resume"), "{saved}");
        let domid = host.add("db", Condition::Runs);
        assert_eq!(advice(&host, domid, "db", Some("host2")), None);
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
