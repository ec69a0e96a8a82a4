//! `lab-rsh HOST WORD…`: runs a shell line on another host of the lab, like ssh without its
//! encryption. The module `plain` of the crate `rxl-lab` says why, and installs this and its
//! server.
//!
//! Like ssh, it passes on the end of its input, and ends when the command has ended, whatever it
//! could still read. The command's exit code is not passed on.

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write, stdin, stdout};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::thread;

/// Where the server listens.
const PORT: u16 = 514;
/// Twice what a pipe holds.
const BUFFER_BYTES: usize = 128 << 10;
/// Exit code when there is no connection, as ssh's.
const NO_CONNECTION: u8 = 255;

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let Some(host) = arguments.next() else {
        eprintln!("usage: lab-rsh HOST WORD...");
        return ExitCode::from(NO_CONNECTION);
    };
    let line: Vec<String> = arguments.collect();
    match run(&host, &line.join(" ")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-rsh: {host}: {error}");
            ExitCode::from(NO_CONNECTION)
        }
    }
}

fn run(host: &str, line: &str) -> io::Result<()> {
    let mut connection = TcpStream::connect((host, PORT))?;
    connection.set_nodelay(true)?;
    writeln!(connection, "{line}")?;
    // Standard input and output themselves: the library's hold back what has no line's end.
    let mut from_us = unbuffered(stdin())?;
    let mut to_us = unbuffered(stdout())?;
    let mut input = connection.try_clone()?;
    // Ends with the process: nothing waits for a reader that has no more to say.
    thread::spawn(move || {
        // Failing means that the command has ended, which the loop below sees.
        let _ = pass_on(&mut from_us, &mut input);
        let _ = input.shutdown(Shutdown::Write);
    });
    pass_on(&mut connection, &mut to_us)
}

/// Copies to the end. Not `io::copy`: it would splice from the socket to the pipe, and the kernel
/// keeps a pipe locked while it waits for the socket, so that nobody can read what is in it.
fn pass_on(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(buffer.get(..length).unwrap_or_default())?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn unbuffered(stream: impl AsFd) -> io::Result<File> {
    let descriptor: OwnedFd = stream.as_fd().try_clone_to_owned()?;
    Ok(File::from(descriptor))
}
