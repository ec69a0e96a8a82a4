//! Fuzz targets: a function over bytes for every parser of what a peer, a file or a guest wrote.
//!
//! A target panics, or asks for more memory than it may, if what it tests does; it also panics
//! where a result makes no sense. What each reaches is in `docs/fuzzing.md`. Two programs run
//! them: libFuzzer's (`libfuzzer/`, a workspace of its own) looks for new inputs, and
//! `tests/replay.rs` runs those of `corpus/` with all other tests.
//!
//! What it is not: a place for tests of single behaviours. Those are beside the code that they
//! test.
#![forbid(unsafe_code)]

mod alone;
mod block;
mod file;
mod handshake;
mod header;
mod helper;
mod input;
mod link;
mod linked;
mod links;
mod page_table;
mod receivers;
mod records;
mod report;
mod restore;
mod save;
mod senders;
mod ways;

use std::alloc::System;
use std::fmt::Debug;
use std::panic;
use std::sync::Once;

use cap::Cap;
use rxl_migrate::fake::{FakeDomain, Host};
use rxl_migrate::stream::reduced::{Agreed, Reduce};
use serde::Serialize;
use serde::de::DeserializeOwned;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

const MIB: usize = 1 << 20;

/// What both ends of every link know: all that may be left out of pages is.
const AGREED: Agreed = Agreed { reduce: Reduce::ALL, seed: 7, links: 1 };

/// One function over bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// As on the command line, and of the directory of its corpus.
    pub name: &'static str,
    /// The parsers, in a few words.
    pub about: &'static str,
    /// Most bytes that it may have allocated at a time, beyond a few times its input: the
    /// largest of the limits that the code under test names, and what the model of Xen takes.
    pub memory_bytes_max: usize,
    run: fn(&[u8]),
    seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 10] = [
    Target {
        name: "restore",
        about: "a libxc stream, as the receiver reads and applies it",
        memory_bytes_max: 80 * MIB,
        run: restore::run,
        seeds: restore::seeds,
    },
    Target {
        name: "save",
        about: "a PV guest's own p2m, page tables and vCPU contexts, as the sender reads them",
        memory_bytes_max: 160 * MIB,
        run: save::run,
        seeds: save::seeds,
    },
    Target {
        name: "records",
        about: "headers and records of the libxc stream, and back to bytes",
        memory_bytes_max: MIB,
        run: records::run,
        seeds: records::seeds,
    },
    Target {
        name: "link",
        about: "what both ends say about links, and what the processes of one end do",
        memory_bytes_max: 4 * MIB,
        run: link::run,
        seeds: link::seeds,
    },
    Target {
        name: "links",
        about: "page data over a link, beside the same over the stream",
        memory_bytes_max: 80 * MIB,
        run: links::run,
        seeds: links::seeds,
    },
    Target {
        name: "page_table",
        about: "PV page tables between mfns and pfns",
        memory_bytes_max: MIB,
        run: page_table::run,
        seeds: page_table::seeds,
    },
    Target {
        name: "header",
        about: "xl's header, the domain's configuration in it, the start of the libxl stream",
        memory_bytes_max: 3 * MIB,
        run: header::run,
        seeds: header::seeds,
    },
    Target {
        name: "handshake",
        about: "both ends of xl's handshake, whatever the peer says",
        memory_bytes_max: MIB,
        run: handshake::run,
        seeds: handshake::seeds,
    },
    Target {
        name: "helper",
        about: "the save helper's arguments, its messages and libxl's answers",
        memory_bytes_max: MIB,
        run: helper::run,
        seeds: helper::seeds,
    },
    Target {
        name: "report",
        about: "the save helper's events, as lines of JSON",
        memory_bytes_max: 4 * MIB,
        run: report::run,
        seeds: report::seeds,
    },
];

/// What a byte of input may cost beyond [`Target::memory_bytes_max`]: a record of one page entry
/// takes a page of content from two bytes.
const MEMORY_PER_INPUT_BYTE: usize = 256;

impl Target {
    /// The target called `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<Target> {
        TARGETS.into_iter().find(|target| target.name == name)
    }

    /// Runs it on `input`.
    ///
    /// # Panics
    /// If what it tests does, or gives a result that makes no sense. A request for more memory
    /// than it may have ends the process.
    pub fn run(&self, input: &[u8]) {
        static HOOK: Once = Once::new();
        HOOK.call_once(unlimit_panics);
        let limit = self.memory_bytes_max + MEMORY_PER_INPUT_BYTE * input.len();
        let limited = MEMORY.set_limit(MEMORY.allocated().saturating_add(limit));
        limited.expect("a limit above what is allocated");
        (self.run)(input);
        MEMORY.set_limit(usize::MAX).expect("no limit");
    }

    /// Inputs made from what the real writers of the format write, to begin with.
    #[must_use]
    pub fn seeds(&self) -> Vec<Vec<u8>> {
        (self.seeds)()
    }
}

/// Frames of a host for a few pages, and of one that has room for extents of 2 MiB.
const FRAMES_SMALL: u64 = 64;
const FRAMES_LARGE: u64 = 1200;

/// An empty domain on a host of its own, which may be the larger one, or have no extents.
fn empty_domain(hvm: bool, large: bool, fragmented: bool) -> FakeDomain {
    let frames = if large { FRAMES_LARGE } else { FRAMES_SMALL };
    let host = Host::new(frames, 7);
    let domain = host.create(hvm, frames / 2, 2);
    if fragmented {
        host.fragment();
    }
    domain
}

/// Lets a panic take the memory that its message and backtrace need.
fn unlimit_panics() {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let _ = MEMORY.set_limit(usize::MAX);
        hook(info);
    }));
}

/// Panics unless every part of `error` says something: that is all a user gets to see.
fn assert_told(error: &dyn std::error::Error) {
    for part in std::iter::successors(Some(error), |error| error.source()) {
        assert!(!part.to_string().trim().is_empty(), "{part:?} says nothing");
    }
    assert!(!format!("{error:?}").is_empty());
}

/// `message` as another process of the same end reads it, where messages may be so long.
fn passed_on<M>(message: &M, bytes_max: usize) -> M
where
    M: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let bytes = serde_json::to_vec(message).expect("a message is JSON");
    assert!(bytes.len() <= bytes_max, "a message of {} bytes", bytes.len());
    let again = serde_json::from_slice(&bytes).expect("rxl reads what it writes");
    assert_eq!(&again, message);
    again
}
