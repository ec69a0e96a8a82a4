//! A process as its program sees it: system calls that block, and moments at which others go on.

use std::cell::{RefCell, RefMut};
use std::io;
use std::rc::Rc;

use corosensei::Yielder;

use crate::pipe::{End, PipeId};
use crate::world::{Cond, ProcId, Wait, World, only};

/// How a process gives way, until what it waits for is there.
pub(crate) type Switch = Yielder<(), Wait>;

/// A process, as its program sees it.
pub(crate) struct Process<'a> {
    world: Rc<RefCell<World>>,
    id: ProcId,
    switch: &'a Switch,
}

impl<'a> Process<'a> {
    pub(crate) fn new(world: Rc<RefCell<World>>, id: ProcId, switch: &'a Switch) -> Process<'a> {
        Process { world, id, switch }
    }

    /// The world. Not to be held while the process gives way.
    pub(crate) fn world(&self) -> RefMut<'_, World> {
        self.world.borrow_mut()
    }

    /// The world, for those who outlive a call.
    pub(crate) fn shared_world(&self) -> Rc<RefCell<World>> {
        self.world.clone()
    }

    pub(crate) fn id(&self) -> ProcId {
        self.id
    }

    /// Lets others go on.
    pub(crate) fn step(&self) {
        self.switch.suspend(only(Cond::Now));
    }

    pub(crate) fn wait(&self, wait: Wait) {
        self.switch.suspend(wait);
    }

    /// Whether `cond` holds now.
    pub(crate) fn holds(&self, cond: Cond) -> bool {
        self.world().holds(self.id, cond)
    }

    pub(crate) fn sleep(&self, milliseconds: u64) {
        let until = self.world().now + milliseconds;
        self.wait(only(Cond::At(until)));
    }

    pub(crate) fn close(&self, pipe: PipeId, end: End) {
        self.step();
        self.world().close_end(self.id, (pipe, end));
    }

    /// Holds `end` from now on.
    pub(crate) fn open(&self, pipe: PipeId, end: End) {
        let mut world = self.world();
        world.pipe(pipe).open(end);
        world.proc(self.id).ends.push((pipe, end));
    }

    /// Reads some of what is there; `None` would block.
    pub(crate) fn try_read(&self, pipe: PipeId, into: &mut [u8]) -> Option<io::Result<usize>> {
        let mut world = self.world();
        let (now, room) = (world.now, world.some(into.len()));
        world.pipe(pipe).read(into.get_mut(..room).unwrap_or_default(), now)
    }

    /// Writes some of `bytes`; `None` would block.
    pub(crate) fn try_write(&self, pipe: PipeId, bytes: &[u8]) -> Option<io::Result<usize>> {
        let mut world = self.world();
        let (now, length) = (world.now, world.some(bytes.len()));
        world.pipe(pipe).write(bytes.get(..length).unwrap_or_default(), now)
    }

    pub(crate) fn read(&self, pipe: PipeId, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(done) = self.try_read(pipe, into) {
                return done;
            }
            self.wait(only(Cond::Readable(pipe)));
        }
    }

    /// What others can see is done at a moment of its own.
    pub(crate) fn write(&self, pipe: PipeId, bytes: &[u8]) -> io::Result<usize> {
        self.step();
        loop {
            if let Some(done) = self.try_write(pipe, bytes) {
                return done;
            }
            self.wait(only(Cond::Writable(pipe)));
        }
    }
}

impl World {
    /// How much of `length` bytes a system call moves.
    fn some(&mut self, length: usize) -> usize {
        if length > 1 && self.rng.one_in(8) { 1 + self.rng.index(length) } else { length }
    }
}

/// A descriptor as the standard library's traits want it.
pub(crate) struct File<'a, 'b> {
    pub(crate) process: &'a Process<'b>,
    pub(crate) pipe: PipeId,
}

impl io::Read for File<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.process.read(self.pipe, buf)
    }
}

impl io::Write for File<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.process.write(self.pipe, buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
