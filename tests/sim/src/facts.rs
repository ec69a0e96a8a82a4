//! What has happened in a run, as far as the rules ask for it, and which rules were broken.

use rxl_migrate::xl::handshake::{ReceiverEnd, SenderEnd};

use crate::coverage::Coverage;
use crate::plan::Request;
use crate::world::{Role, Side};

/// What has happened.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// Migrations that have begun. What is said below is of the last.
    pub(crate) attempt: u32,
    /// The sender has begun to write Go.
    pub(crate) go_tried: bool,
    /// The sender was told that the target's copy is gone.
    pub(crate) given_back: bool,
    /// The receiver has read Go.
    pub(crate) go_heard: bool,
    down: [bool; 2],
    pub(crate) cut: bool,
    /// Processes that were killed by themselves (not with their host).
    pub(crate) killed: Vec<Role>,
    /// Requests that failed because the plan said so.
    pub(crate) failed: Vec<(Side, Request)>,
    /// libxl gave up to wait for a guest that may suspend later.
    pub(crate) suspension_given_up: bool,
    pub(crate) sender_end: Option<SenderEnd>,
    pub(crate) receiver_end: Option<ReceiverEnd>,
    /// The source's copy was destroyed.
    pub(crate) source_destroyed: bool,
    pub(crate) coverage: Coverage,
    pub(crate) violations: Vec<String>,
}

impl Facts {
    pub(crate) fn violated(&mut self, what: &str) {
        self.violations.push(what.to_owned());
    }

    pub(crate) fn is_down(&self, side: Side) -> bool {
        self.down[side as usize]
    }

    /// A migration begins with a guest that runs: what was said before does not bind.
    pub(crate) fn begin(&mut self) {
        self.attempt += 1;
        if self.attempt > 1 {
            self.coverage.count("tried again");
        }
        (self.go_tried, self.given_back, self.go_heard) = (false, false, false);
        (self.sender_end, self.receiver_end) = (None, None);
    }

    pub(crate) fn any_down(&self) -> bool {
        self.down != [false; 2]
    }

    fn when(&self) -> &'static str {
        if self.go_tried { "after Go" } else { "before Go" }
    }

    pub(crate) fn host_down(&mut self, side: Side) {
        self.down[side as usize] = true;
        self.coverage.count(format!("crash of the {side:?} host {}", self.when()));
    }

    pub(crate) fn killed(&mut self, role: Role) {
        self.killed.push(role);
        self.coverage.count(format!("kill of {role:?} {}", self.when()));
    }

    pub(crate) fn was_killed(&self, role: Role) -> bool {
        self.killed.contains(&role)
    }

    pub(crate) fn signalled(&mut self, role: Role) {
        self.coverage.count(format!("signal to {role:?} {}", self.when()));
    }

    pub(crate) fn request_failed(&mut self, side: Side, request: Request) {
        self.failed.push((side, request));
        self.coverage.count(format!("failure of {request:?} at the {side:?}"));
    }

    pub(crate) fn has_failed(&self, side: Side, request: Request) -> bool {
        self.failed.contains(&(side, request))
    }

    pub(crate) fn unpaused(&mut self, whole: bool) {
        if !self.go_heard {
            self.violated("the receiver unpauses without Go");
        }
        if !whole {
            self.violated("a copy that is not whole is unpaused");
        }
    }

    pub(crate) fn resumed(&mut self) {
        self.coverage.count("resumed at the source");
        if self.go_tried && !self.given_back {
            self.violated("the source resumes its copy after Go was tried");
        }
    }

    pub(crate) fn destroyed(&mut self, side: Side, ran: bool) {
        self.source_destroyed |= side == Side::Source;
        if ran {
            self.violated("a copy that runs is destroyed");
        }
    }
}
