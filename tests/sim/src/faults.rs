//! What goes wrong, done to the world: processes killed, hosts that crash, connections cut,
//! signals.

use crate::door::Connection;
use crate::pipe::{End, PipeId};
use crate::plan::{Act, Landmark};
use crate::world::{Proc, ProcId, Role, Side, World};

impl World {
    /// Both directions go dead; either end sees it some time later.
    pub(crate) fn cut_link(&mut self) {
        if self.link == [None; 2] {
            return;
        }
        self.facts.cut = true;
        self.trace.note("the link", "is cut", 0);
        let [forward, back] = self.link;
        self.cut_pair(forward, back);
        if self.plan.ways.one_network {
            self.cut_connections(|_| true);
        }
    }

    /// The connections of these links go dead.
    pub(crate) fn cut_connections(&mut self, which: impl Fn(u8) -> bool) {
        self.plan.ways.cut(&which);
        for Connection { link, there, back } in self.connections.clone() {
            if which(link) && !self.pipe(there).is_cut() {
                self.facts.coverage.count("links: one cut");
                self.trace.note("a link", "is cut", link.into());
                self.cut_pair(Some(there), Some(back));
            }
        }
    }

    /// As TCP has it: who closes a link without having read all that came over it takes back what
    /// has not arrived of what it wrote.
    pub(crate) fn reset_abandoned(&mut self) {
        for Connection { there, back, .. } in self.connections.clone() {
            for (from, to) in [(there, back), (back, there)] {
                let abandoned = !self.pipe(from).is_open(End::Write) && self.pipe(to).is_wasted();
                if abandoned && !self.pipe(from).is_cut() {
                    let now = self.now;
                    self.pipe(from).cut(now, now);
                }
            }
        }
    }

    /// What `pipe` is part of is cut.
    pub(crate) fn cut_of(&mut self, pipe: PipeId) {
        let connections = &self.connections;
        match connections.iter().find(|one| one.there == pipe || one.back == pipe) {
            Some(Connection { link, .. }) => {
                let link = *link;
                self.cut_connections(|other| other == link);
            }
            None => self.cut_link(),
        }
        // One that a newer connection has taken the place of.
        let now = self.now;
        self.pipe(pipe).cut(now, now);
    }

    /// `forward` leads from the source to the target.
    fn cut_pair(&mut self, forward: Option<PipeId>, back: Option<PipeId>) {
        let sees = [(); 2].map(|()| self.now + self.rng.below(self.plan.notice_max));
        if let Some(forward) = forward {
            self.pipe(forward).cut(sees[1], sees[0]);
        }
        if let Some(back) = back {
            self.pipe(back).cut(sees[0], sees[1]);
        }
    }

    /// A moment has come that faults may be planned around.
    pub(crate) fn landmark(&mut self, landmark: Landmark) {
        self.trace.note(landmark, "is reached", landmark as u64);
        let procs = &self.procs;
        let steps = |role| {
            let proc = procs.iter().find(|proc: &&Proc| proc.role == role && proc.alive);
            proc.map_or(0, |proc| proc.steps)
        };
        self.plan.reached(landmark, steps);
    }

    /// Does what the plan has for the moment when a process of `role` has made `steps` steps.
    pub(crate) fn follow_plan(&mut self, id: ProcId, role: Role, steps: u32) {
        for act in self.plan.due(role, steps) {
            self.trace.note(act, "is done, as planned", act.number());
            match act {
                Act::Kill(victim) => {
                    let victims = self.all(victim);
                    let any = victims.get(self.rng.index(victims.len().max(1))).copied();
                    if let Some(id) = if victim == role { Some(id) } else { any } {
                        self.facts.killed(victim);
                        self.kill(id);
                    }
                }
                Act::Crash(side) => self.crash(side),
                Act::Cut => self.cut_link(),
                Act::CutConnection(link) => self.cut_connections(|other| other == link),
                Act::Signal(victim) => {
                    if let Some(id) = self.find(victim) {
                        self.signal(id);
                    }
                }
            }
        }
    }

    /// A host dies: its connections do not close, they go dead.
    fn crash(&mut self, side: Side) {
        self.cut_link();
        self.cut_connections(|_| true);
        self.facts.host_down(side);
        for id in self.alive() {
            if self.proc(id).role.side() == side {
                self.kill(id);
            }
        }
    }

    /// SIGINT, SIGTERM or SIGHUP to the sender or the receiver, as its thread for signals sees it.
    fn signal(&mut self, id: ProcId) {
        let Some(gate) = self.proc(id).gate.clone() else { return };
        let role = self.proc(id).role;
        self.facts.signalled(role);
        gate.cancel();
        if !gate.is_cancelled() {
            return;
        }
        let proc = self.proc(id);
        proc.requests += 1;
        let first = proc.requests == 1;
        let operation = proc.operation;
        match operation {
            Some(Some(helper)) if self.proc(helper).alive => {
                self.terminate(helper);
                if !first {
                    self.proc(id).aborted = true;
                }
            }
            Some(_) if !first => self.proc(id).aborted = true,
            _ => {}
        }
    }

    /// SIGTERM to a save helper, which handles it, or to a restore helper, which does not.
    pub(crate) fn terminate(&mut self, helper: ProcId) {
        match self.proc(helper).role {
            Role::SaveHelper => self.proc(helper).terminated = true,
            _ => self.kill(helper),
        }
    }
}
