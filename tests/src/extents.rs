//! What size of memory a PVH guest gets at the target, counted by the hypervisor: its trace has a
//! record for each entry that it puts into a guest's physical map, with the entry's size.
//!
//! rxl's receiver gives whole aligned 2 MiB runs as one extent each, so that the guest keeps its
//! superpages; stock's gives each page by itself.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_lab::{GuestKind, Host, Route};

use crate::background::Background;
use crate::lab::Session;
use crate::tally::{Tally, note};

/// The guest.
const GUEST: &str = "extents";
/// Where the trace goes.
const TRACE: &str = "/run/rxl-extents.trace";
/// Classes of records that are wanted: memory.
const CLASS: &str = "0x0010f000";
/// Pages of the trace's buffer: records of all pages of a guest must fit while nobody reads.
const BUFFER_PAGES: u32 = 1024;
/// How long reading the trace may take.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// At most so many pages for each way, and of the guest, are not in extents: those of the first
/// pass's end, in which batches shrink (docs/links.md), and those around holes.
const SINGLE_OF_WAY: u64 = 1536;
const SINGLE_SHARE: u64 = 20;

/// Record: an entry of a physical map.
const SET_ENTRY: u32 = 0x0010_f004;
/// Record: others have been lost before it.
const LOST: u32 = 0x0001_f001;
/// Type of an entry: memory that the guest reads and writes.
const RAM: u32 = 0;
/// log2 of the pages of an extent.
const EXTENT_ORDER: u32 = 9;

/// Runs all of it.
pub fn run(tally: &mut Tally, session: &Session) {
    let start = || session.start(GUEST, GuestKind::Pvh, 0);
    if tally.case("PVH: start", start).is_none() {
        return;
    }
    tally.case("rxl's receiver gives extents of 2 MiB", || {
        let orders = receive(session, Route::Rxl)?;
        let (large, single) = (count(&orders, EXTENT_ORDER) << EXTENT_ORDER, count(&orders, 0));
        // In the lab one connection for each NIC, and the stream.
        let ways = u64::from(session.lab().shape().nics) + 1;
        let most = SINGLE_OF_WAY * ways + (large + single) / SINGLE_SHARE;
        ensure!(large > 0 && single < most, "{orders:?}, of 4 KiB at most {most}");
        Ok(())
    });
    tally.case("stock's receiver gives single pages", || {
        let orders = receive(session, Route::Xl)?;
        ensure!(count(&orders, 0) > 0 && count(&orders, EXTENT_ORDER) == 0, "{orders:?}");
        Ok(())
    });
    tally.case("PVH: stop", || session.remove(GUEST));
}

fn count(orders: &BTreeMap<u32, u64>, order: u32) -> u64 {
    orders.get(&order).copied().unwrap_or(0)
}

/// Moves the guest to the other host; how many entries of each order the hypervisor there made for
/// it.
fn receive(session: &Session, route: Route) -> Result<BTreeMap<u32, u64>> {
    let (_, to) = session.here_and_there(GUEST)?;
    let command = format!("xentrace -D -S {BUFFER_PAGES} -e {CLASS} {TRACE}");
    let trace = Background::start(to, &format!("sh -c 'rm -f {TRACE}; exec {command}'"))?;
    let moved = session.migrate(GUEST, GuestKind::Pvh, route);
    trace.signal_group("TERM")?;
    trace.finish(READ_TIMEOUT)?;
    moved?;
    let domid = to.run(&format!("xl domid {GUEST}"))?;
    let domid: u32 = domid.trim().parse().context("the domain's number")?;
    let entries = entries(&words(to)?)?;
    let mut orders = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.domain == domid && entry.kind == RAM) {
        *orders.entry(entry.order).or_insert(0) += 1;
    }
    let each = orders.iter().map(|(order, count)| format!("{count} of {} KiB", 4 << order));
    note(format!("entries of its map: {}", each.collect::<Vec<_>>().join(", ")));
    Ok(orders)
}

/// The trace, in words of 32 bits.
fn words(host: &Host) -> Result<Vec<u32>> {
    let text = host.run_within(&format!("od -An -v -tx4 {TRACE} && rm {TRACE}"), READ_TIMEOUT)?;
    let parse = |word| u32::from_str_radix(word, 16).with_context(|| format!("`{word}`"));
    text.split_ascii_whitespace().map(parse).collect()
}

/// An entry of a physical map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    domain: u32,
    kind: u32,
    order: u32,
}

/// The entries in a trace. A record begins with a word that has its event in bits 27..0, the
/// number of further words in bits 30..28, and in bit 31 whether the time, two words, comes before
/// these. Xen's `public/trace.h` and `p2m-pt.c` specify it.
fn entries(trace: &[u32]) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut rest = trace;
    while let Some((head, after)) = rest.split_first() {
        let (event, length) = (head & 0x0fff_ffff, (head >> 28 & 7) as usize);
        let time = if head >> 31 == 1 { 2 } else { 0 };
        let body = after.get(time..time + length).context("the trace ends in a record")?;
        ensure!(event != LOST, "the trace has lost records");
        if let (SET_ENTRY, [_, _, _, _, kind, both]) = (event, body) {
            entries.push(Entry { domain: both & 0xffff, kind: *kind, order: both >> 16 });
        }
        rest = after.get(time + length..).unwrap_or_default();
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_among_other_records_and_a_gap_is_an_error() {
        let entry = |order: u32| [SET_ENTRY | 6 << 28, 0x200, 0, 0x1234, 0, RAM, 7 | order << 16];
        let mut trace = vec![0x0001_f003 | 2 << 28, 0, 0x4000];
        trace.extend(entry(9));
        // Another record of that class, with the time.
        trace.extend([0x8010_f005 | 1 << 28, 11, 22, 33]);
        trace.extend(entry(0));
        let found = entries(&trace).unwrap();
        let expected = [9, 0].map(|order| Entry { domain: 7, kind: RAM, order });
        assert_eq!(found, expected);
        assert!(entries(&trace[..trace.len() - 1]).is_err());
        assert!(entries(&[LOST | 1 << 28, 5]).is_err());
    }
}
