//! Faults that are planted, to see that the comparison finds them: in a stream on its way, or in
//! the model. None is in a product.

use anyhow::{Context, Result, ensure};
use rxl_migrate::frame::PageType;

use crate::helper::Program;
use crate::migration::{Activity, GuestKind, Migration, Rig, compared};
use crate::stream::Stream;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// A page table is left out of the stream.
    SkippedTable,
    /// A page that only the last pass sends is left out.
    DroppedDeferredPage,
    /// After all else an old version of a page comes once more.
    StalePage,
    /// A reading of the dirty bits clears them and says that there are none.
    ForgottenClean,
    /// A page is read through a mapping that was made when it had another frame.
    StaleMapping,
}

impl Planted {
    /// All of them.
    pub const ALL: [Planted; 5] = [
        Planted::SkippedTable,
        Planted::DroppedDeferredPage,
        Planted::StalePage,
        Planted::ForgottenClean,
        Planted::StaleMapping,
    ];
}

impl std::fmt::Display for Planted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Planted::SkippedTable => "a normalised page table is skipped",
            Planted::DroppedDeferredPage => "a deferred page is dropped",
            Planted::StalePage => "a stale page is applied",
            Planted::ForgottenClean => "a CLEAN is forgotten",
            Planted::StaleMapping => "a stale mapping is used",
        })
    }
}

/// Guests that are tried until one gives the fault an occasion.
const GUESTS_MAX: u64 = 60;

impl Rig {
    /// Does a migration with a fault, and says in what the copy differs. Guests from
    /// `migration.seed` on are tried until the fault has an occasion.
    ///
    /// # Errors
    /// A helper fails, or no guest gives the fault an occasion.
    pub fn migrate_with(&self, planted: Planted, migration: &Migration) -> Result<Vec<String>> {
        for seed in (migration.seed..).take(usize::try_from(GUESTS_MAX)?) {
            let migration = Migration { seed, ..*migration };
            if let Some(differences) = self.try_with(planted, &migration)? {
                return Ok(differences);
            }
        }
        anyhow::bail!("none of {GUESTS_MAX} guests gave the fault an occasion")
    }

    /// Saves a guest with digests, changes a page on its way, and says why it is not restored.
    ///
    /// # Errors
    /// The save fails, or the restore does not.
    pub fn changed_page(&self, migration: &Migration) -> Result<String> {
        let source = migration.source()?;
        let (saved, stream) = self.save_alone(migration, &source)?;
        ensure!(saved.succeeded(), "saving: {}", saved.describe());
        source.check_left_behind()?;
        let mut parts = Stream::parse(&stream)?;
        parts.change_page()?;
        let target = migration.target(&source.domain)?;
        let restored = self.restore_alone(migration, &target, &parts.to_bytes()?)?;
        target.check_left_behind()?;
        ensure!(!restored.succeeded(), "it is restored all the same");
        Ok(restored.describe())
    }

    /// Restores a guest on a host whose CPU lacks features that it had: the receiver has to refuse
    /// it by name, or, if it does not look, the comparison to find it.
    ///
    /// # Errors
    /// Neither.
    pub fn restore_on_lesser_cpu(&self, migration: &Migration) -> Result<()> {
        let source = migration.source()?;
        let (saved, stream) = self.save_alone(migration, &source)?;
        ensure!(saved.succeeded(), "saving: {}", saved.describe());
        let target = migration.target(&source.domain)?;
        target.machine.host().lack_features(1);
        let restored = self.restore_alone(migration, &target, &stream)?;
        if migration.to == Program::Rxl {
            let words = "CPUID leaf 0x1 edx bit";
            let is_refused = !restored.succeeded() && restored.describe().contains(words);
            ensure!(is_refused, "restoring: {}", restored.describe());
            return Ok(());
        }
        let differences = compared(migration, &source, &target, &restored)?;
        ensure!(!differences.is_empty(), "the comparison finds nothing");
        Ok(())
    }

    /// `None`: the fault had no occasion.
    fn try_with(&self, planted: Planted, migration: &Migration) -> Result<Option<Vec<String>>> {
        let (guest, activity) = match planted {
            Planted::SkippedTable => (GuestKind::PvLinear, Activity::Stopped),
            Planted::DroppedDeferredPage => (GuestKind::PvTree, Activity::Ballooning),
            Planted::StalePage => (GuestKind::PvTree, Activity::Writing),
            Planted::ForgottenClean => (migration.guest, Activity::Writing),
            Planted::StaleMapping => (GuestKind::PvLinear, Activity::Ballooning),
        };
        let migration = Migration { guest, activity, ..*migration };
        let source = migration.source()?;
        match planted {
            Planted::ForgottenClean => source.machine.host().forget_clean(0),
            Planted::StaleMapping => source.machine.host().map_stale(),
            _ => {}
        }
        let (saved, stream) = self.save_alone(&migration, &source)?;
        if !saved.succeeded() && activity == Activity::Ballooning {
            return Ok(None);
        }
        ensure!(saved.succeeded(), "saving: {}", saved.describe());
        source.check_left_behind()?;
        let mut parts = Stream::parse(&stream)?;
        ensure!(parts.to_bytes()? == stream, "the stream is not what it was read as");
        let there_was_one = match planted {
            Planted::SkippedTable => skip_table(&mut parts)?,
            Planted::DroppedDeferredPage => drop_deferred(&mut parts)?,
            Planted::StalePage => repeat_stale(&mut parts)?,
            Planted::ForgottenClean => true,
            Planted::StaleMapping => source.machine.host().mapped_stale() > 0,
        };
        if !there_was_one {
            return Ok(None);
        }
        let target = migration.target(&source.domain)?;
        let restored = self.restore_alone(&migration, &target, &parts.to_bytes()?)?;
        target.check_left_behind()?;
        if !restored.succeeded() {
            // So bad that Xen refuses it, and nothing is left to be compared.
            return Ok(None);
        }
        compared(&migration, &source, &target, &restored).map(Some)
    }
}

/// Leaves out the first table of level 1 that holds something.
fn skip_table(stream: &mut Stream) -> Result<bool> {
    let is_table = |kind| kind == PageType::Table { level: 1, pinned: false };
    let holds = |data: &Option<Vec<u8>>| data.iter().flatten().any(|byte| *byte != 0);
    let found = stream.pages().find(|(_, page)| is_table(page.kind) && holds(&page.data));
    let place = found.map(|(place, _)| place);
    place.map_or(Ok(false), |place| stream.remove(place).map(|()| true))
}

/// Leaves out a page that comes for the first time in the last pass.
fn drop_deferred(stream: &mut Stream) -> Result<bool> {
    let last_pass = stream.last_pass().context("a stream without pages")?;
    let pages = stream.data_by_pfn();
    let mut new = pages.values().filter_map(|places| match places.as_slice() {
        [(place, page)] if *place >= last_pass && page.kind == PageType::Normal => Some(*place),
        _ => None,
    });
    let place = new.next();
    place.map_or(Ok(false), |place| stream.remove(place).map(|()| true))
}

/// Repeats the first version of a page that came in two, both ordinary memory.
fn repeat_stale(stream: &mut Stream) -> Result<bool> {
    let pages = stream.data_by_pfn();
    let mut changed = pages.values().filter_map(|places| match places.as_slice() {
        [(_, first), .., (_, last)]
            if first.data != last.data
                && first.kind == PageType::Normal
                && last.kind == PageType::Normal =>
        {
            Some((*first).clone())
        }
        _ => None,
    });
    let stale = changed.next();
    stale.map_or(Ok(false), |page| stream.append(page).map(|()| true))
}
