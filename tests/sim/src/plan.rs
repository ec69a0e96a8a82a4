//! What a seed means: the guest, the machines, the network, and what goes wrong when.

use std::time::Duration;

use rxl_migrate::fake::{FakeDomain, Host, HvmSpec, P2mKind, PvSpec, Rng};
use rxl_migrate::hypervisor::{CpuCap, Domain, SourceDomain};
use rxl_migrate::source::Verify;
use rxl_migrate::source::precopy::{AtLimit, Limits, Policy};
use serde_json::json;

use crate::machine::{Machine, NAME};
use crate::pipe::{Link, Pipe};
use crate::plant::Plant;
use crate::ways::Ways;
use crate::world::{ROLES, Role, Side, WORKERS};

/// A request to libxl that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Rename,
    Unpause,
    Resume,
    Destroy,
    ReserveMemory,
    State,
}

const SOURCE_REQUESTS: [Request; 4] =
    [Request::Rename, Request::Resume, Request::Destroy, Request::State];
const TARGET_REQUESTS: [Request; 4] =
    [Request::Rename, Request::Unpause, Request::Destroy, Request::ReserveMemory];

/// Something done to a process, a host or the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// SIGKILL.
    Kill(Role),
    /// The host dies with all that is on it.
    Crash(Side),
    /// The link goes dead.
    Cut,
    /// The connection of a link goes dead.
    CutConnection(u8),
    /// Ctrl-C, or a polite end.
    Signal(Role),
}

impl Act {
    /// For the trace.
    pub(crate) fn number(self) -> u64 {
        match self {
            Act::Kill(role) => role as u64,
            Act::Crash(side) => 100 + side as u64,
            Act::Cut => 200,
            Act::CutConnection(link) => 201 + u64::from(link),
            Act::Signal(role) => 300 + role as u64,
        }
    }
}

/// A moment of a migration around which a step more or less matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Landmark {
    SuspendAsked,
    ReadySaid,
    RenamedAway,
    GoTried,
    GoHeard,
    Renamed,
    Unpaused,
    ReportSaid,
    ReportHeard,
}

const LANDMARKS: [Landmark; 9] = [
    Landmark::SuspendAsked,
    Landmark::ReadySaid,
    Landmark::RenamedAway,
    Landmark::GoTried,
    Landmark::GoHeard,
    Landmark::Renamed,
    Landmark::Unpaused,
    Landmark::ReportSaid,
    Landmark::ReportHeard,
];

/// When a process of `watched` has made `steps` steps, from its start or from a landmark on, `act`
/// is done.
#[derive(Clone, Copy, Debug)]
struct Trigger {
    watched: Role,
    after: Option<Landmark>,
    steps: u32,
    act: Act,
}

/// When the guest follows the request to suspend, if it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suspension {
    /// So many milliseconds after it.
    After(u64),
    Never,
}

/// What a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pvh,
    Hvm,
    Pv(P2mKind),
}

