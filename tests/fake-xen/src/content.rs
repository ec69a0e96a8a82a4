//! What leaving content out saves, and costs: `tests/bench content`.
//!
//! A guest goes from one modelled machine to another over one link, whose way is the loopback
//! interface of a network namespace that this program has for itself: what it carries is counted
//! there by the kernel, and it can be slowed down to any rate. docs/bench.md says what the figures
//! mean.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_migrate::fake::{Rng, WIRING, compare};
use rxl_migrate::frame::{PAGE_SIZE, PageBuf};
use rxl_migrate::hypervisor::Domain;

use crate::bench::{Bench, Side, median, random_page};
use crate::helper::{Helper, Libxl, Program};
use crate::migration::{GuestKind, joined};
use crate::ways::Ways;

/// What may be left out: nothing, each kind, everything; and everything whether that pays or not.
const REDUCE: [&str; 8] =
    ["none", "zero", "same", "delta", "compress", "zstd", "all", "all,always"];
/// How a link is at full speed.
const AT_FULL_SPEED: [Kind; 3] =
    [plain("none"), plain("all"), Kind { encrypted: true, ..plain("none") }];
/// Pages that the changing guest writes to: 8 MiB.
const HOT_PAGES: usize = 2048;
/// Between two times that it writes, and how many words it writes then, each to some hot page.
const GUEST_PAUSE: Duration = Duration::from_micros(500);
const GUEST_WORDS: usize = 4;
/// Words that texts are made of.
const WORDS: [&str; 16] = [
    "the ",
    "guest ",
    "writes ",
    "pages ",
    "while ",
    "they ",
    "are ",
    "sent ",
    "over ",
    "links ",
    "and ",
    "again ",
    "until ",
    "few ",
    "enough ",
    "remain.\n",
];

/// What the memory of a guest holds, and whether it changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nine pages of ten are zero, one is text or random, in turn.
    Idle,
    /// Words in a random order.
    Text,
    /// What cannot be compressed.
    Random,
    /// The same, and words of some of the pages change all the time.
    Changing,
}

impl Content {
    const ALL: [Content; 4] = [Content::Idle, Content::Text, Content::Random, Content::Changing];

    fn name(self) -> &'static str {
        match self {
            Content::Idle => "idle",
            Content::Text => "text",
            Content::Random => "random",
            Content::Changing => "changing",
        }
    }

    fn page(self, pfn: u64, rng: &mut Rng) -> Box<PageBuf> {
        match (self, pfn % 20) {
            (Content::Text, _) | (Content::Idle, 0) => text(rng),
            (Content::Random | Content::Changing, _) | (Content::Idle, 10) => random_page(rng),
            (Content::Idle, _) => PageBuf::zeroed(),
        }
    }
}

fn text(rng: &mut Rng) -> Box<PageBuf> {
    let mut page = PageBuf::zeroed();
    let mut letters = std::iter::repeat_with(|| WORDS.get(rng.index(WORDS.len())))
        .flatten()
        .flat_map(|word| word.bytes());
    page.0.iter_mut().for_each(|byte| *byte = letters.next().unwrap_or_default());
    page
}

/// How a link is: the first of several is what the others are compared with.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// What may be left out.
    reduce: &'static str,
    encrypted: bool,
}

const fn plain(reduce: &'static str) -> Kind {
    Kind { reduce, encrypted: false }
}

/// How fast the way is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// As fast as this machine can.
    Full,
    /// So many Mbit/s.
    Mbit(u32),
}

/// One figure: the medians of a few runs.
#[derive(Clone, Debug)]
pub struct Sent {
    /// What the guest held.
    pub content: Content,
    /// How fast the way was.
    pub rate: Rate,
    /// What might be left out.
    pub reduce: &'static str,
    /// Whether it was encrypted.
    pub encrypted: bool,
    /// What the way carried, with all headers, in MiB.
    pub mib: f64,
    /// The most that the sender's processes had resident, in MiB.
    pub peak_mib: f64,
    /// From the start of the helpers to their end.
    pub took: Duration,
    /// What was carried with nothing left out in the clear, over what was carried.
    pub less: f64,
    /// The time over that of the same, the median over the rounds.
    pub time_ratio: f64,
}

