//! What the threads do, and what the module has to refuse.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::Result;
use crate::device::{Device, MapFrames};

/// Pages of the window for each domain.
const AREA_PAGES: usize = 2048;
/// Most pages of one call.
const RANGE_PAGES: usize = 700;
/// A number that no domain has.
const NO_DOMAIN: u32 = 0x7000;
/// A frame that no machine has.
const NO_FRAME: u64 = (1 << 40) - 7;

/// The part of the window for frames of one domain.
pub(crate) struct Area {
    domain: u32,
    frames: Vec<u64>,
    is_fixed: bool,
}

impl Area {
    pub(crate) fn parse(word: &str) -> Result<Area> {
        let parts: Vec<&str> = word.split(':').collect();
        let [domain, file, kind] = parts.as_slice() else {
            return Err(format!("`{word}` is not DOMID:FILE:fixed|changing").into());
        };
        let bytes = fs::read(file)?;
        let all: Vec<u64> =
            bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        // From all over the domain.
        let step = (all.len() / AREA_PAGES).max(1);
        let frames: Vec<u64> = all.into_iter().step_by(step).take(AREA_PAGES).collect();
        if frames.len() < AREA_PAGES {
            return Err(format!("{file} has only {} frames", frames.len()).into());
        }
        Ok(Area { domain: domain.parse()?, frames, is_fixed: *kind == "fixed" })
    }
}

/// Pages of the window.
pub(crate) fn pages(areas: &[Area]) -> usize {
    areas.len() * AREA_PAGES
}

/// The window and what belongs where.
pub(crate) struct Stage {
    device: Device,
    areas: Vec<Area>,
    /// Of each page of the window, what it has to contain; `None`: that changes.
    digests: Vec<Option<u64>>,
}

impl Stage {
    /// Notes what the frames contain.
    pub(crate) fn new(device: Device, areas: Vec<Area>) -> Result<Stage> {
        let reader = Reader::new()?;
        let mut digests = Vec::new();
        for (index, area) in areas.iter().enumerate() {
            let first = index * AREA_PAGES;
            let mut errors = Vec::new();
            device.map(first, area.domain, &area.frames, &mut errors).map_err(named("mapping"))?;
            for slot in 0..AREA_PAGES {
                let digest = reader.digest(&device, first + slot)?;
                // Of a domain that runs, frames may be gone by now.
                digests.push(if area.is_fixed { Some(digest.ok_or("no frame")?) } else { None });
            }
            device.unmap(first as u64, AREA_PAGES as u64).map_err(named("unmapping"))?;
        }
        Ok(Stage { device, areas, digests })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

fn named(what: &'static str) -> impl Fn(i32) -> String {
    move |errno| format!("{what}: {}", io::Error::from_raw_os_error(errno))
}

/// Reads pages through the kernel.
struct Reader(File);

impl Reader {
    fn new() -> Result<Reader> {
        Ok(Reader(memfd_create("page", MemfdFlags::CLOEXEC)?.into()))
    }

    /// `None`: nothing is mapped there.
    fn digest(&self, device: &Device, page: usize) -> Result<Option<u64>> {
        if !device.read_into(page, &self.0)? {
            return Ok(None);
        }
        let mut bytes = [0; 4096];
        self.0.read_exact_at(&mut bytes, 0)?;
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        Ok(Some(hasher.finish()))
    }
}

/// How often something happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) mapped: u64,
    pub(crate) busy: u64,
    pub(crate) refused_pages: u64,
    pub(crate) unmapped: u64,
    pub(crate) right_pages: u64,
    pub(crate) empty_pages: u64,
}

/// One thread.
pub(crate) struct Player<'a> {
    stage: &'a Stage,
    reader: Reader,
    state: u64,
    errors: Vec<i32>,
    counts: Counts,
}

