//! Guests: small Linux domains that run the memory-checking program of `rxl-guest`.

use std::fmt;
use std::fs;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::devices;
use crate::host::{Host, quote};
use crate::image::{GUEST_KERNEL_PATH, Images, guest_initramfs};
use crate::lab::Lab;
use crate::progress::step;

/// Time for a guest to boot and fill its memory. An HVM guest takes minutes in emulation.
const START_TIMEOUT: Duration = Duration::from_secs(480);

/// Time for a guest to verify its memory and answer.
const CHECK_TIMEOUT: Duration = Duration::from_secs(120);
/// After how many seconds it is asked again over a line that may lose something.
const ASK_AGAIN_S: u32 = 30;

/// Kinds of domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// Paravirtual: page tables known to Xen, no hardware virtualisation.
    Pv,
    /// Paravirtual devices in a hardware container.
    Pvh,
    /// Fully emulated, with a device model.
    Hvm,
}

/// What a guest's pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zero until rewritten.
    Zero,
    /// Incompressible.
    Random,
    /// Compressible.
    Text,
}

/// What a guest is and does.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The domain's name.
    pub name: String,
    /// The kind of domain.
    pub kind: GuestKind,
    /// Memory; PV needs 128 and PVH 192 at least.
    pub memory_mib: u32,
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// Pages that it rewrites per second.
    pub dirty_pages_per_s: u64,
    /// Memory that is rewritten; all if `None`.
    pub working_set_mib: Option<u32>,
    /// Memory that its program leaves alone, so that it can be given back.
    pub leave_mib: Option<u32>,
    /// What its pages hold.
    pub content: Content,
    /// Whether it never answers a request to suspend, though it goes on running.
    pub ignores_suspend: bool,
    /// Whether it has a network card and a disk: see [`Lab::provide_devices`].
    pub has_devices: bool,
}

impl GuestSpec {
    /// A guest with one vCPU and random content that rewrites nothing.
    pub fn new(name: &str, kind: GuestKind, memory_mib: u32) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            memory_mib,
            vcpus: 1,
            dirty_pages_per_s: 0,
            working_set_mib: None,
            leave_mib: None,
            content: Content::Random,
            ignores_suspend: false,
            has_devices: false,
        }
    }

    /// The domain's configuration as xl reads it.
    fn config(&self, initramfs: &str) -> String {
        let kind = self.kind;
        let initramfs = if self.has_devices { devices::INITRAMFS_PATH } else { initramfs };
        let more = match self.has_devices {
            true => format!(
                "vif = [\"bridge=xenbr0\"]\ndisk = [\"format=raw,vdev=xvda,access=rw,\
                 backendtype=phy,target={}\"]\n",
                devices::DISK_PATH
            ),
            false => String::new(),
        };
        let console = match kind {
            GuestKind::Pv | GuestKind::Pvh => "",
            GuestKind::Hvm => "serial = \"pty\"\nvga = \"none\"\nnographic = 1\n",
        };
        // The TSC is native: by default Xen emulates it where it is not known to be reliable, as
        // in QEMU, and each reading is a nested exit. A PVH guest of two vCPUs spends a processor
        // on its timer interrupts then, and an HVM guest may take a minute to suspend.
        format!(
            "name = \"{}\"\ntype = \"{kind}\"\nmemory = {mem}\nmaxmem = {mem}\nvcpus = {}\n\
             kernel = \"{GUEST_KERNEL_PATH}\"\nramdisk = \"{initramfs}\"\nextra = \"{}\"\n\
             on_poweroff = \"destroy\"\non_reboot = \"destroy\"\non_crash = \"preserve\"\n\
             tsc_mode = \"native\"\n{console}{more}",
            self.name,
            self.vcpus,
            self.command_line(),
            mem = self.memory_mib,
        )
    }

    fn command_line(&self) -> String {
        let console = match self.kind {
            GuestKind::Pv | GuestKind::Pvh => "hvc0",
            GuestKind::Hvm => "ttyS0",
        };
        let content = match self.content {
            Content::Zero => "zero",
            Content::Random => "random",
            Content::Text => "text",
        };
        let mut line = format!(
            "console={console} loglevel=4 mitigations=off rxl.content={content} rxl.dirty={}",
            self.dirty_pages_per_s
        );
        if let Some(mib) = self.working_set_mib {
            line.push_str(&format!(" rxl.working_set={mib}"));
        }
        if let Some(mib) = self.leave_mib {
            line.push_str(&format!(" rxl.leave={mib}"));
        }
        if self.ignores_suspend {
            line.push_str(" rxl.no_suspend=1");
        }
        line
    }
}

