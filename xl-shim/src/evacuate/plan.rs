//! Which guest goes where and when, decided from sizes and what has happened so far. No process is
//! started here and nobody is asked.
//!
//! The largest guest goes first: it frees most, and is the hardest to find room for. It goes to
//! the target with most room, so that all fill alike. A guest that could not be moved to one target
//! is tried at the others, once each; a target that does not answer gets no more.

/// A guest that is to leave.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) name: String,
    /// Memory that it takes at a target, overhead included, in MiB.
    pub(super) need_mib: u64,
}

/// Where a guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Here, and its turn comes.
    Waiting,
    /// On its way to the target of that number.
    Moving(usize),
    /// At that target.
    Moved(usize),
    /// Here, running, for these reasons.
    Left(Vec<String>),
    /// Suspended here; what to do was printed.
    Suspended(String),
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Moved,
    /// It runs here.
    Failed(String),
    /// It is suspended here, or nobody knows: it could not be resumed, may run at the target, or
    /// its migration was killed.
    Suspended(String),
    /// Somebody wanted it so.
    Cancelled,
}

/// What a target says when it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// Free memory in MiB; `None`: it decides by itself.
    Room(Option<u64>),
    /// It does not answer.
    Lost(String),
}

#[derive(Debug)]
struct Target {
    name: String,
    health: Health,
}

/// The evacuation.
#[derive(Debug)]
pub(super) struct Plan {
    guests: Vec<(Guest, Place)>,
    targets: Vec<Target>,
    /// By guest: targets that it could not be moved to, and why.
    tried: Vec<Vec<(usize, String)>>,
    parallel: usize,
}

impl Plan {
    pub(super) fn new(
        mut guests: Vec<Guest>,
        targets: Vec<(String, Health)>,
        parallel: usize,
    ) -> Plan {
        guests.sort_by(|a, b| b.need_mib.cmp(&a.need_mib).then_with(|| a.name.cmp(&b.name)));
        let tried = vec![Vec::new(); guests.len()];
        let guests = guests.into_iter().map(|guest| (guest, Place::Waiting)).collect();
        let targets = targets.into_iter().map(|(name, health)| Target { name, health }).collect();
        Plan { guests, targets, tried, parallel }
    }

    /// The next to be started: numbers of a guest and a target. `None`: nothing can be started
    /// now; if nothing is moving either, it is over.
    pub(super) fn next(&mut self) -> Option<(usize, usize)> {
        let moving = self.moving();
        if moving >= self.parallel {
            return None;
        }
        for at in 0..self.guests.len() {
            if self.place(at) != Some(&Place::Waiting) {
                continue;
            }
            if let Some(target) = self.target_for(at) {
                self.set(at, Place::Moving(target));
                self.take_room(at, target);
                return Some((at, target));
            }
            // Room may come back from one that is moving and fails.
            if moving == 0 {
                let reasons = self.reasons(at);
                self.set(at, Place::Left(reasons));
            }
        }
        None
    }

    /// A migration has ended, and its target was asked after that if it failed.
    pub(super) fn ended(&mut self, at: usize, end: End, health: Option<Health>) {
        let Some(&Place::Moving(target)) = self.place(at) else { return };
        if let (Some(health), Some(one)) = (health, self.targets.get_mut(target)) {
            one.health = health;
        }
        let place = match end {
            End::Moved => Place::Moved(target),
            End::Suspended(why) => Place::Suspended(why),
            End::Cancelled => Place::Left(vec!["cancelled".to_owned()]),
            End::Failed(why) => {
                if let Some(tried) = self.tried.get_mut(at) {
                    tried.push((target, why));
                }
                Place::Waiting
            }
        };
        self.set(at, place);
    }

    /// Nothing more is to be started.
    pub(super) fn stop(&mut self) {
        for (_, place) in &mut self.guests {
            if *place == Place::Waiting {
                *place = Place::Left(vec!["not started".to_owned()]);
            }
        }
    }

    /// How many are on their way.
    pub(super) fn moving(&self) -> usize {
        self.guests.iter().filter(|(_, place)| matches!(place, Place::Moving(_))).count()
    }

    /// All guests, and where they are.
    pub(super) fn guests(&self) -> &[(Guest, Place)] {
        &self.guests
    }

