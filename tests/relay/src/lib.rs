//! What goes over the transport of a migration, followed byte by byte: [`forward`] from the sender
//! to the receiver, [`backward`] the other way. Both hand everything on, and say at each [`Point`]
//! that it has come *before* its bytes go on, so that whoever is told can hold the migration there.
//!
//! It reads what [`rxl_migrate`] can parse and judges nothing: from the first byte on that is
//! something else, the rest passes as it is. It sees the stream only: where a migration has links,
//! pages do not pass here, and there is neither [`Point::Pages`] nor [`Point::Again`].
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::io::{self, ErrorKind, Read, Write};

use rxl_migrate::frame::PAGE_SIZE;
use rxl_migrate::stream::libxc::{
    RECORD_HEADER_BYTES, ReadKind, RecordHeader, RecordKind, StreamHeader, page_data_count,
    page_data_entries,
};
use rxl_migrate::stream::libxl::{START_BYTES, is_start};
use rxl_migrate::xl::handshake::Message;
use rxl_migrate::xl::header::Header;

/// Pages that have gone on at [`Point::Pages`]: what one record of page data has at most.
const PAGES: usize = 1024;
/// Bytes that are moved at a time.
const BUFFER_BYTES: usize = 256 << 10;
/// Type of the record that ends a libxl stream.
const LIBXL_END: u32 = 0;

/// A point of a migration. Its bytes, and all that come after them, have not gone on yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Receiver: its first words.
    Banner,
    /// Sender: the libxl stream begins; header and configuration have gone on.
    Stream,
    /// Sender: more pages, of which 4 MiB have gone on.
    Pages,
    /// Sender: the first page that has gone on before: a second pass.
    Again,
    /// Sender: with links, the end of the first pass.
    PassEnd,
    /// Sender: the first record of the guest's state; all pages have gone on.
    State,
    /// Sender: the end of the libxl stream.
    End,
    /// Receiver: it has the domain.
    Ready,
    /// Sender: the permission to start.
    Go,
    /// Receiver: whether the domain runs.
    Report,
}

impl Point {
    /// All, by the names that the command line has for them.
    pub const ALL: [(&'static str, Point); 10] = [
        ("banner", Point::Banner),
        ("stream", Point::Stream),
        ("pages", Point::Pages),
        ("again", Point::Again),
        ("pass-end", Point::PassEnd),
        ("state", Point::State),
        ("end", Point::End),
        ("ready", Point::Ready),
        ("go", Point::Go),
        ("report", Point::Report),
    ];
}

/// Why a stream is followed no further.
enum Left {
    /// It is something that is not known here.
    Unknown,
    /// It, or where it goes, has ended or broken.
    Broken(io::Error),
}

impl From<io::Error> for Left {
    fn from(error: io::Error) -> Left {
        Left::Broken(error)
    }
}

/// Hands on all that a sender says, to the end.
///
/// # Errors
/// Reading or writing failed; the end of `from` is none.
pub fn forward(from: impl Read, to: impl Write, reached: &mut impl FnMut(Point)) -> io::Result<()> {
    let mut tap = Tap::new(from, to);
    let left = follow_sender(&mut tap, reached);
    tap.finish(left)
}

/// Hands on all that a receiver says, to the end.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    from: impl Read,
    to: impl Write,
    reached: &mut impl FnMut(Point),
) -> io::Result<()> {
    let mut tap = Tap::new(from, to);
    let left = follow_receiver(&mut tap, reached);
    tap.finish(left)
}

fn follow_sender<R: Read, W: Write>(
    tap: &mut Tap<R, W>,
    reached: &mut impl FnMut(Point),
) -> Result<(), Left> {
    Header::read_from(&mut *tap).map_err(|_| Left::Unknown)?;
    tap.hand_on()?;
    if !is_start(tap.array::<START_BYTES>()?) {
        return Err(Left::Unknown);
    }
    reached(Point::Stream);
    tap.hand_on()?;
    follow_libxc(tap, reached)?;
    follow_libxl(tap, reached)?;
    expect(tap, Message::Go)?;
    reached(Point::Go);
    Ok(tap.hand_on()?)
}

/// The records within the libxl stream, to their end.
fn follow_libxc<R: Read, W: Write>(
    tap: &mut Tap<R, W>,
    reached: &mut impl FnMut(Point),
) -> Result<(), Left> {
    let header = tap.array::<{ StreamHeader::BYTES }>()?;
    StreamHeader::parse(header).map_err(|_| Left::Unknown)?;
    tap.hand_on()?;
    let mut sent = Sent::default();
    let mut coming = |point| {
        if sent.is_news(point) {
            reached(point)
        }
    };
    let mut seen = HashSet::new();
    loop {
        let header = tap.array::<RECORD_HEADER_BYTES>()?;
        let header = RecordHeader::parse(header).map_err(|_| Left::Unknown)?;
        let whole = header.length + header.padding();
        match header.kind {
            ReadKind::Known(RecordKind::End) => {
                tap.hand_on()?;
                return Ok(());
            }
            ReadKind::Known(RecordKind::PageData) => {
                let pages = page_data(tap, header.length)?;
                if seen.len() >= PAGES {
                    coming(Point::Pages);
                }
                if pages.iter().any(|pfn| seen.contains(pfn)) {
                    coming(Point::Again);
                }
                tap.hand_on()?;
                tap.copy(pages.len() * PAGE_SIZE)?;
                seen.extend(pages);
                continue;
            }
            ReadKind::Known(RecordKind::RxlPassEnd) => coming(Point::PassEnd),
            ReadKind::Known(kind) if is_state(kind) => coming(Point::State),
            ReadKind::Known(_) | ReadKind::Optional(_) => {}
        }
        tap.hand_on()?;
        tap.copy(whole)?;
    }
}