/// All that the seed decides before the run.
#[derive(Debug)]
pub(crate) struct Plan {
    seed: u64,
    kind: Kind,
    pages: u64,
    /// The guest does something at every so many accesses; 0: never.
    run_every: u64,
    pub(crate) device_model: bool,
    pub(crate) verify: Verify,
    /// When the guest is suspended.
    pub(crate) policy: Policy,
    /// How much processor time it may have.
    pub(crate) cpu_cap: CpuCap,
    pub(crate) stays_paused: bool,
    pub(crate) pipe_bytes: usize,
    latency: u64,
    rate: u64,
    cuts: [Option<u64>; 2],
    /// So many milliseconds after a cut its ends see it, at most.
    pub(crate) notice_max: u64,
    /// Once the sender is gone the user tries again so many milliseconds later.
    pub(crate) retry: Option<u64>,
    pub(crate) suspension: Suspension,
    /// The guest takes note of the request to suspend at once, so that it cannot be taken back.
    pub(crate) acknowledges: bool,
    /// Workers and links.
    pub(crate) ways: Ways,
    triggers: Vec<Trigger>,
    /// Where, what, how many succeed before, and whether it happens nevertheless.
    requests: Vec<(Side, Request, u32, bool)>,
    /// Where, which hypercall, how many succeed before, errno.
    hypercalls: Vec<(Side, &'static str, u64, i32)>,
    /// The target has too little memory.
    pub(crate) short_of_memory: bool,
    /// Whose end of the migration is not rxl.
    pub(crate) malicious: Option<Side>,
    pub(crate) plant: Option<Plant>,
    shape: (bool, u64, u32),
    calm: bool,
    /// Something is to go wrong with links, which no migration may fail of.
    link_faults: bool,
}

const SOURCE_CALLS: [&str; 16] = [
    "info",
    "maximum_gpfn",
    "address_bits",
    "map",
    "map_m2p",
    "log_dirty_on",
    "log_dirty_clean",
    "page_types",
    "cpu_cap",
    "set_cpu_cap",
    "tsc_info",
    "cpu_policy",
    "hvm_param",
    "hvm_context",
    "vcpu",
    "xen_version",
];
const TARGET_CALLS: [&str; 13] = [
    "info",
    "map",
    "map_m2p",
    "populate",
    "set_cpu_policy",
    "set_tsc_info",
    "set_hvm_context",
    "set_hvm_param",
    "set_vcpu",
    "pin_tables",
    "seed_grants",
    "address_bits",
    "set_address_bits",
];
const ERRNOS: [i32; 4] = [5, 12, 14, 22];

/// Random choices that a plan is made of.
pub(crate) struct Dice(pub(crate) Rng);

impl Dice {
    pub(crate) fn one_of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.0.index(items.len())]
    }

    pub(crate) fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.0.below(to - from + 1)
    }

    /// A moment: how far a process is.
    fn moment(&mut self, act: Act, workers: bool) -> Trigger {
        let watched = match act {
            Act::Kill(role) | Act::Signal(role) if self.0.one_in(2) => role,
            Act::CutConnection(_) if self.0.one_in(2) => self.one_of(&WORKERS),
            _ if workers && self.0.one_in(4) => self.one_of(&WORKERS),
            _ => self.one_of(&ROLES),
        };
        let (after, bounds) = match self.within(0, 1) {
            0 => (None, [6, 20, 60, 200, 600]),
            // Workers have their last work to do then.
            _ if WORKERS.contains(&watched) => (Some(Landmark::SuspendAsked), [2, 6, 20, 60, 200]),
            _ => (Some(self.one_of(&LANDMARKS)), [1, 2, 4, 8, 20]),
        };
        let bound = self.one_of(&bounds);
        let steps = u32::try_from(self.within(1, bound)).unwrap_or(1);
        Trigger { watched, after, steps, act }
    }
}

/// Those that decide are the ones whose end matters most.
fn kill(dice: &mut Dice) -> Act {
    let deciding = [Role::Sender, Role::Receiver];
    Act::Kill(if dice.0.one_in(2) { dice.one_of(&deciding) } else { dice.one_of(&ROLES) })
}

/// By time for most seeds, with a pause that has to be reached, or with none that could be.
fn policy(seed: u64) -> Policy {
    let milliseconds = |ms| Duration::from_millis(ms);
    let limits = |pause, fixed| Limits {
        pause: milliseconds(pause),
        fixed: milliseconds(fixed),
        time: seed.is_multiple_of(5).then(|| milliseconds(1_000)),
        passes: 8,
        at_limit: if seed.is_multiple_of(11) { AtLimit::Cancel } else { AtLimit::Force },
        throttle: (seed / 3).is_multiple_of(2),
    };
    match seed % 3 {
        0 => Policy::Stock,
        1 => Policy::ByTime(limits(300, 100)),
        _ => Policy::ByTime(limits(50, 49)),
    }
}

