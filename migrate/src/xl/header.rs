//! The header that `xl` puts before a libxl stream, in a save file and in a migration alike.
//!
//! ```text
//!  0  magic                32 bytes
//! 32  byte order           0x01020304 as the writer stores it
//! 36  mandatory flags      bit 0: the configuration is JSON; bit 1: libxl stream version 2
//! 40  optional flags       written 0, not looked at
//! 44  optional data        its length in bytes
//! 48  optional data:       length of the configuration (u32, its NUL counted), the
//!                          configuration, a NUL; whatever follows is skipped
//! ```
//!
//! Integers are in the writer's byte order, which is little endian wherever Xen runs on x86.
//! What it is not: the configuration is text here, nobody looks inside.

use std::io::{self, Read};

use zerocopy::byteorder::little_endian as le;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first bytes; there is no terminator.
pub const MAGIC: [u8; 32] = *b"Xen saved domain, xl format\n \0 \r";
/// Longest configuration that is read or written. libxl's are a few KiB.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;
/// Longest optional data that is read: a configuration, and room for what a later `xl` may add.
pub const OPTIONAL_BYTES_MAX: usize = CONFIG_BYTES_MAX + (64 << 10);
/// Bytes of the fixed part.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();

const BYTE_ORDER: u32 = 0x0102_0304;
const FLAG_JSON: u32 = 1 << 0;
const FLAG_STREAM_V2: u32 = 1 << 1;
/// What every `xl` since 4.5 writes, and the only flags that are understood.
const MANDATORY_FLAGS: u32 = FLAG_JSON | FLAG_STREAM_V2;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 32],
    byte_order: le::U32,
    mandatory_flags: le::U32,
    optional_flags: le::U32,
    optional_data_len: le::U32,
}

/// Bytes that are not a header that can be used.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The stream ended or broke.
    #[error("reading the header of the saved domain failed")]
    Read(#[source] io::Error),
    /// The first bytes are something else. The words are xl's.
    #[error("File has wrong magic number - corrupt or for a different tool?")]
    Magic,
    /// A writer of the other byte order.
    #[error("saved on a machine of another byte order ({0:#010x})")]
    ByteOrder(u32),
    /// Flags of a later `xl`. The words are xl's.
    #[error("Savefile has mandatory flag(s) {0:#x} which are not supported; need newer xl")]
    UnknownFlags(u32),
    /// The configuration is in xl.cfg's syntax, which nobody writes since Xen 4.5.
    #[error("the configuration in the header is not JSON; it was saved by xl older than 4.5")]
    NotJson,
    /// A stream of version 1.
    #[error("the stream is of version 1; it was saved by xl older than 4.6")]
    OldStream,
    /// More optional data than any `xl` writes.
    #[error("the header claims {0} bytes of optional data, the limit is {OPTIONAL_BYTES_MAX}")]
    OptionalTooLong(u32),
    /// More configuration than any domain has.
    #[error("the configuration has {0} bytes, the limit is {CONFIG_BYTES_MAX}")]
    ConfigTooLong(usize),
    /// The optional data ends before the configuration does.
    #[error("the header holds no complete configuration")]
    NoConfig,
    /// Not text.
    #[error("the configuration in the header is not text")]
    NotText,
}

/// A header with its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// libxl's JSON, without the NUL that ends it in the stream.
    pub config: String,
    /// The numbers that `xl` prints: mandatory flags, optional flags, bytes of optional data.
    pub info: (u32, u32, u32),
}

impl Header {
    /// A header for `config`.
    ///
    /// # Errors
    /// [`HeaderError::ConfigTooLong`], and [`HeaderError::NotText`] for a NUL within.
    pub fn new(config: &str) -> Result<Header, HeaderError> {
        if config.len() >= CONFIG_BYTES_MAX {
            return Err(HeaderError::ConfigTooLong(config.len()));
        }
        if config.contains('\0') {
            return Err(HeaderError::NotText);
        }
        let optional = u32::try_from(4 + config.len() + 1)
            .map_err(|_| HeaderError::ConfigTooLong(config.len()))?;
        Ok(Header { config: config.to_owned(), info: (MANDATORY_FLAGS, 0, optional) })
    }

    /// The bytes of header and optional data, as `xl` writes them.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let config_len = self.info.2.saturating_sub(4);
        let raw = RawHeader {
            magic: MAGIC,
            byte_order: BYTE_ORDER.into(),
            mandatory_flags: self.info.0.into(),
            optional_flags: self.info.1.into(),
            optional_data_len: self.info.2.into(),
        };
        let mut out = raw.as_bytes().to_vec();
        out.extend_from_slice(&config_len.to_le_bytes());
        out.extend_from_slice(self.config.as_bytes());
        out.push(0);
        out
    }

    /// Reads header and optional data, and not a byte more: the libxl stream comes next.
    ///
    /// # Errors
    /// See [`HeaderError`]. Nothing is allocated before its length has been checked.
    pub fn read_from(input: &mut impl Read) -> Result<Header, HeaderError> {
        let mut bytes = [0; HEADER_BYTES];
        input.read_exact(&mut bytes).map_err(HeaderError::Read)?;
        let raw: RawHeader = zerocopy::transmute!(bytes);
        let length = check_fixed_part(&raw)?;
        let mut optional = vec![0; length];
        input.read_exact(&mut optional).map_err(HeaderError::Read)?;
        Ok(Header {
            config: config_in(&optional)?,
            info: (
                raw.mandatory_flags.get(),
                raw.optional_flags.get(),
                raw.optional_data_len.get(),
            ),
        })
    }
}

