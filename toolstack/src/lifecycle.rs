//! What `rxl` asks of the host's domain management: one trait, implemented by libxl
//! ([`crate::libxl`]). It never sees the inside of a stream: saving and restoring memory is the
//! save helper's work, which libxl starts and which is `rxl` itself.

use std::os::fd::BorrowedFd;

use rxl_migrate::frame::DomId;
use rxl_migrate::hypervisor::CpuCap;
use rxl_migrate::xl::movable::Facts;

/// A request that the toolstack refused.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}", outcome(*.rc))]
pub struct LifecycleError {
    /// What was asked for, e.g. `destroying domain 5`.
    pub what: String,
    /// libxl's code (negative), e.g. -6 for an invalid argument.
    pub rc: i32,
}

/// libxl's code of an operation that a [`Lifecycle::canceller`] ended (`ERROR_ABORTED`).
pub const CANCELLED: i32 = -22;

impl LifecycleError {
    /// Whether a [`Lifecycle::canceller`] ended it.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.rc == CANCELLED
    }
}

fn outcome(rc: i32) -> String {
    match rc {
        CANCELLED => "was cancelled".to_owned(),
        -8 => "failed: the guest did not respond in time (libxl error -8)".to_owned(),
        -21 => "failed: there is no such domain (libxl error -21)".to_owned(),
        rc => format!("failed (libxl error {rc})"),
    }
}

/// Result of a request to the toolstack.
pub type Result<T> = std::result::Result<T, LifecycleError>;

/// Whether a domain runs, in the toolstack's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainState {
    /// It runs, blocks or is paused.
    Alive,
    /// It has suspended itself and waits to be resumed or destroyed.
    Suspended,
    /// It has shut down otherwise, or is being torn down.
    Dead,
    /// There is none.
    Gone,
}

/// Domain management of this host. Calls block. Handles are not shared between threads, except
/// for [`Lifecycle::canceller`]'s.
pub trait Lifecycle {
    /// The domain of that name or number.
    ///
    /// # Errors
    /// There is none.
    fn resolve(&self, name_or_id: &str) -> Result<DomId>;
    /// Its name.
    ///
    /// # Errors
    /// There is no such domain.
    fn name(&self, domain: DomId) -> Result<String>;
    /// What the hypervisor says of it (never guessed from an error code).
    ///
    /// # Errors
    /// The hypervisor cannot be asked.
    fn state(&self, domain: DomId) -> Result<DomainState>;
    /// Its configuration as libxl's JSON.
    ///
    /// # Errors
    /// libxl's.
    fn config(&self, domain: DomId) -> Result<String>;
    /// What the hypervisor says that decides whether it can be moved. Nothing is done to it.
    ///
    /// # Errors
    /// The hypervisor's.
    fn facts(&self, domain: DomId) -> Result<Facts>;
    /// Writes the libxl stream to `fd`; on success the domain is suspended. `live`: it runs while
    /// most of its memory goes out. `debug`: all of it is sent again at the end, to be compared.
    /// The descriptor stays open.
    ///
    /// # Errors
    /// libxl's; ask [`Lifecycle::state`] how the domain is.
    fn save(&self, domain: DomId, fd: BorrowedFd<'_>, live: bool, debug: bool) -> Result<()>;
    /// Switches log-dirty off, which a save helper that was killed has left on. Harmless where it
    /// is off.
    ///
    /// # Errors
    /// The hypervisor's.
    fn log_dirty_off(&self, domain: DomId) -> Result<()>;
    /// How much processor time it may have.
    ///
    /// # Errors
    /// The hypervisor's: its scheduler knows no such limit.
    fn cpu_cap(&self, domain: DomId) -> Result<CpuCap>;
    /// Lets it have so much from now on.
    ///
    /// # Errors
    /// As [`Lifecycle::cpu_cap`].
    fn set_cpu_cap(&self, domain: DomId, cap: CpuCap) -> Result<()>;
    /// A function that ends a [`Lifecycle::save`] or [`Lifecycle::restore`] from another thread;
    /// that then returns [`CANCELLED`], unless it succeeds nevertheless.
    ///
    /// The first call ends the transfer in order, which takes as long as libxl's time limits
    /// where it waits for the guest to suspend (60 s). A second one gives up such waits: quick,
    /// but the device model of an HVM guest goes on logging what it writes, and the guest may
    /// still suspend. A call while nothing runs ends the next operation before it begins.
    fn canceller(&self) -> Box<dyn Fn() + Send + Sync>;
    /// Makes a paused domain from `config` (libxl's JSON) and the libxl stream on `fd`, of which
    /// nothing is read past its end. On an error nothing is left of it.
    ///
    /// # Errors
    /// libxl's.
    fn restore(&self, config: &str, fd: BorrowedFd<'_>) -> Result<DomId>;
    /// Gives it another name.
    ///
    /// # Errors
    /// libxl's, e.g. where the name is taken.
    fn rename(&self, domain: DomId, from: &str, to: &str) -> Result<()>;
    /// Stops it where it is; a suspended one then does not run when it is resumed.
    ///
    /// # Errors
    /// libxl's.
    fn pause(&self, domain: DomId) -> Result<()>;
    /// Lets it run.
    ///
    /// # Errors
    /// libxl's.
    fn unpause(&self, domain: DomId) -> Result<()>;
    /// Lets a suspended domain run on where it was (its suspend call returns "cancelled").
    ///
    /// # Errors
    /// libxl's.
    fn resume(&self, domain: DomId) -> Result<()>;
    /// Ends it.
    ///
    /// # Errors
    /// libxl's.
    fn destroy(&self, domain: DomId) -> Result<()>;
    /// KiB that a domain of this `config` takes of a host, overhead included.
    ///
    /// # Errors
    /// libxl's.
    fn needed_memory(&self, config: &str) -> Result<u64>;
    /// Makes room of so many KiB, taking memory from dom0 where the host's settings allow it.
    /// Nobody keeps it free.
    ///
    /// # Errors
    /// There is not enough; the text says how much there is and how much is needed.
    fn make_room(&self, kib: u64) -> std::result::Result<(), ShortOfMemory>;
    /// [`Lifecycle::make_room`] for a domain of this `config`. Where dom0 may shrink, xl's lock is
    /// held, so that nobody else takes the room, until the next [`Lifecycle::restore`] is over.
    ///
    /// # Errors
    /// As [`Lifecycle::make_room`].
    fn reserve_memory(&self, config: &str) -> std::result::Result<(), ShortOfMemory>;
}

/// A host that is too full.
#[derive(Debug, thiserror::Error)]
pub enum ShortOfMemory {
    /// The arithmetic.
    #[error(
        "not enough memory on this host: the guest needs {need_mib} MiB, {free_mib} MiB are free"
    )]
    Need {
        /// What the guest takes, overhead included.
        need_mib: u64,
        /// What is free, after what could be taken from dom0.
        free_mib: u64,
    },
    /// The host could not be asked.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
}
