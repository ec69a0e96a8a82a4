//! A host for tests: domains that run, are paused or suspended, and requests that fail when told.
//!
//! It models what the handshake depends on and no more: a save suspends its domain before the end
//! of the stream and fails where the stream cannot be written; a restore makes a paused domain
//! only from a whole stream, and leaves nothing else; names are unique.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::CpuCap;
use rxl_migrate::xl::config::DomainConfig;
use rxl_migrate::xl::movable::Facts;
use rxl_toolstack::lifecycle::{
    CANCELLED, DomainState, Lifecycle, LifecycleError, Result, ShortOfMemory,
};

/// Bytes of a domain's stream; the last quarter is written while it is suspended.
pub(crate) const STREAM: [u8; 64] = [0x5a; 64];

/// What a domain does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Runs,
    Paused,
    Suspended,
    /// Suspended, and paused when it is resumed.
    SuspendedPaused,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Save,
    Restore,
    Rename,
    Pause,
    Unpause,
    Resume,
    Destroy,
    ReserveMemory,
}

type Hook = Box<dyn Fn(Request) -> bool + Send + Sync>;

/// A host; clones are the same host.
#[derive(Clone, Default)]
pub(crate) struct FakeHost(Arc<Inner>);

#[derive(Default)]
struct Inner {
    domains: Mutex<BTreeMap<u16, (String, Condition)>>,
    /// What the hypervisor says of every domain, if that is odd.
    facts: Mutex<Option<Facts>>,
    /// More of every domain's configuration.
    config: Mutex<String>,
    /// Called before each request; `false` makes it fail.
    hook: Mutex<Option<Hook>>,
    cancelled: AtomicBool,
    /// Of the domain that was saved last; as after a helper that was killed, on at every failure.
    log_dirty: AtomicBool,
    /// Of all domains.
    cpu_cap: AtomicU16,
}

impl fmt::Debug for FakeHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.domains.lock().unwrap().fmt(f)
    }
}

impl FakeHost {
    pub(crate) fn with_domain(name: &str) -> (FakeHost, DomId) {
        let host = FakeHost::default();
        let domid = host.add(name, Condition::Runs);
        (host, domid)
    }

    pub(crate) fn add(&self, name: &str, condition: Condition) -> DomId {
        let mut domains = self.0.domains.lock().unwrap();
        let domid = domains.keys().last().map_or(1, |last| last + 1);
        domains.insert(domid, (name.to_owned(), condition));
        DomId(domid)
    }

    /// Calls `hook` before each request; where it says `false` the request fails and does nothing.
    pub(crate) fn hook(&self, hook: impl Fn(Request) -> bool + Send + Sync + 'static) {
        *self.0.hook.lock().unwrap() = Some(Box::new(hook));
    }

    /// Lets the hypervisor say that of every domain.
    pub(crate) fn set_facts(&self, facts: Facts) {
        *self.0.facts.lock().unwrap() = Some(facts);
    }

    /// Adds `json` to every domain's configuration.
    pub(crate) fn add_to_config(&self, json: &str) {
        *self.0.config.lock().unwrap() = format!(",{json}");
    }

    /// Name and condition of each domain.
    pub(crate) fn domains(&self) -> Vec<(String, Condition)> {
        self.0.domains.lock().unwrap().values().cloned().collect()
    }

    /// Whether log-dirty is on.
    pub(crate) fn is_logging(&self) -> bool {
        self.0.log_dirty.load(SeqCst)
    }

    fn ask(&self, request: Request) -> Result<()> {
        let refused = self.0.hook.lock().unwrap().as_ref().is_some_and(|hook| !hook(request));
        if refused { Err(error(request, -3)) } else { Ok(()) }
    }

    fn set(&self, domid: DomId, condition: Condition) {
        self.0.domains.lock().unwrap().get_mut(&domid.0).unwrap().1 = condition;
    }

    fn condition(&self, domid: DomId) -> Condition {
        self.0.domains.lock().unwrap().get(&domid.0).unwrap().1
    }

    fn write_stream(&self, domid: DomId, fd: BorrowedFd<'_>, live: bool) -> std::io::Result<()> {
        let mut file = File::from(fd.try_clone_to_owned()?);
        let (first, last) = STREAM.split_at(STREAM.len() * 3 / 4);
        if !live {
            self.set(domid, Condition::Suspended);
        }
        file.write_all(first)?;
        if self.0.cancelled.load(SeqCst) {
            return Err(std::io::Error::other("cancelled"));
        }
        self.set(domid, Condition::Suspended);
        file.write_all(last)
    }
}

fn error(request: Request, rc: i32) -> LifecycleError {
    LifecycleError { what: format!("{request:?}"), rc }
}

impl Lifecycle for FakeHost {
    fn resolve(&self, name_or_id: &str) -> Result<DomId> {
        let domains = self.0.domains.lock().unwrap();
        let found = domains.iter().find(|(_, (name, _))| name == name_or_id);
        let missing = || LifecycleError { what: name_or_id.to_owned(), rc: -21 };
        found.map(|(domid, _)| DomId(*domid)).ok_or_else(missing)
    }

