//! The lab as a whole: up, attach, down.

use std::fs;
use std::io::ErrorKind;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::clock::{self, AGENT_PATH, ClockOffset};
use crate::host::{Host, HostFiles};
use crate::image::Images;
use crate::network;
use crate::plain;
use crate::process::{ProcessId, last_lines};
use crate::progress::{note, step};
use crate::qemu::Machine;
use crate::state::{Lock, Shape, State};
use crate::store::Store;

const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
const BOOT_POLL: Duration = Duration::from_millis(200);

/// Lines of a console that a failed boot prints.
const CONSOLE_LINES: usize = 40;

const MAX_HOSTS: u8 = 3;
const MAX_NICS: u8 = 8;
const MAX_VCPUS: u8 = 8;

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    store: Store,
    images: Images,
    shape: Shape,
    hosts: Vec<Host>,
}

/// One host as `status` shows it.
#[derive(Clone, Debug)]
pub struct HostStatus {
    /// The host's name.
    pub name: String,
    /// Pid of its QEMU process.
    pub pid: i32,
    /// Whether that process runs.
    pub is_alive: bool,
    /// Output of `xl list`, or why there is none.
    pub domains: String,
}

impl Lab {
    /// Boots a lab of that shape; fails at once if one is up or the images are not built.
    pub fn up(store: &Store, shape: Shape) -> Result<Self> {
        check_shape(&shape)?;
        Self::forget_dead(store)?;
        let _lock = Lock::take(store)?;
        if State::load(store)?.is_some() || network::exists() {
            bail!("A lab is up, or was not taken down: see `status`, or run `down` first");
        }
        let images = Images::find(store, &shape.all_releases())?;
        let started = Self::boot(store, images, shape);
        if started.is_err() {
            // The console logs stay in the state folder until the next `down`.
            stop_all(store)?;
        }
        started
    }

    /// The lab that is up.
    pub fn attach(store: &Store) -> Result<Self> {
        let Some(state) = State::load(store)? else {
            bail!("No lab is up: run `dom0-setup/lab up`");
        };
        ensure!(state.is_up, "The lab did not come up, or is just being started: see `status`");
        for release in state.shape.all_releases() {
            state.images.host(release).context("Run `dom0-setup/lab down`")?;
        }
        Ok(Self::new(store, state.images, state.shape))
    }

    /// Ends the lab and removes everything of it. Nothing to remove is no error.
    pub fn down(store: &Store) -> Result<()> {
        let _lock = Lock::take(store)?;
        step("took the lab down", || {
            stop_all(store)?;
            match fs::remove_dir_all(store.state_dir()) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(error).context("Cannot remove the lab's state")
                }
                _ => Ok(()),
            }
        })
    }

    /// Takes down what is left of a lab of which no host runs any more: this machine was started
    /// again meanwhile, or somebody has ended them. One that is just being started is left alone.
    pub fn forget_dead(store: &Store) -> Result<()> {
        let Some(state) = State::load(store)? else { return Ok(()) };
        let runs = state.processes.iter().copied().any(ProcessId::is_alive);
        if runs || state.processes.is_empty() { Ok(()) } else { Self::down(store) }
    }

    /// All hosts, in order.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts.iter().find(|host| host.name() == name).with_context(|| {
            let names: Vec<String> = self.hosts.iter().map(Host::name).collect();
            format!("The lab has no host {name}, only {}", names.join(", "))
        })
    }

    /// Size and shape of the lab.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Sets every host's wall clock to this machine's; see [`crate::clock`] for why.
    pub fn sync_clocks(&self) -> Result<Vec<ClockOffset>> {
        self.on_all_hosts(clock::sync)
    }

    /// How far every host's wall clock is from this machine's.
    pub fn clock_offsets(&self) -> Result<Vec<ClockOffset>> {
        self.on_all_hosts(clock::measure)
    }

    /// Runs `work` for all hosts at once; gives the results in the order of hosts.
    pub fn on_all_hosts<T: Send>(
        &self,
        work: impl Fn(&Host) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        thread::scope(|scope| {
            let started: Vec<_> =
                self.hosts.iter().map(|host| scope.spawn(|| work(host))).collect();
            started
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| bail!("A host's thread panicked")))
                .collect()
        })
    }

    /// Sets the rates at which hosts receive on the NICs from the first on, as `tc` writes them;
    /// NICs past the end of `rates` have no limit.
    pub fn set_nic_rates(&self, rates: &[String]) -> Result<()> {
        for host in &self.hosts {
            for nic in 0..self.shape.nics {
                let rate = rates.get(usize::from(nic)).map(String::as_str);
                network::set_rate(&network::tap_name(nic, host.number()), rate)?;
            }
        }
        Ok(())
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    fn new(store: &Store, images: Images, shape: Shape) -> Self {
        let hosts = (1..=shape.hosts).map(|number| host(store, &images, number)).collect();
        Self { store: store.clone(), images, shape, hosts }
    }

    fn boot(store: &Store, images: Images, shape: Shape) -> Result<Self> {
        let mut state = State {
            shape: shape.clone(),
            images: images.clone(),
            processes: Vec::new(),
            is_up: false,
        };
        fs::create_dir_all(store.state_dir())?;
        // From here on `down` knows that there is something to remove.
        state.save(store)?;
        let plan = network::Plan {
            hosts: shape.hosts,
            nics: shape.nics,
            nic_rate: shape.nic_rate.as_deref(),
        };
        step("made the network", || network::create(&plan))?;
        let lab = Self::new(store, images, shape);
        let state_dir = store.state_dir();
        for host in lab.hosts() {
            state.processes.push(lab.machine(host, &state_dir)?.start()?);
            state.save(store)?;
        }
        let processes = state.processes.clone();
        lab.on_all_hosts(|host| {
            let process = processes.get(usize::from(host.number()) - 1);
            let process = *process.context("A host has no process")?;
            step(&format!("booted {}", host.name()), || {
                wait_for_boot(&lab.machine(host, &state_dir)?, host, process)
            })?;
            host.connect()?;
            host.write_file(AGENT_PATH, "755", &fs::read(lab.images.clock_agent())?)?;
            plain::install(host, &lab.images.plain_client())
        })?;
        step("set the hosts' clocks", || lab.sync_clocks())?;
        state.is_up = true;
        state.save(store)?;
        Ok(lab)
    }

    fn machine<'a>(&'a self, host: &Host, state_dir: &'a std::path::Path) -> Result<Machine<'a>> {
        Ok(Machine {
            images: self.images.host(self.shape.release(host.number()))?,
            state_dir,
            host: host.number(),
            hosts: self.shape.hosts,
            nics: self.shape.nics,
            vcpus: self.shape.vcpus,
        })
    }
}

