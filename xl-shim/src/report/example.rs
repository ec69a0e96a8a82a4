//! A report for tests, and for the example in `docs/`.

use std::collections::BTreeMap;

use rxl_migrate::counters::Counters;
use rxl_migrate::progress::Sample;
use rxl_migrate::report::PassPages;

use super::{Link, Outcome, Pass, Pause, Report, Target};

/// A migration of 512 MiB over two connections, the second of which is lost.
pub(crate) fn example() -> Report {
    let sizes: [(u64, u64, f64); 4] =
        [(262_144, 131_072, 5100.0), (12_800, 12_760, 520.0), (1400, 1400, 60.0), (160, 160, 9.0)];
    let pass = |(index, (wanted, plain, ms)): (usize, (u64, u64, f64))| Pass {
        pass: u32::try_from(index).unwrap(),
        last: index == 3,
        pages: PassPages { wanted, plain, empty: wanted - plain, ..PassPages::default() },
        bytes: plain * 4104,
        ms,
    };
    let sample = |step: u64| {
        let second = if step < 14 { step * 13 } else { 182 };
        let first = step * 12 + step * step / 4;
        let links = vec![(0, first << 20), (1, second << 20)];
        Sample { ms: step as f64 * 250.0, bytes: (first + second) << 20, links }
    };
    let link = |link, mib: u64, lost: Option<&str>| Link {
        link,
        bytes: mib << 20,
        batches: mib,
        queue: 0.97,
        stalled_ms: 812.0,
        lost: lost.map(str::to_owned),
    };
    Report {
        version: 1,
        domain: "web".to_owned(),
        target: Target::Host("host2".to_owned()),
        outcome: Outcome::Moved,
        cause: Vec::new(),
        total_ms: 6400.0,
        pause_ms: Some(212.0),
        suspend_wait_ms: Some(24.0),
        pause_expected_ms: Some(240),
        throttled_percent: None,
        pause: Some(Pause {
            last_pass_ms: 31.0,
            verify_ms: None,
            state_ms: 12.0,
            target_ms: 121.0,
            handshake_ms: 48.0,
        }),
        bytes: Some(568 << 20),
        rate_mib_s: Some(96.4),
        passes: sizes.into_iter().enumerate().map(pass).collect(),
        links: vec![link(0, 386, None), link(1, 182, Some("connection reset by peer"))],
        mapper: Some("privcmd"),
        verified_pages: None,
        counters: Counters {
            hypercalls: BTreeMap::from([("getpageframeinfo3".to_owned(), 262)]),
            mappings: 300,
            mapped_pages: 145_000,
            map_ns: 41_000_000,
            ..Counters::default()
        },
        samples: (0..24).map(sample).collect(),
    }
}
