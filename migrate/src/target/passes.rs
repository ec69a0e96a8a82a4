//! Which pass may be applied: the rule that keeps the stream and all links in step.
//!
//! A page may come in two passes over two links, and the later content has to stay. So nothing of
//! a pass is applied before all earlier ones are complete ([`crate::stream::link`]). That is kept
//! here, and does not rest on a sender that waits at the end of each pass, as rxl's does so that
//! little is on its way when the guest is suspended. Nothing here waits or does anything either.

use std::collections::{BTreeMap, VecDeque};

use crate::stream::FormatError;
use crate::stream::libxc::RecordKind;
use crate::stream::link::LinkSet;

/// Passes that may have ended on the stream and not on all links. A sender makes a few dozen in
/// all.
const AHEAD_MAX: usize = 1024;

/// How far every way is.
#[derive(Debug, Default)]
pub(super) struct Passes {
    /// All is known that page data need, of which the stream tells first.
    begun: bool,
    /// Passes that are complete: all below this number.
    complete: u32,
    /// The links of the passes that have ended on the stream and are not complete, in order.
    ended: VecDeque<LinkSet>,
    /// The pass that each link has come to.
    at: BTreeMap<u8, u32>,
    lost: LinkSet,
}

impl Passes {
    /// Page data may come: a link can be faster than the head of the stream.
    pub(super) fn begin(&mut self) {
        self.begun = true;
    }

    /// Pass `pass` has ended on the stream.
    ///
    /// # Errors
    /// Another would have had to end first, or there are too many.
    pub(super) fn end(&mut self, pass: u32, links: LinkSet) -> Result<(), FormatError> {
        let kind = RecordKind::RxlPassEnd.code();
        let next = self.complete as usize + self.ended.len();
        if pass as usize != next {
            return Err(FormatError::Order { kind, why: "is not for the pass that comes next" });
        }
        if self.ended.len() >= AHEAD_MAX {
            return Err(FormatError::Order { kind, why: "is too far ahead of the links" });
        }
        self.ended.push_back(links);
        self.advance();
        Ok(())
    }

    /// Link `link` has come to pass `pass`; all of the earlier ones that it had is applied.
    ///
    /// # Errors
    /// It was there already.
    pub(super) fn come(&mut self, link: u8, pass: u32) -> Result<(), FormatError> {
        if self.at.get(&link).is_some_and(|at| *at >= pass) {
            let kind = RecordKind::RxlPass.code();
            return Err(FormatError::Order { kind, why: "goes back" });
        }
        self.at.insert(link, pass);
        self.advance();
        Ok(())
    }

    /// Link `link` is lost; what it had not brought will come again.
    pub(super) fn lose(&mut self, link: u8) {
        self.lost.insert(link);
        self.advance();
    }

    /// Whether pages of pass `pass` may be applied.
    pub(super) fn may_apply(&self, pass: u32) -> bool {
        self.begun && pass <= self.complete
    }

    /// Whether all that has ended on the stream is complete.
    pub(super) fn are_complete(&self) -> bool {
        self.ended.is_empty()
    }

    fn advance(&mut self) {
        while let Some(links) = self.ended.front() {
            let is_done = |link: u8| {
                self.lost.contains(link) || self.at.get(&link).is_some_and(|at| *at > self.complete)
            };
            if !links.iter().all(is_done) {
                return;
            }
            self.ended.pop_front();
            self.complete += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn begun() -> Passes {
        Passes { begun: true, ..Passes::default() }
    }

    fn set(links: &[u8]) -> LinkSet {
        let mut set = LinkSet::default();
        links.iter().for_each(|link| set.insert(*link));
        set
    }

    #[test]
    fn a_pass_waits_for_the_stream_and_for_each_link_that_took_part() {
        let mut passes = Passes::default();
        passes.come(3, 0).unwrap();
        assert!(!passes.may_apply(0), "nobody knows where pages belong");
        passes.begin();
        assert!(passes.may_apply(0) && !passes.may_apply(1));
        passes.come(3, 1).unwrap();
        assert!(!passes.may_apply(1), "the stream may still carry pages of pass 0");
        passes.end(0, set(&[3, 5])).unwrap();
        assert!(!passes.may_apply(1) && !passes.are_complete(), "link 5 has not been heard of");
        passes.end(1, set(&[3])).unwrap();
        passes.lose(5);
        assert!(passes.may_apply(1) && !passes.may_apply(2));
        passes.come(3, 2).unwrap();
        assert!(passes.may_apply(2) && passes.are_complete());
    }

    #[test]
    fn neither_stream_nor_link_may_go_back_or_skip() {
        let mut passes = Passes::default();
        assert!(passes.end(1, set(&[])).is_err());
        passes.end(0, set(&[])).unwrap();
        assert!(passes.end(0, set(&[])).is_err());
        passes.come(0, 4).unwrap();
        assert!(passes.come(0, 4).is_err() && passes.come(0, 3).is_err());
    }

    #[test]
    fn a_stream_that_runs_far_ahead_is_refused() {
        let mut passes = Passes::default();
        let refused = (0..).find(|pass| passes.end(*pass, set(&[1])).is_err());
        assert_eq!(refused, Some(1024));
    }

    proptest! {
        /// Links come to passes in any order; none is ever let into a pass before all of the
        /// earlier ones are through.
        #[test]
        fn nothing_is_applied_before_what_was_sent_earlier(
            steps in prop::collection::vec((0_u8..4, any::<bool>()), 0..80),
        ) {
            let mut passes = begun();
            let all = set(&[0, 1, 2]);
            let (mut at, mut ended) = ([0_u32; 3], 0);
            for link in 0..3 { passes.come(link, 0).unwrap(); }
            for (who, _) in steps {
                if who == 3 {
                    passes.end(ended, all).unwrap();
                    ended += 1;
                } else {
                    let at = &mut at[usize::from(who)];
                    *at += 1;
                    passes.come(who, *at).unwrap();
                }
                let through = at.iter().copied().min().unwrap().min(ended);
                prop_assert!(passes.may_apply(through));
                prop_assert!(!passes.may_apply(through + 1));
            }
        }
    }
}
