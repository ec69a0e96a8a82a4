//! The lock in C, and what it calls.
//!
//! # Safety
//! A lock lives until it is dropped, and all runs in one OS thread. C calls [`shim_spin_lock`] and
//! [`shim_wait`] in a coroutine only, whose [`Yielder`] is then in [`CURRENT`]: the coroutine sets
//! it when it starts and whenever it goes on. What C hands them lives as long as the call, and the
//! call as long as the coroutine is suspended in it. A coroutine that is dropped there is unwound,
//! for which C code has its tables on this architecture.

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_ulong};
use std::fmt;
use std::ptr::{self, NonNull};

use corosensei::Yielder;

/// What the scheduler tells a thread that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Go,
    /// It has been killed while it waited.
    Kill,
}

/// Where a thread gives way.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pause {
    /// Before it takes the guard.
    Guard,
    Wait(Waiting),
}

/// What a thread waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    done: *const c_uint,
    pub(crate) killable: bool,
}

impl Waiting {
    /// Whether it has been granted. Only to be asked while the thread is suspended in this wait.
    pub(crate) fn is_over(self) -> bool {
        // SAFETY: on the stack of the suspended thread, or in what it handed down.
        unsafe { self.done.read() != 0 }
    }
}

/// What a thread gives way by.
pub(crate) type Switch = Yielder<Order, Pause>;

thread_local! {
    /// Of the coroutine that runs.
    static CURRENT: Cell<*const Switch> = const { Cell::new(ptr::null()) };
}

/// Linux' number for a wait that a signal ended.
const ERESTARTSYS: c_int = 512;

/// `spinlock_t` of the shim.
#[repr(C)]
struct Spinlock {
    held: c_int,
}

#[repr(C)]
struct Opaque {
    _nothing: [u8; 0],
}

unsafe extern "C-unwind" {
    fn glue_new() -> *mut Opaque;
    fn glue_free(lock: *mut Opaque) -> c_int;
    fn glue_hold(
        lock: *mut Opaque,
        first: c_ulong,
        last: c_ulong,
        killable: c_int,
        waited: *mut c_int,
    ) -> c_int;
}

fn pause(pause: Pause) -> Order {
    let current = CURRENT.get();
    // SAFETY: this runs in that coroutine, see the top.
    let order = unsafe { &*current }.suspend(pause);
    CURRENT.set(current);
    order
}

#[unsafe(no_mangle)]
extern "C-unwind" fn shim_spin_lock(lock: *mut Spinlock) {
    pause(Pause::Guard);
    // SAFETY: the lock's guard, which lives as long as the lock.
    let held = unsafe { &mut (*lock).held };
    assert_eq!(*held, 0, "the guard is held twice");
    *held = 1;
}

#[unsafe(no_mangle)]
extern "C-unwind" fn shim_spin_unlock(lock: *mut Spinlock) {
    // SAFETY: as in `shim_spin_lock`.
    let held = unsafe { &mut (*lock).held };
    assert_eq!(*held, 1, "the guard is given back by one who does not hold it");
    *held = 0;
}

#[unsafe(no_mangle)]
extern "C-unwind" fn shim_wait(done: *const c_uint, killable: bool) -> c_int {
    match pause(Pause::Wait(Waiting { done, killable })) {
        Order::Go => 0,
        Order::Kill => -ERESTARTSYS,
    }
}

/// The thread was killed while it waited, and does not hold the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Killed;

/// A lock. It must outlive whoever uses it.
pub(crate) struct Lock(NonNull<Opaque>);

impl fmt::Debug for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lock")
    }
}

impl Lock {
    pub(crate) fn new() -> Lock {
        // SAFETY: needs nothing.
        let raw = unsafe { glue_new() };
        Lock(NonNull::new(raw).expect("no memory for a lock"))
    }

    /// Ends the lock. Whether nobody was in it any more.
    pub(crate) fn close(self) -> bool {
        // SAFETY: made by `glue_new`, and this is its end.
        unsafe { glue_free(self.0.as_ptr()) != 0 }
    }

    /// Locks and unlocks a range, in a coroutine. Whether it had to wait, and was killed.
    pub(crate) fn hold(
        &self,
        switch: &Switch,
        (first, last): (u8, u8),
        killable: bool,
    ) -> (bool, Result<(), Killed>) {
        CURRENT.set(switch);
        let mut waited = 0;
        let (first, last) = (c_ulong::from(first), c_ulong::from(last));
        // SAFETY: the lock lives, and this is a coroutine, whose switch has been set.
        let err = unsafe {
            glue_hold(self.0.as_ptr(), first, last, c_int::from(killable), &raw mut waited)
        };
        (waited != 0, if err == 0 { Ok(()) } else { Err(Killed) })
    }
}