/// How the memory is compared at the end.
fn verify(dice: &mut Dice, plant: Option<Plant>) -> Verify {
    match (plant, dice.within(0, 11)) {
        (Some(Plant::PageChanged), _) => Verify::No,
        (Some(Plant::PageChangedAndVerified), _) | (_, 0..=2) => Verify::Digests,
        (_, 3) => Verify::Again,
        _ => Verify::No,
    }
}

impl Plan {
    pub(crate) fn new(seed: u64, plant: Option<Plant>) -> Plan {
        let mut dice = Dice(Rng::new(seed ^ 0x51a7_10ad_0b5e_55ed));
        let linear = dice.one_of(&[P2mKind::Linear, P2mKind::Tree]);
        let (kind, pages) = match dice.within(0, 9) {
            0..=4 => (Kind::Pvh, dice.within(16, 40)),
            5 => (Kind::Pvh, dice.within(80, 150)),
            6 => (Kind::Hvm, dice.within(16, 40)),
            _ => (Kind::Pv(linear), dice.within(80, 120)),
        };
        let run_every = match dice.within(0, 3) {
            0 => 0,
            1 => dice.within(1, 4),
            _ => dice.within(5, 60),
        };
        let mut plan = Plan {
            seed,
            kind,
            pages,
            run_every,
            device_model: kind == Kind::Hvm,
            verify: verify(&mut dice, plant),
            policy: policy(seed),
            cpu_cap: CpuCap(dice.one_of(&[0, 0, 50, 130])),
            stays_paused: dice.0.one_in(8),
            pipe_bytes: dice.one_of(&[512, 4096, 65_536]),
            latency: dice.one_of(&[0, 1, 20, 300]),
            rate: dice.one_of(&[100, 5_000, 1_000_000]),
            cuts: [None; 2],
            notice_max: dice.one_of(&[1, 1_000, 300_000]),
            retry: None,
            suspension: Suspension::After(dice.one_of(&[0, 1, 100, 5_000])),
            acknowledges: false,
            ways: Ways::new(&mut dice, plant),
            triggers: Vec::new(),
            requests: Vec::new(),
            hypercalls: Vec::new(),
            short_of_memory: false,
            malicious: None,
            plant,
            shape: (false, 0, 0),
            calm: false,
            link_faults: false,
        };
        let has_links = !plan.ways.links.is_empty();
        if !has_links || dice.0.one_in(2) {
            plan.add_fault(&mut dice);
            if dice.0.one_in(6) {
                plan.add_fault(&mut dice);
            }
        }
        if has_links && dice.0.one_in(16) {
            plan.malicious = Some(dice.one_of(&[Side::Source, Side::Target]));
        }
        plan.calm = plan.has_no_faults();
        if has_links && dice.0.one_in(2) {
            plan.link_faults = true;
            for _ in 0..dice.within(1, 3) {
                plan.add_link_fault(&mut dice);
            }
        }
        if !plan.calm && plan.malicious.is_none() && dice.0.one_in(3) {
            plan.retry = Some(dice.one_of(&[0, 10, 1_000, 70_000]));
        }
        plan
    }

