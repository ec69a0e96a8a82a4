//! libxl, as a save helper sees it: the process that starts it, answers it, and takes note of how
//! it ended. The protocol is [`rxl_migrate::helper`]'s.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rxl_migrate::fake::FakeDomain;
use rxl_migrate::helper::Message;
use rxl_migrate::hypervisor::Domain;
use rxl_migrate::target::{Options, Outcome};

use crate::machine::Machine;
use crate::usage::{Usage, WATCH_INTERVAL, Watch};
use crate::ways::Ways;

/// A helper that is silent for so long is stuck.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(120);
/// What libxl answers in a plain save and a plain restore (`cbflags`).
const SAVE_CALLBACKS: &str = "136";
const RESTORE_CALLBACKS: &str = "768";
/// Levels of xentoollog from which a line tells of a failure.
const LEVEL_ERROR: u32 = 8;
/// The level of a line that tells of something odd.
const LEVEL_WARNING: u32 = 7;
/// Starts a helper with the stream, which comes as descriptor 2, as descriptor 3, and its errors
/// in a file. The standard library cannot hand on other descriptors than the first three, and
/// makes SIGPIPE deadly, which `xl` ignores, and with it its helper.
const START: &str = r#"trap '' PIPE; errors=$1; shift; exec "$@" 3<&2 2>"$errors""#;
/// The stream's descriptor there.
const STREAM_FD: &str = "3";

/// Whose save helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Debian's `libxl-save-helper`.
    Stock,
    /// rxl's.
    Rxl,
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Program::Stock => "stock",
            Program::Rxl => "rxl",
        })
    }
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Debian's `libxl-save-helper`.
    pub stock: PathBuf,
    /// `rxl`.
    pub rxl: PathBuf,
    /// The library that is preloaded into them.
    pub preload: PathBuf,
}

impl Programs {
    fn path(&self, program: Program) -> &Path {
        match program {
            Program::Stock => &self.stock,
            Program::Rxl => &self.rxl,
        }
    }
}

/// How libxl behaves while the helper runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Libxl {
    /// The guest does not follow the request to suspend.
    pub refuses_to_suspend: bool,
    /// Take a fingerprint of the guest when it is suspended.
    pub takes_fingerprint: bool,
    /// How its environment tells rxl's helper to move memory.
    pub ways: Ways,
    /// What it says may be left out over links; nothing: what rxl chooses.
    pub reduce: &'static str,
    /// Determines which workers are killed, if some are.
    pub seed: u64,
}

/// How a helper ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// What it said at last: 0, or -1 and an errno.
    pub complete: Option<(i32, i32)>,
    /// Frames of the rings (restore).
    pub rings: Option<Outcome>,
    /// Lines that tell of a failure.
    pub errors: Vec<String>,
    /// Lines that tell of something odd.
    pub warnings: Vec<String>,
    /// What it wrote to standard error.
    pub stderr: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// From its start to its end.
    pub took: Duration,
    /// From the request to suspend the guest to its end.
    pub suspended_for: Option<Duration>,
    /// [`FakeDomain::fingerprint`] at suspension, if one was to be taken.
    pub fingerprint: Option<u64>,
    /// What it had used when it said that it was done.
    pub used: Usage,
}

impl Ended {
    /// Whether all went well.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.complete == Some((0, 0)) && self.status.success()
    }

    /// What it has to say for itself, in one line.
    #[must_use]
    pub fn describe(&self) -> String {
        let errors = self.errors.join("; ");
        format!("{:?}, {}: {errors} {}", self.complete, self.status, self.stderr.trim())
    }
}

/// A save helper to be run on a machine, for one of its domains.
#[derive(Clone, Copy, Debug)]
pub struct Helper<'a> {
    /// Where the programs are.
    pub programs: &'a Programs,
    /// Which of them.
    pub program: Program,
    /// Where it runs.
    pub machine: &'a Machine,
    /// For which domain.
    pub domain: &'a FakeDomain,
    /// How libxl behaves.
    pub libxl: Libxl,
}