impl<'a> Player<'a> {
    pub(crate) fn new(stage: &'a Stage, seed: u64) -> Result<Player<'a>> {
        let (reader, counts) = (Reader::new()?, Counts::default());
        Ok(Player { stage, reader, state: seed, errors: Vec::new(), counts })
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// SplitMix64.
    fn below(&mut self, end: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % end.max(1) as u64).unwrap_or(0)
    }

    /// One thing, drawn.
    pub(crate) fn step(&mut self) -> Result<()> {
        match self.below(8) {
            0..3 => self.map(),
            3..6 => self.unmap(),
            _ => self.read(),
        }
    }

    fn map(&mut self) -> Result<()> {
        let area = self.below(self.stage.areas.len());
        let count = 1 + self.below(RANGE_PAGES);
        let slot = self.below(AREA_PAGES - count + 1);
        let Some(Area { domain, frames, .. }) = self.stage.areas.get(area) else { return Ok(()) };
        let mut wanted = frames.get(slot..slot + count).ok_or("past the area")?.to_vec();
        // Now and then one that there is not.
        let bad = (self.below(4) == 0).then(|| self.below(count));
        if let Some(frame) = bad.and_then(|bad| wanted.get_mut(bad)) {
            *frame = if self.below(2) == 0 { NO_FRAME } else { u64::MAX };
        }
        let first = area * AREA_PAGES + slot;
        match self.stage.device.map(first, *domain, &wanted, &mut self.errors) {
            Ok(()) => self.counts.mapped += 1,
            Err(libc::EBUSY) => self.counts.busy += 1,
            Err(errno) => return Err(named("mapping")(errno).into()),
        }
        self.counts.refused_pages += self.errors.iter().filter(|error| **error != 0).count() as u64;
        Ok(())
    }

    fn unmap(&mut self) -> Result<()> {
        let count = 1 + self.below(2 * RANGE_PAGES);
        let first = self.below(self.stage.device.pages() - count + 1);
        self.stage.device.unmap(first as u64, count as u64).map_err(named("unmapping"))?;
        self.counts.unmapped += 1;
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        let page = self.below(self.stage.device.pages());
        let expected = self.stage.digests.get(page).copied().flatten();
        match (self.reader.digest(&self.stage.device, page)?, expected) {
            (None, _) => self.counts.empty_pages += 1,
            (Some(_), None) => {}
            (Some(got), Some(expected)) if got == expected => self.counts.right_pages += 1,
            (Some(_), Some(_)) => return Err(format!("page {page} is another frame's").into()),
        }
        Ok(())
    }
}

/// What the module has to refuse, and that a call which is refused does nothing.
pub(crate) fn refusals(stage: &Stage) -> Result<()> {
    let device = &stage.device;
    let Some(Area { domain, frames, .. }) = stage.areas.first() else { return Ok(()) };
    let mut errors = vec![0; frames.len()];
    let fine = MapFrames {
        first: 0,
        count: 4,
        frames: frames.as_ptr().expose_provenance() as u64,
        errors: errors.as_mut_ptr().expose_provenance() as u64,
        domain: *domain,
        flags: 0,
    };
    let pages = device.pages() as u64;
    let cases = [
        ("no pages", MapFrames { count: 0, ..fine }, libc::EINVAL),
        ("too many pages", MapFrames { count: u64::MAX, ..fine }, libc::EINVAL),
        ("past the end", MapFrames { first: pages - 3, ..fine }, libc::EINVAL),
        ("far past the end", MapFrames { first: u64::MAX, ..fine }, libc::EINVAL),
        ("unknown flags", MapFrames { flags: 2, ..fine }, libc::EINVAL),
        ("no domain's number", MapFrames { domain: 1 << 16, ..fine }, libc::EINVAL),
        ("no list", MapFrames { frames: 8, ..fine }, libc::EFAULT),
        ("no room for errors", MapFrames { errors: 8, ..fine }, libc::EFAULT),
    ];
    for (what, call, errno) in cases {
        expect(what, device.map_raw(call), Err(errno))?;
        // The last one has been done, but for telling.
        expect("unmapping", device.unmap(0, 4), Ok(()))?;
    }
    let mut said = Vec::new();
    let four = frames.get(..4).ok_or("too few frames")?;
    expect("a domain that is not there", device.map(0, NO_DOMAIN, four, &mut said), Ok(()))?;
    expect_all_refused(&said)?;
    expect("frames that are not there", device.map(0, *domain, &[NO_FRAME; 4], &mut said), Ok(()))?;
    expect_all_refused(&said)?;
    expect("unmapping past the end", device.unmap(pages - 1, 2), Err(libc::EINVAL))?;
    expect("a private window", device.window(1, libc::MAP_PRIVATE).map(drop), Err(libc::EINVAL))?;
    expect("a second window", device.window(1, libc::MAP_SHARED).map(drop), Err(libc::EBUSY))?;
    if device.can_be_written(0)? {
        return Err("an empty page can be written".into());
    }

    expect("mapping", device.map(0, *domain, four, &mut said), Ok(()))?;
    expect("mapping again", device.map(3, *domain, four, &mut said), Err(libc::EBUSY))?;
    if device.can_be_written(0)? {
        return Err("a page that was mapped for reading can be written".into());
    }
    for (what, got, errno) in device.mistreat() {
        expect(what, got, Err(errno))?;
    }
    expect("unmapping", device.unmap(0, pages), Ok(()))?;
    ends_of_windows(*domain, four)
}

/// Windows that end with frames in them.
fn ends_of_windows(domain: u32, frames: &[u64]) -> Result<()> {
    let mut said = Vec::new();
    let device = Device::open(1000)?;
    expect("restricting", device.restrict(domain), Ok(()))?;
    expect("restricting again", device.restrict(domain + 1), Err(libc::EINVAL))?;
    let other = device.map(0, domain + 1, frames, &mut said);
    expect("another domain than the only one", other, Err(libc::EPERM))?;
    expect("the only domain", device.map(990, domain, frames, &mut said), Ok(()))?;
    expect("moving", device.move_window(), Err(libc::EINVAL))?;
    expect("mapping after that", device.map(0, domain, frames, &mut said), Err(libc::ENODEV))?;
    expect("unmapping the window", device.unmap_window(), Ok(()))?;

    let device = Device::open(1000)?;
    expect("mapping", device.map(10, domain, frames, &mut said), Ok(()))?;
    expect("unmapping the window", device.unmap_window(), Ok(()))?;
    expect("unmapping after that", device.unmap(0, 1), Err(libc::ENODEV))
}

fn expect_all_refused(errors: &[i32]) -> Result<()> {
    if errors.iter().all(|error| *error < 0) { Ok(()) } else { Err(format!("{errors:?}").into()) }
}

fn expect(
    what: &str,
    got: std::result::Result<(), i32>,
    wanted: std::result::Result<(), i32>,
) -> Result<()> {
    if got == wanted { Ok(()) } else { Err(format!("{what}: {got:?}, not {wanted:?}").into()) }
}
