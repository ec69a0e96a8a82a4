//! The start of a libxl stream: its header, and the header of the record that stands for the
//! libxc stream inside. libxl itself writes and reads all of it; this is to know a start that is
//! none before libxl looks.
//!
//! Specified in Xen's `docs/specs/libxl-migration-stream.pandoc`: the header is big-endian, the
//! records are in the byte order of the header's options, which is little-endian for all that
//! libxl accepts on x86.

use zerocopy::byteorder::{big_endian as be, little_endian as le};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the start.
pub const START_BYTES: usize = size_of::<RawStart>();
/// The version of the format.
pub const VERSION: u32 = 2;
/// `LibxlFmt`.
const IDENT: u64 = 0x4c69_6278_6c46_6d74;
/// Option: records are big-endian.
const OPTION_BIG_ENDIAN: u32 = 1;
/// Type of the record that stands for the libxc stream. It has no body.
const LIBXC_CONTEXT: u32 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawStart {
    ident: be::U64,
    version: be::U32,
    options: be::U32,
    record: le::U32,
    length: le::U32,
}

/// Whether libxl, from these bytes on, would start its save helper: a stream of version 2, little
/// endian, whose first record stands for the libxc stream.
#[must_use]
pub fn is_start(bytes: [u8; START_BYTES]) -> bool {
    let raw: RawStart = zerocopy::transmute!(bytes);
    raw.ident.get() == IDENT
        && raw.version.get() == VERSION
        && raw.options.get() & OPTION_BIG_ENDIAN == 0
        && raw.record.get() == LIBXC_CONTEXT
        && raw.length.get() == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_what_libxl_writes_and_any_other_is_refused() {
        // As Debian's libxl 4.17 writes it.
        let valid = *b"LibxlFmt\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0";
        assert!(is_start(valid));
        // Each of the bytes that libxl or its helper would stumble over.
        for wrong in [0, 7, 11, 15, 16, 19, 20, 23] {
            let mut start = valid;
            start[wrong] ^= 1;
            assert!(!is_start(start), "byte {wrong}");
        }
        let mut converted = valid;
        converted[15] = 2;
        assert!(is_start(converted));
    }
}