/// What is there of a lab, in whatever condition it is; `None` if nothing is.
pub fn status(store: &Store) -> Result<Option<(Shape, bool, Vec<HostStatus>)>> {
    let Some(state) = State::load(store)? else {
        return Ok(None);
    };
    let lab = Lab::attach(store).ok();
    let hosts = state.processes.iter().enumerate().map(|(index, process)| {
        let name = format!("host{}", index + 1);
        let domains = match lab.as_ref().map(|lab| lab.host(&name)?.run("xl list")) {
            Some(Ok(list)) => list,
            Some(Err(error)) => format!("{error:#}"),
            None => "not up".to_owned(),
        };
        HostStatus { name, pid: process.pid(), is_alive: process.is_alive(), domains }
    });
    Ok(Some((state.shape.clone(), state.is_up, hosts.collect())))
}

fn check_shape(shape: &Shape) -> Result<()> {
    ensure!((1..=MAX_HOSTS).contains(&shape.hosts), "A lab has 1 to {MAX_HOSTS} hosts");
    ensure!((1..=MAX_NICS).contains(&shape.nics), "A host has 1 to {MAX_NICS} NICs");
    ensure!((1..=MAX_VCPUS).contains(&shape.vcpus), "A host has 1 to {MAX_VCPUS} vCPUs");
    Ok(())
}

fn host(store: &Store, images: &Images, number: u8) -> Host {
    let state = store.state_dir();
    Host::new(
        number,
        HostFiles {
            ssh_key: images.ssh_key(),
            known_hosts: images.known_hosts(),
            control_socket: state.join(format!("host{number}-ssh")),
            console_log: state.join(format!("host{number}-console.log")),
        },
    )
}

fn wait_for_boot(machine: &Machine<'_>, host: &Host, process: ProcessId) -> Result<()> {
    let ready = format!("rxl-lab: {} is ready", host.name());
    let failed = format!("rxl-lab: {} failed", host.name());
    let deadline = Instant::now() + BOOT_TIMEOUT;
    let reason = loop {
        let log = fs::read(machine.console_log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        if log.contains(&ready) {
            return Ok(());
        }
        if log.contains(&failed) {
            break "its boot script failed".to_owned();
        }
        if !process.is_alive() {
            let words = fs::read_to_string(machine.qemu_log()).unwrap_or_default();
            break format!("QEMU has ended: {}", last_lines(&words, 5));
        }
        if Instant::now() > deadline {
            break format!("it took longer than {} s", BOOT_TIMEOUT.as_secs());
        }
        thread::sleep(BOOT_POLL);
    };
    bail!(
        "{} does not boot: {reason}\nThe end of its console:\n{}",
        host.name(),
        host.console_tail(CONSOLE_LINES)
    )
}

/// Ends the lab's processes and removes its network.
fn stop_all(store: &Store) -> Result<()> {
    if let Some(state) = State::load(store)? {
        for process in &state.processes {
            process.end(Duration::from_secs(5))?;
        }
    }
    close_connections(store);
    let leftover = end_unrecorded(store)?;
    network::remove()?;
    if !leftover.is_empty() {
        note(&format!(
            "processes that are not the lab's were in its network and are now cut off: {}",
            leftover.join(" ")
        ));
    }
    Ok(())
}

/// Ends what a command that died left behind, and ssh of commands that still wait for a host; gives
/// the pids of others. A process is the lab's if it is in the lab's namespace *and* its command
/// line names the lab's state folder.
fn end_unrecorded(store: &Store) -> Result<Vec<String>> {
    let state_dir = store.state_dir();
    for pid in network::pids()? {
        // One that has ended in the meantime is no error.
        let Ok(process) = ProcessId::of(pid.parse()?) else { continue };
        if process.command_line_names(&state_dir) {
            process.end(Duration::from_secs(2))?;
        }
    }
    network::pids()
}

fn close_connections(store: &Store) {
    for number in 1..=MAX_HOSTS {
        let socket = store.state_dir().join(format!("host{number}-ssh"));
        if socket.exists() {
            let mut command = std::process::Command::new("ssh");
            command.args(["-F", "/dev/null", "-O", "exit", "-S"]).arg(&socket).arg("lab");
            crate::process::succeeds(&mut command);
        }
    }
}
