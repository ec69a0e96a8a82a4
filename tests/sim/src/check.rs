//! What has to be true when all processes have ended.
//!
//! The rules are those of the design: at no moment two copies that run (checked where copies are
//! started); at the end one that runs, or one that can be let run by hand where it is documented
//! that nobody can know; a copy's memory is the guest's as it was suspended (checked where a copy
//! is put to use); nothing is left behind.

use rxl_migrate::hypervisor::SourceDomain;
use rxl_migrate::xl::handshake::{ReceiverCause, ReceiverEnd, SenderEnd};
use rxl_migrate::xl::{away_name, incoming_name};

use crate::facts::Facts;
use crate::machine::NAME;
use crate::plan::Request;
use crate::world::{Ended, Role, SIDES, Side, World};

/// Where the copies are.
#[derive(Debug)]
struct Copies {
    /// The source's: its name, whether it runs, whether it is suspended.
    source: Option<(String, bool, bool)>,
    /// The target's: name, whether it runs, whether it is whole.
    target: Vec<(String, bool, bool)>,
}

/// Checks a run that has ended.
pub(crate) fn check(world: &mut World, ended: Ended) {
    match ended {
        Ended::Well => {}
        Ended::Stuck => world.facts.violated("processes wait for what never comes"),
        Ended::Endless => world.facts.violated("it does not end"),
    }
    if ended != Ended::Well {
        return;
    }
    let copies = copies(world);
    world.trace.say(|| format!("{copies:?}"));
    let mut found = Vec::new();
    check_leftovers(world, &copies, &mut found);
    match world.plan.malicious {
        Some(Side::Source) => check_receiver(world, &copies, &mut found),
        Some(Side::Target) => check_sender(world, &copies, &mut found),
        None => {
            check_sender(world, &copies, &mut found);
            check_receiver(world, &copies, &mut found);
            check_life(world, &copies, &mut found);
            check_success(world, &mut found);
        }
    }
    found.iter().for_each(|what| world.facts.violated(what));
    cover(world, &copies);
}

fn copies(world: &mut World) -> Copies {
    let entry = world.machine(Side::Source).domains.values().next();
    let source = entry
        .map(|entry| (entry.name.clone(), entry.domain.is_running(), entry.domain.is_suspended()));
    let target = world.machine(Side::Target).domains.values();
    let target = target
        .map(|entry| (entry.name.clone(), entry.domain.is_running(), entry.restored.is_some()));
    Copies { source, target: target.collect() }
}

/// Mappings, log-dirty, half-built copies.
fn check_leftovers(world: &mut World, copies: &Copies, found: &mut Vec<String>) {
    for side in SIDES {
        if world.machine(side).host.mapped_pages() > 0 {
            found.push(format!("pages of the {side:?} are still mapped"));
        }
    }
    let guarded = !world.facts.was_killed(Role::SourceGuard);
    let both = [Role::Sender, Role::SaveHelper].map(|role| world.facts.was_killed(role));
    // Only libxl, asked by the helper, can tell a device model to log no more.
    let device_model = world.plan.device_model && both != [false; 2];
    let guest = world.machine(Side::Source).guest().clone();
    let excused = world.facts.is_down(Side::Source)
        || world.plan.malicious == Some(Side::Source)
        || both == [true; 2] && !guarded;
    if copies.source.is_some() && guest.is_logging() && !excused && !device_model {
        found.push("log-dirty is still on".into());
    }
    let cap = world.plan.cpu_cap;
    if copies.source.is_some() && !excused && guest.cpu_cap().is_ok_and(|now| now != cap) {
        found.push("the guest is slow still".into());
    }
    if !world.facts.is_down(Side::Target) {
        let go = world.facts.go_tried || world.facts.go_heard;
        let excused = go
            || world.facts.has_failed(Side::Target, Request::Destroy)
            || world.facts.was_killed(Role::Receiver) && world.facts.was_killed(Role::TargetGuard);
        if !copies.target.is_empty() && !excused {
            found.push("a copy is left at the target although Go was never tried".into());
        }
        let half = copies.target.iter().any(|(_, _, whole)| !whole);
        let killed = world.facts.was_killed(Role::Receiver);
        if half && !(killed && excused) {
            found.push("a half-built copy is left at the target".into());
        }
    }
}

