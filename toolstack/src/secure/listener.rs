//! Where migrations over TLS come in.
//!
//! Anybody can connect to a port. Who has not shown a certificate that is trusted costs a
//! descriptor and what TLS holds of a handshake, for [`HANDSHAKE_TIME`] at most, and no more than
//! [`STRANGERS_MAX`] of them; the one that has been there for longest goes if there are more.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustls::{ServerConfig, ServerConnection};

use super::relay::{HANDSHAKE_TIME, prepared};
use crate::tls::Tls;

/// Connections that may be there without having shown who they are.
pub const STRANGERS_MAX: usize = 16;

/// Lets in who may come in.
pub struct Listener {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    strangers: Vec<Stranger>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// A connection that is not trusted yet.
struct Stranger {
    tls: Tls,
    from: SocketAddr,
    until: Instant,
}

/// What became of somebody who connected.
#[derive(Debug)]
pub enum Visitor {
    /// It is trusted.
    Welcome(Box<Tls>, SocketAddr),
    /// It is not, or was too slow.
    Refused(SocketAddr, io::Error),
}

impl Listener {
    /// Listens at `address`; with port 0 at one that the system chooses.
    ///
    /// # Errors
    /// It cannot.
    pub fn open(address: SocketAddr, config: Arc<ServerConfig>) -> io::Result<Listener> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Listener { listener, config, strangers: Vec::new() })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits until something becomes of somebody, or until `wake` can be read: then there may be
    /// nobody.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&mut self, wake: BorrowedFd<'_>) -> io::Result<Vec<Visitor>> {
        let timeout = self.strangers.iter().map(|stranger| stranger.until).min();
        let timeout = timeout.map(|until| until.saturating_duration_since(Instant::now()));
        // Not a moment before it.
        let timeout = timeout.map(|timeout| timeout + Duration::from_millis(1));
        let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut fds = vec![
            PollFd::from_borrowed_fd(wake, PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
        ];
        for Stranger { tls, .. } in &self.strangers {
            let write = if tls.wants_write() { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::from_borrowed_fd(tls.as_fd(), PollFlags::IN | write));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut visitors = self.accept();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.go_on() {
                Ok(true) => visitors.push(Visitor::Welcome(Box::new(stranger.tls), stranger.from)),
                Ok(false) => self.strangers.push(stranger),
                Err(error) => visitors.push(Visitor::Refused(stranger.from, error)),
            }
        }
        Ok(visitors)
    }

    fn accept(&mut self) -> Vec<Visitor> {
        let mut refused = Vec::new();
        // No more at a time than there is room for: whoever floods does not keep rxl busy.
        for _ in 0..STRANGERS_MAX {
            let Ok((socket, from)) = self.listener.accept() else { break };
            let tls = prepared(socket.into()).and_then(|socket| {
                let connection = ServerConnection::new(Arc::clone(&self.config));
                Tls::over(socket, connection.map_err(io::Error::other)?.into())
            });
            let Ok(tls) = tls else { continue };
            if self.strangers.len() >= STRANGERS_MAX {
                let oldest = self.strangers.remove(0);
                let why = io::Error::new(ErrorKind::TimedOut, "too many others wait");
                refused.push(Visitor::Refused(oldest.from, why));
            }
            let until = Instant::now() + HANDSHAKE_TIME;
            self.strangers.push(Stranger { tls, from, until });
        }
        refused
    }
}

impl Stranger {
    /// Takes what has come. `true`: it has shown who it is.
    fn go_on(&mut self) -> io::Result<bool> {
        loop {
            match self.tls.advance() {
                Ok(()) if !self.tls.is_handshaking() => return Ok(true),
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.tls.flush_now()?;
        match Instant::now() < self.until {
            true => Ok(false),
            false => Err(io::Error::new(ErrorKind::TimedOut, "it did not show who it is in time")),
        }
    }
}
