//! Uses the kernel module `rxl_map` in every way that a process can, for `tests/run kmod`.
//!
//! ```text
//! kmod SECONDS SEED DOMID:FILE:fixed|changing …
//! ```
//!
//! `FILE` has numbers of frames of the domain, as `mapping frames` writes them. Threads share one
//! window. Each of its pages belongs to one frame for the whole run: whoever maps that page maps
//! that frame there. So the threads need not know of each other, take each other's ranges, and
//! still every page that can be read has to be the right frame's, if the domain's memory is
//! `fixed`. What cannot be read is found without a signal, by having the kernel read it.
//!
//! It prints a line of JSON with how often it did what. The first thing that is not as it has to
//! be ends it.
//!
//! # Safety
//! `unsafe` is for the window, which is never read but by the kernel, and for calls of the module,
//! some of which are meant to be wrong: it has to refuse them.
#![allow(unsafe_code)]

mod device;
mod play;

use std::error::Error;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::device::Device;
use crate::play::{Area, Player, Stage};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Threads that use the window.
const THREADS: u64 = 8;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [seconds, seed, areas @ ..] = words.as_slice() else {
        return Err("usage: kmod SECONDS SEED DOMID:FILE:fixed|changing …".into());
    };
    let (seconds, seed): (u64, u64) = (seconds.parse()?, seed.parse()?);
    let areas = areas.iter().map(|word| Area::parse(word)).collect::<Result<Vec<_>>>()?;
    let device = Device::open(play::pages(&areas))?;
    let stage = Stage::new(device, areas)?;
    play::refusals(&stage)?;

    let end = Instant::now() + Duration::from_secs(seconds);
    let over = AtomicBool::new(false);
    let counts = thread::scope(|scope| {
        let players: Vec<_> = (0..THREADS)
            .map(|index| {
                let (stage, over) = (&stage, &over);
                scope.spawn(move || {
                    let mut player = Player::new(stage, seed.wrapping_mul(THREADS) + index)?;
                    while !over.load(Ordering::Relaxed) && Instant::now() < end {
                        // One that fails ends the others.
                        player.step().inspect_err(|_| over.store(true, Ordering::Relaxed))?;
                    }
                    Result::Ok(player.counts())
                })
            })
            .collect();
        let joined = players.into_iter().map(|player| player.join().map_err(|_| "a panic")?);
        joined.collect::<Result<Vec<_>>>()
    })?;
    let sum = |pick: fn(&play::Counts) -> u64| counts.iter().map(pick).sum::<u64>();
    let line = json!({
        "mapped": sum(|counts| counts.mapped),
        "busy": sum(|counts| counts.busy),
        "refused_pages": sum(|counts| counts.refused_pages),
        "unmapped": sum(|counts| counts.unmapped),
        "right_pages": sum(|counts| counts.right_pages),
        "empty_pages": sum(|counts| counts.empty_pages),
        "fdinfo": stage.device().fdinfo()?,
    });
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