/// A guest that suspends when nobody waits for it any more has a guard, unless that was killed or
/// the host refused to resume the guest.
fn suspends_alone(facts: &Facts) -> bool {
    let guard_fails = facts.was_killed(Role::SourceGuard);
    facts.suspension_given_up && (guard_fails || facts.has_failed(Side::Source, Request::Resume))
}

/// What the sender says is so.
fn check_sender(world: &World, copies: &Copies, found: &mut Vec<String>) {
    let facts = &world.facts;
    if facts.is_down(Side::Source) {
        return;
    }
    let Some(end) = facts.sender_end else {
        if !facts.was_killed(Role::Sender) {
            found.push("the sender has no end".into());
        }
        return;
    };
    let good = match (end, &copies.source) {
        (SenderEnd::Moved, source) => source.is_none(),
        (SenderEnd::MovedWithRemains, source) => {
            facts.has_failed(Side::Source, Request::Destroy)
                && source.as_ref().is_none_or(|(_, runs, _)| !runs)
        }
        (SenderEnd::Kept(_), Some((name, runs, suspended))) => {
            let named = name == NAME || facts.has_failed(Side::Source, Request::Rename);
            named && (*runs || *suspended && suspends_alone(facts))
        }
        // Where the host could not say how the guest is, it may have been running all the time.
        (SenderEnd::NotResumed(_), Some(_)) => {
            facts.has_failed(Side::Source, Request::Resume)
                || facts.has_failed(Side::Source, Request::State)
        }
        (SenderEnd::Uncertain(_), Some((name, runs, suspended))) => {
            facts.go_tried && !runs && *suspended && *name == away_name(NAME)
        }
        (_, None) => false,
    };
    if !good {
        found.push(format!("the sender says {end:?}, but: {:?}", copies.source));
    }
    // Where all that failed was told over a channel that worked, there is no doubt. A receiver
    // that was cancelled tells so, but its transport may be gone before Go is written.
    let doubtful = facts.cut
        || facts.any_down()
        || !facts.killed.is_empty()
        || facts.receiver_end == Some(ReceiverEnd::Nothing(ReceiverCause::Cancelled))
        || facts.has_failed(Side::Target, Request::Destroy)
        || world.plan.malicious.is_some();
    if matches!(end, SenderEnd::Uncertain(_)) && !doubtful {
        found.push("the sender is uncertain without a reason".into());
    }
}

/// What the receiver says is so.
fn check_receiver(world: &World, copies: &Copies, found: &mut Vec<String>) {
    let facts = &world.facts;
    if facts.is_down(Side::Target) {
        return;
    }
    let Some(end) = facts.receiver_end else { return };
    let good = match end {
        ReceiverEnd::Running | ReceiverEnd::RunningUnreported => {
            copies.target.iter().any(|(name, runs, whole)| {
                *name != incoming_name(NAME) && *whole && *runs != world.plan.stays_paused
            })
        }
        // What an earlier migration has left is not this one's.
        ReceiverEnd::Nothing(_) | ReceiverEnd::GivenBack { .. } => {
            copies.target.is_empty() || facts.attempt > 1
        }
        ReceiverEnd::Remains => facts.has_failed(Side::Target, Request::Destroy),
    };
    if !good {
        found.push(format!("the receiver says {end:?}, but: {:?}", copies.target));
    }
}

