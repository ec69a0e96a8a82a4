//! What is recorded of the running lab, and the lock that keeps two commands from changing it at
//! once.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::image::Images;
use crate::process::ProcessId;
use crate::release::Release;
use crate::store::Store;

const FILE: &str = "lab.json";

/// Size and shape of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of hosts, 1 to 3.
    pub hosts: u8,
    /// What each of them runs, the last what those after it run; none is the usual one.
    #[serde(default)]
    pub releases: Vec<Release>,
    /// Virtual CPUs of each host and of its dom0.
    pub vcpus: u8,
    /// NICs of each host, each on a network of its own.
    pub nics: u8,
    /// Rate that every NIC receives at, as `tc` writes it.
    pub nic_rate: Option<String>,
}

impl Default for Shape {
    fn default() -> Self {
        Self { hosts: 2, releases: Vec::new(), vcpus: 1, nics: 1, nic_rate: None }
    }
}

impl Shape {
    /// What the host of that number, from 1, runs.
    #[must_use]
    pub fn release(&self, host: u8) -> Release {
        let index = usize::from(host.saturating_sub(1));
        self.releases.get(index).or(self.releases.last()).copied().unwrap_or_default()
    }

    /// All that hosts run.
    #[must_use]
    pub fn all_releases(&self) -> Vec<Release> {
        let all: BTreeSet<Release> = (1..=self.hosts).map(|host| self.release(host)).collect();
        all.into_iter().collect()
    }
}

/// The record in the state folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) shape: Shape,
    /// What the lab was booted from: this tree may have moved on since.
    pub(crate) images: Images,
    /// QEMU processes in the order of hosts, as far as they were started.
    pub(crate) processes: Vec<ProcessId>,
    /// Whether `up` came to its end.
    pub(crate) is_up: bool,
}

impl State {
    /// The record, if there is one.
    pub(crate) fn load(store: &Store) -> Result<Option<Self>> {
        let path = file(store);
        match fs::read(&path) {
            Ok(bytes) => {
                let state = serde_json::from_slice(&bytes)
                    .with_context(|| format!("{} is not readable", path.display()))?;
                Ok(Some(state))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("Cannot read {}", path.display())),
        }
    }

    /// Replaces the record.
    pub(crate) fn save(&self, store: &Store) -> Result<()> {
        let path = file(store);
        let draft = path.with_extension("new");
        fs::write(&draft, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&draft, &path).with_context(|| format!("Cannot write {}", path.display()))
    }
}

fn file(store: &Store) -> PathBuf {
    store.state_dir().join(FILE)
}

/// Held by a command that changes the lab; released when dropped or when the program dies.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    pub(crate) fn take(store: &Store) -> Result<Self> {
        let path = store.lock_file();
        let file = File::create(&path)
            .with_context(|| format!("Cannot open the lock {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(Errno::WOULDBLOCK) => bail!("Another command is changing the lab right now"),
            Err(error) => Err(error).context("Cannot lock the lab"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_state_of_an_older_tree_can_be_read() {
        let text = r#"{"shape":{"hosts":2,"vcpus":1,"nics":1,"nic_rate":null},
            "images":{"hypervisor":"/i/h","dom0":"/i/d","guest":"/i/g"},
            "processes":[{"pid":7,"start_ticks":9}],"is_up":true}"#;
        let state: State = serde_json::from_str(text).expect("it is what was written");
        assert_eq!(state.processes.len(), 1);
        assert!(state.images.host(Release::default()).is_err());
    }
}