/// A guest's answer to a check.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestReport {
    /// Host on which it runs.
    #[serde(default)]
    pub host: String,
    /// Time since boot, over suspensions.
    pub uptime_s: f64,
    /// Pages verified.
    pub pages_checked: u64,
    /// Time that took.
    pub check_ms: u64,
    /// Pages that did not hold what they should, now or in any earlier check.
    pub bad_pages: u64,
    /// The first few of them.
    pub first_bad_pages: Vec<u64>,
    /// Asked rate of rewriting.
    pub dirty_pages_per_s: u64,
    /// Pages that are rewritten in turn.
    pub working_set_pages: u64,
    /// Pages rewritten since the start.
    pub pages_written: u64,
    /// Times that the guest looked at its clock.
    pub ticks: u64,
    /// Longest time between two of them since the last check.
    pub longest_gap_ms: f64,
    /// Time suspended since the last check, as the guest's kernel knows it.
    pub suspended_ms: f64,
    /// Blocks of its disk that were written and read again, since it has one.
    #[serde(default)]
    pub disk_blocks: u64,
    /// Those with which that failed.
    #[serde(default)]
    pub disk_errors: u64,
    /// What the first failure was.
    #[serde(default)]
    pub first_disk_error: Option<String>,
}

impl Lab {
    /// Starts a guest and waits until it has filled its memory.
    pub fn start_guest(&self, host: &Host, spec: &GuestSpec) -> Result<()> {
        step(&format!("started {} on {}", spec.name, host.name()), || {
            self.create_guest(host, spec)?;
            self.await_guest(host, spec)
        })
    }

    /// Waits until a guest that was just started has filled its memory.
    pub fn await_guest(&self, host: &Host, spec: &GuestSpec) -> Result<()> {
        host.run_within(&await_ready(spec), START_TIMEOUT)
            .with_context(|| format!("{} does not become ready", spec.name))
            .map(drop)
    }

    /// Starts a guest; its kernel has just begun then.
    pub fn create_guest(&self, host: &Host, spec: &GuestSpec) -> Result<()> {
        let path = self.prepare_guest(spec)?;
        host.run_within(&format!("xl create -q {path}"), START_TIMEOUT).map(drop)
    }

    /// Puts on all hosts what the guest is started from; gives the path of its configuration, which
    /// is xl's. What an earlier guest of its name has said goes.
    pub fn prepare_guest(&self, spec: &GuestSpec) -> Result<String> {
        check_name(&spec.name)?;
        if let Some(other) = self.find_guest(&spec.name)?.first() {
            bail!("{} runs already, on {}", spec.name, other.name());
        }
        let initramfs = self.provide_initramfs()?;
        let path = config_path(&spec.name);
        let config = spec.config(&initramfs);
        let log = console_log(&spec.name);
        self.on_all_hosts(|host| {
            host.write_file(&path, "644", config.as_bytes())?;
            host.run(&format!("rm -f {log}"))
        })?;
        Ok(path)
    }

