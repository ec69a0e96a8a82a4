//! Messages between rxl's own processes: JSON over sequenced-packet sockets, so that each arrives
//! whole, and the end of a process is the end of its socket.

use std::io::{self, ErrorKind};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::abort;

/// Longest message in bytes.
pub(crate) const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Messages that a socket has room for, at their longest: nobody may wait for room, because who
/// has nothing to read would wait for ever.
const MESSAGES_MAX: usize = 8;

const _: () = assert!(rxl_migrate::source::workers::MESSAGE_BYTES_MAX <= MESSAGE_BYTES_MAX);
const _: () = assert!(rxl_migrate::target::links::MESSAGE_BYTES_MAX <= MESSAGE_BYTES_MAX);

/// Two ends of a socket.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The kernel counts its own books as well, which are about as much as short messages.
    let room = 2 * MESSAGE_BYTES_MAX * MESSAGES_MAX;
    for end in [&ours, &theirs] {
        sockopt::set_socket_send_buffer_size_force(end, room)
            .or_else(|_| sockopt::set_socket_send_buffer_size(end, room))?;
    }
    Ok((ours, theirs))
}

/// Sends `message`.
pub(crate) fn send(socket: BorrowedFd<'_>, message: &impl Serialize) -> io::Result<()> {
    let message = serde_json::to_vec(message)?;
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(ErrorKind::InvalidInput.into());
    }
    loop {
        match rustix::net::send(socket, &message, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) if !abort::requested() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The next message; `None`: the other end is closed.
pub(crate) fn receive<M: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<M>> {
    // Most messages are short, so nothing is cleared that none fills.
    let mut message = Vec::with_capacity(MESSAGE_BYTES_MAX);
    loop {
        match rustix::net::recv(socket, spare_capacity(&mut message), RecvFlags::empty()) {
            Ok(_) => break,
            Err(Errno::INTR) if !abort::requested() => {}
            // It had sent something that nobody has read when it ended.
            Err(Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    match message.as_slice() {
        [] => Ok(None),
        message => Ok(Some(serde_json::from_slice(message)?)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rxl_migrate::frame::{PageType, Pfn};
    use rxl_migrate::source::workers::{Reply, Request};
    use rxl_migrate::source::{Outcome, Pass};
    use rxl_migrate::stream::libxc::PageEntry;
    use rxl_migrate::target::file::Batch;
    use rxl_migrate::target::links::Answer;

    use super::*;

    /// As long as they get: no two pages are neighbours, and all numbers have all their digits.
    #[test]
    fn the_longest_messages_arrive_whole_and_several_wait_for_their_reader() {
        let (ours, theirs) = pair().unwrap();
        let pages: Vec<Pfn> = (0..1024).map(|n| Pfn((1 << 52) - 2 - 2 * n)).collect();
        let request = Request::Batch {
            pages: pages.clone(),
            taken_over: vec![3],
            pass: Pass { number: 4, last: true, digests: false },
        };
        for _ in 0..MESSAGES_MAX {
            send(ours.as_fd(), &request).unwrap();
        }
        for _ in 0..MESSAGES_MAX {
            assert_eq!(receive(theirs.as_fd()).unwrap(), Some(request.clone()));
        }
        let done = Ok(Outcome { sent: pages.clone(), ..Outcome::default() });
        let reply = Reply { done, sent: u64::MAX, confirmed: u64::MAX, counters: None };
        send(theirs.as_fd(), &reply).unwrap();
        assert_eq!(receive(ours.as_fd()).unwrap(), Some(reply));
        let answer = Answer::Frames(pages.iter().map(|pfn| pfn.0).collect());
        send(theirs.as_fd(), &answer).unwrap();
        assert_eq!(receive(ours.as_fd()).unwrap(), Some(answer));
        let kind = PageType::Table { level: 4, pinned: true };
        let entries = pages.iter().map(|pfn| PageEntry { pfn: *pfn, kind }).collect();
        let frames = pages.iter().map(|pfn| pfn.0).collect();
        let referred: Vec<Pfn> = (0..4096).map(|n| Pfn((1 << 52) - 2 - 2 * n)).collect();
        let referred_frames = referred.iter().map(|pfn| pfn.0).collect();
        let batch = Batch { offset: u64::MAX, entries, frames, referred, referred_frames };
        let answer = Answer::Place(batch);
        for _ in 0..MESSAGES_MAX {
            send(theirs.as_fd(), &answer).unwrap();
        }
        for _ in 0..MESSAGES_MAX {
            assert_eq!(receive(ours.as_fd()).unwrap(), Some(answer.clone()));
        }
        drop(ours);
        assert_eq!(receive::<Request>(theirs.as_fd()).unwrap(), None);
    }

    #[test]
    fn an_end_with_something_unread_is_an_end() {
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), &1).unwrap();
        drop(theirs);
        assert_eq!(receive::<u8>(ours.as_fd()).unwrap(), None);
        assert!(send(ours.as_fd(), &1).is_err());
    }
}
