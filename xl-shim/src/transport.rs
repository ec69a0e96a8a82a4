//! The process that carries the migration: ssh, or whatever `-s` says, between two pipes.
//!
//! It is started under `sh -c` with SIGINT and SIGHUP ignored, which ssh leaves so: a Ctrl-C at
//! the terminal reaches only rxl, which knows whether the migration can still be cancelled.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Pid, Signal, kill_process};

/// Wanted capacity of the pipe to the transport: the helper writes batches of up to 4 MiB, and
/// the default of 64 KiB means a switch of processes for each 16 pages.
const PIPE_BYTES: usize = 1 << 20;
/// How long the transport may take to end once its pipes are closed, as in `xl`.
const GRACE: Duration = Duration::from_secs(2);

/// What runs at the target and how it is reached.
#[derive(Debug)]
pub(crate) struct Rune<'a> {
    /// The command that reaches it by TLS, if that is wanted.
    pub(crate) tls: Option<String>,
    /// `-s`: the command before the host; empty: `host` is a whole shell command.
    pub(crate) ssh: &'a str,
    /// As given.
    pub(crate) host: &'a str,
    /// `--receiver`: the program there; none: rxl where there is one, else xl.
    pub(crate) receiver: Option<&'a str>,
    /// xl is of no use there.
    pub(crate) rxl_only: bool,
    /// Options of xl before the verb, e.g. `-vvv`.
    pub(crate) globals: Vec<String>,
    /// Options after it.
    pub(crate) options: Vec<&'static str>,
    /// KiB that the domain takes, which a receiver that is rxl for certain is told.
    pub(crate) need: Option<u64>,
}

impl Rune<'_> {
    /// The shell command.
    pub(crate) fn command(&self) -> String {
        if let Some(command) = &self.tls {
            return command.clone();
        }
        if self.ssh.is_empty() {
            return self.host.to_owned();
        }
        let mut words = self.globals.join(" ");
        if !words.is_empty() {
            words.push(' ');
        }
        words.push_str("migrate-receive");
        for option in &self.options {
            words.push(' ');
            words.push_str(option);
        }
        let remote = match self.receiver {
            Some(program) => format!("{program} {words}"),
            None => quoted(&self.remote_snippet(&words)),
        };
        format!("exec {} {} {remote}", self.ssh, self.host)
    }

    /// What the target's shell runs: plain POSIX, and no single quote in it, so that single
    /// quotes bring it through the local shell and ssh as it is.
    fn remote_snippet(&self, words: &str) -> String {
        let need = self.need.map(|kib| format!(" --need {kib}")).unwrap_or_default();
        let exec_if_there = |program: &str, words: &str| {
            format!("command -v {program} >/dev/null 2>&1 && exec {program} {words};")
        };
        let rxl = exec_if_there("rxl", &format!("{words}{need}"));
        let (xl, none) = match self.rxl_only {
            true => (String::new(), "no rxl"),
            false => (exec_if_there("xl", words), "neither rxl nor xl"),
        };
        format!("{REMOTE_PATH} {rxl} {xl} echo \"{none} on $(uname -n)\" >&2; exit 127")
    }
}

/// Where a target's programs are: ssh gives root a short path.
pub(crate) const REMOTE_PATH: &str =
    "PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin; export PATH;";

/// In single quotes, of which `text` has none.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{text}'")
}

/// The running transport and the descriptors to its two ends.
#[derive(Debug)]
pub(crate) struct Transport {
    child: Child,
}