    fn add_fault(&mut self, dice: &mut Dice) {
        match dice.within(0, 99) {
            0..=11 => {}
            12..=39 => self.add_kill(dice),
            40..=45 => {
                self.add_kill(dice);
                self.add_kill(dice);
            }
            46..=51 => {
                self.add_trigger(dice, |dice| {
                    Act::Crash(dice.one_of(&[Side::Source, Side::Target]))
                });
            }
            52..=55 => self.add_trigger(dice, |_| Act::Cut),
            56..=60 => {
                let bytes = match dice.within(0, 3) {
                    0 => dice.within(0, 300),
                    _ => dice.within(0, 400_000),
                };
                match dice.within(0, 1) {
                    0 => self.cuts[0] = Some(bytes),
                    // Few bytes go that way.
                    _ => self.cuts[1] = Some(bytes % 140),
                }
            }
            61..=70 => {
                for _ in 0..dice.within(1, 3) {
                    self.add_trigger(dice, |dice| {
                        Act::Signal(dice.one_of(&[Role::Sender, Role::Sender, Role::Receiver]))
                    });
                }
            }
            71..=78 => {
                let errno = dice.one_of(&ERRNOS);
                let succeed = dice.within(0, 11);
                self.hypercalls.push(match dice.within(0, 1) {
                    0 => (Side::Source, dice.one_of(&SOURCE_CALLS), succeed, errno),
                    _ => (Side::Target, dice.one_of(&TARGET_CALLS), succeed % 3, errno),
                });
            }
            79..=85 => {
                let (side, request) = match dice.within(0, 1) {
                    0 => (Side::Source, dice.one_of(&SOURCE_REQUESTS)),
                    _ => (Side::Target, dice.one_of(&TARGET_REQUESTS)),
                };
                // libxl's unpausing ends with the hypercall: if that fails nothing runs.
                let after = request != Request::Unpause && dice.0.one_in(3);
                self.requests.push((side, request, 0, after));
            }
            86..=88 => self.short_of_memory = true,
            89..=91 => {
                self.acknowledges = !dice.0.one_in(3);
                self.suspension = match dice.within(0, 2) {
                    0 => Suspension::Never,
                    _ => Suspension::After(dice.within(58_000, 64_000)),
                };
            }
            _ => self.malicious = Some(dice.one_of(&[Side::Source, Side::Target])),
        }
    }

    fn add_kill(&mut self, dice: &mut Dice) {
        if self.ways.any() && dice.0.one_in(3) {
            self.add_trigger(dice, |dice| Act::Kill(dice.one_of(&WORKERS)));
        } else {
            self.add_trigger(dice, kill);
        }
    }

    /// Something that costs links, and nothing else.
    fn add_link_fault(&mut self, dice: &mut Dice) {
        match dice.within(0, 6) {
            0..=1 => self.ways.add_cut(dice),
            2..=3 => {
                let count = self.ways.links.len() as u64 - 1;
                self.add_trigger(dice, |dice| Act::CutConnection(dice.within(0, count) as u8));
            }
            // A worker of the stream takes the stream with it.
            4 if self.ways.stream_workers == 0 => {
                self.add_trigger(dice, |_| Act::Kill(Role::SaveWorker));
            }
            4..=5 => self.add_trigger(dice, |_| Act::Kill(Role::RestoreWorker)),
            _ => self.ways.add_hang(dice),
        }
    }

    fn add_trigger(&mut self, dice: &mut Dice, act: impl FnOnce(&mut Dice) -> Act) {
        let act = act(dice);
        let moment = dice.moment(act, self.ways.any());
        self.triggers.push(moment);
    }

    /// The two hosts, with the guest on the first.
    pub(crate) fn machines(&mut self) -> [Machine; 2] {
        let seed = self.seed;
        let source = Host::new(self.pages + 60, seed);
        let guest = self.build(&source);
        source.run_guests(self.run_every);
        guest.set_cpu_cap(self.cpu_cap).expect("a domain that has just been made");
        if self.plant == Some(Plant::StaleMapping) {
            source.map_stale();
        }
        let info = guest.info().expect("a domain that has just been made");
        let pages = info.total_pages + 24;
        self.shape = (info.hvm, pages, info.max_vcpu_id + 1);
        let frames = if self.short_of_memory { info.total_pages / 2 } else { pages + 40 };
        let target = Host::new(frames.max(16), seed ^ 0x5eed);
        for (side, call, succeed, errno) in &self.hypercalls {
            match side {
                Side::Source => source.fail(call, *succeed, *errno),
                Side::Target => target.fail(call, *succeed, *errno),
            }
        }
        [Machine::new(source, &guest, true), Machine::new(target, &guest, false)]
    }