    /// Has the guest verify all of its memory; gives what it answers.
    pub fn check_guest(&self, name: &str) -> Result<GuestReport> {
        static QUESTIONS: AtomicU32 = AtomicU32::new(0);
        check_name(name)?;
        let host = self.only_host_of(name)?;
        // Another one each time: answers to one that was asked twice may still come.
        let question = QUESTIONS.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:x}-{question}", std::process::id());
        let answer = host
            .run_within(&ask(name, &id), CHECK_TIMEOUT)
            .with_context(|| format!("{name} on {} does not answer", host.name()))?;
        let (_, json) = answer
            .split_once(&format!("rxl-answer {id} "))
            .with_context(|| format!("{name} answers `{}`", answer.trim()))?;
        let mut report: GuestReport = serde_json::from_str(json.trim())
            .with_context(|| format!("{name} answers `{}`", json.trim()))?;
        report.host = host.name();
        Ok(report)
    }

    /// Destroys the guest wherever it runs.
    pub fn stop_guest(&self, name: &str) -> Result<()> {
        check_name(name)?;
        let hosts = self.find_guest(name)?;
        ensure!(!hosts.is_empty(), "No host runs {name}");
        for host in hosts {
            step(&format!("stopped {name} on {}", host.name()), || {
                host.run(&format!("xl destroy {name}"))
            })?;
        }
        Ok(())
    }

    /// Hosts that have a domain of exactly that name, in whatever condition.
    pub fn find_guest(&self, name: &str) -> Result<Vec<&Host>> {
        let lists = self.on_all_hosts(|host| host.run("xl list"))?;
        let found = self.hosts().iter().zip(lists);
        Ok(found.filter(|(_, list)| has_domain(list, name)).map(|(host, _)| host).collect())
    }

    fn only_host_of(&self, name: &str) -> Result<&Host> {
        match self.find_guest(name)?.as_slice() {
            [host] => Ok(host),
            [] => bail!("No host runs {name}"),
            several => {
                let names: Vec<String> = several.iter().map(|host| host.name()).collect();
                bail!("{name} is on more than one host: {}", names.join(", "))
            }
        }
    }

    /// Puts the guests' initramfs on all hosts if it is not there; gives its path.
    pub(crate) fn provide_initramfs(&self) -> Result<String> {
        let image = Images::build_guest(self.store())?;
        let key = image.file_name().unwrap_or_default().to_string_lossy();
        let path = format!("/var/lib/rxl-lab/{key}.cpio");
        let content = fs::read(guest_initramfs(&image))?;
        self.on_all_hosts(|host| {
            let present = host.finish(&format!("test -e {path}"), crate::host::COMMAND_TIMEOUT)?;
            if present.status.success() {
                return Ok(());
            }
            host.write_file(&path, "644", &content)
        })?;
        Ok(path)
    }
}

fn config_path(name: &str) -> String {
    format!("/etc/xen/{name}.cfg")
}

fn console_log(name: &str) -> String {
    format!("/var/log/xen/console/guest-{name}.log")
}

/// Names go into shell lines and paths.
fn check_name(name: &str) -> Result<()> {
    let is_plain =
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    ensure!(is_plain, "A guest's name has letters, digits, - and _ only, not `{name}`");
    Ok(())
}

/// Shell lines that set `tty` to the terminal of the guest's console.
fn find_terminal(name: &str) -> String {
    // An emulated serial port, if there is one, is what the guest's program talks to.
    format!(
        "d=/local/domain/$(xl domid {name}) || exit 1\n\
         tty=$(xenstore-read $d/serial/0/tty 2>/dev/null || xenstore-read $d/console/tty)\n"
    )
}

/// Waits for the guest's word that it is ready, or that it failed. A domain that ends before it can
/// say anything is asked for now and then: the emulator makes a guest fault once in a while.
fn await_ready(spec: &GuestSpec) -> String {
    let words = "rxl-guest: (ready|failed.*)";
    let wait = match spec.kind {
        // Xen's console daemon keeps a log of it.
        GuestKind::Pv | GuestKind::Pvh => {
            let log = console_log(&spec.name);
            format!(
                "tries=0\n\
                 until said=$(grep -aEo -m1 '{words}' {log}); do\n\
                   sleep 0.2; tries=$((tries + 1))\n\
                   [ $((tries % 20)) -ne 0 ] || xl domid {} > /dev/null 2>&1 || \
                   {{ echo 'the domain has ended' >&2; exit 1; }}\n\
                 done\n",
                spec.name
            )
        }
        GuestKind::Hvm => format!(
            "{}said=$(grep -aEo -m1 --line-buffered '{words}' < \"$tty\")\n",
            find_terminal(&spec.name)
        ),
    };
    format!("{wait}[ \"$said\" = 'rxl-guest: ready' ] || {{ echo \"$said\" >&2; exit 1; }}")
}

