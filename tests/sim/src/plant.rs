//! Mistakes that the checkers have to find, planted around the product's code. Nothing of the
//! product knows of them.

use std::cell::Cell;
use std::rc::Rc;

use rxl_migrate::helper::EventSink;
use rxl_migrate::report::Event;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// The sender lets its copy run on although it has tried to send Go.
    SenderResumesAfterGo,
    /// The sender's guard is told to stand down only after Go has been written.
    GuardStandsDownLate,
    /// The source's guard acts although it was told to stand down.
    GuardIsDeaf,
    /// The sender's guard goes with it although the guest may still suspend.
    GuardLeavesEarly,
    /// The sender takes a report of failure for one of success.
    ReportIgnored,
    /// The receiver lets its copy run as soon as it has it.
    ReceiverUnpausesBeforeGo,
    /// The receiver goes on after a restore that failed.
    FailedRestoreIgnored,
    /// The receiver says that its copy is gone, and keeps it.
    CopyKept,
    /// Pages of a pass arrive among those of the next one.
    PassesOverlap,
    /// The last dirty bits are read and forgotten.
    DirtyBitsLost,
    /// Log-dirty is not switched off at the end.
    LogDirtyStaysOn,
    /// A second migration does not care whether the first is over.
    LockIgnored,
    /// A mapping of guest memory outlives its process.
    MappingLeaks,
    /// A mapping of a page is used without a look at where the page is now.
    StaleMapping,
    /// The receiver lets a link into a pass before the earlier ones are complete.
    PassAppliedEarly,
    /// The receiver does not wait for what links have of a pass.
    LinkPartNotAwaited,
    /// The sender takes for confirmed what a link has sent.
    LostPagesForgotten,
    /// The sender goes on to the state records without waiting for confirmations.
    ConfirmationsNotAwaited,
    /// A link that has nothing to send is not watched.
    IdleLinkUnwatched,
    /// A link whose receiver is there and does not get on is not given up.
    StalledLinkKept,
    /// Who fails or dies while it writes to a shared stream keeps its turn.
    TurnKept,
}

/// All of them.
pub const PLANTS: [Plant; 21] = [
    Plant::SenderResumesAfterGo,
    Plant::GuardStandsDownLate,
    Plant::GuardIsDeaf,
    Plant::GuardLeavesEarly,
    Plant::ReportIgnored,
    Plant::ReceiverUnpausesBeforeGo,
    Plant::FailedRestoreIgnored,
    Plant::CopyKept,
    Plant::PassesOverlap,
    Plant::DirtyBitsLost,
    Plant::LogDirtyStaysOn,
    Plant::LockIgnored,
    Plant::MappingLeaks,
    Plant::StaleMapping,
    Plant::PassAppliedEarly,
    Plant::LinkPartNotAwaited,
    Plant::LostPagesForgotten,
    Plant::ConfirmationsNotAwaited,
    Plant::IdleLinkUnwatched,
    Plant::StalledLinkKept,
    Plant::TurnKept,
];

/// Lets the last page data of a pass arrive after the first of the next, as it could if they came
/// over two connections and nobody waited for the end of a pass.
#[derive(Debug, Default)]
pub(crate) struct Reorder {
    pass: Rc<Cell<u32>>,
    /// The pass of the record that is kept back.
    kept_in: u32,
    kept: Option<Vec<u8>>,
}

impl Reorder {
    /// Hears which pass it is.
    pub(crate) fn watch(&self) -> EventSink {
        let pass = self.pass.clone();
        Box::new(move |event| {
            if let Event::PassStarted { pass: number, .. } = event {
                pass.set(*number);
            }
        })
    }

    /// What to write where `record` was to be written.
    pub(crate) fn pass(&mut self, record: Vec<u8>) -> Vec<Vec<u8>> {
        let pass = self.pass.get();
        match self.kept.take() {
            Some(kept) if self.kept_in < pass => vec![record, kept],
            kept => {
                self.kept_in = pass;
                self.kept = Some(record);
                kept.into_iter().collect()
            }
        }
    }

    /// What has to be written before anything that is not page data.
    pub(crate) fn late(&mut self) -> Option<Vec<u8>> {
        self.kept.take()
    }
}
