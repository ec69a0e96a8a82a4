//! How the save helper is to move memory: its workers, the links that it may offer, and when it
//! suspends the guest.
//!
//! `rxl migrate` has options for it; the helper, which libxl starts, is told by variables of the
//! environment. Under stock `xl` or libvirt the same variables are the user's. What is not said is
//! chosen here, by what the process may use: processors that it may run on, and the limit of its
//! cgroup.

use std::env;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::thread;

use anyhow::{Context, ensure};
use rxl_migrate::stream::link::LINKS_MAX;
use rxl_migrate::stream::reduced::Reduce;
use rxl_toolstack::doorman::Doorman;
use rxl_toolstack::inherit;
use rxl_toolstack::rate::Rate;
use rxl_toolstack::senders::WORKERS_MAX;
use rxl_toolstack::worker::Mode;
use rxl_toolstack::xc::MapperWanted;

use crate::policy::{self, PolicyWanted};

/// `N`, `N:process` or `N:thread`: workers of the save helper.
const WORKERS_ENV: &str = "RXL_WORKERS";
/// The addresses of this host at which links may be opened, with commas between them. Without
/// it, no links are offered.
const ADDRESSES_ENV: &str = "RXL_ADDRESSES";
/// `auto`, `privcmd` or `module`: what maps guests' memory.
const MAPPER_ENV: &str = "RXL_MAPPER";
/// Not empty: links are not encrypted.
const NO_ENCRYPT_ENV: &str = "RXL_NO_ENCRYPT";
/// What may be left out of what goes over links: see [`Reduce`].
const REDUCE_ENV: &str = "RXL_REDUCE";
/// Not empty: memory is compared by digests at the end of a migration.
const VERIFY_ENV: &str = "RXL_VERIFY";
/// How fast memory may be sent at most, in Mbit/s.
const RATE_ENV: &str = "RXL_RATE";
/// Links to offer.
const STREAMS_ENV: &str = "RXL_STREAMS";

/// Most workers of one stream that are chosen. They share one writer, and mapping costs less than
/// three times what writing does (docs/bench.md); those that read a file share its disk.
const STREAM_WORKERS_CHOSEN_MAX: usize = 4;
/// Most links that are chosen for the sake of processors: 8 connections fill the fastest networks
/// that others have measured; more addresses get more.
const LINKS_CHOSEN_MAX: usize = 8;

/// Workers that the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkersWanted {
    /// How many; `None`: as many as help.
    count: Option<u8>,
    mode: Mode,
}

impl FromStr for WorkersWanted {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<WorkersWanted> {
        let (count, mode) = text.split_once(':').unwrap_or((text, "process"));
        let mode = match mode {
            "process" => Mode::Process,
            "thread" => Mode::Thread,
            other => anyhow::bail!("workers are \"process\" or \"thread\", not \"{other}\""),
        };
        if count == "auto" {
            return Ok(WorkersWanted { count: None, mode });
        }
        let count = count.parse().ok().filter(|count| (1..=WORKERS_MAX).contains(count));
        let count = count.with_context(|| format!("a number from 1 to {WORKERS_MAX}, or auto"))?;
        Ok(WorkersWanted { count: Some(count), mode })
    }
}

impl fmt::Display for WorkersWanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            Some(count) => write!(f, "{count}")?,
            None => f.write_str("auto")?,
        }
        f.write_str(match self.mode {
            Mode::Process => ":process",
            Mode::Thread => ":thread",
        })
    }
}

/// Links that the user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LinksWanted {
    /// Addresses of this host.
    pub(crate) addresses: Vec<IpAddr>,
    /// How many links; `None`: as many as help.
    pub(crate) count: Option<u8>,
    /// Whether they are encrypted.
    pub(crate) encrypted: bool,
    /// What may be left out of what goes over them.
    pub(crate) reduce: Reduce,
}

/// How memory is to be moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ways {
    pub(crate) workers: WorkersWanted,
    pub(crate) mapper: MapperWanted,
    /// `None`: the stream is all there is.
    pub(crate) links: Option<LinksWanted>,
    pub(crate) policy: PolicyWanted,
    /// Whether memory is compared by digests.
    pub(crate) verify: bool,
    /// How fast it may be sent at most.
    pub(crate) rate: Option<Rate>,
}

impl Ways {
    /// What the environment says. What makes no sense there is passed over, with a word to the
    /// log: a guest is not kept from moving for it.
    pub(crate) fn from_environment() -> Ways {
        let workers = variable::<WorkersWanted>(WORKERS_ENV).unwrap_or_default();
        let addresses = variable::<Addresses>(ADDRESSES_ENV).map(|Addresses(list)| list);
        let links = addresses.filter(|list| !list.is_empty()).map(|addresses| LinksWanted {
            addresses,
            count: variable::<u8>(STREAMS_ENV).filter(|count| *count > 0),
            encrypted: !is_set(NO_ENCRYPT_ENV),
            reduce: variable::<Reduce>(REDUCE_ENV).unwrap_or(Reduce::ALL),
        });
        let policy = variable::<PolicyWanted>(policy::ENV).unwrap_or_default();
        let mapper = variable::<MapperWanted>(MAPPER_ENV).unwrap_or_default();
        let (verify, rate) = (is_set(VERIFY_ENV), variable::<Rate>(RATE_ENV));
        Ways { workers, mapper, links, policy, verify, rate }
    }

