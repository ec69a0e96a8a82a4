//! The connection of this process to its machine: one, opened when first needed.

use std::env;
use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::wire;

pub(crate) struct Connection {
    socket: UnixStream,
    /// The memory of the machine.
    pub(crate) memory: File,
}

static CONNECTION: OnceLock<Mutex<Connection>> = OnceLock::new();

/// Opens it if it is not open yet.
pub(crate) fn open() -> io::Result<()> {
    if CONNECTION.get().is_none() {
        let connection = Connection::open()?;
        // If another thread was faster, its connection is used.
        let _ = CONNECTION.set(Mutex::new(connection));
    }
    Ok(())
}

/// Does `act` with the connection, which must be open.
pub(crate) fn with<T>(act: impl FnOnce(&mut Connection) -> io::Result<T>) -> io::Result<T> {
    let connection = CONNECTION.get().ok_or(io::ErrorKind::NotConnected)?;
    act(&mut connection.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Connection {
    fn open() -> io::Result<Connection> {
        let path = env::var_os(wire::SOCKET_VARIABLE).ok_or(io::ErrorKind::NotFound)?;
        let mut socket = UnixStream::connect(path)?;
        send(&mut socket, &[wire::HELLO, u64::from(process::id())], &[])?;
        receive_result(&mut socket)?;
        let [pid, fd] = receive(&mut socket)?;
        let memory = format!("/proc/{pid}/fd/{fd}");
        let memory = OpenOptions::new().read(true).write(true).open(memory)?;
        Ok(Connection { socket, memory })
    }

    /// Sends a request and waits for its result.
    pub(crate) fn ask(&mut self, request: &[u64], rest: &[u64]) -> io::Result<u64> {
        send(&mut self.socket, request, rest)?;
        receive_result(&mut self.socket)
    }

    /// Words that follow a result.
    pub(crate) fn receive(&mut self, count: usize) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0; count * 8];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }
}

fn send(socket: &mut UnixStream, request: &[u64], rest: &[u64]) -> io::Result<()> {
    let padding = [0; wire::REQUEST_WORDS];
    let words = request.iter().chain(padding.iter().skip(request.len())).chain(rest);
    socket.write_all(&words.flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>())
}

fn receive<const N: usize>(socket: &mut UnixStream) -> io::Result<[u64; N]> {
    let mut words = [0; N];
    for word in &mut words {
        let mut bytes = [0; 8];
        socket.read_exact(&mut bytes)?;
        *word = u64::from_ne_bytes(bytes);
    }
    Ok(words)
}

fn receive_result(socket: &mut UnixStream) -> io::Result<u64> {
    let [result] = receive(socket)?;
    match result as i64 {
        0.. => Ok(result),
        errno => Err(io::Error::from_raw_os_error(-errno as c_int)),
    }
}

/// Tells a caller in C why: `errno`.
pub(crate) fn set_errno(error: &io::Error) {
    let errno = match (error.raw_os_error(), error.kind()) {
        (Some(errno), _) => errno,
        (None, io::ErrorKind::NotFound) => libc::ENOENT,
        // The machine is gone.
        (None, _) => libc::EIO,
    };
    // SAFETY: the address of this thread's `errno`, always valid.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above; nothing refers to it.
    unsafe { place.write(errno) };
}

/// What a function returns that gives a number, or -1.
pub(crate) fn number(result: io::Result<u64>) -> i64 {
    match result {
        Ok(value) => value as i64,
        Err(error) => {
            set_errno(&error);
            -1
        }
    }
}
