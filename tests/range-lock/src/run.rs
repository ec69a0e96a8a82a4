//! Threads that use a lock, a scheduler for them, and what the lock promises.
//!
//! The model is one sentence: a range is held if and only if no range that came before it, and is
//! still held or waited for, overlaps it. Exclusion, order, and that nobody waits without need all
//! follow; it is compared with the lock after every step.

use std::cell::RefCell;
use std::rc::Rc;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult};

use crate::c::{Killed, Lock, Order, Pause, Waiting};

const STACK_BYTES: usize = 64 << 10;

/// What a thread does once: locks a range and unlocks it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// First number of the range.
    pub first: u8,
    /// Last number of the range, not before the first.
    pub last: u8,
    /// Whether a thread that is killed gives up.
    pub killable: bool,
}

impl Hold {
    fn overlaps(&self, other: &Hold) -> bool {
        (self.first.max(other.first)..=self.last.min(other.last)).count() > 0
    }
}

/// A step that can be taken.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    thread: usize,
    order: Order,
}

/// Stacks of threads, used again by later runs.
#[derive(Default)]
pub struct Stacks(Vec<DefaultStack>);

impl std::fmt::Debug for Stacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} stacks", self.0.len())
    }
}

/// Where a thread is.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// About to enter.
    Outside,
    Waiting(Waiting),
    /// About to leave.
    Holding,
    /// About to leave, as it was killed.
    GivingUp,
    Ended,
}

/// What C returned for a hold: whether it waited, and whether it was killed.
type Answers = Rc<RefCell<Vec<(bool, Result<(), Killed>)>>>;

struct Thread {
    coroutine: Coroutine<Order, Pause, ()>,
    holds: Vec<Hold>,
    phase: Phase,
    /// How many holds are over.
    over: usize,
    answers: Answers,
    expected: Vec<(bool, Result<(), Killed>)>,
    has_waited: bool,
}

/// One run of threads over one lock.
pub struct Run {
    lock: Rc<Lock>,
    threads: Vec<Thread>,
    /// Threads that hold or wait, in the order in which they came.
    queue: Vec<usize>,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let phases: Vec<_> = self.threads.iter().map(|thread| thread.phase).collect();
        write!(f, "{phases:?}, came in the order {:?}", self.queue)
    }
}

impl Run {
    /// A thread for each of `programs`, about to begin with the first of its holds.
    #[must_use]
    pub fn new(programs: &[Vec<Hold>], stacks: &mut Stacks) -> Run {
        let lock = Rc::new(Lock::new());
        let threads = programs.iter().map(|holds| Thread::new(&lock, holds, stacks));
        let threads = threads.collect();
        Run { lock, threads, queue: Vec::new() }
    }

    /// All steps that can be taken now.
    #[must_use]
    pub fn choices(&self) -> Vec<Choice> {
        let mut choices = Vec::new();
        for (thread, state) in self.threads.iter().enumerate() {
            let (go, kill) = match state.phase {
                Phase::Outside | Phase::Holding | Phase::GivingUp => (true, false),
                Phase::Waiting(waiting) => (waiting.is_over(), waiting.killable),
                Phase::Ended => (false, false),
            };
            choices.extend(go.then_some(Choice { thread, order: Order::Go }));
            choices.extend(kill.then_some(Choice { thread, order: Order::Kill }));
        }
        choices
    }

    /// Takes a step, and compares.
    ///
    /// # Errors
    /// What the lock promises and did not keep.
    pub fn take(&mut self, choice: Choice) -> Result<(), String> {
        let index = choice.thread;
        let Some(thread) = self.threads.get_mut(index) else { return Err("no thread".into()) };
        match thread.phase {
            Phase::Outside => self.queue.push(index),
            Phase::Holding | Phase::GivingUp => self.queue.retain(|other| *other != index),
            Phase::Waiting(_) | Phase::Ended => {}
        }
        thread.step(choice.order)?;
        self.compare()
    }

    /// Whether every thread has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.threads.iter().all(|thread| matches!(thread.phase, Phase::Ended))
    }

    /// Ends a run that is over.
    ///
    /// # Errors
    /// Something is left in the lock.
    pub fn finish(self, stacks: &mut Stacks) -> Result<(), String> {
        stacks.0.extend(self.threads.into_iter().map(|thread| thread.coroutine.into_stack()));
        let lock = Rc::into_inner(self.lock).ok_or("a thread has not ended")?;
        if lock.close() { Ok(()) } else { Err("the lock is not empty".to_owned()) }
    }

    fn compare(&self) -> Result<(), String> {
        for (place, index) in self.queue.iter().enumerate() {
            let Some(thread) = self.threads.get(*index) else { continue };
            let earlier = self.queue.iter().take(place).filter_map(|at| self.threads.get(*at));
            let free = earlier.filter(|other| other.overlaps(thread)).count() == 0;
            let granted = match thread.phase {
                Phase::Holding => true,
                Phase::Waiting(waiting) => waiting.is_over(),
                // It may or may not have been granted; it will not use it.
                Phase::GivingUp | Phase::Outside | Phase::Ended => continue,
            };
            if granted && !free {
                return Err(format!("thread {index} got its range too early: {self:?}"));
            }
            if free && !granted {
                return Err(format!("thread {index} waits for nobody: {self:?}"));
            }
        }
        Ok(())
    }
}

