//! All interleavings of small cases.
#![allow(clippy::unwrap_used, reason = "a panic is a failed test")]

use rxl_range_lock::{Hold, Stacks, explore};

/// All ranges over the numbers 0 to `end - 1`.
fn ranges(end: u8) -> Vec<(u8, u8)> {
    (0..end).flat_map(|first| (first..end).map(move |last| (first, last))).collect()
}

fn once((first, last): (u8, u8), killable: bool) -> Vec<Hold> {
    vec![Hold { first, last, killable }]
}

#[test]
fn three_threads_with_every_ranges_over_three_numbers() {
    let (mut stacks, mut runs) = (Stacks::default(), 0);
    let ranges = ranges(3);
    for a in &ranges {
        for b in &ranges {
            for c in &ranges {
                // The threads are alike, so those that may be killed are the last ones.
                for killable in [0, 2] {
                    let programs = [a, b, c].into_iter().enumerate();
                    let programs = programs.map(|(at, range)| once(*range, at + killable >= 3));
                    let programs: Vec<_> = programs.collect();
                    runs += explore(&programs, &mut stacks).unwrap();
                }
            }
        }
    }
    assert!(runs > 50_000, "only {runs} runs");
}

#[test]
fn four_threads_that_can_be_killed_around_a_range_over_all() {
    let (mut stacks, mut runs) = (Stacks::default(), 0);
    for [a, b, c] in [[(0, 0), (1, 1), (0, 0)], [(0, 1), (1, 2), (2, 2)]] {
        let programs = [a, b, c, (0, 2)].map(|range| once(range, true));
        runs += explore(&programs, &mut stacks).unwrap();
    }
    assert!(runs > 10_000, "only {runs} runs");
}

#[test]
fn a_thread_that_was_killed_locks_again() {
    let hold = |first, last, killable| Hold { first, last, killable };
    let programs = [
        vec![hold(0, 1, true), hold(1, 2, false)],
        vec![hold(1, 1, false), hold(0, 0, true)],
        vec![hold(0, 2, true)],
    ];
    let runs = explore(&programs, &mut Stacks::default()).unwrap();
    assert!(runs > 1_000, "only {runs} runs");
}
