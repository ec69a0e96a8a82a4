//! That a seed is always the same run. The runs themselves, and that the checkers find what is
//! planted for them, are `tests/run sim`, which builds the simulator to be quick.

use rxl_sim::{Plant, run};

#[test]
fn a_seed_gives_the_same_run_each_time() {
    for seed in 0..30 {
        let (first, second) = (run(seed, None, false), run(seed, None, true));
        assert_eq!(first.digest, second.digest, "seed {seed}");
        assert_eq!((first.violations, first.coverage), (second.violations, second.coverage));
        assert!(!second.lines.is_empty());
    }
    let digests: std::collections::BTreeSet<u64> =
        (0..30).map(|seed| run(seed, None, false).digest).collect();
    assert_eq!(digests.len(), 30, "seeds that give the same run");
}

#[test]
fn a_page_that_changes_on_its_way_is_found_by_digests_and_the_guest_stays_where_it_was() {
    let mut found = 0;
    for seed in 0..300 {
        let verdict = run(seed, Some(Plant::PageChangedAndVerified), false);
        for what in verdict.violations {
            // By the digests of all pages; or, over a link, when a later version of the page refers
            // to the one that changed.
            let kept = ["NoReady", "NotSent"]
                .map(|why| format!("went wrong, but the guest did not move: Some(Kept({why}))"));
            assert!(kept.iter().any(|kept| what.ends_with(kept)), "seed {seed}: {what}");
            found += 1;
        }
    }
    assert!(found > 50, "only {found} of the guests that nothing else went wrong with");
}