    /// Names of a guest and a target.
    pub(super) fn names(&self, guest: usize, target: usize) -> (&str, &str) {
        let guest = self.guests.get(guest).map_or("", |(guest, _)| guest.name.as_str());
        (guest, self.target_name(target))
    }

    pub(super) fn target_name(&self, target: usize) -> &str {
        self.targets.get(target).map_or("", |target| target.name.as_str())
    }

    fn place(&self, at: usize) -> Option<&Place> {
        self.guests.get(at).map(|(_, place)| place)
    }

    fn set(&mut self, at: usize, place: Place) {
        if let Some((_, old)) = self.guests.get_mut(at) {
            *old = place;
        }
    }

    fn has_tried(&self, at: usize, target: usize) -> bool {
        self.tried.get(at).is_some_and(|all| all.iter().any(|(one, _)| *one == target))
    }

    /// The one with most room of those where it fits and was not tried.
    fn target_for(&self, at: usize) -> Option<usize> {
        let need = self.guests.get(at).map_or(0, |(guest, _)| guest.need_mib);
        let room = |target: &Target| match target.health {
            Health::Room(None) => Some(u64::MAX),
            Health::Room(Some(free)) => Some(free).filter(|free| *free >= need),
            Health::Lost(_) => None,
        };
        let fit = self.targets.iter().enumerate().filter(|(n, _)| !self.has_tried(at, *n));
        let fit = fit.filter_map(|(n, target)| Some((room(target)?, n)));
        // Of equal ones the one with fewest on their way there, then the first.
        let busy = |n| self.guests.iter().filter(|(_, p)| *p == Place::Moving(n)).count();
        fit.min_by_key(|(free, n)| (u64::MAX - free, busy(*n), *n)).map(|(_, n)| n)
    }

    fn take_room(&mut self, at: usize, target: usize) {
        let need = self.guests.get(at).map_or(0, |(guest, _)| guest.need_mib);
        if let Some(Target { health: Health::Room(Some(free)), .. }) = self.targets.get_mut(target)
        {
            *free = free.saturating_sub(need);
        }
    }

