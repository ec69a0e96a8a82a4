//! A simulator of whole migrations: the product's own state machines, drivers, engine and helper
//! protocol, over a modelled Xen, network and clock, with anything going wrong at any moment.
//!
//! A run is decided by its seed alone: the guest, the order in which processes go on, how much
//! each read and write moves, what fails and when. [`run`] makes one and says what rules it broke;
//! the same seed gives the same run, which the digest of its trace shows.
//!
//! What is the product's: `migrate::xl` (both state machines, both drivers, the gate, the guards'
//! rules, the header), `migrate::source` and `migrate::target` with their workers,
//! `migrate::helper` (the helper's protocol, both ends). What is modelled: Xen and the guests
//! (`migrate::fake`), libxl ([`libxl`]), processes and signals ([`world`]), pipes and connections
//! ([`pipe`]), ssh ([`ssh`]), and of `toolstack` what it does for workers ([`worker`], [`senders`],
//! [`receivers`]) and links ([`door`], [`link`]). Not here: what the user reads, disks and devices,
//! encryption.
#![forbid(unsafe_code)]
#![allow(
    clippy::indexing_slicing,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "an index or number out of range is a bug in the model, which is to stop the run"
)]

mod check;
mod coverage;
mod door;
mod facts;
mod faults;
mod helper;
mod liar;
mod libxl;
mod link;
mod machine;
mod peer;
mod peer_links;
mod pipe;
mod plan;
mod plant;
mod process;
mod receiver;
mod receivers;
mod sender;
mod senders;
mod ssh;
mod trace;
mod ways;
mod worker;
mod world;

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use rxl_migrate::fake::Rng;

pub use coverage::Coverage;
pub use plant::{PLANTS, Plant};

use crate::plan::Plan;
use crate::trace::Trace;
use crate::world::{Role, Side, World};

/// More steps than any run takes; a large guest over one slow link takes over 200,000.
const STEPS_MAX: u64 = 1_000_000;

/// What came of one seed.
#[derive(Debug)]
pub struct Verdict {
    /// The seed.
    pub seed: u64,
    /// The rules that were broken.
    pub violations: Vec<String>,
    /// Of all that happened.
    pub digest: u64,
    /// What the run exercised.
    pub coverage: Coverage,
    /// What happened, line by line, if it was asked for.
    pub lines: Vec<String>,
}

/// Runs `seed`, with a mistake in the product's place if there is one to plant. `text`: keep a
/// trace for a reader.
#[must_use]
pub fn run(seed: u64, plant: Option<Plant>, text: bool) -> Verdict {
    let done = catch_unwind(AssertUnwindSafe(|| run_unguarded(seed, plant, text)));
    done.unwrap_or_else(|panic| Verdict {
        seed,
        violations: vec![format!("panic: {}", message(&*panic))],
        digest: 0,
        coverage: Coverage::default(),
        lines: Vec::new(),
    })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

fn run_unguarded(seed: u64, plant: Option<Plant>, text: bool) -> Verdict {
    let mut plan = Plan::new(seed, plant);
    let machines = plan.machines();
    let mut trace = Trace::new(text);
    trace.say(|| plan.describe());
    let malicious = plan.malicious;
    let world = World::new(plan, machines, Rng::new(seed), trace);
    let world = Rc::new(RefCell::new(world));
    world.borrow_mut().spawn(
        Role::Sender,
        &[],
        Box::new(move |process| match malicious {
            Some(Side::Source) => peer::send(process),
            Some(Side::Target) => sender::migrate(process, peer::receive),
            None => sender::migrate(process, receiver::receive),
        }),
    );
    let ended = world::run(&world, STEPS_MAX);
    let mut world = world.borrow_mut();
    check::check(&mut world, ended);
    let facts = std::mem::take(&mut world.facts);
    let trace = std::mem::replace(&mut world.trace, Trace::new(false));
    Verdict {
        seed,
        violations: facts.violations,
        digest: trace.digest(),
        coverage: facts.coverage,
        lines: trace.into_lines(),
    }
}