impl Transport {
    /// Starts it: what it says, and where to write to it.
    pub(crate) fn start(command: &str) -> anyhow::Result<(Transport, OwnedFd, OwnedFd)> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).context("making a pipe");
        let (child_input, output) = pipe()?;
        let (input, child_output) = pipe()?;
        // Only speed hangs on it, and a limit of the system may forbid it.
        let _ = fcntl_setpipe_size(output.as_fd(), PIPE_BYTES);
        let script = format!("trap '' INT HUP; {command}");
        let child = Command::new("sh")
            .args([OsStr::new("-c"), OsStr::new(&script)])
            .stdin(Stdio::from(child_input))
            .stdout(Stdio::from(child_output))
            .spawn()
            .context("starting the migration transport")?;
        Ok((Transport { child }, input, output))
    }

    /// Waits a little for it to end by itself, which it does once its pipes are closed, and ends
    /// it otherwise. `None`: it had to be ended.
    pub(crate) fn finish(mut self, wait: bool) -> Option<ExitStatus> {
        let deadline = Instant::now() + if wait { GRACE } else { Duration::ZERO };
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                Ok(None) | Err(_) => break,
            }
        }
        self.end();
        None
    }

    fn end(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + GRACE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// What an exit status of the transport means; `None` for success.
pub(crate) fn explain(status: ExitStatus, rune: &Rune<'_>) -> Option<String> {
    let what = if rune.ssh.is_empty() { "the transport" } else { rune.ssh };
    if rune.tls.is_some() {
        return (!status.success()).then(|| format!("the connection to {} failed", rune.host));
    }
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(255), _) if !rune.ssh.is_empty() => Some(format!(
            "{what} could not reach {} or lost the connection (exit status 255)",
            rune.host
        )),
        (Some(127), _) if !rune.ssh.is_empty() => {
            Some(format!("no receiver was found on {} (exit status 127)", rune.host))
        }
        (Some(1), _) => Some("the receiver ended with exit status 1".to_owned()),
        (Some(code), _) => Some(format!("{what} ended with exit status {code}")),
        (None, Some(signal)) => Some(format!("{what} was ended by signal {signal}")),
        (None, None) => Some(format!("{what} ended: {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rune<'a>(ssh: &'a str, receiver: Option<&'a str>) -> Rune<'a> {
        Rune {
            tls: None,
            ssh,
            host: "host2",
            receiver,
            rxl_only: false,
            globals: vec!["-t".into(), "-vv".into()],
            options: vec!["-e", "-p"],
            need: Some(4096),
        }
    }

    #[test]
    fn a_named_receiver_is_started_as_xl_starts_its_own() {
        assert_eq!(
            rune("ssh -p 2", Some("xl")).command(),
            "exec ssh -p 2 host2 xl -t -vv migrate-receive -e -p"
        );
        assert_eq!(rune("", Some("xl")).command(), "host2");
    }

    /// Runs what the target's shell would be given, with `sh` in the place of ssh.
    fn run_remote(programs: &[(&str, &str)], rxl_only: bool) -> (Option<i32>, String, String) {
        let dir = tempfile::tempdir().unwrap();
        for (name, script) in programs {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&path, mode).unwrap();
        }
        // Takes the host away and joins the rest by spaces, as ssh does; the remote PATH then
        // holds nothing but `programs`, whatever is installed here.
        let ssh = dir.path().join("ssh");
        let bare = format!("shift; PATH={}/bin; exec /bin/sh -c \"$*\"", dir.path().display());
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        for (name, _) in programs {
            std::fs::rename(dir.path().join(name), dir.path().join("bin").join(name)).unwrap();
        }
        std::os::unix::fs::symlink("/bin/uname", dir.path().join("bin/uname")).unwrap();
        std::fs::write(&ssh, format!("#!/bin/sh\n{bare}\n")).unwrap();
        std::fs::set_permissions(&ssh, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let ssh = ssh.to_str().unwrap().to_owned();
        let command = Rune { rxl_only, ..rune(&ssh, None) }.command().replace(REMOTE_PATH, "");
        let out = Command::new("sh").args(["-c", &command]).output().unwrap();
        let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    }

    #[test]
    fn the_target_runs_rxl_if_it_has_one_else_xl_else_says_so() {
        let rxl = ("rxl", "echo rxl \"$@\"");
        let xl = ("xl", "echo xl \"$@\"");
        let words = "-t -vv migrate-receive -e -p\n";
        let told = "rxl -t -vv migrate-receive -e -p --need 4096\n";
        assert_eq!(run_remote(&[xl, rxl], false).1, told);
        assert_eq!(run_remote(&[xl], false).1, format!("xl {words}"));
        let (code, out, err) = run_remote(&[], false);
        assert_eq!((code, out.as_str()), (Some(127), ""));
        assert!(err.starts_with("neither rxl nor xl on "), "{err}");
        assert_eq!(run_remote(&[xl, rxl], true).1, told);
        let (code, out, err) = run_remote(&[xl], true);
        assert_eq!((code, out.as_str()), (Some(127), ""));
        assert!(err.starts_with("no rxl on "), "{err}");
    }

    #[test]
    fn a_transport_is_deaf_to_ctrl_c_and_its_status_is_known() {
        let (transport, input, output) = Transport::start("kill -INT $$; exit 7").unwrap();
        drop((input, output));
        let status = transport.finish(true).unwrap();
        assert_eq!(status.code(), Some(7));
        let rune = rune("ssh", None);
        assert_eq!(explain(status, &rune).unwrap(), "ssh ended with exit status 7");
        assert_eq!(explain(ExitStatus::from_raw(0), &rune), None);
        assert!(explain(ExitStatus::from_raw(255 << 8), &rune).unwrap().contains("host2"));
    }

    #[test]
    fn a_transport_that_does_not_end_is_ended() {
        let (transport, _input, _output) = Transport::start("exec sleep 60").unwrap();
        assert!(transport.finish(false).is_none());
    }
}
