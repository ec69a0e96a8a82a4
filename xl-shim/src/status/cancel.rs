//! `rxl cancel`: what Ctrl-C does, from another shell. The rxl that is meant decides whether it is
//! not too late; here it is told and waited for.

use std::io;
use std::os::fd::OwnedFd;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::runs::{Run, Runs, process_started};
use super::state::{Doing, Phase, State};
use crate::Exit;
use crate::output;

/// Cancels what goes on with `domain`, and waits until that is over.
pub(crate) fn run(domain: &str) -> anyhow::Result<Exit> {
    let (exit, text) = cancel(&Runs::of_this_host(), domain)?;
    output::stderr(&format!("rxl: {text}"));
    Ok(exit)
}

/// The exit code, and what the user is told.
fn cancel(runs: &Runs, domain: &str) -> anyhow::Result<(Exit, String)> {
    let state = find(runs, domain)?;
    let name = &state.domain;
    if state.phase == Phase::Committed {
        bail!("too late to cancel: {name} {}", may_run(state.doing));
    }
    let process = open(&state).context("reaching the rxl that is to be cancelled")?;
    let Some(process) = process else { bail!("too late to cancel: it has just ended") };
    match pidfd_send_signal(&process, Signal::TERM) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => {
            return Err(io::Error::from(error)).context("telling the rxl that is to be cancelled");
        }
    }
    let mut ends = [PollFd::new(&process, PollFlags::IN)];
    retry_on_intr(|| poll(&mut ends, None)).context("waiting for it")?;
    let exit = runs.read(state.pid).and_then(|state| state.exit);
    let cancelled = exit == Some(Exit::Cancelled as u8)
        || (state.doing == Doing::Receive && exit == Some(Exit::Failed as u8));
    Ok(match exit {
        _ if cancelled => (Exit::Success, format!("cancelled: {}", where_now(&state))),
        Some(0) => (Exit::Failed, format!("too late to cancel: {name} {}", done(state.doing))),
        Some(code) => {
            let text = "it ended by itself, and not well";
            (Exit::Failed, format!("{name}: {text} (exit code {code}); it has said what is left"))
        }
        None => {
            let text = "its rxl ended without a word; if there is a guard it cleans up";
            (Exit::Failed, format!("{name}: {text}: see rxl status, xl list"))
        }
    })
}

/// The one that the user means; of a domain that comes and one that goes, the one that goes.
fn find(runs: &Runs, domain: &str) -> anyhow::Result<State> {
    let all = runs.list();
    let mut meant: Vec<Run> = all.into_iter().filter(|run| run.state.is_of(domain)).collect();
    meant.sort_by_key(|run| (run.is_killed, !run.state.doing.is_leaving()));
    match meant.into_iter().next() {
        Some(run) if run.is_killed => bail!(
            "the rxl that moved, saved or restored {domain} was killed; its guard puts things \
             right, which takes a minute at most"
        ),
        Some(run) => Ok(run.state),
        None => bail!(
            "{domain} is not being migrated, saved or restored here (rxl status shows what is)"
        ),
    }
}

/// `None`: it is over.
fn open(state: &State) -> io::Result<Option<OwnedFd>> {
    let pid = i32::try_from(state.pid).ok().and_then(Pid::from_raw);
    let Some(pid) = pid else { return Ok(None) };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(None),
        opened => opened?,
    };
    // The number may have come to another process before it was opened, not since.
    Ok((process_started(state.pid) == Some(state.pid_started)).then_some(process))
}

fn may_run(doing: Doing) -> &'static str {
    match doing {
        Doing::Migrate => "may run at the target already",
        Doing::Receive | Doing::Restore => "is being started here",
        Doing::Save => "is saved",
    }
}

fn done(doing: Doing) -> &'static str {
    match doing {
        Doing::Migrate => "runs at the target",
        Doing::Receive | Doing::Restore => "is here",
        Doing::Save => "is saved",
    }
}

fn where_now(state: &State) -> String {
    let name = &state.domain;
    match state.doing {
        Doing::Migrate | Doing::Save => format!("{name} runs on here"),
        Doing::Receive => format!("nothing of {name} is here; it is left to the sender"),
        Doing::Restore => format!("nothing of {name} is here"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    use super::super::state::example;
    use super::*;

    /// A process that says it is an rxl, and when it gets SIGTERM, that it ended with `exit`.
    fn pretend(directory: &Path, doing: Doing, exit: Option<u8>) -> Child {
        let script = "trap 'kill $!; test ! -e ended || mv ended $$.json; exit' TERM
                      sleep 1000 > /dev/null & echo; wait";
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(directory).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let (pid, pid_started) = (child.id(), process_started(child.id()).unwrap());
        let state = State { doing, pid, pid_started, ..example() };
        Runs::at(directory).write(&state).unwrap();
        if exit.is_some() {
            let ended = serde_json::to_vec(&State { exit, ..state }).unwrap();
            fs::write(directory.join("ended"), ended).unwrap();
        }
        child
    }

    #[test]
    fn it_is_told_and_waited_for_and_the_user_told_what_came_of_it() {
        for (doing, exit, code, text) in [
            (Doing::Migrate, Some(130), Exit::Success, "cancelled: web runs on here"),
            (Doing::Restore, Some(130), Exit::Success, "cancelled: nothing of web is here"),
            (Doing::Receive, Some(1), Exit::Success, "cancelled: nothing of web is here; it is"),
            (Doing::Migrate, Some(0), Exit::Failed, "too late to cancel: web runs at the target"),
            (Doing::Save, Some(1), Exit::Failed, "web: it ended by itself, and not well"),
            (Doing::Save, None, Exit::Failed, "web: its rxl ended without a word"),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let mut child = pretend(directory.path(), doing, exit);
            let (got, said) = cancel(&Runs::at(directory.path()), "web").unwrap();
            child.wait().unwrap();
            assert_eq!(got, code, "{said}");
            assert!(said.starts_with(text), "{said}");
        }
    }

    #[test]
    fn what_is_not_there_or_too_late_is_refused_and_nobody_told() {
        let directory = tempfile::tempdir().unwrap();
        let runs = Runs::at(directory.path());
        let refused = |domain: &str| cancel(&runs, domain).unwrap_err().to_string();
        assert!(refused("web").starts_with("web is not being migrated"), "{}", refused("web"));
        // Nobody else than this process itself: the signal would end it.
        let pid = std::process::id();
        let pid_started = process_started(pid).unwrap();
        runs.write(&State { phase: Phase::Committed, pid, pid_started, ..example() }).unwrap();
        assert_eq!(refused("web"), "too late to cancel: web may run at the target already");
    }
}
