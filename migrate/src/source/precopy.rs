//! When to stop copying the memory of a running guest: a pure function of what has been seen.

/// Stock's rule: this many live passes at most.
pub const STOCK_PASSES_MAX: u32 = 5;
/// Stock's rule: fewer dirty pages than this are not worth another live pass.
pub const STOCK_DIRTY_PAGES_MIN: u64 = 50;

/// What the decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Live passes sent so far.
    pub passes: u32,
    /// Pages that the guest wrote during the last of them.
    pub dirty: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send the dirty pages while the guest runs.
    Continue,
    /// Suspend the guest and send them then.
    Stop,
}

/// The rule of stock Xen, but for one thing: a remainder below [`STOCK_DIRTY_PAGES_MIN`] is sent
/// in the pause, where stock sends it live and then pays for one more pass.
#[must_use]
pub fn stock(seen: Seen) -> Decision {
    if seen.passes >= STOCK_PASSES_MAX || seen.dirty < STOCK_DIRTY_PAGES_MIN {
        Decision::Stop
    } else {
        Decision::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stops_at_the_fifth_pass_or_below_fifty_pages() {
        assert_eq!(stock(Seen { passes: 1, dirty: 50 }), Decision::Continue);
        assert_eq!(stock(Seen { passes: 1, dirty: 49 }), Decision::Stop);
        assert_eq!(stock(Seen { passes: 4, dirty: 1 << 30 }), Decision::Continue);
        assert_eq!(stock(Seen { passes: 5, dirty: 1 << 30 }), Decision::Stop);
    }
}