impl Helper<'_> {
    /// Lets it write the stream of the domain to `stream`. `live`: while the guest runs.
    ///
    /// # Errors
    /// It does not start, breaks the protocol, or is stuck. A failure to save is none.
    pub fn save(&self, stream: OwnedFd, live: bool) -> Result<Ended> {
        let domid = self.domain.domid().to_string();
        let flags = if live { "1" } else { "0" };
        let args = ["--save-domain", STREAM_FD, "-1", &domid, flags, SAVE_CALLBACKS, "0"];
        self.run(&args, stream)
    }

    /// Lets it fill the domain, which is new, from `stream`.
    ///
    /// # Errors
    /// As [`Helper::save`].
    pub fn restore(&self, stream: OwnedFd, wiring: &Options) -> Result<Ended> {
        let domid = self.domain.domid().to_string();
        let store = (wiring.store_evtchn.to_string(), wiring.store_domid.to_string());
        let console = (wiring.console_evtchn.to_string(), wiring.console_domid.to_string());
        let rings = [&store.0, &store.1, &console.0, &console.1].map(String::as_str);
        let head = ["--restore-domain", STREAM_FD, "-1", &domid];
        self.run(&[&head[..], &rings, &[RESTORE_CALLBACKS, "0"]].concat(), stream)
    }

    fn run(&self, args: &[&str], stream: OwnedFd) -> Result<Ended> {
        let started = Instant::now();
        let errors = tempfile::NamedTempFile::new().context("Cannot make a file")?;
        let mut command = Command::new("sh");
        command.args(["-c", START, "sh"]).arg(errors.path());
        command.arg(self.programs.path(self.program)).args(args);
        self.machine.furnish(&mut command, &self.programs.preload);
        self.libxl.ways.tell(&mut command);
        command.env("RXL_REDUCE", self.libxl.reduce);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stream)
            .spawn()
            .context("Cannot start the helper")?;
        // The stream's descriptor is the child's alone from here on.
        drop(command);
        let _killer = self.libxl.ways.kill_workers(child.id(), self.libxl.seed);
        let mut ended = Conversation::new(self, &mut child)?.hold();
        if ended.is_err() {
            // It may be gone already.
            let _ = child.kill();
        }
        let status = child.wait().context("Cannot wait for the helper")?;
        let stderr = std::fs::read(errors.path()).unwrap_or_default();
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        let talk = ended.as_mut().map_err(|error| {
            anyhow::anyhow!("{} ({status}): {error:#}: {}", self.program, stderr.trim())
        })?;
        Ok(Ended {
            complete: talk.complete,
            rings: talk.rings,
            errors: std::mem::take(&mut talk.errors),
            warnings: std::mem::take(&mut talk.warnings),
            stderr,
            status,
            took: started.elapsed(),
            suspended_for: talk.suspended.map(|at| at.elapsed()),
            fingerprint: talk.fingerprint,
            used: talk.used,
        })
    }
}

/// What libxl and the helper say to each other.
struct Conversation<'a> {
    helper: &'a Helper<'a>,
    messages: Receiver<std::io::Result<Message>>,
    replies: std::process::ChildStdin,
    complete: Option<(i32, i32)>,
    rings: Option<Outcome>,
    errors: Vec<String>,
    warnings: Vec<String>,
    suspended: Option<Instant>,
    fingerprint: Option<u64>,
    watch: Watch,
    used: Usage,
}

impl<'a> Conversation<'a> {
    fn new(helper: &'a Helper<'a>, child: &mut Child) -> Result<Conversation<'a>> {
        let mut output = child.stdout.take().context("no standard output")?;
        let replies = child.stdin.take().context("no standard input")?;
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            while let Some(message) = Message::read_from(&mut output).transpose() {
                let failed = message.is_err();
                // Nobody listens any more: the helper is about to be killed.
                if sender.send(message).is_err() || failed {
                    return;
                }
            }
        });
        Ok(Conversation {
            helper,
            messages,
            replies,
            complete: None,
            rings: None,
            errors: Vec::new(),
            warnings: Vec::new(),
            suspended: None,
            fingerprint: None,
            watch: Watch::new(child.id()),
            used: Usage::default(),
        })
    }

    /// Until the helper has nothing more to say.
    fn hold(mut self) -> Result<Conversation<'a>> {
        let mut heard = Instant::now();
        loop {
            match self.messages.recv_timeout(WATCH_INTERVAL) {
                Ok(message) => {
                    self.hear(message.context("Cannot understand the helper")?)?;
                    heard = Instant::now();
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(self),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    ensure!(heard.elapsed() < SILENCE_TIMEOUT, "the helper is stuck");
                }
            }
            self.watch.glance();
        }
    }

    fn hear(&mut self, message: Message) -> Result<()> {
        ensure!(self.complete.is_none(), "after its end it says {message:?}");
        match message {
            Message::Log { level, text, .. } if level >= LEVEL_ERROR => self.errors.push(text),
            Message::Log { level: LEVEL_WARNING, text, .. } => self.warnings.push(text),
            Message::Log { .. } | Message::Progress { .. } => {}
            Message::Suspend => {
                let Libxl { refuses_to_suspend, takes_fingerprint, .. } = self.helper.libxl;
                let suspends = !refuses_to_suspend;
                if suspends {
                    self.helper.domain.suspend();
                    self.suspended = Some(Instant::now());
                    let taken = takes_fingerprint.then(|| self.helper.domain.fingerprint());
                    self.fingerprint = taken;
                }
                self.reply(i32::from(suspends))?;
            }
            Message::SwitchQemuLogdirty { domain, enable } => {
                ensure!(domain == self.helper.domain.domid(), "it speaks of domain {domain}");
                self.helper.domain.set_qemu_log_dirty(enable);
                self.reply(0)?;
            }
            Message::StaticDataDone { .. } => self.reply(0)?,
            Message::RestoreResults { store, console } => {
                self.rings = Some(Outcome { store_frame: store, console_frame: console });
            }
            Message::Complete { retval, errno } => {
                self.complete = Some((retval, errno));
                self.used = self.watch.usage();
                self.reply(0)?;
            }
        }
        Ok(())
    }

    fn reply(&mut self, reply: i32) -> Result<()> {
        self.replies.write_all(&reply.to_ne_bytes()).context("The helper takes no answer")
    }
}