/// The length of the optional data, if this is a header that can be used.
fn check_fixed_part(raw: &RawHeader) -> Result<usize, HeaderError> {
    if raw.magic != MAGIC {
        return Err(HeaderError::Magic);
    }
    if raw.byte_order.get() != BYTE_ORDER {
        return Err(HeaderError::ByteOrder(raw.byte_order.get()));
    }
    let flags = raw.mandatory_flags.get();
    if flags & !MANDATORY_FLAGS != 0 {
        return Err(HeaderError::UnknownFlags(flags & !MANDATORY_FLAGS));
    }
    if flags & FLAG_STREAM_V2 == 0 {
        return Err(HeaderError::OldStream);
    }
    if flags & FLAG_JSON == 0 {
        return Err(HeaderError::NotJson);
    }
    let length = raw.optional_data_len.get();
    usize::try_from(length)
        .ok()
        .filter(|l| *l <= OPTIONAL_BYTES_MAX)
        .ok_or(HeaderError::OptionalTooLong(length))
}

/// The configuration at the start of the optional data.
fn config_in(optional: &[u8]) -> Result<String, HeaderError> {
    let (length, rest) = optional.split_first_chunk::<4>().ok_or(HeaderError::NoConfig)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| HeaderError::NoConfig)?;
    if length > CONFIG_BYTES_MAX {
        return Err(HeaderError::ConfigTooLong(length));
    }
    let bytes = rest.get(..length).ok_or(HeaderError::NoConfig)?;
    let text = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    if text.is_empty() {
        return Err(HeaderError::NoConfig);
    }
    if text.contains(&0) {
        return Err(HeaderError::NotText);
    }
    String::from_utf8(text.to_vec()).map_err(|_| HeaderError::NotText)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The header of a domain whose configuration is `{}`, byte by byte.
    const GOLDEN: &[u8] = b"Xen saved domain, xl format\n \0 \r\
        \x04\x03\x02\x01\x03\0\0\0\0\0\0\0\x07\0\0\0\
        \x03\0\0\0{}\0";

    fn read(mut bytes: &[u8]) -> Result<Header, HeaderError> {
        Header::read_from(&mut bytes)
    }

    fn golden_with(offset: usize, value: u32) -> Vec<u8> {
        let mut bytes = GOLDEN.to_vec();
        bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_is_written_as_xl_writes_it() {
        assert_eq!(HEADER_BYTES, 48);
        assert_eq!(Header::new("{}").unwrap().to_bytes(), GOLDEN);
    }

    #[test]
    fn reading_stops_at_the_first_byte_of_the_stream() {
        let mut bytes = GOLDEN.to_vec();
        bytes.extend_from_slice(b"LibxlFmt");
        let mut input = bytes.as_slice();
        let header = Header::read_from(&mut input).unwrap();
        assert_eq!(header.config, "{}");
        assert_eq!(header.info, (3, 0, 7));
        assert_eq!(input, b"LibxlFmt");
    }

    #[test]
    fn what_follows_the_configuration_in_the_optional_data_is_skipped() {
        let mut bytes = golden_with(44, 7 + 5);
        bytes.extend_from_slice(b"later");
        assert_eq!(read(&bytes).unwrap().config, "{}");
    }

    #[test]
    fn unknown_mandatory_flags_are_refused_in_xls_words_and_optional_ones_ignored() {
        let text = read(&golden_with(36, 0x13)).unwrap_err().to_string();
        assert_eq!(
            text,
            "Savefile has mandatory flag(s) 0x10 which are not supported; need newer xl"
        );
        assert_eq!(read(&golden_with(40, 0xff)).unwrap().config, "{}");
    }

    #[test]
    fn text_configurations_and_old_streams_are_refused_by_name() {
        assert!(matches!(read(&golden_with(36, 2)), Err(HeaderError::NotJson)));
        assert!(matches!(read(&golden_with(36, 1)), Err(HeaderError::OldStream)));
    }

    #[test]
    fn lengths_are_checked_before_anything_is_allocated_for_them() {
        let claim = golden_with(44, u32::MAX);
        assert!(matches!(read(&claim), Err(HeaderError::OptionalTooLong(u32::MAX))));
        let over = u32::try_from(CONFIG_BYTES_MAX + 1).unwrap();
        assert!(matches!(read(&golden_with(48, over)), Err(HeaderError::ConfigTooLong(_))));
        assert!(matches!(read(&golden_with(48, 4)), Err(HeaderError::NoConfig)));
        assert!(matches!(read(&golden_with(44, 3)), Err(HeaderError::NoConfig)));
        assert!(Header::new(&"x".repeat(CONFIG_BYTES_MAX)).is_err());
        let longest = Header::new(&"x".repeat(CONFIG_BYTES_MAX - 1)).unwrap();
        assert_eq!(read(&longest.to_bytes()).unwrap(), longest);
    }

    #[test]
    fn a_header_that_ends_early_or_is_something_else_is_refused() {
        for end in 0..GOLDEN.len() {
            assert!(matches!(read(&GOLDEN[..end]), Err(HeaderError::Read(_))), "{end}");
        }
        assert!(matches!(read(&golden_with(0, 0)), Err(HeaderError::Magic)));
        assert!(matches!(read(&golden_with(32, 0x0403_0201)), Err(HeaderError::ByteOrder(_))));
    }

    proptest! {
        #[test]
        fn any_text_survives_and_any_bytes_are_read_without_panic(
            config in "[^\0]{1,300}",
            noise in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let header = Header::new(&config).unwrap();
            prop_assert_eq!(read(&header.to_bytes()).unwrap(), header);
            let mut bytes = GOLDEN[..36].to_vec();
            bytes.extend_from_slice(&noise);
            let _ = read(&bytes);
        }
    }
}