    fn build(&self, host: &Host) -> FakeDomain {
        let (pages, seed) = (self.pages, self.seed);
        match self.kind {
            Kind::Pv(p2m) => {
                let (vcpus, processes) = (1 + (seed % 3) as u32, 1 + (seed % 2) as usize);
                PvSpec { pages, one_hole_in: 20, p2m, long_tail: false, vcpus, processes, seed }
                    .build(host)
            }
            Kind::Hvm => HvmSpec { pages, seed }.build(host),
            Kind::Pvh => {
                let guest = HvmSpec { pages, seed }.build(host);
                guest.remove_device_model();
                guest
            }
        }
    }

    /// The guest's configuration as it goes to the target.
    pub(crate) fn config(&self) -> String {
        let (hvm, pages, vcpus) = self.shape;
        json!({
            "c_info": { "name": NAME, "type": if hvm { "pvh" } else { "pv" } },
            "b_info": { "max_pages": pages, "max_vcpus": vcpus },
        })
        .to_string()
    }

    /// Both directions between the hosts.
    pub(crate) fn links(&self) -> (Pipe, Pipe) {
        let link = |cut: Option<u64>| {
            let mut pipe = Pipe::link(65_536, Link::new(self.latency, self.rate));
            if let Some(bytes) = cut {
                pipe.cut_at(bytes);
            }
            pipe
        };
        (link(self.cuts[0]), link(self.cuts[1]))
    }

    /// `landmark` has been reached; `steps` says how many steps a process has made.
    pub(crate) fn reached(&mut self, landmark: Landmark, steps: impl Fn(Role) -> u32) {
        for trigger in &mut self.triggers {
            if trigger.after == Some(landmark) {
                trigger.after = None;
                trigger.steps += steps(trigger.watched);
            }
        }
    }

    /// What is to be done now that a process of `role` has made `steps` steps.
    pub(crate) fn due(&mut self, role: Role, steps: u32) -> Vec<Act> {
        let mut due = Vec::new();
        self.triggers.retain(|trigger| {
            let counts = trigger.after.is_none() && trigger.watched == role;
            let now = counts && trigger.steps == steps;
            if now {
                due.push(trigger.act);
            }
            !now
        });
        due
    }

    /// Whether a request is to fail, and whether it happens nevertheless.
    pub(crate) fn request_fault(&mut self, side: Side, request: Request) -> Option<bool> {
        let mut found = None;
        self.requests.retain_mut(|(at, what, succeed, after)| {
            if *at != side || *what != request {
                return true;
            }
            if *succeed > 0 {
                *succeed -= 1;
                return true;
            }
            found = Some(*after);
            false
        });
        found
    }

    /// Whether something is to go wrong with links.
    pub(crate) fn has_link_faults(&self) -> bool {
        self.link_faults
    }

    /// Whether nothing is to go wrong but with links, and the policy gives no migration up.
    pub(crate) fn is_calm(&self) -> bool {
        self.calm
    }

    fn has_no_faults(&self) -> bool {
        let gives_up = |limits: Limits| limits.at_limit == AtLimit::Cancel;
        self.triggers.is_empty()
            && !matches!(self.policy, Policy::ByTime(limits) if gives_up(limits))
            && self.requests.is_empty()
            && self.hypercalls.is_empty()
            && self.cuts == [None; 2]
            && !self.short_of_memory
            && self.malicious.is_none()
            && matches!(self.suspension, Suspension::After(time) if time < 60_000)
    }

    /// Whether a hypercall was told to fail.
    pub(crate) fn fails_hypercalls(&self) -> bool {
        !self.hypercalls.is_empty()
    }

    /// A line for the reader.
    pub(crate) fn describe(&self) -> String {
        format!("{self:?}")
    }
}
