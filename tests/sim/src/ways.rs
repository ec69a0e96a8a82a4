//! What a seed means for workers and links: how many there are, and what their network is like.

use rxl_migrate::stream::reduced::Reduce;

use crate::pipe::{Link, Pipe};
use crate::plan::Dice;
use crate::plant::Plant;

/// Workers and links of a seed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ways {
    /// Workers that share the stream.
    pub(crate) stream_workers: u8,
    /// The links that are offered.
    pub(crate) links: Vec<LinkPlan>,
    /// Where the stream's connection goes dead, links do.
    pub(crate) one_network: bool,
    /// What may be left out of what goes over links.
    pub(crate) reduce: Reduce,
    /// The receiver knows nothing of that.
    pub(crate) older_receiver: bool,
}

/// One link.
#[derive(Clone, Debug)]
pub(crate) struct LinkPlan {
    /// Milliseconds before it is opened; `None`: it is tried, and nobody answers.
    pub(crate) opens_after: Option<u64>,
    /// Milliseconds that a byte takes.
    pub(crate) latency: u64,
    rate: u64,
    capacity: usize,
    cuts: [Option<u64>; 2],
    /// The receiver's worker never gets past this record, and goes on to say that it is there.
    pub(crate) hangs_at: Option<u64>,
}

impl Ways {
    pub(crate) fn new(dice: &mut Dice, plant: Option<Plant>) -> Ways {
        let (stream_workers, links) = match dice.within(0, 19) {
            0..=8 => (0, 0),
            9..=10 => (dice.within(2, 3), 0),
            11..=16 => (0, dice.within(1, 4)),
            _ => (dice.within(2, 3), dice.within(1, 4)),
        };
        // That mistake is made where one process writes the stream.
        if plant == Some(Plant::PassesOverlap) {
            return Ways::default();
        }
        let links = (0..links).map(|_| LinkPlan::new(dice)).collect();
        let one_network = dice.0.one_in(2);
        let reduce = match dice.within(0, 3) {
            0 => Reduce::NONE,
            1 => Reduce::from_bits(dice.0.next() as u8),
            _ => Reduce::ALL,
        };
        let reduce = reduce.or(Reduce::ALWAYS);
        let older_receiver = dice.0.one_in(8);
        let stream_workers = stream_workers as u8;
        Ways { stream_workers, links, one_network, reduce, older_receiver }
    }

    /// Whether there are any.
    pub(crate) fn any(&self) -> bool {
        self.stream_workers > 0 || !self.links.is_empty()
    }

    /// One of the links is cut at some byte.
    pub(crate) fn add_cut(&mut self, dice: &mut Dice) {
        let index = dice.0.index(self.links.len());
        let there = dice.0.one_in(2);
        let bytes = match (there, dice.within(0, 3)) {
            // The welcome and the first records.
            (true, 0) => dice.within(0, 300),
            (true, _) => dice.within(0, 300_000),
            // The hello and some confirmations.
            (false, _) => dice.within(0, 200),
        };
        self.links[index].cuts[usize::from(!there)] = Some(bytes);
    }

    /// The worker of one of the links hangs, at the target.
    pub(crate) fn add_hang(&mut self, dice: &mut Dice) {
        let index = dice.0.index(self.links.len());
        self.links[index].hangs_at = Some(dice.within(1, 20));
    }

    /// Links that are cut do not come any more.
    pub(crate) fn cut(&mut self, which: impl Fn(u8) -> bool) {
        for (link, plan) in (0..).zip(&mut self.links) {
            if which(link) {
                plan.opens_after = None;
            }
        }
    }

    /// Whether one of the links is much slower than others.
    pub(crate) fn has_slow(&self) -> bool {
        self.links.iter().any(|link| link.rate < 100)
    }
}

impl LinkPlan {
    fn new(dice: &mut Dice) -> LinkPlan {
        let opens_after = match dice.within(0, 11) {
            0 => None,
            1..=2 => Some(dice.one_of(&[20, 200, 3_000])),
            _ => Some(0),
        };
        let slow = dice.0.one_in(5);
        LinkPlan {
            opens_after,
            latency: dice.one_of(&[0, 1, 20, 300]),
            rate: if slow { dice.one_of(&[5, 20]) } else { dice.one_of(&[1_000, 1_000_000]) },
            capacity: dice.one_of(&[4_096, 32_768, 262_144]),
            cuts: [None; 2],
            hangs_at: None,
        }
    }

    /// Both directions of its connection.
    pub(crate) fn pipes(&self) -> [Pipe; 2] {
        self.cuts.map(|cut| {
            let link = Link { answers_late: true, ..Link::new(self.latency, self.rate) };
            let mut pipe = Pipe::link(self.capacity, link);
            if let Some(bytes) = cut {
                pipe.cut_at(bytes);
            }
            pipe
        })
    }
}