/// One copy runs, or it is known why none does, and then one can be let run by hand.
fn check_life(world: &World, copies: &Copies, found: &mut Vec<String>) {
    let facts = &world.facts;
    let (source_up, target_up) = (!facts.is_down(Side::Source), !facts.is_down(Side::Target));
    let source_runs = source_up && copies.source.as_ref().is_some_and(|(_, runs, _)| *runs);
    let target_runs = target_up
        && copies.target.iter().any(|(name, runs, whole)| {
            *whole && (*runs || world.plan.stays_paused && name == NAME)
        });
    let named = copies.source.as_ref().is_none_or(|(name, ..)| name == NAME);
    if source_runs && !named && !facts.has_failed(Side::Source, Request::Rename) {
        found.push("the guest runs at the source under a wrong name".into());
    }
    if source_runs || target_runs {
        if source_runs && target_runs {
            found.push("a copy runs here and one is to be used there".into());
        }
        return;
    }
    let left = source_up && copies.source.is_some()
        || target_up && copies.target.iter().any(|(_, _, whole)| *whole);
    if !left && !facts.any_down() {
        found.push("no copy is left".into());
    }
    let guard_gone = facts.was_killed(Role::Sender) && facts.was_killed(Role::SourceGuard);
    let known = facts.any_down()
        || facts.go_tried
        || guard_gone
        || suspends_alone(facts)
        || facts.has_failed(Side::Source, Request::Resume);
    if !known {
        found.push("no copy runs, and there is no reason why".into());
    }
    if world.plan.is_calm() {
        found.push("no copy runs although nothing went wrong".into());
    }
}

/// Where nothing goes wrong, or only with links, the guest moves.
fn check_success(world: &World, found: &mut Vec<String>) {
    let end = world.facts.sender_end;
    if world.plan.is_calm() && end != Some(SenderEnd::Moved) {
        let what = if world.plan.has_link_faults() { "only links" } else { "nothing" };
        found.push(format!("{what} went wrong, but the guest did not move: {end:?}"));
    }
}

fn cover(world: &mut World, copies: &Copies) {
    let calm = world.plan.is_calm();
    let facts = &mut world.facts;
    if let Some(end) = facts.sender_end {
        let name = match end {
            SenderEnd::Moved => "sender: moved",
            SenderEnd::MovedWithRemains => "sender: moved with remains",
            SenderEnd::Kept(_) => "sender: kept",
            SenderEnd::NotResumed(_) => "sender: not resumed",
            SenderEnd::Uncertain(_) => "sender: uncertain",
        };
        facts.coverage.count(name);
    }
    if let Some(end) = facts.receiver_end {
        let name = match end {
            ReceiverEnd::Running => "receiver: running",
            ReceiverEnd::RunningUnreported => "receiver: running, unreported",
            ReceiverEnd::Nothing(_) => "receiver: nothing",
            ReceiverEnd::GivenBack { .. } => "receiver: given back",
            ReceiverEnd::Remains => "receiver: remains",
        };
        facts.coverage.count(name);
    }
    for (happened, name) in [
        (facts.cut, "link cut"),
        (facts.suspension_given_up, "guest that may suspend too late"),
        (facts.killed.len() > 1, "two processes killed"),
        (
            copies.source.as_ref().is_some_and(|(_, runs, _)| *runs),
            "at the end: runs at the source",
        ),
        (copies.target.iter().any(|(_, runs, _)| *runs), "at the end: runs at the target"),
        (calm && !world.plan.has_link_faults(), "nothing goes wrong"),
        (calm && world.plan.has_link_faults(), "only links go wrong"),
        (world.plan.ways.stream_workers > 0, "workers that share the stream"),
        (world.plan.ways.has_slow(), "links: one that is slow"),
    ] {
        if happened {
            facts.coverage.count(name);
        }
    }
    let plan = &world.plan;
    let (malicious, short) = (plan.malicious, plan.short_of_memory);
    let hypercalls = plan.fails_hypercalls();
    let links = plan.ways.links.len();
    let facts = &mut world.facts;
    if links > 0 {
        facts.coverage.count(format!("links: {links} offered"));
    }
    match malicious {
        Some(Side::Source) => facts.coverage.count("malicious sender"),
        Some(Side::Target) => facts.coverage.count("malicious receiver"),
        None => {}
    }
    if short {
        facts.coverage.count("target short of memory");
    }
    if hypercalls {
        facts.coverage.count("a hypercall that fails");
    }
}
