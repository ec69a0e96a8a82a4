//! The arguments with which libxl starts its helper. Which descriptors they name, and whether
//! these are open, is not looked at here.

use std::ffi::OsStr;

use super::DOMID_RESERVED;
use crate::frame::DomId;

/// `XCFLAGS_LIVE`.
const FLAG_LIVE: u32 = 1;
/// `XCFLAGS_DEBUG`.
const FLAG_DEBUG: u32 = 2;

/// Arguments that libxl does not pass.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvocationError {
    /// Neither a save nor a restore.
    #[error(
        "expected --save-domain or --restore-domain and its numbers; libxl starts this program"
    )]
    Mode,
    /// Too few or too many.
    #[error("{mode} takes {wanted} numbers, not {given}")]
    Count {
        /// `--save-domain` or `--restore-domain`.
        mode: &'static str,
        /// How many it takes.
        wanted: usize,
        /// How many came.
        given: usize,
    },
    /// Not a number, or one out of range.
    #[error("{name}: {value:?} is not {wanted}")]
    Number {
        /// Which argument.
        name: &'static str,
        /// As given.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A checkpointed stream.
    #[error("stream type {0}: checkpointed streams (Remus, COLO) are not supported")]
    Checkpointed(u32),
}

/// The callbacks that libxl answers (`cbflags`). To call another one is a protocol error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Callbacks(pub u32);

impl Callbacks {
    /// Whether libxl answers the message of that number.
    pub(super) fn has(self, number: u16) -> bool {
        self.0 >> number & 1 == 1
    }
}

/// What libxl wants, from the arguments of the helper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Write the stream of a domain.
    Save(SaveArgs),
    /// Read a stream into an empty domain.
    Restore(RestoreArgs),
}

/// Arguments of `--save-domain`. Its back channel (a checkpointed stream's) is left out: libxl
/// passes an unrelated descriptor there in a plain save.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveArgs {
    /// Descriptor to write the stream to.
    pub io_fd: i32,
    /// Which domain.
    pub domain: DomId,
    /// The guest runs while most of its memory goes out.
    pub live: bool,
    /// Everything is sent again at the end, to be compared.
    pub debug: bool,
    /// What libxl answers.
    pub callbacks: Callbacks,
}

/// Arguments of `--restore-domain`. Its back channel is left out: when `xl` receives a
/// migration, that is the descriptor of its own handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreArgs {
    /// Descriptor to read the stream from, not one byte past its end.
    pub io_fd: i32,
    /// Which domain.
    pub domain: DomId,
    /// The domain's event channel for xenstore.
    pub store_port: u32,
    /// The domain that xenstored runs in.
    pub store_domain: DomId,
    /// The domain's event channel for the console.
    pub console_port: u32,
    /// The domain that the console daemon runs in.
    pub console_domain: DomId,
    /// What libxl answers.
    pub callbacks: Callbacks,
}

impl Invocation {
    /// Reads the arguments, without the program's name.
    ///
    /// # Errors
    /// Whatever libxl would not pass, and checkpointed streams.
    pub fn parse(args: &[impl AsRef<OsStr>]) -> Result<Invocation, InvocationError> {
        let args: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
        let numbers: Vec<&str> = args.iter().skip(1).map(AsRef::as_ref).collect();
        match args.first().map(AsRef::as_ref) {
            Some("--save-domain") => SaveArgs::parse(&numbers).map(Invocation::Save),
            Some("--restore-domain") => RestoreArgs::parse(&numbers).map(Invocation::Restore),
            _ => Err(InvocationError::Mode),
        }
    }
}

impl SaveArgs {
    fn parse(numbers: &[&str]) -> Result<SaveArgs, InvocationError> {
        let [io_fd, _recv_fd, domid, flags, callbacks, stream_type] = *numbers else {
            let (wanted, given) = (6, numbers.len());
            return Err(InvocationError::Count { mode: "--save-domain", wanted, given });
        };
        plain_stream(stream_type)?;
        let xcflags = number("xcflags", flags)?;
        if xcflags & !(FLAG_LIVE | FLAG_DEBUG) != 0 {
            return Err(wrong("xcflags", flags, "a sum of 1 (live) and 2 (debug)"));
        }
        Ok(SaveArgs {
            io_fd: descriptor(io_fd)?,
            domain: domain("domid", domid)?,
            live: xcflags & FLAG_LIVE != 0,
            debug: xcflags & FLAG_DEBUG != 0,
            callbacks: Callbacks(number("cbflags", callbacks)?),
        })
    }
}

