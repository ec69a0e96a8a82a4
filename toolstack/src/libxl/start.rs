//! The start of a libxl stream that is restored, looked at before libxl looks.
//!
//! libxl (4.14 to 4.22) calls a null pointer, which ends this process and leaves a half-built
//! domain behind, if a stream fails before its save helper has started: `check_all_finished`
//! stops a helper that has no `completion_callback` yet. A sender that gives up early, or a file
//! that is none, is enough. So the 24 bytes that come before the helper's part are waited for and
//! checked here, without taking them from the descriptor. For the other direction see
//! [`super::held`].
//!
//! What is read of the format is in [`rxl_migrate::stream::libxl`].

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::pipe::{PipeFlags, SpliceFlags};
use rxl_migrate::stream::libxl::{START_BYTES, VERSION, is_start};

/// How often a request to end is looked for.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Between two looks at a start that is not complete.
const RETRY: Duration = Duration::from_millis(20);

/// A stream that libxl must not see.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// It ends first.
    #[error("the stream ends before the domain's memory")]
    Truncated,
    /// The wrong kind of file.
    #[error("this is not a libxl stream of version {VERSION}")]
    NotLibxl,
    /// Somebody asked for the end.
    #[error("cancelled")]
    Cancelled,
    /// The descriptor does not work.
    #[error("the stream cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Waits until a whole start is on `fd`, and checks it. A descriptor that cannot be read without
/// taking the bytes (no file, pipe or socket) is not looked at.
pub(super) fn check(fd: BorrowedFd<'_>, cancelled: impl Fn() -> bool) -> Result<(), StartError> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd).map_err(io::Error::from)?.st_mode);
    let look = match kind {
        FileType::RegularFile => look_at_file,
        FileType::Socket => look_at_socket,
        FileType::Fifo => look_at_pipe,
        _ => return Ok(()),
    };
    loop {
        let ended = wait(fd)? || kind == FileType::RegularFile;
        let mut start = [0; START_BYTES];
        if look(fd, &mut start)? == START_BYTES {
            return if is_start(start) { Ok(()) } else { Err(StartError::NotLibxl) };
        }
        if ended {
            return Err(StartError::Truncated);
        }
        if cancelled() {
            return Err(StartError::Cancelled);
        }
        sleep(RETRY);
    }
}

/// Waits a little for something to read. Whether the other end is closed, so that what is there
/// is all.
fn wait(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN | PollFlags::RDHUP)];
    match poll(&mut fds, Some(&PATIENCE)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    let end = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR | PollFlags::NVAL;
    Ok(fds.iter().any(|f| f.revents().intersects(end)))
}

type Start = [u8; START_BYTES];

fn look_at_file(fd: BorrowedFd<'_>, start: &mut Start) -> io::Result<usize> {
    let position = rustix::fs::tell(fd)?;
    Ok(rustix::io::pread(fd, start.as_mut_slice(), position)?)
}

fn look_at_socket(fd: BorrowedFd<'_>, start: &mut Start) -> io::Result<usize> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(fd, start.as_mut_slice(), flags) {
        Ok((bytes, _)) => Ok(bytes),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

/// By duplicating what is in it into a pipe of our own (`tee`).
fn look_at_pipe(fd: BorrowedFd<'_>, start: &mut Start) -> io::Result<usize> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    match rustix::pipe::tee(fd, writer.as_fd(), START_BYTES, SpliceFlags::NONBLOCK) {
        Ok(0) | Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Ok(_) => {
            let mut room = [MaybeUninit::uninit(); START_BYTES];
            let (bytes, _) = rustix::io::read(&reader, &mut room)?;
            start.iter_mut().zip(bytes.iter()).for_each(|(to, from)| *to = *from);
            Ok(bytes.len())
        }
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    /// As Debian's libxl 4.17 writes it.
    const VALID: &Start = b"LibxlFmt\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0";

    fn never() -> bool {
        false
    }

    #[test]
    fn a_pipe_keeps_every_byte_that_was_looked_at() {
        let (mut reader, mut writer) = io::pipe().unwrap();
        let sender = std::thread::spawn(move || {
            for part in VALID.chunks(7) {
                writer.write_all(part).unwrap();
                sleep(Duration::from_millis(30));
            }
            writer.write_all(b"libxc").unwrap();
        });
        check(reader.as_fd(), never).unwrap();
        sender.join().unwrap();
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, [VALID.as_slice(), b"libxc"].concat());
    }

    #[test]
    fn a_socket_and_a_file_keep_every_byte_too() {
        let (mut reader, mut writer) = UnixStream::pair().unwrap();
        writer.write_all(VALID).unwrap();
        drop(writer);
        check(reader.as_fd(), never).unwrap();
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all, VALID);

        let path = std::env::temp_dir().join(format!("rxl-start-{}", std::process::id()));
        std::fs::write(&path, [b"preamble".as_slice(), VALID].concat()).unwrap();
        let mut file = File::open(&path).unwrap();
        file.seek(SeekFrom::Start(8)).unwrap();
        check(file.as_fd(), never).unwrap();
        assert_eq!(file.stream_position().unwrap(), 8);
        file.seek(SeekFrom::Start(9)).unwrap();
        assert!(matches!(check(file.as_fd(), never), Err(StartError::Truncated)));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_stream_that_ends_early_is_told_from_one_that_is_late() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&VALID[..23]).unwrap();
        let asked = AtomicBool::new(false);
        let late = check(reader.as_fd(), || asked.swap(true, SeqCst));
        assert!(matches!(late, Err(StartError::Cancelled)));
        drop(writer);
        assert!(matches!(check(reader.as_fd(), never), Err(StartError::Truncated)));

        let (reader, writer) = UnixStream::pair().unwrap();
        drop(writer);
        assert!(matches!(check(reader.as_fd(), never), Err(StartError::Truncated)));
    }

    #[test]
    fn any_other_start_is_refused() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"LibxlFmt, but not the format").unwrap();
        assert!(matches!(check(reader.as_fd(), never), Err(StartError::NotLibxl)));
    }
}
