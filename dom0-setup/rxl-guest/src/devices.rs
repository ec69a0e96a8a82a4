//! Devices of the guest, if it has some: a network card at which every line comes back that is sent
//! to it, and a disk that is written and read all the time.
//!
//! What it takes to have them (drivers, addresses) is in `/devices`, a script that the host has put
//! into the initramfs with all that it needs; without it there are none.

use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;

const SCRIPT: &str = "/devices";
const DISK: &str = "/dev/xvda";
/// Where a connection gets back what it sends (RFC 862).
const ECHO_PORT: u16 = 7;
/// Between two blocks that are written.
const DISK_PAUSE: Duration = Duration::from_millis(50);
/// The part of the disk that is used, and what is written of it at a time.
const DISK_BLOCKS: u64 = 1024;
const BLOCK_BYTES: usize = 4096;
/// What memory has before a block is read into it.
const UNREAD: u64 = u64::MAX;

/// A block that is aligned as direct transfers need it.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

/// What has been done with the disk.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) blocks: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) first_error: OnceLock<String>,
}

/// Whether there are devices; then they are there afterwards, with their addresses.
pub(crate) fn prepare() -> Result<bool> {
    if !Path::new(SCRIPT).exists() {
        return Ok(false);
    }
    let status = Command::new("/bin/busybox").args(["sh", "-e", SCRIPT]).status();
    let status = status.context("Cannot start busybox")?;
    ensure!(status.success(), "{SCRIPT}: {status}");
    Ok(true)
}

/// Sends back what comes, over as many connections as there are.
pub(crate) fn echo() -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT)).context("Cannot listen")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(bytes.get(..count).unwrap_or_default()).is_err() {
            return;
        }
    }
}

impl Disk {
    /// Writes block after block, past the kernel's cache, and reads each again.
    pub(crate) fn run(&self) {
        for number in 1_u64.. {
            let done = match transfer(number) {
                // A move between writing and reading; the next one is far away.
                Ok(Found::OtherDisk) => transfer(number),
                done => done,
            };
            let error = match done {
                Ok(Found::Same) => None,
                Ok(Found::OtherDisk) => Some("the disk was another twice".to_owned()),
                Ok(Found::Other(found)) => Some(format!("{found:#x} was read")),
                Err(error) => Some(format!("{error:#}")),
            };
            if let Some(error) = error {
                self.errors.fetch_add(1, Ordering::Relaxed);
                self.first_error.get_or_init(|| format!("block {number}: {error}"));
            } else {
                self.blocks.fetch_add(1, Ordering::Relaxed);
            }
            thread::sleep(DISK_PAUSE);
        }
    }
}

/// What was read.
enum Found {
    /// What was written.
    Same,
    /// What another host's disk may have there, as each has a disk of its own: nothing, or what was
    /// written at this place by an earlier round or guest.
    OtherDisk,
    /// Anything else that begins so: memory that the disk's backend has not written, for one.
    Other(u64),
}

fn transfer(number: u64) -> Result<Found> {
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    let mut disk = OpenOptions::new().read(true).write(true).custom_flags(direct).open(DISK)?;
    let place = number % DISK_BLOCKS;
    disk.seek(SeekFrom::Start(place * BLOCK_BYTES as u64))?;
    disk.write_all(&block_of(number).0)?;
    let mut read = block_of(UNREAD);
    disk.seek(SeekFrom::Start(place * BLOCK_BYTES as u64))?;
    disk.read_exact(&mut read.0)?;
    let found = u64::from_le_bytes(read.0.first_chunk().copied().unwrap_or_default());
    let whole = read.0 == block_of(found).0 && found != UNREAD;
    Ok(match found {
        _ if whole && found == number => Found::Same,
        _ if whole && (found == 0 || found % DISK_BLOCKS == place) => Found::OtherDisk,
        _ => Found::Other(found),
    })
}

/// A block full of `number`.
fn block_of(number: u64) -> Block {
    let mut block = Block([0; BLOCK_BYTES]);
    block.0.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = number.to_le_bytes());
    block
}