impl Thread {
    fn new(lock: &Rc<Lock>, holds: &[Hold], stacks: &mut Stacks) -> Thread {
        let answers = Answers::default();
        let (lock, program, says) = (Rc::clone(lock), holds.to_vec(), Rc::clone(&answers));
        let stack = stacks.0.pop();
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("a stack"));
        let coroutine = Coroutine::with_stack(stack, move |switch, _: Order| {
            for Hold { first, last, killable } in program {
                let answer = lock.hold(switch, (first, last), killable);
                says.borrow_mut().push(answer);
            }
        });
        let mut thread = Thread {
            coroutine,
            holds: holds.to_vec(),
            phase: Phase::Outside,
            over: 0,
            answers,
            expected: Vec::new(),
            has_waited: false,
        };
        // To the first guard; nobody else sees anything of it.
        if let CoroutineResult::Return(()) = thread.coroutine.resume(Order::Go) {
            thread.phase = Phase::Ended;
        }
        thread
    }

    fn overlaps(&self, other: &Thread) -> bool {
        let both = self.holds.get(self.over).zip(other.holds.get(other.over));
        both.is_some_and(|(one, other)| one.overlaps(other))
    }

    /// From where it is to where it gives way next.
    fn step(&mut self, order: Order) -> Result<(), String> {
        let leaves = match self.phase {
            Phase::Holding => Some(Ok(())),
            Phase::GivingUp => Some(Err(Killed)),
            _ => None,
        };
        if let Some(result) = leaves {
            self.expected.push((self.has_waited, result));
            (self.over, self.has_waited) = (self.over + 1, false);
        }
        let next = self.coroutine.resume(order);
        self.phase = match (self.phase, next) {
            (Phase::Outside, CoroutineResult::Yield(Pause::Wait(waiting))) => {
                self.has_waited = true;
                Phase::Waiting(waiting)
            }
            (Phase::Outside, CoroutineResult::Yield(Pause::Guard)) => Phase::Holding,
            (Phase::Waiting(_), CoroutineResult::Yield(Pause::Guard)) => match order {
                Order::Go => Phase::Holding,
                Order::Kill => Phase::GivingUp,
            },
            (Phase::Holding | Phase::GivingUp, CoroutineResult::Yield(Pause::Guard)) => {
                Phase::Outside
            }
            (Phase::Holding | Phase::GivingUp, CoroutineResult::Return(())) => Phase::Ended,
            (was, next) => {
                let next = next.as_yield();
                return Err(format!("a thread that was {was:?} came to {next:?}"));
            }
        };
        let answers = self.answers.borrow();
        if *answers == self.expected {
            Ok(())
        } else {
            Err(format!("a thread was told {answers:?} and not {:?}", self.expected))
        }
    }
}

/// Runs every interleaving there is of threads that do `programs`, with every way to kill them
/// while they wait; how many there were.
///
/// # Errors
/// What the lock promises and did not keep.
pub fn explore(programs: &[Vec<Hold>], stacks: &mut Stacks) -> Result<u64, String> {
    // Of each step, which of how many choices is taken.
    let mut path: Vec<(usize, usize)> = Vec::new();
    let mut runs = 0;
    loop {
        let mut run = Run::new(programs, stacks);
        let mut depth = 0;
        while !run.is_over() {
            let choices = run.choices();
            if depth == path.len() {
                path.push((0, choices.len()));
            }
            let next = path.get(depth).and_then(|(taken, _)| choices.get(*taken));
            let Some(next) = next else { return Err(format!("nobody can go on: {run:?}")) };
            run.take(*next).map_err(|e| format!("{e}, on the way {path:?} of {programs:?}"))?;
            depth += 1;
        }
        run.finish(stacks)?;
        runs += 1;
        while path.last().is_some_and(|(taken, of)| taken + 1 >= *of) {
            path.pop();
        }
        match path.last_mut() {
            Some((taken, _)) => *taken += 1,
            None => return Ok(runs),
        }
    }
}
