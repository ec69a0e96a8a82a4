//! Mistakes that the checkers have to find, planted around the product's code. Nothing of the
//! product knows of them.

use std::borrow::Cow;
use std::cell::Cell;
use std::rc::Rc;

use rxl_migrate::frame::{PAGE_SIZE, PageType};
use rxl_migrate::helper::EventSink;
use rxl_migrate::report::Event;
use rxl_migrate::stream::libxc::{
    self, PageEntry, RECORD_HEADER_BYTES, ReadKind, RecordHeader, RecordKind, page_data_head,
};
use rxl_migrate::stream::reduced;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// The sender lets its copy run on although it has tried to send Go.
    SenderResumesAfterGo,
    /// The sender's guard is told to stand down only after Go has been written.
    GuardStandsDownLate,
    /// The source's guard acts although it was told to stand down.
    GuardIsDeaf,
    /// The source's guard is not told that the guest is asked to suspend.
    GuardIsNotTold,
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
    /// A guest that was slowed stays slow.
    SlowForEver,
    /// A second migration does not care whether the first is over.
    LockIgnored,
    /// A mapping of guest memory outlives its process.
    MappingLeaks,
    /// A mapping of a page is used without a look at where the page is now.
    StaleMapping,
    /// The receiver lets a link into a pass before the earlier ones are complete.
    PassAppliedEarly,
    /// The sender takes for confirmed what a link has sent.
    LostPagesForgotten,
    /// The sender goes on to the state records without waiting for confirmations.
    ConfirmationsNotAwaited,
    /// A link that has nothing to send is not watched.
    IdleLinkUnwatched,
    /// A link whose receiver is there and does not get on is not given up.
    StalledLinkKept,
    /// A page changes on its way.
    PageChanged,
    /// The same, but the receiver has digests to compare with. Unlike all others this is found by
    /// the product, so it is none of [`PLANTS`].
    PageChangedAndVerified,
    /// Who fails or dies while it writes to a shared stream keeps its turn.
    TurnKept,
    /// The receiver takes the memory of pages of zeros for zeros.
    ZerosAssumed,
    /// A worker goes by what it sent of a page that others have sent since.
    StaleContent,
    /// A sender leaves out what its receiver knows nothing of.
    ReducedUnasked,
}

/// All that the checkers find.
pub const PLANTS: [Plant; 26] = [
    Plant::SenderResumesAfterGo,
    Plant::GuardStandsDownLate,
    Plant::GuardIsDeaf,
    Plant::GuardIsNotTold,
    Plant::GuardLeavesEarly,
    Plant::ReportIgnored,
    Plant::ReceiverUnpausesBeforeGo,
    Plant::FailedRestoreIgnored,
    Plant::CopyKept,
    Plant::PassesOverlap,
    Plant::DirtyBitsLost,
    Plant::LogDirtyStaysOn,
    Plant::SlowForEver,
    Plant::LockIgnored,
    Plant::MappingLeaks,
    Plant::StaleMapping,
    Plant::PassAppliedEarly,
    Plant::LostPagesForgotten,
    Plant::ConfirmationsNotAwaited,
    Plant::IdleLinkUnwatched,
    Plant::StalledLinkKept,
    Plant::PageChanged,
    Plant::TurnKept,
    Plant::ZerosAssumed,
    Plant::StaleContent,
    Plant::ReducedUnasked,
];

/// A record of a link without the content of its pages of zeros.
pub(crate) fn assume_zeros(record: &[u8]) -> Vec<u8> {
    let Some((head, body)) = record.split_first_chunk::<RECORD_HEADER_BYTES>() else {
        return record.to_vec();
    };
    let kind = RecordHeader::parse(*head).map(|header| header.kind);
    let is_reduced = kind == Ok(ReadKind::Known(RecordKind::RxlReduced));
    let Ok(parsed) = reduced::parse(body.get(..body_length(head)).unwrap_or_default()) else {
        return record.to_vec();
    };
    if !is_reduced {
        return record.to_vec();
    }
    let count = parsed.entries.len();
    let (entries, rest) = body[8..].split_at(8 * count);
    let (words, content) = rest.split_at((2 * count).next_multiple_of(8));
    let is_zero = |index: usize| words[2 * index..2 * index + 2] == [0, 0];
    let (mut zeros, mut others, mut other_words) = (Vec::new(), Vec::new(), Vec::new());
    for (index, entry) in parsed.entries.iter().enumerate() {
        if is_zero(index) {
            zeros.push(PageEntry { kind: PageType::AllocOnly, ..*entry });
        } else {
            others.extend_from_slice(&entries[8 * index..8 * index + 8]);
            other_words.extend_from_slice(&words[2 * index..2 * index + 2]);
        }
    }
    if zeros.is_empty() {
        return record.to_vec();
    }
    let mut bytes = page_data_head(&zeros).unwrap_or_default();
    if zeros.len() < count {
        let left = ((count - zeros.len()) as u64).to_le_bytes();
        other_words.resize(other_words.len().next_multiple_of(8), 0);
        let content = &content[..body_length(head) - 8 - entries.len() - words.len()];
        let parts: [&[u8]; 4] = [&left, &others, &other_words, content];
        bytes.extend(libxc::record(RecordKind::RxlReduced, &parts).unwrap_or_default());
    }
    bytes
}

/// What arrives where `bytes` were sent: with some mistakes each page has another byte.
pub(crate) fn on_its_way(plant: Option<Plant>, bytes: &[u8]) -> Cow<'_, [u8]> {
    let changes = [Plant::PageChanged, Plant::PageChangedAndVerified].map(Some).contains(&plant);
    let mut bytes = Cow::Borrowed(bytes);
    if changes && bytes.len() == PAGE_SIZE {
        bytes.to_mut()[PAGE_SIZE / 2] ^= 0x20;
    }
    bytes
}

fn body_length(head: &[u8; RECORD_HEADER_BYTES]) -> usize {
    RecordHeader::parse(*head).map_or(0, |header| header.length)
}

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