    fn name(&self, domain: DomId) -> Result<String> {
        let domains = self.0.domains.lock().unwrap();
        Ok(domains.get(&domain.0).unwrap().0.clone())
    }

    fn state(&self, domain: DomId) -> Result<DomainState> {
        Ok(match self.0.domains.lock().unwrap().get(&domain.0) {
            None => DomainState::Gone,
            Some((_, Condition::Suspended | Condition::SuspendedPaused)) => DomainState::Suspended,
            Some(_) => DomainState::Alive,
        })
    }

    fn config(&self, domain: DomId) -> Result<String> {
        let more = self.0.config.lock().unwrap();
        Ok(format!(r#"{{"c_info":{{"name":"{}"}}{more}}}"#, self.name(domain)?))
    }

    fn facts(&self, _domain: DomId) -> Result<Facts> {
        let plain = Facts { pv: true, address_bits: 64, shadow_paging: true, paused: false };
        Ok(self.0.facts.lock().unwrap().unwrap_or(plain))
    }

    fn save(&self, domain: DomId, fd: BorrowedFd<'_>, live: bool, _debug: bool) -> Result<()> {
        self.ask(Request::Save)?;
        let saved = self.write_stream(domain, fd, live);
        let rc = if self.0.cancelled.swap(false, SeqCst) { CANCELLED } else { -3 };
        saved.map_err(|_| {
            self.0.log_dirty.store(true, SeqCst);
            error(Request::Save, rc)
        })
    }

    fn log_dirty_off(&self, _domain: DomId) -> Result<()> {
        self.0.log_dirty.store(false, SeqCst);
        Ok(())
    }

    fn cpu_cap(&self, _domain: DomId) -> Result<CpuCap> {
        Ok(CpuCap(self.0.cpu_cap.load(SeqCst)))
    }

    fn set_cpu_cap(&self, _domain: DomId, cap: CpuCap) -> Result<()> {
        self.0.cpu_cap.store(cap.0, SeqCst);
        Ok(())
    }

    fn canceller(&self) -> Box<dyn Fn() + Send + Sync> {
        let host = self.clone();
        Box::new(move || host.0.cancelled.store(true, SeqCst))
    }

    fn restore(&self, config: &str, fd: BorrowedFd<'_>) -> Result<DomId> {
        let mut bytes = [0; STREAM.len()];
        let mut file = File::from(fd.try_clone_to_owned().unwrap());
        file.read_exact(&mut bytes).map_err(|_| error(Request::Restore, -3))?;
        assert_eq!(bytes, STREAM);
        self.ask(Request::Restore)?;
        let config = DomainConfig::parse(config).unwrap();
        Ok(self.add(config.name().unwrap(), Condition::Paused))
    }

    fn rename(&self, domain: DomId, from: &str, to: &str) -> Result<()> {
        self.ask(Request::Rename)?;
        let mut domains = self.0.domains.lock().unwrap();
        if domains.values().any(|(name, _)| name == to) {
            return Err(error(Request::Rename, -6));
        }
        let (name, _) = domains.get_mut(&domain.0).unwrap();
        assert_eq!(name, from);
        to.clone_into(name);
        Ok(())
    }

    fn pause(&self, domain: DomId) -> Result<()> {
        self.ask(Request::Pause)?;
        self.set(
            domain,
            match self.condition(domain) {
                Condition::Runs | Condition::Paused => Condition::Paused,
                Condition::Suspended | Condition::SuspendedPaused => Condition::SuspendedPaused,
            },
        );
        Ok(())
    }

    fn unpause(&self, domain: DomId) -> Result<()> {
        self.ask(Request::Unpause)?;
        self.set(domain, Condition::Runs);
        Ok(())
    }

    fn resume(&self, domain: DomId) -> Result<()> {
        self.ask(Request::Resume)?;
        assert_eq!(self.state(domain).unwrap(), DomainState::Suspended);
        let paused = self.condition(domain) == Condition::SuspendedPaused;
        self.set(domain, if paused { Condition::Paused } else { Condition::Runs });
        Ok(())
    }

    fn destroy(&self, domain: DomId) -> Result<()> {
        self.ask(Request::Destroy)?;
        self.0.domains.lock().unwrap().remove(&domain.0).unwrap();
        Ok(())
    }

    fn needed_memory(&self, _config: &str) -> Result<u64> {
        Ok(512 << 10)
    }

    fn make_room(&self, _kib: u64) -> std::result::Result<(), ShortOfMemory> {
        Ok(())
    }

    fn reserve_memory(&self, _config: &str) -> std::result::Result<(), ShortOfMemory> {
        self.ask(Request::ReserveMemory)
            .map_err(|_| ShortOfMemory::Need { need_mib: 512, free_mib: 100 })
    }
}
