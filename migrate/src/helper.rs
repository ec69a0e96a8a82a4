//! The protocol between libxl and its save helper, the process that moves a libxc stream.
//!
//! libxl starts the program that `LIBXL_SAVE_HELPER` names, with everything but the content of
//! the stream in its arguments ([`Invocation`]). The helper sends messages on its standard output
//! and reads the answers to some of them on its standard input ([`HelperChannel`]). The protocol
//! is the same from Xen 4.14 on; it is defined by libxl's `libxl_save_msgs_gen.pl`.
//!
//! A message is a `u16` length, then that many bytes: a `u16` number and its arguments, packed,
//! all in the machine's byte order. A string is a `u32` size, its closing NUL counted, and the
//! bytes. An answer is one `i32`.
//!
//! | number | message | arguments | answer |
//! |---|---|---|---|
//! | 1 | log | `u32` level, `u32` errno (all ones: none), string context, string text | - |
//! | 2 | progress | string context, string what, `u64` done, `u64` total | - |
//! | 3 | suspend | - | 1 suspended, 0 not |
//! | 4, 5, 6 | postcopy, checkpoint, wait_checkpoint | - | Remus and COLO; not used here |
//! | 7 | switch_qemu_logdirty | `u32` domid, `u32` enable | 0 or an error |
//! | 8 | static_data_done | `u32` missing: 1 CPUID, 2 MSRs | 0 or an error |
//! | 9 | restore_results | `u64` store frame, `u64` console frame | - |
//! | 10 | complete | `i32` return value, `i32` errno | any |
//!
//! What it is not: the helper itself. That opens descriptors and handles signals, and is
//! `toolstack`'s. Nothing here knows what a stream holds.

mod channel;
mod invocation;
mod message;

pub use channel::{EventSink, HelperChannel, Notice};
pub use invocation::{Callbacks, Invocation, InvocationError, RestoreArgs, SaveArgs};
pub use message::{Message, MessageError, STRING_BYTES_MAX};

/// The first domain number that means something other than a domain (`DOMID_FIRST_RESERVED`).
const DOMID_RESERVED: u16 = 0x7ff0;
