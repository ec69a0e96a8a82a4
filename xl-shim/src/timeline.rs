//! When things happened to a domain that is sent or saved, on the clock that the save helper stamps
//! its events with.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::status::{Board, Phase};

/// Steps that rxl sees itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// rxl began.
    Started,
    /// The receiver answered.
    Answered,
    /// The stream is written; the domain is suspended.
    Sent,
    /// The receiver has a complete copy.
    Ready,
    /// From here on it is too late to cancel.
    Committed,
    /// The receiver has reported.
    Reported,
    /// The domain runs on here.
    Resumed,
    /// rxl ended.
    Ended,
}

/// Nanoseconds of the host's monotonic clock, for each step that was reached.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeline {
    marks: Vec<(Mark, u64)>,
    /// Who looks on reads there what is reached.
    board: Board,
}

impl Timeline {
    /// Now is `mark`.
    pub(crate) fn mark(&mut self, mark: Mark) {
        self.marks.push((mark, now_ns()));
        if let Some(phase) = Phase::of_mark(mark) {
            self.board.reach(phase);
        }
    }

    /// Shows what is reached on `board` from now on.
    pub(crate) fn show_on(&mut self, board: Board) {
        self.board = board;
    }

    /// Where it is shown.
    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// When `mark` was.
    pub(crate) fn at(&self, mark: Mark) -> Option<u64> {
        self.marks.iter().find(|(m, _)| *m == mark).map(|(_, ns)| *ns)
    }

    #[cfg(test)]
    pub(crate) fn from_marks(marks: &[(Mark, u64)]) -> Timeline {
        Timeline { marks: marks.to_vec(), board: Board::default() }
    }
}

/// The monotonic clock, in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    u64::try_from(now().as_nanos()).unwrap_or(u64::MAX)
}

/// The monotonic clock.
pub(crate) fn now() -> Duration {
    clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default()
}
