//! That the simulator is what it claims: a seed is always the same run, and the checkers find
//! what they are there to find. The runs themselves are `tests/run sim`.

use rxl_sim::{PLANTS, run};

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
fn every_planted_mistake_is_found() {
    for plant in PLANTS {
        let found = (0..10_000).find(|seed| !run(*seed, Some(plant), false).violations.is_empty());
        assert!(found.is_some(), "{plant:?}");
    }
}