/// What follows in the libxl stream, to its end.
fn follow_libxl<R: Read, W: Write>(
    tap: &mut Tap<R, W>,
    reached: &mut impl FnMut(Point),
) -> Result<(), Left> {
    loop {
        let [a, b, c, d, e, f, g, h] = tap.array::<RECORD_HEADER_BYTES>()?;
        let (kind, length) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        if kind == LIBXL_END {
            reached(Point::End);
            return Ok(tap.hand_on()?);
        }
        tap.hand_on()?;
        tap.copy((length as usize).next_multiple_of(8))?;
    }
}

fn follow_receiver<R: Read, W: Write>(
    tap: &mut Tap<R, W>,
    reached: &mut impl FnMut(Point),
) -> Result<(), Left> {
    let messages = [
        (Message::Banner, Point::Banner),
        (Message::Ready, Point::Ready),
        (Message::Report, Point::Report),
    ];
    for (message, point) in messages {
        expect(tap, message)?;
        reached(point);
        tap.hand_on()?;
    }
    Ok(())
}

/// Reads a message, and does not hand it on yet.
fn expect<R: Read, W: Write>(tap: &mut Tap<R, W>, message: Message) -> Result<(), Left> {
    let bytes = tap.take(message.wire_bytes())?;
    if bytes.starts_with(message.text()) { Ok(()) } else { Err(Left::Unknown) }
}

/// The pfns that come with data in a record of page data, whose header has been read. What has
/// been read has not been handed on.
fn page_data<R: Read, W: Write>(tap: &mut Tap<R, W>, length: usize) -> Result<Vec<u64>, Left> {
    let head = tap.array::<8>()?;
    let count = page_data_count(head, length).map_err(|_| Left::Unknown)?;
    let entries = page_data_entries(tap.take(8 * count)?, length).map_err(|_| Left::Unknown)?;
    Ok(entries.into_iter().filter(|entry| entry.kind.has_data()).map(|entry| entry.pfn.0).collect())
}

/// Whether a record is sent once the guest is suspended.
fn is_state(kind: RecordKind) -> bool {
    use RecordKind as Kind;
    matches!(
        kind,
        Kind::X86TscInfo
            | Kind::SharedInfo
            | Kind::X86PvVcpuBasic
            | Kind::HvmContext
            | Kind::HvmParams
    )
}

/// The points that have come.
#[derive(Default)]
struct Sent(Vec<Point>);

impl Sent {
    fn is_news(&mut self, point: Point) -> bool {
        let news = !self.0.contains(&point);
        if news {
            self.0.push(point);
        }
        news
    }
}

/// One direction: what is read is kept until it is handed on.
struct Tap<R, W> {
    from: R,
    to: W,
    kept: Vec<u8>,
}

impl<R: Read, W: Write> Tap<R, W> {
    fn new(from: R, to: W) -> Tap<R, W> {
        Tap { from, to, kept: Vec::new() }
    }

    /// Reads `bytes` bytes.
    fn take(&mut self, bytes: usize) -> io::Result<&[u8]> {
        let start = self.kept.len();
        let limit = u64::try_from(bytes).unwrap_or(u64::MAX);
        // What comes is kept also where it is too little.
        if self.from.by_ref().take(limit).read_to_end(&mut self.kept)? < bytes {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(self.kept.get(start..).unwrap_or_default())
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| ErrorKind::UnexpectedEof.into())
    }

    /// Hands on what has been read.
    fn hand_on(&mut self) -> io::Result<()> {
        self.to.write_all(&self.kept)?;
        self.kept.clear();
        self.to.flush()
    }

    /// Reads and hands on `bytes` bytes.
    fn copy(&mut self, bytes: usize) -> io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            let some = left.min(BUFFER_BYTES);
            self.take(some)?;
            self.hand_on()?;
            left -= some;
        }
        Ok(())
    }

    /// Hands on the rest, whatever it is.
    fn finish(mut self, left: Result<(), Left>) -> io::Result<()> {
        match left {
            Ok(()) | Err(Left::Unknown) => {}
            Err(Left::Broken(error)) if error.kind() == ErrorKind::UnexpectedEof => {
                return self.hand_on();
            }
            Err(Left::Broken(error)) => return Err(error),
        }
        self.hand_on()?;
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match self.from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => self.to.write_all(buffer.get(..length).unwrap_or_default())?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// For parsers that read by themselves: what they read is kept.
impl<R: Read, W: Write> Read for Tap<R, W> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let length = self.from.read(buf)?;
        self.kept.extend_from_slice(buf.get(..length).unwrap_or_default());
        Ok(length)
    }
}

#[cfg(test)]
mod tests;
