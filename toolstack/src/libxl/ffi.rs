//! libxl's functions as methods of [`Context`] that cannot be misused, and the few C structures
//! that pass between.
//!
//! # Safety
//! Every call takes the context, which is valid as long as the [`Context`] that the method
//! borrows (reason "the context" below), and otherwise pointers to values that outlive the call:
//! C strings that libxl copies, out-parameters on the stack, and [`Room`]s. Structures that libxl
//! fills are in rooms larger than the release that this was built with says, and only fields of
//! those listed in [`super`] are read.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::time::{SystemTime, UNIX_EPOCH};

use rxl_migrate::frame::DomId;
use rxl_xen_sys::libxl as xl;

use super::ctx::Context;

/// A code of libxl's, negative.
pub(super) type Rc = c_int;
/// What a call gives.
pub(super) type RcResult<T> = Result<T, Rc>;

/// Of any domain configuration: 4.17's is 1288 bytes.
const CONFIG_ROOM: usize = 64 << 10;
/// Of any other structure here, the largest of which has 120 bytes.
const OTHER_ROOM: usize = 4 << 10;
/// Alignment of a room: that of the most demanding C type.
const ROOM_ALIGN: usize = 16;

/// The types of event that a [`DeathWatch`] generates, as a mask.
const DOMAIN_EVENTS: u64 =
    (1 << xl::LIBXL_EVENT_TYPE_DOMAIN_SHUTDOWN) | (1 << xl::LIBXL_EVENT_TYPE_DOMAIN_DEATH);

/// Zeroed memory for a structure whose size only the loaded libxl knows.
struct Room<T, const BYTES: usize>(NonNull<T>);

impl<T, const BYTES: usize> Room<T, BYTES> {
    const LAYOUT: Layout = match Layout::from_size_align(BYTES, ROOM_ALIGN) {
        Ok(layout) if BYTES >= 2 * size_of::<T>() && align_of::<T>() <= ROOM_ALIGN => layout,
        _ => panic!("a room too small, checked when this is compiled"),
    };

    fn new() -> Self {
        // SAFETY: the layout's size is not 0.
        let room = unsafe { alloc_zeroed(Self::LAYOUT) };
        match NonNull::new(room) {
            Some(room) => Room(room.cast()),
            None => handle_alloc_error(Self::LAYOUT),
        }
    }

    fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T, const BYTES: usize> Drop for Room<T, BYTES> {
    fn drop(&mut self) {
        // SAFETY: from `alloc_zeroed` with the same layout.
        unsafe { dealloc(self.0.as_ptr().cast(), Self::LAYOUT) };
    }
}

/// `libxl_domain_config`, opaque: made, filled and read by libxl alone.
pub(super) struct Config<'a> {
    context: &'a Context,
    room: Room<xl::libxl_domain_config, CONFIG_ROOM>,
}

impl<'a> Config<'a> {
    fn new(context: &'a Context) -> Config<'a> {
        let room = Room::new();
        // SAFETY: zeroed room that is large enough.
        unsafe { context.api.libxl_domain_config_init(room.as_ptr()) };
        Config { context, room }
    }

    fn to_json(&self) -> RcResult<String> {
        let api = &self.context.api;
        // SAFETY: the context; the configuration is initialised.
        let json =
            unsafe { api.libxl_domain_config_to_json(self.context.raw(), self.room.as_ptr()) };
        // SAFETY: from libxl, by malloc, to be freed by its caller (libxl.h).
        unsafe { take_string(json) }.ok_or(xl::ERROR_FAIL)
    }
}

impl Drop for Config<'_> {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`; frees what libxl hung on it, not the room.
        unsafe { self.context.api.libxl_domain_config_dispose(self.room.as_ptr()) };
    }
}

/// An event that the context generated, freed when dropped.
struct Event<'a> {
    context: &'a Context,
    event: NonNull<xl::libxl_event>,
}

