//! A save or restore that another thread may end.
//!
//! It is asynchronous in libxl's eyes, so that it has a name, and this thread waits for its event.
//! Ending it has two degrees, because libxl's own way (`libxl_ao_abort`) leaves an HVM guest's
//! device model logging dirty pages: libxl then refuses everything on the operation's behalf,
//! switching that log off too. So the first request is a SIGTERM to the save helper alone, which
//! winds up as usual, with libxl at its side; only the second (or the first, while no helper
//! runs) is `libxl_ao_abort`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::lifecycle::CANCELLED;

use super::ctx::Context;
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

    /// Runs `operation`, which is to call what it is given when libxl knows of the operation.
    ///
    /// The order matters. A canceller first counts its request and then looks for an operation;
    /// here the operation is first announced, then started, and then the requests are looked at.
    /// Whatever the interleaving, one of the two sides sees the other.
    pub(super) fn run<T>(
        &self,
        context: &Context,
        operation: impl FnOnce(u64, &dyn Fn()) -> RcResult<T>,
    ) -> RcResult<T> {
        let id = self.new_id();
        context.helper().expect();
        self.current.store(id, SeqCst);
        let result = if self.requests.load(SeqCst) > 0 {
            Err(CANCELLED)
        } else {
            operation(id, &|| {
                if self.requests.load(SeqCst) > 0 {
                    end(context, id, 1);
                }
            })
        };
        self.current.store(NONE, SeqCst);
        context.helper().forget();
        let asked = self.requests.swap(0, SeqCst) > 0;
        result.map_err(|rc| cause(rc, asked))
    }

    /// Asks for the end of the operation that runs, or else of the next one.
    pub(super) fn cancel(&self, context: &Context) {
        let nth = self.requests.fetch_add(1, SeqCst) + 1;
        let id = self.current.load(SeqCst);
        if id != NONE {
            end(context, id, nth);
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

fn end(context: &Context, id: u64, nth: u32) {
    if nth > 1 || !context.helper().terminate() {
        context.abort(id);
    }
}

/// A helper that was told to stop makes libxl report all sorts of failures.
fn cause(rc: Rc, asked: bool) -> Rc {
    if asked { CANCELLED } else { rc }
}
