//! What a program with the preloaded library and the machine say to each other: numbers of 64
//! bits in the byte order of the host they share.
//!
//! A request is [`REQUEST_WORDS`] words: what, then its arguments. [`MAP`] is followed by the
//! frames. An answer begins with the result: 0 or more, or a negated errno. What follows a result
//! that is not negative is said with each request. The client waits for the answer, so the
//! machine may read and write its memory meanwhile, as Xen would.

/// The variable that names the machine's socket.
pub(crate) const SOCKET_VARIABLE: &str = "RXL_FAKE_XEN";
/// Words of every request.
pub(crate) const REQUEST_WORDS: usize = 8;

/// First of all: the client's process number. Two words follow the result: the machine's process
/// number, and its descriptor of the file that holds the memory.
pub(crate) const HELLO: u64 = 1;
/// A hypercall: its number and five arguments.
pub(crate) const CALL: u64 = 2;
/// Maps frames of a domain: address (a name for it), domain, whether writable, number of frames.
/// A word for each page follows the result: its place in the file, or [`PAGE_ERROR`] and why.
pub(crate) const MAP: u64 = 3;
/// Ends a mapping or a resource: its address.
pub(crate) const UNMAP: u64 = 4;
/// Maps a resource: address, domain, type, id, first frame, number of frames. Answered as
/// [`MAP`] is.
pub(crate) const RESOURCE: u64 = 5;

/// Set in the word of a page that is not mapped; the low bits are the errno.
pub(crate) const PAGE_ERROR: u64 = 1 << 63;