/// Fields of a `libxl_event`, each read by itself: the structure's end may be shorter in the
/// loaded libxl than in the headers, so there is never a reference to the whole.
impl Event<'_> {
    /// What the program gave when it asked for the event.
    fn for_user(&self) -> u64 {
        // SAFETY: libxl's until `libxl_event_free`; nobody writes it.
        unsafe { (*self.event.as_ptr()).for_user }
    }

    fn kind(&self) -> xl::libxl_event_type {
        // SAFETY: as above.
        unsafe { (*self.event.as_ptr()).type_ }
    }

    /// Result of an operation, for an `OPERATION_COMPLETE`.
    fn rc(&self) -> Rc {
        // SAFETY: it is at the union's start, and any bytes are a number.
        unsafe { self.details().cast::<Rc>().read() }
    }

    /// Why the domain shut down, for a `DOMAIN_SHUTDOWN`.
    fn shutdown_reason(&self) -> u8 {
        // SAFETY: it is at the union's start, and any byte is a number.
        unsafe { self.details().cast::<u8>().read() }
    }

    fn details(&self) -> *const xl::libxl_event__bindgen_ty_1 {
        // SAFETY: the union is inside libxl's allocation, whatever the size of its members.
        unsafe { &raw const (*self.event.as_ptr()).u }
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // SAFETY: the context; the event came from `libxl_event_wait` and is freed once.
        unsafe { self.context.api.libxl_event_free(self.context.raw(), self.event.as_ptr()) };
    }
}

/// What the hypervisor says of a domain.
#[derive(Clone, Copy, Debug)]
pub(super) struct DomainInfo {
    pub(super) shutdown: bool,
    pub(super) dying: bool,
    /// `LIBXL_SHUTDOWN_REASON_*`, if `shutdown`.
    pub(super) reason: c_int,
}

/// What happened to a watched domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DomainEvent {
    /// It shut down, for this reason (`LIBXL_SHUTDOWN_REASON_*`).
    Shutdown(u8),
    /// It is being, or has been, destroyed.
    Death,
}

/// A domain whose end is reported, until dropped.
pub(super) struct DeathWatch<'a> {
    context: &'a Context,
    watch: NonNull<xl::libxl_evgen_domain_death>,
    id: u64,
}

impl Drop for DeathWatch<'_> {
    fn drop(&mut self) {
        // SAFETY: the context; the watch came from `libxl_evenable_domain_death`.
        unsafe {
            let api = &self.context.api;
            api.libxl_evdisable_domain_death(self.context.raw(), self.watch.as_ptr());
        }
    }
}

/// How an asynchronous operation is named, to libxl and in its event.
fn named(id: u64) -> xl::libxl_asyncop_how {
    xl::libxl_asyncop_how {
        callback: None,
        u: xl::libxl_asyncop_how__bindgen_ty_1 { for_event: id },
    }
}

/// What a save comes to whose stream does not take its start.
fn cannot_write(error: &io::Error) -> Rc {
    tracing::error!("the stream cannot be written: {error}");
    xl::ERROR_FAIL
}

fn check(rc: Rc) -> RcResult<()> {
    if rc < 0 { Err(rc) } else { Ok(()) }
}

fn c_string(text: &str) -> RcResult<CString> {
    CString::new(text).map_err(|_| xl::ERROR_INVAL)
}

/// A string that the caller of libxl owns, and frees here; `None` for a null pointer and for
/// what is not UTF-8.
///
/// # Safety
/// `text` is null, or a C string from malloc that nobody else frees.
unsafe fn take_string(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the caller's word.
    let copy = unsafe { CStr::from_ptr(text) }.to_str().ok().map(str::to_owned);
    // SAFETY: the caller's word.
    unsafe { libc::free(text.cast()) };
    copy
}

