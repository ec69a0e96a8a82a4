//! Many threads with arbitrary ranges, scheduled and killed in an arbitrary order.

use proptest::prelude::*;
use rxl_range_lock::{Hold, Run, Stacks};

fn hold() -> impl Strategy<Value = Hold> {
    (0..32u8, 0..12u8, any::<bool>()).prop_map(|(first, more, killable)| Hold {
        first,
        last: first + more,
        killable,
    })
}

proptest! {
    #[test]
    fn a_range_is_held_as_soon_as_none_that_came_earlier_overlaps_it(
        programs in prop::collection::vec(prop::collection::vec(hold(), 0..5), 1..12),
        order in prop::collection::vec(any::<prop::sample::Index>(), 1..200),
    ) {
        let mut stacks = Stacks::default();
        let mut run = Run::new(&programs, &mut stacks);
        let mut order = order.iter().cycle();
        while !run.is_over() {
            let choices = run.choices();
            prop_assert!(!choices.is_empty(), "nobody can go on: {run:?}");
            let next = order.next().map(|index| *index.get(&choices));
            if let Some(next) = next {
                run.take(next).map_err(TestCaseError::fail)?;
            }
        }
        run.finish(&mut stacks).map_err(TestCaseError::fail)?;
    }
}
