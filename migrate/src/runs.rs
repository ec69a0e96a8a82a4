//! Lists of numbers as runs of neighbours, for messages between processes of one side: most
//! batches are a few runs of pfns, and a run is as short as one number.
//!
//! Made for `#[serde(with = "…")]`: [`pfns`] for a list of pfns, [`entries`] for one of page-data
//! entries, [`frames`] for any numbers. A list is written as `[[first, count], …]`, in its order.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};

/// Longest list that is read: of the entries that any page-data record may have here.
const LENGTH_MAX: u64 = 1 << 16;

fn write<S: Serializer>(numbers: impl Iterator<Item = u64>, to: S) -> Result<S::Ok, S::Error> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((first, count)) if first.checked_add(*count) == Some(number) => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    to.collect_seq(runs)
}

fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
    let runs = Vec::<(u64, u64)>::deserialize(from)?;
    let mut numbers = Vec::new();
    for (first, count) in runs {
        let end = first.checked_add(count).filter(|_| count <= LENGTH_MAX);
        let end = end.ok_or(D::Error::custom("a run that cannot be"))?;
        numbers.extend(first..end);
        if numbers.len() as u64 > LENGTH_MAX {
            return Err(D::Error::custom("a list that is too long"));
        }
    }
    Ok(numbers)
}

/// For `Vec<u64>`.
pub(crate) mod frames {
    use super::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(frames: &[u64], to: S) -> Result<S::Ok, S::Error> {
        super::write(frames.iter().copied(), to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
        super::read(from)
    }
}

/// For `Vec<Pfn>`.
pub(crate) mod pfns {
    use super::{Deserializer, Serializer};
    use crate::frame::Pfn;

    pub(crate) fn serialize<S: Serializer>(pfns: &[Pfn], to: S) -> Result<S::Ok, S::Error> {
        super::write(pfns.iter().map(|pfn| pfn.0), to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Pfn>, D::Error> {
        Ok(super::read(from)?.into_iter().map(Pfn).collect())
    }
}

/// For `Vec<PageEntry>`: in their form of the stream, pages of one type that are neighbours are
/// neighbouring numbers.
pub(crate) mod entries {
    use serde::de::Error as _;

    use super::{Deserializer, Serializer};
    use crate::stream::libxc::PageEntry;

    pub(crate) fn serialize<S: Serializer>(list: &[PageEntry], to: S) -> Result<S::Ok, S::Error> {
        super::write(list.iter().map(|entry| entry.encode()), to)
    }

    pub(crate) fn deserialize<'de, D>(from: D) -> Result<Vec<PageEntry>, D::Error>
    where
        D: Deserializer<'de>,
    {
        let entries = super::read(from)?.into_iter().map(PageEntry::parse);
        entries.collect::<Result<_, _>>().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    use crate::frame::{PageType, Pfn};
    use crate::stream::libxc::PageEntry;

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Lists {
        #[serde(with = "super::pfns")]
        pfns: Vec<Pfn>,
        #[serde(with = "super::frames")]
        frames: Vec<u64>,
        #[serde(with = "super::entries")]
        entries: Vec<PageEntry>,
    }

    #[test]
    fn neighbours_are_one_run() {
        let entry = |pfn, kind| PageEntry { pfn: Pfn(pfn), kind };
        let lists = Lists {
            pfns: [5, 6, 7, 4, 9].map(Pfn).to_vec(),
            frames: vec![],
            entries: vec![entry(1, PageType::Normal), entry(2, PageType::Normal)],
        };
        let text = serde_json::to_string(&lists).unwrap();
        assert_eq!(text, r#"{"pfns":[[5,3],[4,1],[9,1]],"frames":[],"entries":[[1,2]]}"#);
        assert_eq!(serde_json::from_str::<Lists>(&text).unwrap(), lists);
    }

    #[test]
    fn a_run_that_is_too_long_costs_nothing() {
        for runs in ["[[0,65537]]", "[[18446744073709551615,2]]", "[[0,65536],[1,1]]"] {
            let text = format!(r#"{{"pfns":{runs},"frames":[],"entries":[]}}"#);
            assert!(serde_json::from_str::<Lists>(&text).is_err(), "{runs}");
        }
    }

    proptest! {
        #[test]
        fn any_list_is_read_as_it_was_written(
            numbers in prop::collection::vec(prop_oneof![0_u64..9, any::<u64>()], 0..40),
        ) {
            let pfns = numbers.iter().map(|n| Pfn(*n)).collect();
            let lists = Lists { pfns, frames: numbers, entries: vec![] };
            let text = serde_json::to_string(&lists).unwrap();
            prop_assert_eq!(serde_json::from_str::<Lists>(&text).unwrap(), lists);
        }
    }
}
