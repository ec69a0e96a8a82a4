//! A host as its toolstack sees it: the modelled Xen, the names of its domains, and what libxl's
//! requests do to them. Every effect that matters to the rules is checked where it happens.

use std::collections::BTreeMap;

use rxl_migrate::fake::{FakeDomain, Host, compare};
use rxl_migrate::frame::DomId;
use rxl_migrate::target::{Options, Outcome};

use crate::plan::{Landmark, Request};
use crate::world::{SIDES, Side, World};

/// The name of the guest that moves.
pub(crate) const NAME: &str = "web";

/// What libxl says of the wiring of a new domain.
pub(crate) const WIRING: Options = Options {
    store_evtchn: 17,
    store_domid: DomId(0),
    console_evtchn: 18,
    console_domid: DomId(0),
};

/// libxl's `ERROR_FAIL`, without its sign.
pub(crate) const FAIL: u8 = 3;
/// libxl's `ERROR_ABORTED`, without its sign.
pub(crate) const ABORTED: u8 = 22;

/// A domain in the toolstack's eyes.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) domain: FakeDomain,
    pub(crate) name: String,
    /// Where its rings are, once a restore of it has succeeded.
    pub(crate) restored: Option<Outcome>,
}

/// One host.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) host: Host,
    pub(crate) domains: BTreeMap<u16, Entry>,
    /// The guest that moves, at the source, even when it has been destroyed.
    guest: FakeDomain,
}

impl Machine {
    /// A host with `guest`, which is on it if `here`.
    pub(crate) fn new(host: Host, guest: &FakeDomain, here: bool) -> Machine {
        let mut machine = Machine { host, domains: BTreeMap::new(), guest: guest.clone() };
        if here {
            machine.enter(guest.clone(), NAME);
        }
        machine
    }

    /// A domain has been made.
    pub(crate) fn enter(&mut self, domain: FakeDomain, name: &str) {
        let id = rxl_migrate::hypervisor::Domain::domid(&domain).0;
        self.domains.insert(id, Entry { domain, name: name.to_owned(), restored: None });
    }

    pub(crate) fn guest(&self) -> &FakeDomain {
        &self.guest
    }

    pub(crate) fn guest_suspends(&mut self) {
        if self.guest.exists() && self.guest.is_running() {
            self.guest.suspend();
        }
    }

    pub(crate) fn find(&self, name: &str) -> Option<DomId> {
        self.domains.iter().find(|(_, entry)| entry.name == name).map(|(id, _)| DomId(*id))
    }
}

impl World {
    /// Whether a request is to fail, and whether it does its work nevertheless.
    fn fault(&mut self, side: Side, request: Request) -> Option<bool> {
        let fault = self.plan.request_fault(side, request)?;
        self.facts.request_failed(side, request);
        self.trace.note((side, request), "fails", u64::from(fault));
        Some(fault)
    }

    /// Does `effect` unless the request is to fail before.
    fn request(
        &mut self,
        side: Side,
        request: Request,
        effect: impl FnOnce(&mut World) -> Result<(), u8>,
    ) -> Result<(), u8> {
        self.trace.note((side, request), "is asked for", request as u64);
        match self.fault(side, request) {
            None => effect(self),
            Some(true) => effect(self).and(Err(FAIL)),
            Some(false) => Err(FAIL),
        }
    }

    pub(crate) fn rename(&mut self, side: Side, id: DomId, from: &str, to: &str) -> Result<(), u8> {
        self.request(side, Request::Rename, |world| {
            let machine = world.machine(side);
            if machine.find(to).is_some() {
                return Err(6);
            }
            let entry = machine.domains.get_mut(&id.0).ok_or(FAIL)?;
            if entry.name != from {
                return Err(FAIL);
            }
            to.clone_into(&mut entry.name);
            match side {
                Side::Source => world.landmark(Landmark::RenamedAway),
                Side::Target => {
                    world.landmark(Landmark::Renamed);
                    world.check_memory(id);
                }
            }
            Ok(())
        })
    }

    pub(crate) fn unpause(&mut self, side: Side, id: DomId) -> Result<(), u8> {
        self.request(side, Request::Unpause, |world| {
            let entry = world.machine(side).domains.get(&id.0).ok_or(FAIL)?;
            let whole = entry.restored.is_some();
            entry.domain.unpause();
            world.facts.unpaused(whole);
            world.landmark(Landmark::Unpaused);
            world.check_memory(id);
            world.check_copies();
            Ok(())
        })
    }

    pub(crate) fn resume(&mut self, side: Side, id: DomId) -> Result<(), u8> {
        self.request(side, Request::Resume, |world| {
            let entry = world.machine(side).domains.get(&id.0).ok_or(FAIL)?;
            if !entry.domain.is_suspended() {
                return Err(FAIL);
            }
            entry.domain.resume();
            world.facts.resumed();
            world.check_copies();
            Ok(())
        })
    }

    pub(crate) fn destroy(&mut self, side: Side, id: DomId) -> Result<(), u8> {
        self.request(side, Request::Destroy, |world| {
            let entry = world.machine(side).domains.remove(&id.0).ok_or(FAIL)?;
            let ran = entry.domain.is_running();
            entry.domain.destroy();
            world.facts.destroyed(side, ran);
            Ok(())
        })
    }

    pub(crate) fn reserve_memory(&mut self, side: Side) -> Result<(), u8> {
        self.request(side, Request::ReserveMemory, |_| Ok(()))
    }

    pub(crate) fn state_is_known(&mut self, side: Side) -> Result<(), u8> {
        self.request(side, Request::State, |_| Ok(()))
    }

    /// Copies that run.
    pub(crate) fn running(&mut self) -> usize {
        let mut running = 0;
        for side in SIDES {
            if self.facts.is_down(side) {
                continue;
            }
            let entries = self.machine(side).domains.values();
            running += entries.filter(|entry| entry.domain.is_running()).count();
        }
        running
    }

    fn check_copies(&mut self) {
        let running = self.running();
        if running > 1 {
            self.facts.violated("two copies of the guest run");
        }
    }

    /// Compares the copy `id` at the target with the guest as it is suspended at the source.
    fn check_memory(&mut self, id: DomId) {
        if self.plan.malicious.is_some() {
            return;
        }
        let source = self.machine(Side::Source).guest().clone();
        let Some(entry) = self.machine(Side::Target).domains.get(&id.0) else { return };
        let domain = entry.domain.clone();
        let Some(outcome) = entry.restored else {
            return self.facts.violated("a copy that is not whole is put to use");
        };
        if !source.exists() || !source.is_suspended() {
            return self.facts.violated("the copy is put to use while the guest is not suspended");
        }
        for difference in compare(&source, &domain, &WIRING, &outcome) {
            self.facts.violated(&format!("memory: {difference}"));
        }
    }
}
