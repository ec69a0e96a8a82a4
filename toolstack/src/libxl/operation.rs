//! A save or restore that another thread may end.
//!
//! It is asynchronous in libxl's eyes, so that it has a name, and this thread waits for its event.
//!
//! Ending it has two degrees. The first request is a SIGTERM to the save helper alone, which winds
//! up as usual, with libxl at its side. Only the second (or the first, once the helper is done)
//! is libxl's own `libxl_ao_abort`, because that one
//! - leaves an HVM guest's device model logging dirty pages: libxl then refuses everything on the
//!   operation's behalf, switching that log off too;
//! - makes libxl unable to destroy the domain of a failed restore, for the same reason;
//! - ends this process before the helper has started: libxl then calls a null pointer (4.14 to
//!   4.22: `check_all_finished` stops a helper whose `completion_callback` is not set yet). So a
//!   request before that is kept for the helper.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::lifecycle::CANCELLED;

use super::ctx::{Context, Told};
use super::ffi::{Rc, RcResult};

/// No operation.
const NONE: u64 = 0;

/// Which operation runs, and how often its end was asked for. Shared with the cancellers.
#[derive(Debug, Default)]
pub(super) struct Operations {
    last: AtomicU64,
    current: AtomicU64,
    requests: AtomicU32,
}

impl Operations {
    /// A number that was not given before: names an operation, or a watch.
    pub(super) fn new_id(&self) -> u64 {
        self.last.fetch_add(1, SeqCst) + 1
    }

    /// Whether the end of the operation that runs was asked for.
    pub(super) fn is_cancelled(&self) -> bool {
        self.requests.load(SeqCst) > 0
    }

    /// Runs `operation`, which starts a save helper and is known to libxl by the number it gets.
    ///
    /// The order matters. A canceller first counts its request and then looks for an operation;
    /// here the operation is first announced, and then the requests are looked at. Whatever the
    /// interleaving, one of the two sides sees the other.
    pub(super) fn run<T>(
        &self,
        context: &Context,
        operation: impl FnOnce(u64) -> RcResult<T>,
    ) -> RcResult<T> {
        let id = self.new_id();
        context.helper().expect();
        self.current.store(id, SeqCst);
        let result = if self.is_cancelled() { Err(CANCELLED) } else { operation(id) };
        self.current.store(NONE, SeqCst);
        context.helper().forget();
        let asked = self.requests.swap(0, SeqCst) > 0;
        result.map_err(|rc| cause(rc, asked))
    }

    /// Asks for the end of the operation that runs, or else of the next one.
    fn cancel(&self, context: &Context) {
        let first = self.requests.fetch_add(1, SeqCst) == 0;
        let id = self.current.load(SeqCst);
        if id == NONE {
            return;
        }
        match context.helper().terminate() {
            Told::Later => {}
            Told::Now if first => {}
            Told::Now | Told::Nobody => context.abort(id),
        }
    }
}

/// A function that any thread may call, at any time.
pub(super) fn canceller(
    context: &Arc<Context>,
    operations: &Arc<Operations>,
) -> Box<dyn Fn() + Send + Sync> {
    let (context, operations) = (Arc::clone(context), Arc::clone(operations));
    Box::new(move || operations.cancel(&context))
}

/// A helper that was told to stop makes libxl report all sorts of failures.
fn cause(rc: Rc, asked: bool) -> Rc {
    if asked { CANCELLED } else { rc }
}
