//! One host of a running lab, reached as root by ssh. One connection carries all commands, so that
//! each costs milliseconds rather than a key exchange in an emulated machine.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::network::{address, inside};
use crate::process::{last_lines, output_with_input};

/// Time that a short command on a host may take.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A host of the lab.
#[derive(Clone, Debug)]
pub struct Host {
    number: u8,
    ssh_key: PathBuf,
    known_hosts: PathBuf,
    control_socket: PathBuf,
    console_log: PathBuf,
}

/// A command that ended by itself.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

/// Files that belong to a host of the lab.
#[derive(Clone, Debug)]
pub(crate) struct HostFiles {
    pub(crate) ssh_key: PathBuf,
    pub(crate) known_hosts: PathBuf,
    pub(crate) control_socket: PathBuf,
    pub(crate) console_log: PathBuf,
}

impl Host {
    pub(crate) fn new(number: u8, files: HostFiles) -> Self {
        let HostFiles { ssh_key, known_hosts, control_socket, console_log } = files;
        Self { number, ssh_key, known_hosts, control_socket, console_log }
    }

    /// The host's name, `host1` and so on; it resolves on every host.
    pub fn name(&self) -> String {
        format!("host{}", self.number)
    }

    /// The host's number, from 1.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The host's address on a NIC, counted from 0.
    pub fn address(&self, nic: u8) -> String {
        address(nic, self.number)
    }

    /// A command line of the host's shell as a process of this machine: standard streams, exit
    /// status and signals are the caller's affair.
    pub fn command(&self, script: &str) -> Command {
        let mut command = self.ssh();
        command.arg("--").arg(script);
        command
    }

    /// Starts a shell command line and leaves it running, with all streams piped.
    pub fn spawn(&self, script: &str) -> Result<Child> {
        self.command(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("Cannot start ssh to {}", self.name()))
    }

    /// Runs a shell command line to its end, however it ends. After `timeout` it is ended on the
    /// host, and that is an error.
    pub fn finish(&self, script: &str, timeout: Duration) -> Result<Finished> {
        let limited = format!("timeout -k 5 {} sh -c {}", seconds(timeout), quote(script));
        let mut child = self
            .command(&limited)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("Cannot start ssh to {}", self.name()))?;
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        // The host ends the command by itself; this limit is for a host that hangs.
        let Some(status) = wait(&mut child, timeout + Duration::from_secs(20))? else {
            bail!("{} hangs: no end of `{script}`", self.name());
        };
        let text = |reader: thread::JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
        };
        if status.code() == Some(124) {
            bail!("`{script}` on {} took longer than {} s", self.name(), timeout.as_secs());
        }
        Ok(Finished { status, stdout: text(stdout), stderr: text(stderr) })
    }

    /// Runs a shell command line that must succeed within `timeout`; gives its standard output.
    pub fn run_within(&self, script: &str, timeout: Duration) -> Result<String> {
        let finished = self.finish(script, timeout)?;
        if !finished.status.success() {
            bail!(
                "`{script}` on {} ended with {}:\n{}{}",
                self.name(),
                finished.status,
                finished.stdout,
                finished.stderr
            );
        }
        Ok(finished.stdout)
    }

    /// Runs a short shell command line that must succeed; gives its standard output.
    pub fn run(&self, script: &str) -> Result<String> {
        self.run_within(script, COMMAND_TIMEOUT)
    }

    /// Puts a file on the host, in one step under its final name.
    pub fn write_file(&self, path: &str, permissions: &str, content: &[u8]) -> Result<()> {
        let (folder, _) = path.rsplit_once('/').context("A path on a host must be absolute")?;
        let (folder, path) = (quote(folder), quote(path));
        // The shell's own number: two guests that start at once bring the same files.
        let draft = format!("{path}.$$");
        let script = format!(
            "mkdir -p {folder}/ && cat > {draft} && chmod {permissions} {draft} && \
             mv {draft} {path}"
        );
        output_with_input(&mut self.command(&script), content)?;
        Ok(())
    }

    /// The last lines of the host's serial console: Xen's and the kernel's messages.
    pub fn console_tail(&self, lines: usize) -> String {
        let log = fs::read(&self.console_log).unwrap_or_default();
        last_lines(&String::from_utf8_lossy(&log), lines)
    }

    /// Opens the connection that all commands share.
    pub(crate) fn connect(&self) -> Result<()> {
        output_with_input(self.ssh().args(["-o", "ControlPersist=yes", "--", "true"]), b"")
            .with_context(|| format!("Cannot log in on {}", self.name()))?;
        Ok(())
    }

    fn ssh(&self) -> Command {
        let mut command = inside("ssh");
        command
            .args(["-F", "/dev/null", "-l", "root", "-i"])
            .arg(&self.ssh_key)
            .arg("-o")
            .arg(format!("UserKnownHostsFile={}", self.known_hosts.display()))
            .args(["-o", "GlobalKnownHostsFile=/dev/null", "-o", "BatchMode=yes"])
            .args(["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=30"])
            .args(["-o", "Ciphers=aes128-ctr"])
            .args(["-o", "ControlMaster=auto", "-o", "ControlPersist=yes", "-S"])
            .arg(&self.control_socket)
            .arg(self.address(0));
        command
    }
}

/// Quotes a word for a POSIX shell.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn seconds(timeout: Duration) -> u64 {
    timeout.as_secs().max(1)
}

fn collect(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What was read before an error still tells something.
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_quote_inner_quote_survives_shell() {
        let word = "it's $HOME; \"x\"";
        let output = Command::new("sh")
            .args(["-c", &format!("printf %s {}", quote(word))])
            .output()
            .expect("sh runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), word);
    }
}