impl Sent {
    /// One line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let Sent { rate, reduce, encrypted, mib, peak_mib, less, time_ratio, .. } = self;
        let (content, ms) = (self.content.name(), self.took.as_millis());
        let rate = match rate {
            Rate::Full => "null".to_owned(),
            Rate::Mbit(rate) => rate.to_string(),
        };
        format!(
            "{{\"content\":\"{content}\",\"rate_mbit\":{rate},\"reduce\":\"{reduce}\",\
             \"encrypted\":{encrypted},\"mib\":{mib:.1},\"ms\":{ms},\"less\":{less:.2},\
             \"time_ratio\":{time_ratio:.3},\"peak_mib\":{peak_mib:.1}}}"
        )
    }

    /// One line for a reader.
    #[must_use]
    pub fn text(&self) -> String {
        let Sent { rate, reduce, mib, peak_mib, less, time_ratio, took, .. } = self;
        let sealed = if self.encrypted { "encrypted" } else { "" };
        let (content, seconds) = (self.content.name(), took.as_secs_f64());
        let rate = match rate {
            Rate::Full => "full speed".to_owned(),
            Rate::Mbit(rate) => format!("{rate} Mbit/s"),
        };
        format!(
            "{content:<9}{rate:>11}  {reduce:<11}{sealed:<10}{mib:>8.1} MiB {seconds:>8.2} s  \
             {less:>6.2} times less, {time_ratio:.3} of the time, {peak_mib:.0} MiB of memory"
        )
    }
}

/// One run.
#[derive(Clone, Copy, Debug)]
struct Run {
    bytes: u64,
    peak_kib: u64,
    took: Duration,
}

/// Moves guests of `bench.mib` MiB with each content: with nothing, each kind and everything left
/// out at each of `rates`, and at full speed with nothing, everything, and encrypted; `bench.pairs`
/// times each. `show` gets each figure as it is there.
///
/// # Errors
/// This program does not run in a network namespace of its own, a helper fails, or the guest that
/// arrives is not what was sent.
pub fn content(bench: &Bench, rates: &[u32], mut show: impl FnMut(&Sent)) -> Result<()> {
    let slow = REDUCE.map(plain);
    let rates = rates.iter().map(|rate| (Rate::Mbit(*rate), &slow[..]));
    for (rate, kinds) in std::iter::once((Rate::Full, &AT_FULL_SPEED[..])).chain(rates) {
        set_rate(rate)?;
        for content in Content::ALL {
            let named = format!("{}/{rate:?}", content.name());
            if named.starts_with(&bench.only) {
                measure(bench, content, rate, kinds, &mut show).context(named)?;
            }
        }
    }
    Ok(())
}

fn measure(
    bench: &Bench,
    content: Content,
    rate: Rate,
    kinds: &[Kind],
    show: &mut impl FnMut(&Sent),
) -> Result<()> {
    let source = bench.source(GuestKind::Pvh)?;
    let (mut rng, mut hot) = (Rng::new(1), Vec::new());
    source.domain.fill(|pfn| {
        hot.push(pfn);
        Some(content.page(pfn, &mut rng))
    });
    hot.truncate(if content == Content::Changing { HOT_PAGES } else { 0 });
    let mut rounds: Vec<Vec<Run>> = Vec::new();
    for round in 0..bench.pairs {
        let mut runs = Vec::new();
        for kind in kinds {
            let moved = one(bench, &source, &hot, *kind);
            runs.push(moved.with_context(|| format!("{kind:?}, round {round}"))?);
        }
        rounds.push(runs);
    }
    let over_rounds = |index: usize, of: fn(Run, Run) -> f64| {
        let values = rounds.iter().filter_map(|runs| Some(of(*runs.get(index)?, *runs.first()?)));
        median(values.collect())
    };
    for (index, Kind { reduce, encrypted }) in kinds.iter().copied().enumerate() {
        show(&Sent {
            content,
            rate,
            reduce,
            encrypted,
            mib: over_rounds(index, |run, _| run.bytes as f64 / f64::from(1 << 20)),
            peak_mib: over_rounds(index, |run, _| run.peak_kib as f64 / 1024.0),
            took: Duration::from_secs_f64(over_rounds(index, |run, _| run.took.as_secs_f64())),
            less: over_rounds(index, |run, none| none.bytes as f64 / run.bytes as f64),
            time_ratio: over_rounds(index, |run, none| run.took.div_duration_f64(none.took)),
        });
    }
    Ok(())
}

