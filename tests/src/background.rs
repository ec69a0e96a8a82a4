//! A command that runs on a host while something is done to it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ExitStatus};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rxl_lab::{Finished, Host, quote};

const POLL: Duration = Duration::from_millis(50);

/// The command. It leads a process group of its own, as a terminal's foreground job does.
#[derive(Debug)]
pub struct Background<'a> {
    host: &'a Host,
    child: Child,
    group: u32,
    output: JoinHandle<String>,
    errors: JoinHandle<String>,
}

impl<'a> Background<'a> {
    /// Starts it.
    ///
    /// # Errors
    /// The host does not answer.
    pub fn start(host: &'a Host, command: &str) -> Result<Background<'a>> {
        let script = format!("exec setsid -w sh -c {}", quote(&format!("echo $$; exec {command}")));
        let mut child = host.spawn(&script)?;
        drop(child.stdin.take());
        let mut output = BufReader::new(child.stdout.take().context("no standard output")?);
        let errors = child.stderr.take().context("no standard error")?;
        let mut first = String::new();
        output.read_line(&mut first).context("reading the process number")?;
        let group = first.trim().parse().with_context(|| format!("no number: `{first}`"))?;
        let (output, errors) = (collect(output), collect(errors));
        Ok(Background { host, child, group, output, errors })
    }

    /// Sends a signal to the whole group, as the terminal does on Ctrl-C.
    ///
    /// # Errors
    /// The group is gone.
    pub fn signal_group(&self, signal: &str) -> Result<()> {
        // dash's own kill does not know `--`.
        self.host.run(&format!("env kill -{signal} -- -{}", self.group)).map(|_| ())
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end. After `timeout` it is killed, and that is an error.
    ///
    /// # Errors
    /// It took too long.
    pub fn finish(mut self, timeout: Duration) -> Result<Finished> {
        let deadline = Instant::now() + timeout;
        let mut status: Option<ExitStatus> = None;
        while status.is_none() && Instant::now() < deadline {
            thread::sleep(POLL);
            status = self.child.try_wait()?;
        }
        let late = status.is_none();
        if late {
            self.signal_group("KILL")?;
        }
        let status = self.child.wait()?;
        let text = |reader: JoinHandle<String>| reader.join().unwrap_or_default();
        let (stdout, stderr) = (text(self.output), text(self.errors));
        if late {
            bail!("it did not end within {} s: {stderr}", timeout.as_secs());
        }
        Ok(Finished { status, stdout, stderr })
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error still tells something.
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