/// `fn name(domain)`: calls that take a domain and are synchronous.
macro_rules! on_domain {
    ($($(#[$doc:meta])* $name:ident = $function:ident $(($extra:expr))?;)*) => {$(
        $(#[$doc])*
        pub(super) fn $name(&self, domain: DomId) -> RcResult<()> {
            // SAFETY: the context; no `ao_how`: it is over when the call returns.
            check(unsafe {
                self.api.$function(self.raw(), domain.0.into(), $($extra,)? ptr::null())
            })
        }
    )*};
}

impl Context {
    on_domain! {
        /// Ends it.
        destroy = libxl_domain_destroy;
        /// Stops it where it is.
        pause = libxl_domain_pause;
        /// Lets it run.
        unpause = libxl_domain_unpause;
        /// Lets it return from its suspend call, with "cancelled".
        resume = libxl_domain_resume(1);
    }

    /// The number of a domain by name or number (of which it is not said that it exists).
    pub(super) fn domid_of(&self, name_or_id: &str) -> RcResult<DomId> {
        let name = c_string(name_or_id)?;
        let mut domid = 0u32;
        // SAFETY: the context; a C string and an out-parameter.
        check(unsafe {
            self.api.libxl_domain_qualifier_to_domid(self.raw(), name.as_ptr(), &raw mut domid)
        })?;
        u16::try_from(domid).map(DomId).map_err(|_| xl::ERROR_DOMAIN_NOTFOUND)
    }

    /// The name of a domain, if there is such a domain.
    pub(super) fn name_of(&self, domain: DomId) -> Option<String> {
        // SAFETY: the context.
        let name = unsafe { self.api.libxl_domid_to_name(self.raw(), domain.0.into()) };
        // SAFETY: from libxl, by malloc, to be freed by its caller (libxl.h).
        unsafe { take_string(name) }
    }

    /// What the hypervisor says; `None`: there is no such domain.
    pub(super) fn info(&self, domain: DomId) -> RcResult<Option<DomainInfo>> {
        let room = Room::<xl::libxl_dominfo, OTHER_ROOM>::new();
        // SAFETY: zeroed room that is large enough.
        unsafe { self.api.libxl_dominfo_init(room.as_ptr()) };
        // SAFETY: the context; initialised room.
        let rc = unsafe { self.api.libxl_domain_info(self.raw(), room.as_ptr(), domain.0.into()) };
        // SAFETY: initialised above, and every bit pattern that libxl leaves in the fields that
        // are read is valid: C `bool`s are 0 or 1.
        let read = unsafe { room.0.as_ref() };
        let info =
            DomainInfo { shutdown: read.shutdown, dying: read.dying, reason: read.shutdown_reason };
        // SAFETY: initialised, disposed of once; `info` holds copies.
        unsafe { self.api.libxl_dominfo_dispose(room.as_ptr()) };
        match rc {
            0 => Ok(Some(info)),
            xl::ERROR_DOMAIN_NOTFOUND => Ok(None),
            rc => Err(rc),
        }
    }

    /// Parses libxl's JSON.
    pub(super) fn config_from_json(&self, json: &str) -> RcResult<Config<'_>> {
        let json = c_string(json.trim_end_matches('\0'))?;
        let config = Config::new(self);
        // SAFETY: the context; an initialised configuration and a C string.
        check(unsafe {
            let api = &self.api;
            api.libxl_domain_config_from_json(self.raw(), config.room.as_ptr(), json.as_ptr())
        })?;
        Ok(config)
    }

    /// A domain's configuration of now, as JSON.
    pub(super) fn retrieve_config(&self, domain: DomId) -> RcResult<String> {
        let config = Config::new(self);
        // SAFETY: the context; an initialised configuration; synchronous.
        check(unsafe {
            self.api.libxl_retrieve_domain_configuration(
                self.raw(),
                domain.0.into(),
                config.room.as_ptr(),
                ptr::null(),
            )
        })?;
        config.to_json()
    }

    /// Gives a domain another name.
    pub(super) fn rename(&self, domain: DomId, from: &str, to: &str) -> RcResult<()> {
        let (from, to) = (c_string(from)?, c_string(to)?);
        // SAFETY: the context; C strings.
        check(unsafe {
            let api = &self.api;
            api.libxl_domain_rename(self.raw(), domain.0.into(), from.as_ptr(), to.as_ptr())
        })
    }

    /// Gives a dead domain the name `config.name + suffix` and another UUID, so that one like it
    /// can be made.
    pub(super) fn preserve(
        &self,
        domain: DomId,
        config: &Config<'_>,
        suffix: &str,
    ) -> RcResult<()> {
        let suffix = c_string(suffix)?;
        let mut uuid = xl::libxl_uuid::default();
        // SAFETY: writes the 16 bytes.
        unsafe { self.api.libxl_uuid_generate(&raw mut uuid) };
        // `c_info` is the first member of a configuration in every release.
        let create_info = config.room.as_ptr().cast::<xl::libxl_domain_create_info>();
        // SAFETY: the context; initialised by libxl; a C string.
        check(unsafe {
            let api = &self.api;
            let id = domain.0.into();
            api.libxl_domain_preserve(self.raw(), id, create_info, suffix.as_ptr(), uuid)
        })
    }

    /// Writes a domain's memory to a file, as an ELF core.
    pub(super) fn core_dump(&self, domain: DomId, file: &str) -> RcResult<()> {
        let file = c_string(file)?;
        // SAFETY: the context; a C string; synchronous.
        check(unsafe {
            let api = &self.api;
            api.libxl_domain_core_dump(self.raw(), domain.0.into(), file.as_ptr(), ptr::null())
        })
    }

    /// Makes a paused domain.
    pub(super) fn create(&self, config: &Config<'_>) -> RcResult<DomId> {
        let mut domid = xl::INVALID_DOMID.cast_unsigned();
        let config = config.room.as_ptr();
        // SAFETY: the context; an initialised configuration; synchronous, no progress wanted.
        check(unsafe {
            let (api, domid) = (&self.api, &raw mut domid);
            api.libxl_domain_create_new(self.raw(), config, domid, ptr::null(), ptr::null())
        })?;
        u16::try_from(domid).map(DomId).map_err(|_| xl::ERROR_FAIL)
    }

    /// Takes a domain that asked for a soft reset down to its memory, and builds it up again,
    /// paused.
    pub(super) fn soft_reset(&self, domain: DomId, config: &Config<'_>) -> RcResult<()> {
        let config = config.room.as_ptr();
        let id = domain.0.into();
        // SAFETY: the context; an initialised configuration; synchronous, no progress wanted.
        check(unsafe {
            let api = &self.api;
            api.libxl_domain_soft_reset(self.raw(), config, id, ptr::null(), ptr::null())
        })
    }

    /// Saves a domain; `id` names the operation for [`Context::abort`].
    pub(super) fn suspend(
        &self,
        domain: DomId,
        fd: BorrowedFd<'_>,
        flags: u32,
        id: u64,
    ) -> RcResult<()> {
        let how = named(id);
        let flags = flags.cast_signed();
        let id32 = domain.0.into();
        let out = self.helper().hold(fd).map_err(|error| cannot_write(&error))?;
        // SAFETY: the context; `how` is copied; the descriptor stays open, because it is let go
        // of only after the operation's end.
        let started = check(unsafe {
            let api = &self.api;
            api.libxl_domain_suspend(self.raw(), id32, out, flags, &raw const how)
        });
        let saved = started.and_then(|()| self.wait_operation(id));
        let passed_on = self.helper().let_go().map_err(|error| cannot_write(&error));
        saved.and(passed_on)
    }

    /// Restores a domain; `id` names the operation. The domain's number comes back even on an
    /// error: something may be left of it.
    pub(super) fn restore(
        &self,
        config: &Config<'_>,
        fd: BorrowedFd<'_>,
        id: u64,
    ) -> (RcResult<()>, Option<DomId>) {
        let room = Room::<u32, OTHER_ROOM>::new();
        // SAFETY: room for a number, written before libxl knows of it.
        unsafe { room.as_ptr().write(xl::INVALID_DOMID.cast_unsigned()) };
        let params = RestoreParams::new(self);
        let how = named(id);
        // SAFETY: the context; `how` is copied; all else stays valid until the operation's end,
        // or for ever where that cannot be waited for.
        let begun = check(unsafe {
            self.api.libxl_domain_create_restore(
                self.raw(),
                config.room.as_ptr(),
                room.as_ptr(),
                fd.as_raw_fd(),
                -1,
                params.room.as_ptr(),
                &raw const how,
                ptr::null(),
            )
        });
        if let Err(rc) = begun {
            return (Err(rc), None);
        }
        let result = self.wait_operation(id);
        // SAFETY: written above, and by libxl at the operation's end.
        let domid = unsafe { room.as_ptr().read_volatile() };
        (result, u16::try_from(domid).ok().filter(|id| *id != 0).map(DomId))
    }

    /// Asks libxl to end an operation. Whether there was one is immaterial.
    pub(super) fn abort(&self, id: u64) {
        let how = named(id);
        // SAFETY: the context, which may be called from any thread; `how` is only compared.
        let _ = unsafe { self.api.libxl_ao_abort(self.raw(), &raw const how) };
    }

    /// Waits for the end of an operation. If that is not possible at all (the library is out of
    /// memory or descriptors), this process ends, because the operation goes on using memory and
    /// descriptors that its caller is about to free.
    fn wait_operation(&self, id: u64) -> RcResult<()> {
        loop {
            match self.wait_event(1 << xl::LIBXL_EVENT_TYPE_OPERATION_COMPLETE) {
                Ok(event) if event.for_user() == id => return check(event.rc()),
                Ok(_) => {}
                Err(rc) => {
                    tracing::error!("libxl cannot wait for an operation (libxl error {rc})");
                    std::process::abort();
                }
            }
        }
    }

    fn wait_event(&self, types: u64) -> RcResult<Event<'_>> {
        let mut event = ptr::null_mut();
        // SAFETY: the context; an out-parameter; no predicate.
        check(unsafe {
            let (api, event) = (&self.api, &raw mut event);
            api.libxl_event_wait(self.raw(), event, types, None, ptr::null_mut())
        })?;
        let event = NonNull::new(event).ok_or(xl::ERROR_FAIL)?;
        Ok(Event { context: self, event })
    }

    /// Has a domain's end reported to [`Context::wait_domain`] with this watch; `id` tells it
    /// from all earlier ones.
    pub(super) fn watch_death(&self, domain: DomId, id: u64) -> RcResult<DeathWatch<'_>> {
        let mut watch = ptr::null_mut();
        // SAFETY: the context; an out-parameter.
        check(unsafe {
            let (api, watch) = (&self.api, &raw mut watch);
            api.libxl_evenable_domain_death(self.raw(), domain.0.into(), id, watch)
        })?;
        let watch = NonNull::new(watch).ok_or(xl::ERROR_FAIL)?;
        Ok(DeathWatch { context: self, watch, id })
    }

    /// Waits for what happens next to the watched domain.
    pub(super) fn wait_domain(&self, watch: &DeathWatch<'_>) -> RcResult<DomainEvent> {
        loop {
            let event = self.wait_event(DOMAIN_EVENTS)?;
            if event.for_user() == watch.id {
                return Ok(match event.kind() {
                    xl::LIBXL_EVENT_TYPE_DOMAIN_SHUTDOWN => {
                        DomainEvent::Shutdown(event.shutdown_reason())
                    }
                    _ => DomainEvent::Death,
                });
            }
        }
    }

    /// Xen's command line, if it can be had.
    pub(super) fn command_line(&self) -> Option<String> {
        // SAFETY: the context, which owns the result.
        let version = unsafe { self.api.libxl_get_version_info(self.raw()) };
        // SAFETY: null, or valid as long as the context.
        let line = unsafe { version.as_ref() }?.commandline;
        if line.is_null() {
            return None;
        }
        // SAFETY: a C string as long as the context lives.
        Some(unsafe { CStr::from_ptr(line) }.to_string_lossy().into_owned())
    }

    /// KiB that a domain of this configuration takes, overhead included.
    pub(super) fn need_memory(&self, config: &Config<'_>) -> RcResult<u64> {
        let mut kib = 0;
        // SAFETY: the context; libxl fills defaults into the configuration; an out-parameter.
        check(unsafe {
            let (api, nobody) = (&self.api, xl::INVALID_DOMID.cast_unsigned());
            api.libxl_domain_need_memory(self.raw(), config.room.as_ptr(), nobody, &raw mut kib)
        })?;
        Ok(kib)
    }

    /// KiB that no domain has.
    pub(super) fn free_memory(&self) -> RcResult<u64> {
        let mut kib = 0;
        // SAFETY: the context; an out-parameter.
        check(unsafe { self.api.libxl_get_free_memory(self.raw(), &raw mut kib) })?;
        Ok(kib)
    }

    /// Has dom0 give up `kib`.
    pub(super) fn shrink_dom0(&self, kib: i64) -> RcResult<()> {
        let (relative, enforce) = (1, 0);
        // SAFETY: the context.
        check(unsafe {
            self.api.libxl_set_memory_target(self.raw(), 0, kib.saturating_neg(), relative, enforce)
        })
    }

    /// Waits until dom0 has what it is to have; gives up after `seconds` without progress.
    pub(super) fn wait_for_dom0(&self, seconds: c_int) -> RcResult<()> {
        // SAFETY: the context.
        check(unsafe { self.api.libxl_wait_for_memory_target(self.raw(), 0, seconds) })
    }
}