/// Sends the command and prints the line that answers it. The answer is read from the terminal
/// itself, because the name of the log changes when a guest arrives by migration. A serial port,
/// which an HVM guest has, may lose what comes while nobody fetches it: there it is sent again.
fn ask(name: &str, id: &str) -> String {
    let pattern = quote(&format!("^rxl-answer {id} "));
    format!(
        "{find}exec 3<>\"$tty\"\n\
         ask() {{ printf '\\ncheck {id}\\n' >&3; }}\n\
         ask\n\
         if xenstore-exists \"$d/serial/0/tty\"; then\n\
           while sleep {ASK_AGAIN_S}; do ask; done >/dev/null 2>&1 &\n\
           trap \"kill $!\" EXIT\n\
         fi\n\
         grep -a -m1 --line-buffered {pattern} <&3",
        find = find_terminal(name)
    )
}

/// Whether `xl list` names the domain.
fn has_domain(list: &str, name: &str) -> bool {
    list.lines().skip(1).any(|line| line.split_ascii_whitespace().next() == Some(name))
}

impl fmt::Display for GuestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
            Self::Hvm => "hvm",
        })
    }
}

impl FromStr for GuestKind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "pv" => Ok(Self::Pv),
            "pvh" => Ok(Self::Pvh),
            "hvm" => Ok(Self::Hvm),
            _ => bail!("Kinds of guest are pv, pvh and hvm"),
        }
    }
}

impl FromStr for Content {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "zero" => Ok(Self::Zero),
            "random" => Ok(Self::Random),
            "text" => Ok(Self::Text),
            _ => bail!("Kinds of content are zero, random and text"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn test_config_pv_has_rate_and_no_devices() {
        let mut spec = GuestSpec::new("pv1", GuestKind::Pv, 128);
        spec.dirty_pages_per_s = 200;
        let config = spec.config("/x.cpio");
        assert!(config.contains("type = \"pv\"\nmemory = 128\nmaxmem = 128\nvcpus = 1\n"));
        assert!(config.contains("console=hvc0"));
        assert!(config.contains("rxl.content=random rxl.dirty=200\""));
        assert!(!config.contains("serial"));
    }

    #[test]
    fn test_config_hvm_without_suspend_says_so() {
        let mut spec = GuestSpec::new("h", GuestKind::Hvm, 256);
        spec.ignores_suspend = true;
        spec.working_set_mib = Some(8);
        let config = spec.config("/x.cpio");
        assert!(config.contains("console=ttyS0"));
        assert!(config.contains("rxl.working_set=8 rxl.no_suspend=1\""));
        assert!(config.contains("serial = \"pty\""));
    }

    #[test]
    fn test_await_ready_domain_that_ended_is_no_wait() {
        // The log and the domain are nowhere; `xl` fails or is not there at all.
        let spec = GuestSpec::new("rxl-lab-no-such-guest", GuestKind::Pv, 128);
        let mut command = Command::new("timeout");
        let output = command.args(["60", "sh", "-c", &await_ready(&spec)]).output().expect("sh");
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("the domain has ended"));
    }

    #[test]
    fn test_has_domain_incoming_is_another_name() {
        let list = "Name    ID Mem\nDomain-0  0 1024\npv1--incoming  3 128\n";
        assert!(!has_domain(list, "pv1"));
        assert!(has_domain(list, "pv1--incoming"));
    }

    #[test]
    fn test_check_name_shell_characters_are_refused() {
        assert!(check_name("pv-1").is_ok());
        assert!(check_name("a;b").is_err());
        assert!(check_name("").is_err());
    }
}
