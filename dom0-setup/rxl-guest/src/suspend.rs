//! A guest that never answers a suspend request, and is healthy otherwise.
//!
//! The toolstack asks by writing to the xenstore node `control/shutdown`, on which the kernel has
//! a watch. `XS_RESET_WATCHES` makes xenstored forget all watches of this domain; after it the
//! kernel never learns of a request, while the program goes on running and answering.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

/// Message type of xen/io/xs_wire.h.
const XS_RESET_WATCHES: u32 = 21;
const HEADER_BYTES: usize = 16;
const REPLY_BYTES_MAX: usize = 4096;

/// Has xenstored forget the kernel's watches.
pub(crate) fn ignore_requests() -> Result<()> {
    let mut xenbus = File::options().read(true).write(true).open("/dev/xen/xenbus")?;
    xenbus.write_all(&request())?;
    let mut reply = [0; REPLY_BYTES_MAX];
    let length = xenbus.read(&mut reply)?;
    ensure!(length >= HEADER_BYTES, "xenstored's answer has {length} bytes");
    let kind = reply.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    let kind = kind.context("xenstored's answer has no type")?;
    ensure!(kind == XS_RESET_WATCHES, "xenstored refuses (message type {kind})");
    Ok(())
}

/// Header (type, request, transaction, length) and a body of one NUL, as the kernel sends it.
fn request() -> Vec<u8> {
    let mut message: Vec<u8> =
        [XS_RESET_WATCHES, 0, 0, 1].into_iter().flat_map(u32::to_le_bytes).collect();
    message.push(0);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_request_has_header_and_one_nul() {
        assert_eq!(request(), [21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
    }
}
