//! The lab's network: one network namespace, in it a bridge per NIC and a tap per host and NIC.
//! Nothing of it is visible outside of the namespace, and all of it goes with the namespace.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::process::{output, output_with_input, succeeds};

/// Name of the lab's network namespace.
pub const NAMESPACE: &str = "rxl-lab";

const NAMESPACES_DIR: &str = "/run/netns";

/// Host number of this machine on every bridge.
const MACHINE_ADDRESS: u8 = 254;

/// Numbers of hosts and NICs and the shaping of every tap.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) hosts: u8,
    pub(crate) nics: u8,
    /// A rate as `tc` writes it, for example `100mbit`.
    pub(crate) nic_rate: Option<&'a str>,
}

/// Address of a host on a NIC. Hosts count from 1, NICs from 0.
pub fn address(nic: u8, host: u8) -> String {
    format!("10.77.{nic}.{host}")
}

/// Name of the tap device of a host's NIC.
pub(crate) fn tap_name(nic: u8, host: u8) -> String {
    format!("host{host}-nic{nic}")
}

/// A command that runs inside the namespace.
pub(crate) fn inside(program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", NAMESPACE, program]);
    command
}

/// Creates the namespace and everything in it.
pub(crate) fn create(plan: &Plan<'_>) -> Result<()> {
    output(Command::new("ip").args(["netns", "add", NAMESPACE]))?;
    output_with_input(
        Command::new("ip").args(["-n", NAMESPACE, "-batch", "-"]),
        ip_batch(plan).as_bytes(),
    )?;
    if let Some(rate) = plan.nic_rate {
        for tap in taps(plan) {
            set_rate(&tap, Some(rate))?;
        }
    }
    Ok(())
}

/// Sets the rate that a host's NIC receives at, or lifts the limit.
pub(crate) fn set_rate(tap: &str, rate: Option<&str>) -> Result<()> {
    let words = shaping(tap, rate);
    output(Command::new("tc").args(["-n", NAMESPACE]).args(words.split(' '))).map(drop)
}

/// Removes the namespace if it is there.
pub(crate) fn remove() -> Result<()> {
    if exists() {
        // A process that stays in the namespace would keep these alive after the name is gone.
        let links = output(Command::new("ip").args(["-n", NAMESPACE, "-o", "link"]))?;
        for link in own_links(&links) {
            output(Command::new("ip").args(["-n", NAMESPACE, "link", "del", link]))?;
        }
        output(Command::new("ip").args(["netns", "del", NAMESPACE]))?;
    }
    let is_unused = fs::read_dir(NAMESPACES_DIR).is_ok_and(|mut names| names.next().is_none());
    if is_unused {
        // `ip netns add` mounts this folder on itself and leaves it so. It may not be a mount.
        succeeds(Command::new("umount").arg(NAMESPACES_DIR));
    }
    Ok(())
}

/// Whether the namespace is there.
pub(crate) fn exists() -> bool {
    Path::new(NAMESPACES_DIR).join(NAMESPACE).exists()
}

/// Pids of the processes that are in the namespace.
pub(crate) fn pids() -> Result<Vec<String>> {
    if !exists() {
        return Ok(Vec::new());
    }
    let listing = output(Command::new("ip").args(["netns", "pids", NAMESPACE]))?;
    Ok(listing.split_ascii_whitespace().map(str::to_owned).collect())
}

/// Names in a listing of `ip -o link` (`2: br0: <…`), but for the loopback device.
fn own_links(listing: &str) -> impl Iterator<Item = &str> {
    listing.lines().filter_map(|line| line.split(": ").nth(1)).filter(|name| *name != "lo")
}

fn taps(plan: &Plan<'_>) -> Vec<String> {
    (0..plan.nics).flat_map(|nic| (1..=plan.hosts).map(move |host| tap_name(nic, host))).collect()
}

fn ip_batch(plan: &Plan<'_>) -> String {
    let mut lines = vec!["link set lo up".to_owned()];
    for nic in 0..plan.nics {
        let machine = address(nic, MACHINE_ADDRESS);
        lines.push(format!("link add br{nic} type bridge"));
        lines.push(format!("addr add {machine}/24 dev br{nic}"));
        lines.push(format!("link set br{nic} up"));
        for host in 1..=plan.hosts {
            let tap = tap_name(nic, host);
            // With vnet_hdr whole TCP segments cross the tap, ten times as fast as frames.
            lines.push(format!("tuntap add dev {tap} mode tap vnet_hdr"));
            lines.push(format!("link set {tap} master br{nic} up"));
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

/// Arguments for `tc`. The burst holds several whole TCP segments of 64 KiB.
fn shaping(tap: &str, rate: Option<&str>) -> String {
    match rate {
        Some(rate) => {
            format!("qdisc replace dev {tap} root tbf rate {rate} burst 256kb latency 50ms")
        }
        // One without a rate in its place, as there need not be one to delete.
        None => format!("qdisc replace dev {tap} root pfifo_fast"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_own_links_loopback_is_left_out() {
        let listing = "1: lo: <LOOPBACK> mtu 65536\n2: br0: <UP> mtu 1500\n";
        assert_eq!(own_links(listing).collect::<Vec<_>>(), ["br0"]);
    }

    #[test]
    fn test_shaping_no_rate_replaces_what_shaped() {
        assert!(shaping("t", Some("18mbit")).contains("dev t root tbf rate 18mbit burst"));
        assert!(shaping("t", None).ends_with("replace dev t root pfifo_fast"));
    }

    #[test]
    fn test_ip_batch_two_hosts_has_bridge_and_taps_per_nic() {
        let batch = ip_batch(&Plan { hosts: 2, nics: 2, nic_rate: None });
        for line in [
            "link add br1 type bridge",
            "addr add 10.77.1.254/24 dev br1",
            "tuntap add dev host2-nic1 mode tap vnet_hdr",
            "link set host1-nic0 master br0 up",
        ] {
            assert!(batch.lines().any(|have| have == line), "{line} is not in\n{batch}");
        }
        assert!(batch.ends_with('\n'));
    }
}