/// One migration to a new machine, whose frames hold what others left in them, while the guest
/// writes to its `hot` pages.
fn one(bench: &Bench, source: &Side, hot: &[u64], kind: Kind) -> Result<Run> {
    let info = source.domain.info()?;
    let machine = bench.used_machine()?;
    let domain = machine.host().create(info.hvm, info.total_pages + 600, info.max_vcpu_id + 1);
    let target = Side { machine, domain };
    let with = |side| {
        let helper: Helper<'_> = bench.helper(Program::Rxl, side);
        let ways = if kind.encrypted { Ways::Sealed(1) } else { Ways::Links(1) };
        Helper { libxl: Libxl { ways, reduce: kind.reduce, ..helper.libxl }, ..helper }
    };
    let (save_end, restore_end) = UnixStream::pair().context("Cannot make a socket")?;
    let (before, over) = (carried()?, &AtomicBool::new(false));
    let (saved, restored) = thread::scope(|scope| {
        let helper = with(&target);
        let restore = scope.spawn(move || helper.restore(restore_end.into(), &WIRING));
        scope.spawn(move || write(source, hot, over));
        let saved = with(source).save(save_end.into(), true);
        over.store(true, Ordering::Relaxed);
        (saved, joined(restore))
    });
    let (saved, restored) = (saved?, restored?);
    ensure!(saved.succeeded(), "{}", saved.describe());
    ensure!(restored.succeeded(), "{}", restored.describe());
    let bytes = carried()? - before;
    target.machine.settle()?;
    let rings = restored.rings.context("no word of the rings")?;
    let differences = compare(&source.domain, &target.domain, &WIRING, &rings);
    ensure!(differences.is_empty(), "the copy differs: {differences:?}");
    source.domain.resume();
    let peak_kib = saved.used.peak_kib;
    Ok(Run { bytes, peak_kib, took: saved.took.max(restored.took) })
}

/// The guest writes to its `hot` pages until it is `over`.
fn write(source: &Side, hot: &[u64], over: &AtomicBool) {
    let mut rng = Rng::new(2);
    while !hot.is_empty() && !over.load(Ordering::Relaxed) {
        for _ in 0..GUEST_WORDS {
            let pfn = hot.get(rng.index(hot.len())).copied().unwrap_or_default();
            let (slot, word) = (rng.index(PAGE_SIZE / 8), rng.next());
            source.domain.write(pfn, slot, word);
        }
        thread::sleep(GUEST_PAUSE);
    }
}

/// Bytes that the loopback interface has carried.
fn carried() -> Result<u64> {
    let table = fs::read_to_string("/proc/self/net/dev").context("Cannot read net/dev")?;
    let bytes =
        |line: &str| line.trim().strip_prefix("lo:")?.split_whitespace().next()?.parse().ok();
    table.lines().find_map(bytes).context("there is no loopback interface")
}

/// Makes the loopback interface as fast as `rate` says.
fn set_rate(rate: Rate) -> Result<()> {
    let others = fs::read_to_string("/proc/self/net/dev").context("Cannot read net/dev")?;
    let alone = others.lines().filter(|line| line.contains(':')).all(|line| {
        let name = line.trim();
        name.starts_with("lo:") || line.split_whitespace().nth(1) == Some("0")
    });
    ensure!(alone, "this network namespace is used: start this by tests/bench content, as root");
    run("ip", "link set lo up")?;
    match rate {
        Rate::Full => run("tc", "qdisc replace dev lo root noqueue"),
        Rate::Mbit(rate) => {
            let shape = format!("tbf rate {rate}mbit burst 256kb limit 1mb");
            run("tc", &format!("qdisc replace dev lo root {shape}"))
        }
    }
}

fn run(program: &str, arguments: &str) -> Result<()> {
    let status = Command::new(program).args(arguments.split(' ')).status();
    let status = status.with_context(|| format!("Cannot start {program} (package iproute2)"))?;
    ensure!(status.success(), "{program} {arguments}: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_guest_is_zeros_but_for_a_page_in_ten_and_nothing_repeats_itself_in_random_ones() {
        let mut rng = Rng::new(1);
        let pages: Vec<_> = (0..100).map(|pfn| Content::Idle.page(pfn, &mut rng)).collect();
        let zeros = pages.iter().filter(|page| page.0.iter().all(|byte| *byte == 0)).count();
        assert_eq!(zeros, 90);
        let random = pages[10].0.as_chunks::<8>().0;
        assert!(random.iter().collect::<std::collections::BTreeSet<_>>().len() == random.len());
        assert!(pages[0].0.is_ascii() && pages[0].0.contains(&b' '));
    }

    #[test]
    fn a_figure_is_one_line_with_the_fields_in_order() {
        let (content, rate, reduce) = (Content::Idle, Rate::Mbit(200), "zero");
        let (mib, took, less, time_ratio) = (25.64, Duration::from_millis(1500), 9.98, 0.1);
        let encrypted = false;
        let peak_mib = 30.0;
        let sent = Sent { content, rate, reduce, encrypted, mib, peak_mib, took, less, time_ratio };
        let expected = r#"{"content":"idle","rate_mbit":200,"reduce":"zero","encrypted":false,"#
            .to_owned()
            + r#""mib":25.6,"ms":1500,"less":9.98,"time_ratio":0.100,"peak_mib":30.0}"#;
        assert_eq!(sent.json(), expected);
        assert!(Sent { rate: Rate::Full, ..sent }.json().contains(r#""rate_mbit":null,"#));
    }
}