impl RestoreArgs {
    fn parse(numbers: &[&str]) -> Result<RestoreArgs, InvocationError> {
        let [io_fd, _back_fd, domid, port, store, console_port, console, callbacks, stream_type] =
            *numbers
        else {
            let (wanted, given) = (9, numbers.len());
            return Err(InvocationError::Count { mode: "--restore-domain", wanted, given });
        };
        plain_stream(stream_type)?;
        Ok(RestoreArgs {
            io_fd: descriptor(io_fd)?,
            domain: domain("domid", domid)?,
            store_port: number("store_port", port)?,
            store_domain: domain("store_domid", store)?,
            console_port: number("console_port", console_port)?,
            console_domain: domain("console_domid", console)?,
            callbacks: Callbacks(number("cbflags", callbacks)?),
        })
    }
}

fn wrong(name: &'static str, value: &str, wanted: &'static str) -> InvocationError {
    InvocationError::Number { name, value: value.to_owned(), wanted }
}

fn number(name: &'static str, value: &str) -> Result<u32, InvocationError> {
    value.parse().map_err(|_| wrong(name, value, "a 32-bit number"))
}

fn descriptor(value: &str) -> Result<i32, InvocationError> {
    let fd = value.parse().ok().filter(|fd| *fd > 2);
    fd.ok_or(wrong("io_fd", value, "a descriptor above the standard three"))
}

fn domain(name: &'static str, value: &str) -> Result<DomId, InvocationError> {
    let domid = value.parse().ok().filter(|domid| *domid < DOMID_RESERVED);
    domid.map(DomId).ok_or(wrong(name, value, "a domain number"))
}

fn plain_stream(value: &str) -> Result<(), InvocationError> {
    match number("stream_type", value)? {
        0 => Ok(()),
        other => Err(InvocationError::Checkpointed(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVE_CALLBACKS: Callbacks = Callbacks(136);
    const RESTORE_CALLBACKS: Callbacks = Callbacks(768);

    fn parse(line: &str) -> Result<Invocation, InvocationError> {
        Invocation::parse(&line.split_whitespace().collect::<Vec<_>>())
    }

    #[test]
    fn the_arguments_of_a_save_are_understood() {
        let save = SaveArgs {
            io_fd: 9,
            domain: DomId(3),
            live: true,
            debug: false,
            callbacks: SAVE_CALLBACKS,
        };
        assert_eq!(parse("--save-domain 9 0 3 1 136 0"), Ok(Invocation::Save(save.clone())));
        let debug = SaveArgs { live: false, debug: true, ..save };
        assert_eq!(parse("--save-domain 9 -1 3 2 136 0"), Ok(Invocation::Save(debug)));
    }

    #[test]
    fn the_arguments_of_a_restore_are_understood() {
        let restore = RestoreArgs {
            io_fd: 10,
            domain: DomId(4),
            store_port: 1,
            store_domain: DomId(0),
            console_port: 2,
            console_domain: DomId(5),
            callbacks: RESTORE_CALLBACKS,
        };
        let parsed = parse("--restore-domain 10 11 4 1 0 2 5 768 0");
        assert_eq!(parsed, Ok(Invocation::Restore(restore)));
    }

    #[test]
    fn arguments_that_libxl_does_not_pass_are_named_in_the_error() {
        let cases = [
            ("", "libxl starts this program"),
            ("--help", "libxl starts this program"),
            ("--save-domain 9 0 3 1 136", "--save-domain takes 6 numbers, not 5"),
            ("--restore-domain 9 0 3 1 136 0", "--restore-domain takes 9 numbers, not 6"),
            ("--save-domain 2 0 3 1 136 0", "io_fd: \"2\" is not a descriptor"),
            ("--save-domain 9 0 32752 1 136 0", "domid: \"32752\" is not a domain number"),
            ("--save-domain 9 0 3 4 136 0", "xcflags: \"4\" is not a sum of"),
            ("--save-domain 9 0 3 1 -1 0", "cbflags: \"-1\" is not a 32-bit number"),
            ("--save-domain 9 0 3 1 136 1", "stream type 1: checkpointed streams"),
            ("--save-domain 9 0 3 1 136 x", "stream_type: \"x\" is not a 32-bit number"),
            ("--restore-domain 9 0 4 1 99999 2 0 768 0", "store_domid: \"99999\" is not a domain"),
            ("--restore-domain 9 0 4 1 0 2 0 768 2", "stream type 2: checkpointed streams"),
        ];
        for (line, expected) in cases {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
