//! A helper's worker: a process of its own, and the socket over which the two talk.
//!
//! It is modelled on `toolstack`: messages arrive whole, the end of a process is the end of its
//! socket, and workers die with the helper that started them.

use std::io::{self, ErrorKind};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::pipe::{End, Pipe, PipeId};
use crate::process::Process;
use crate::world::{Cond, ProcId, Role, World, only};

/// Room for all messages that are ever on their way.
const SOCKET_BYTES: usize = 1 << 20;

/// One end of a socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Socket {
    pub(crate) input: PipeId,
    output: PipeId,
}

impl Socket {
    /// Two ends of one.
    fn pair(world: &mut World) -> [Socket; 2] {
        let [a, b] = [(); 2].map(|()| world.new_pipe(Pipe::new(SOCKET_BYTES)));
        [Socket { input: a, output: b }, Socket { input: b, output: a }]
    }

    fn ends(self) -> [(PipeId, End); 2] {
        [(self.input, End::Read), (self.output, End::Write)]
    }

    /// Sends `message`, whole.
    pub(crate) fn send(self, process: &Process<'_>, message: &impl Serialize) -> io::Result<()> {
        let body = serde_json::to_vec(message)?;
        let message = [&(body.len() as u32).to_le_bytes(), &body[..]].concat();
        process.step();
        let mut world = process.world();
        let now = world.now;
        match world.pipe(self.output).write(&message, now) {
            Some(Ok(count)) if count == message.len() => Ok(()),
            Some(Err(error)) => Err(error),
            _ => {
                world.facts.violated("a socket between a helper and a worker is full");
                Err(ErrorKind::WouldBlock.into())
            }
        }
    }

    /// The next message; `None`: the other end is closed.
    pub(crate) fn receive<M: DeserializeOwned>(
        self,
        process: &Process<'_>,
    ) -> io::Result<Option<M>> {
        while !process.holds(Cond::Readable(self.input)) {
            process.wait(only(Cond::Readable(self.input)));
        }
        let mut world = process.world();
        // As the kernel has it: if the other end ended without reading all, this comes first.
        if world.pipe(self.output).is_wasted() {
            return Ok(None);
        }
        let now = world.now;
        let mut length = [0; 4];
        let Some(Ok(4)) = world.pipe(self.input).read(&mut length, now) else { return Ok(None) };
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        match world.pipe(self.input).read(&mut body, now) {
            Some(Ok(count)) if count == body.len() => Ok(Some(serde_json::from_slice(&body)?)),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// A worker, as its helper sees it. Dropping it ends it.
pub(crate) struct Worker<'a, 'b> {
    owner: &'a Process<'b>,
    process: ProcId,
    pub(crate) socket: Socket,
}

impl<'a, 'b> Worker<'a, 'b> {
    /// Starts a worker that does `body` with its end of the socket, and holds `ends` as well.
    pub(crate) fn start(
        owner: &'a Process<'b>,
        role: Role,
        ends: &[(PipeId, End)],
        body: impl FnOnce(&Process<'_>, Socket) + 'static,
    ) -> Worker<'a, 'b> {
        owner.step();
        let parent = owner.id();
        let mut world = owner.world();
        let [socket, theirs] = Socket::pair(&mut world);
        for (pipe, end) in socket.ends() {
            world.pipe(pipe).open(end);
            world.proc(parent).ends.push((pipe, end));
        }
        let all = [&theirs.ends()[..], ends].concat();
        let process = world.spawn(
            role,
            &all,
            Box::new(move |p| {
                // A worker is for a moment one that does not die with its parent.
                p.step();
                p.world().die_with(p.id(), parent);
                body(p, theirs);
            }),
        );
        world.share_lock(role.side(), parent, process);
        world.proc(parent).sockets.push(socket.input);
        Worker { owner, process, socket }
    }

    /// Waits for its end, once its socket has ended.
    pub(crate) fn reap(&self) {
        self.owner.wait(only(Cond::Ended(self.process)));
    }
}

impl Drop for Worker<'_, '_> {
    fn drop(&mut self) {
        // A helper that is killed does nothing any more.
        if std::thread::panicking() {
            return;
        }
        self.owner.world().doom(self.process);
        self.reap();
        let mut world = self.owner.world();
        let input = self.socket.input;
        world.proc(self.owner.id()).sockets.retain(|socket| *socket != input);
        for end in self.socket.ends() {
            world.close_end(self.owner.id(), end);
        }
    }
}