/// `libxl_domain_restore_params` for a plain libxl stream of version 2.
struct RestoreParams<'a> {
    context: &'a Context,
    room: Room<xl::libxl_domain_restore_params, OTHER_ROOM>,
}

impl<'a> RestoreParams<'a> {
    fn new(context: &'a Context) -> RestoreParams<'a> {
        let mut room = Room::new();
        // SAFETY: zeroed room that is large enough.
        unsafe { context.api.libxl_domain_restore_params_init(room.as_ptr()) };
        // SAFETY: initialised above; nobody else has the pointer yet.
        let params: &mut xl::libxl_domain_restore_params = unsafe { room.0.as_mut() };
        params.checkpointed_stream = 0;
        params.stream_version = 2;
        RestoreParams { context, room }
    }
}

impl Drop for RestoreParams<'_> {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`; disposed of once.
        unsafe { self.context.api.libxl_domain_restore_params_dispose(self.room.as_ptr()) };
    }
}

/// xl's mark for a preserved domain: `-20260131T0915Z`.
pub(super) fn utc_suffix(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = libc::time_t::try_from(since).unwrap_or_default();
    // SAFETY: plain numbers and a pointer, for which zero is valid.
    let mut t: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: two pointers to values on this stack; a null result leaves `t` as it is.
    unsafe { libc::gmtime_r(&raw const seconds, &raw mut t) };
    let (year, month) = (t.tm_year + 1900, t.tm_mon + 1);
    format!("-{year:04}{month:02}{:02}T{:02}{:02}Z", t.tm_mday, t.tm_hour, t.tm_min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_mark_of_a_preserved_domain_is_the_time_in_utc() {
        let at = |s| utc_suffix(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "-19700101T0000Z");
        assert_eq!(at(1_709_210_096), "-20240229T1234Z");
    }

    #[test]
    fn text_with_a_nul_is_refused_before_libxl_sees_it() {
        assert_eq!(c_string("a\0b").unwrap_err(), xl::ERROR_INVAL);
    }
}
