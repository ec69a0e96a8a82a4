//! That a seed is always the same run. The runs themselves, and that the checkers find what is
//! planted for them, are `tests/run sim`, which builds the simulator to be quick.

use rxl_sim::run;

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