    /// Passes it on to the save helper. To be called while there is one thread.
    pub(crate) fn pass_on(&self) -> anyhow::Result<()> {
        let (mut addresses, mut streams, mut no_encrypt, mut reduce) = Default::default();
        if let Some(links) = &self.links {
            let texts: Vec<String> = links.addresses.iter().map(IpAddr::to_string).collect();
            addresses = texts.join(",");
            streams = links.count.map(|count| count.to_string()).unwrap_or_default();
            no_encrypt = if links.encrypted { "" } else { "1" }.to_owned();
            reduce = links.reduce.to_string();
        }
        let all = [
            (WORKERS_ENV, self.workers.to_string()),
            (MAPPER_ENV, self.mapper.to_string()),
            (ADDRESSES_ENV, addresses),
            (STREAMS_ENV, streams),
            (NO_ENCRYPT_ENV, no_encrypt),
            (REDUCE_ENV, reduce),
            (policy::ENV, self.policy.to_string()),
            (VERIFY_ENV, if self.verify { "1" } else { "" }.to_owned()),
            (RATE_ENV, self.rate.map(|rate| rate.mbit().to_string()).unwrap_or_default()),
        ];
        for (name, value) in all {
            inherit::set_variable(name, value.as_ref()).context("telling the save helper")?;
        }
        Ok(())
    }

    /// What workers are.
    pub(crate) fn mode(&self) -> Mode {
        self.workers.mode
    }

    /// Workers that share the stream, or at the receiver the file that it is; 0 where the save
    /// helper does it alone.
    pub(crate) fn stream_workers(&self) -> u8 {
        let count = self.workers.count.unwrap_or_else(|| chosen(STREAM_WORKERS_CHOSEN_MAX));
        if count < 2 { 0 } else { count }
    }

    /// Where links come in, if any are wanted and can be had.
    pub(crate) fn doorman(&self) -> Option<Doorman> {
        let LinksWanted { addresses, count, encrypted, reduce } = self.links.as_ref()?;
        let workers = self.workers.count.unwrap_or_else(|| chosen(LINKS_CHOSEN_MAX));
        let at_least = u8::try_from(addresses.len()).unwrap_or(LINKS_MAX);
        let links = count.unwrap_or(workers.max(at_least)).min(LINKS_MAX);
        Doorman::open(addresses, links, *encrypted, *reduce)
            .inspect_err(|error| tracing::warn!(%error, "no connection can be offered"))
            .ok()
    }
}

/// Processors that this process may use, at most `max`.
fn chosen(max: usize) -> u8 {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    u8::try_from(processors.min(max)).unwrap_or(1)
}

fn is_set(name: &str) -> bool {
    env::var_os(name).is_some_and(|value| !value.is_empty())
}

fn variable<T: FromStr<Err: fmt::Display>>(name: &str) -> Option<T> {
    let text = env::var(name).ok().filter(|text| !text.is_empty())?;
    text.parse().inspect_err(|error| tracing::warn!("{name}={text}: {error}")).ok()
}

/// Addresses with commas between them.
struct Addresses(Vec<IpAddr>);

impl FromStr for Addresses {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Addresses, Self::Err> {
        text.split(',').map(|one| one.trim().parse()).collect::<Result<_, _>>().map(Addresses)
    }
}

/// The addresses of this host that another can reach: all of its interfaces' that are up, or of
/// those in `nics`.
pub(crate) fn addresses_of(nics: &[String]) -> anyhow::Result<Vec<IpAddr>> {
    let all = if_addrs::get_if_addrs().context("Cannot list this host's network interfaces")?;
    for nic in nics {
        ensure!(
            all.iter().any(|interface| interface.name == *nic),
            "This host has no network interface {nic} with an address (ip address)"
        );
    }
    let wanted = |name: &String| nics.is_empty() || nics.contains(name);
    let addresses = all.into_iter().filter(|one| wanted(&one.name) && !one.is_loopback());
    Ok(addresses.filter(|one| !one.is_link_local()).map(|one| one.ip()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_a_number_and_what_they_are() {
        for text in ["1:process", "7:thread", "auto:process", "64:process"] {
            assert_eq!(text.parse::<WorkersWanted>().unwrap().to_string(), text);
        }
        assert_eq!("3".parse::<WorkersWanted>().unwrap().to_string(), "3:process");
        for text in ["", "0", "65", "-1", "2:fibre", "many"] {
            assert!(text.parse::<WorkersWanted>().is_err(), "{text}");
        }
    }

    #[test]
    fn one_worker_is_the_helper_itself() {
        let ways = |text: &str| Ways { workers: text.parse().unwrap(), ..Ways::default() };
        assert_eq!(ways("1").stream_workers(), 0);
        assert_eq!(ways("5").stream_workers(), 5);
        assert!(usize::from(ways("auto").stream_workers()) <= STREAM_WORKERS_CHOSEN_MAX);
        assert!(ways("5").doorman().is_none());
    }

    #[test]
    fn there_are_as_many_links_as_addresses_at_least() {
        let links = |workers: &str, count| {
            let addresses = vec!["127.0.0.1".parse().unwrap(); 3];
            let (encrypted, reduce) = (true, Reduce::ALL);
            let links = Some(LinksWanted { addresses, count, encrypted, reduce });
            let workers = workers.parse().unwrap();
            Ways { workers, links, ..Ways::default() }.doorman().unwrap().offer().links
        };
        assert_eq!(links("1", None), 3);
        assert_eq!(links("5", None), 5);
        assert_eq!(links("5", Some(2)), 2);
        assert_eq!(links("5", Some(200)), LINKS_MAX);
    }

    #[test]
    fn an_interface_that_is_not_there_is_an_error_and_the_loop_is_none() {
        assert!(addresses_of(&["no-such-nic".into()]).is_err());
        assert!(addresses_of(&[]).unwrap().iter().all(|address| !address.is_loopback()));
    }
}
