//! At most one migration, save or restore of a domain at a time on a host.
//!
//! One that was killed is not over when its process is: its guard still has to put things right,
//! and its save helper to notice. A second one meanwhile would be hit by them: a guest that it has
//! suspended would be let run on, and then run twice. So who does any of this, or resumes by hand,
//! holds a lock, which its guard and its helper inherit; it is free when the last of them ends,
//! however that comes about.
//!
//! It is a socket that is bound to an abstract name: the kernel gives a name to one socket at a
//! time and takes it back with the last descriptor, so nothing can be left behind. What is sent to
//! the socket outlives its sender: the save helper says there that the guest is asked to suspend
//! ([`say_asked`]), and the guard looks ([`was_asked`]) if their owner has been killed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use anyhow::{Context, bail};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{RecvFlags, recv};
use rxl_migrate::frame::DomId;

/// Longest name of a lock; an abstract name may have 107 bytes.
const NAME_BYTES_MAX: usize = 100;

/// What is sent to a lock.
const ASKED: &[u8] = b"asked";

/// The lock, as long as it lives, and as long as a process lives that has inherited it.
#[derive(Debug)]
pub(crate) struct Lock(OwnedFd);

impl Lock {
    /// For who sends or saves `domain`, called `name`, or lets it run on.
    pub(crate) fn of_domain(domain: DomId, name: &str) -> anyhow::Result<Lock> {
        Lock::take(&domain_name(domain.0), name)
    }

    /// For who receives or restores a domain called `name`. Very long names that begin alike have
    /// one lock.
    pub(crate) fn of_incoming(name: &str) -> anyhow::Result<Lock> {
        Lock::take(&incoming_name(name), name)
    }

    fn take(lock: &str, name: &str) -> anyhow::Result<Lock> {
        let address = SocketAddr::from_abstract_name(shortened(lock));
        match UnixDatagram::bind_addr(&address.context("naming the domain's lock")?) {
            Ok(socket) => Ok(Lock(socket.into())),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => bail!(
                "{name} is being migrated, saved or restored here already, or what guards an rxl \
                 that was killed is putting things right, which takes a minute at most"
            ),
            Err(error) => Err(error).context("taking the domain's lock"),
        }
    }

    /// Lets the process that `spawn` starts inherit it. Nobody else may start one meanwhile.
    pub(crate) fn inherited_by<T>(&self, spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.pass_on()?;
        let child = spawn();
        fcntl_setfd(&self.0, FdFlags::CLOEXEC)?;
        child
    }

    /// Its number in a process that inherits it.
    pub(crate) fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Lets all processes that are started from now on inherit it.
    pub(crate) fn pass_on(&self) -> io::Result<()> {
        Ok(fcntl_setfd(&self.0, FdFlags::empty())?)
    }
}

/// Says to whoever has the lock of `domain` that it is asked to suspend from now on.
///
/// # Errors
/// It could not be said; that nobody has the lock is none.
pub(crate) fn say_asked(domain: DomId) -> io::Result<()> {
    say(&domain_name(domain.0))
}

fn say(lock: &str) -> io::Result<()> {
    let address = SocketAddr::from_abstract_name(shortened(lock))?;
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match socket.send_to_addr(ASKED, &address) {
        // Nobody has it: the stock xl has started the helper. Or it has been said before.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        said => said.map(drop),
    }
}

/// Whether that may have been said, in a process that has inherited the lock.
pub(crate) fn was_asked(lock: impl AsFd) -> bool {
    let mut word = [0; ASKED.len()];
    let heard = recv(lock, &mut word, RecvFlags::DONTWAIT);
    heard.err() != Some(Errno::WOULDBLOCK)
}

/// The lock of domain number `domid`.
pub(crate) fn domain_name(domid: u16) -> String {
    format!("rxl/domain/{domid}")
}

/// The lock of a domain called `name` that is to come.
pub(crate) fn incoming_name(name: &str) -> String {
    format!("rxl/incoming/{name}")
}

fn shortened(lock: &str) -> &[u8] {
    lock.as_bytes().get(..NAME_BYTES_MAX).unwrap_or(lock.as_bytes())
}

/// Whether somebody has that lock, for who does not want it (unix(7), `/proc/net/unix`: an
/// abstract name is the last word of its line, behind an `@`).
pub(crate) fn is_held(lock: &str) -> bool {
    let sockets = std::fs::read("/proc/net/unix").unwrap_or_default();
    let wanted = [b" @", shortened(lock)].concat();
    sockets.split(|byte| *byte == b'\n').any(|line| line.ends_with(&wanted))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use super::*;

    /// A lock that no other test has.
    fn take(what: &str) -> anyhow::Result<Lock> {
        Lock::take(&format!("rxl/test/{}/{what}", std::process::id()), "web")
    }

    /// Takes it once it is free: a process that another test starts may have it for a moment.
    fn take_when_free(what: &str) -> Lock {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            match take(what) {
                Ok(lock) => return lock,
                Err(error) => assert!(Instant::now() < limit, "{error}"),
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// A process that waits for the end of its input.
    fn start() -> io::Result<Child> {
        Command::new("cat").stdin(Stdio::piped()).spawn()
    }

    fn end(mut child: Child) {
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn a_lock_is_free_when_its_owner_and_the_owners_guard_are_gone() {
        let lock = take("guard").unwrap();
        let text = take("guard").unwrap_err().to_string();
        assert!(
            text.starts_with("web is being migrated, saved or restored here already"),
            "{text}"
        );
        take("other").unwrap();
        let guard = lock.inherited_by(start).unwrap();
        let transport = start().unwrap();
        drop(lock);
        assert!(take("guard").is_err());
        end(guard);
        take_when_free("guard");
        end(transport);
    }

    #[test]
    fn what_is_said_to_a_lock_is_heard_once_its_sender_is_gone() {
        let name = format!("rxl/test/{}/asked", std::process::id());
        say(&name).unwrap();
        let lock = take("asked").unwrap();
        assert!(!was_asked(&lock.0));
        say(&name).unwrap();
        assert!(was_asked(&lock.0));
        // However often: nobody reads meanwhile.
        for _ in 0..2000 {
            say(&name).unwrap();
        }
        assert!(was_asked(&lock.0));
    }

    #[test]
    fn a_lock_is_inherited_from_the_moment_on_that_it_is_passed_on() {
        let lock = take("helper").unwrap();
        let transport = start().unwrap();
        lock.pass_on().unwrap();
        let helper = start().unwrap();
        drop(lock);
        assert!(take("helper").is_err());
        end(helper);
        take_when_free("helper");
        end(transport);
    }

    #[test]
    fn the_longest_name_has_a_lock() {
        let long = "x".repeat(1000);
        let lock = take(&long).unwrap();
        assert!(take(&long).is_err());
        assert!(is_held(&format!("rxl/test/{}/{long}", std::process::id())));
        assert!(!is_held("rxl/test"));
        drop(lock);
    }
}