    /// Why it is left, by target.
    fn reasons(&self, at: usize) -> Vec<String> {
        let need = self.guests.get(at).map_or(0, |(guest, _)| guest.need_mib);
        let tried = self.tried.get(at).map(Vec::as_slice).unwrap_or_default();
        let reason = |(n, target): (usize, &Target)| {
            let why = match (tried.iter().find(|(one, _)| *one == n), &target.health) {
                (Some((_, why)), _) => why.clone(),
                (None, Health::Lost(why)) => why.clone(),
                (None, Health::Room(free)) => {
                    format!("it needs {need} MiB, {} MiB are free", free.unwrap_or_default())
                }
            };
            format!("{}: {why}", target.name)
        };
        self.targets.iter().enumerate().map(reason).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(guests: &[(&str, u64)], targets: &[(&str, u64)], parallel: usize) -> Plan {
        let guest = |(name, need_mib): &(&str, u64)| Guest {
            name: (*name).to_owned(),
            need_mib: *need_mib,
        };
        let target = |(name, free): &(&str, u64)| ((*name).to_owned(), Health::Room(Some(*free)));
        Plan::new(
            guests.iter().map(guest).collect(),
            targets.iter().map(target).collect(),
            parallel,
        )
    }

    /// The names of what is started next.
    fn next(plan: &mut Plan) -> Option<(usize, String)> {
        let (guest, target) = plan.next()?;
        let (guest_name, target_name) = plan.names(guest, target);
        Some((guest, format!("{guest_name}>{target_name}")))
    }

    fn places(plan: &Plan) -> Vec<String> {
        let text = |place: &Place| match place {
            Place::Moved(target) => plan.target_name(*target).to_owned(),
            Place::Left(reasons) => reasons.join("; "),
            other => format!("{other:?}"),
        };
        plan.guests()
            .iter()
            .map(|(guest, place)| format!("{}: {}", guest.name, text(place)))
            .collect()
    }

    #[test]
    fn the_largest_goes_first_and_where_most_room_is() {
        let mut plan = plan(&[("a", 10), ("b", 30), ("c", 20)], &[("x", 40), ("y", 35)], 2);
        let (b, started) = next(&mut plan).unwrap();
        assert_eq!(started, "b>x");
        let (c, started) = next(&mut plan).unwrap();
        assert_eq!(started, "c>y");
        assert_eq!(next(&mut plan), None, "two at a time");
        plan.ended(b, End::Moved, None);
        assert_eq!(next(&mut plan).unwrap().1, "a>y");
        plan.ended(c, End::Moved, None);
        plan.ended(2, End::Moved, None);
        assert_eq!(next(&mut plan), None);
        assert_eq!(places(&plan), ["b: x", "c: y", "a: y"]);
    }

    #[test]
    fn a_target_that_is_lost_gets_no_more_and_its_guests_go_to_others() {
        let mut plan = plan(&[("a", 10), ("b", 10), ("c", 10)], &[("x", 100), ("y", 50)], 1);
        let (a, started) = next(&mut plan).unwrap();
        assert_eq!(started, "a>x");
        let lost = Health::Lost("no answer".to_owned());
        plan.ended(a, End::Failed("link lost".to_owned()), Some(lost));
        for guest in ["a", "b", "c"] {
            let (at, started) = next(&mut plan).unwrap();
            assert_eq!(started, format!("{guest}>y"));
            plan.ended(at, End::Moved, None);
        }
        assert_eq!((next(&mut plan), plan.moving()), (None, 0));
    }

    #[test]
    fn a_guest_that_a_target_refuses_is_tried_once_at_each_and_then_left() {
        let mut plan = plan(&[("a", 10), ("b", 90)], &[("x", 50), ("y", 20)], 1);
        let fails = |plan: &mut Plan, wanted: &str, why: &str, room| {
            let (at, started) = next(plan).unwrap();
            assert_eq!(started, wanted);
            plan.ended(at, End::Failed(why.to_owned()), Some(Health::Room(Some(room))));
        };
        fails(&mut plan, "a>x", "no disk", 50);
        fails(&mut plan, "a>y", "no bridge", 20);
        assert_eq!(next(&mut plan), None);
        assert_eq!(
            places(&plan),
            [
                "b: x: it needs 90 MiB, 50 MiB are free; y: it needs 90 MiB, 20 MiB are free",
                "a: x: no disk; y: no bridge"
            ]
        );
    }

    #[test]
    fn a_guest_waits_for_room_that_may_come_back() {
        let mut plan = plan(&[("a", 30), ("b", 30)], &[("x", 40), ("y", 10)], 2);
        let (a, started) = next(&mut plan).unwrap();
        assert_eq!((started.as_str(), next(&mut plan)), ("a>x", None));
        plan.ended(a, End::Failed("refused".to_owned()), Some(Health::Room(Some(40))));
        assert_eq!(next(&mut plan).unwrap().1, "b>x");
    }

    #[test]
    fn what_is_suspended_or_cancelled_is_not_tried_again() {
        let mut plan = plan(&[("a", 3), ("b", 2), ("c", 1)], &[("x", 40), ("y", 40)], 2);
        let (a, _) = next(&mut plan).unwrap();
        let (b, started) = next(&mut plan).unwrap();
        assert_eq!(started, "b>y", "the one with more room");
        plan.ended(a, End::Suspended("may run at x".to_owned()), None);
        plan.stop();
        assert_eq!((next(&mut plan), plan.moving()), (None, 1));
        plan.ended(b, End::Cancelled, None);
        assert_eq!((next(&mut plan), plan.moving()), (None, 0));
        assert_eq!(
            places(&plan),
            ["a: Suspended(\"may run at x\")", "b: cancelled", "c: not started"]
        );
    }

    #[test]
    fn targets_that_decide_by_themselves_share_the_guests() {
        let targets = ["x", "y"].map(|name| (name.to_owned(), Health::Room(None)));
        let guest = |name: &str| Guest { name: name.to_owned(), need_mib: 1 };
        let mut plan = Plan::new(["a", "b"].map(guest).into(), targets.into(), 2);
        assert_eq!(next(&mut plan).unwrap().1, "a>x");
        assert_eq!(next(&mut plan).unwrap().1, "b>y");
    }
}
