//! The save helper's events.

use rxl_migrate::progress::{Progress, SAMPLES_MAX};
use rxl_migrate::report::{EVENTS_MAX, Event, PassPages, Stamped, read_lines};

pub(crate) fn run(bytes: &[u8]) {
    let (mut seen, mut progress) = (0, Progress::default());
    let events = read_lines(bytes, |stamped| {
        seen += 1;
        let json = serde_json::to_string(stamped).expect("an event is JSON");
        let again: Stamped = serde_json::from_str(&json).expect("rxl reads what it writes");
        assert_eq!(&again, stamped);
        progress.see(stamped);
        if let Event::PassEnded { pages, .. } = &stamped.event {
            // What somebody makes of it later must not be able to overflow.
            let _ = pages.sent();
        }
    });
    assert!(events.len() <= seen && events.len() <= EVENTS_MAX);
    assert!(progress.samples().len() <= SAMPLES_MAX);
    let lines = bytes.split(|byte| *byte == b'\n').count() + bytes.len() / (64 << 10);
    assert!(seen <= lines, "more events than lines");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let pages = PassPages { wanted: 9, plain: 5, tables: 1, empty: 2, deferred: 1 };
    let events = [
        Event::Started { pid: 7, hvm: true, total_pages: 1024, p2m_pages: 2048 },
        Event::PassStarted { pass: 0, last: false, pages: 9 },
        Event::PassProgress {
            pass: 0,
            done: 4,
            pages: 9,
            bytes: 1 << 33,
            links: vec![(0, 1 << 32), (255, u64::MAX)],
        },
        Event::PassEnded { pass: 0, last: true, pages, bytes: u64::MAX },
        Event::Dirty { pages: 50 },
        Event::SuspendAsked,
        Event::Suspended,
        Event::MemorySent,
        Event::Finished { bytes: 12 },
        Event::Failed { why: "the \"stream\" is \u{e4} not valid\n".into() },
    ];
    let line = |(t_ns, event)| {
        serde_json::to_string(&Stamped { t_ns, event }).expect("an event is JSON") + "\n"
    };
    let lines: Vec<String> = (1..).zip(events).map(line).collect();
    let all = lines.concat().into_bytes();
    lines.into_iter().map(String::into_bytes).chain([all, b"{\"t_ns\":1,\n\n".to_vec()]).collect()
}
