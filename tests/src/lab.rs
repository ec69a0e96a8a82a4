//! The lab as the suites use it: hosts with rxl on them, guests that are moved and checked.

use std::time::{Duration, Instant};
use std::{iter, process, thread};

use anyhow::{Result, bail, ensure};
use rxl_lab::{
    Finished, GuestKind, GuestReport, GuestSpec, Host, Images, Lab, Route, Shape, Store,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::tally::note;

/// How long what a migration started may take to end after it: a guard waits for a guest longer
/// than libxl does.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long a host may take to destroy a domain.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(60);

/// A lab that is up, with this tree's rxl on its hosts. One that was not up before is taken down
/// at the end, whether that is the suite's or a signal's.
#[derive(Debug)]
pub struct Session {
    lab: Lab,
    store: Store,
    is_ours: bool,
}

impl Session {
    /// Finds the lab or boots one, and installs rxl on it.
    ///
    /// # Errors
    /// Whatever keeps the lab from coming up.
    pub fn open() -> Result<Session> {
        let session = Session::open_shaped(Shape::default())?;
        session.lab.push_rxl()?;
        Ok(session)
    }

    /// Finds the lab or boots one of that shape; nothing is installed on it.
    ///
    /// # Errors
    /// Whatever keeps the lab from coming up, and one that is up but smaller.
    pub fn open_shaped(shape: Shape) -> Result<Session> {
        let store = Store::open()?;
        Lab::forget_dead(&store)?;
        let is_ours = rxl_lab::status(&store)?.is_none();
        let lab = if is_ours {
            Images::build(&store, &shape.all_releases())?;
            let lab = Lab::up(&store, shape)?;
            take_down_on_signals(store.clone())?;
            lab
        } else {
            let lab = Lab::attach(&store)?;
            ensure!(
                suffices(lab.shape(), &shape),
                "the lab that is up is smaller, or another: {shape:?}"
            );
            // What ran before may have left its NICs slow.
            let Shape { nics, nic_rate, .. } = lab.shape();
            let rates = iter::repeat_n(nic_rate, usize::from(*nics)).flatten().cloned();
            lab.set_nic_rates(&rates.collect::<Vec<_>>())?;
            lab
        };
        Ok(Session { lab, store, is_ours })
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The host of that number, from 1.
    ///
    /// # Errors
    /// The lab has fewer.
    pub fn host(&self, number: u8) -> Result<&Host> {
        self.lab.host(&format!("host{number}"))
    }

    /// Where a guest is, and the other one of the first two hosts.
    pub(crate) fn here_and_there(&self, guest: &str) -> Result<(&Host, &Host)> {
        match self.lab.find_guest(guest)?.as_slice() {
            [from] => Ok((self.host(from.number())?, self.host(3 - from.number())?)),
            [] => bail!("{guest} is on no host"),
            _ => bail!("{guest} is on both hosts"),
        }
    }

    /// Starts a guest of the least memory that its kind boots with, on host1.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&self, guest: &str, kind: GuestKind, dirty_pages_per_s: u64) -> Result<()> {
        self.start_spec(&GuestSpec { dirty_pages_per_s, ..spec(guest, kind) })
    }

    /// The same for a guest of any sort.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_spec(&self, spec: &GuestSpec) -> Result<()> {
        self.remove(&spec.name)?;
        self.lab.start_guest(self.host(1)?, spec)
    }

    /// Destroys every domain of that name or with a suffix of a migration, on all hosts.
    ///
    /// # Errors
    /// A host does not answer.
    pub fn remove(&self, guest: &str) -> Result<()> {
        for host in self.lab.hosts() {
            for name in domains(host)?.iter().filter(|name| is_or_was(name, guest)) {
                // What a migration left may end by itself meanwhile: gone is what is asked for.
                let finished = host.finish(&format!("xl destroy {name}"), DESTROY_TIMEOUT)?;
                let is_gone = finished.status.success() || !domains(host)?.contains(name);
                ensure!(is_gone, "cannot destroy {name}: {}", describe(&finished));
            }
        }
        Ok(())
    }

    /// Moves a guest to the other host and verifies it there.
    ///
    /// # Errors
    /// The migration failed, or anything is not as it has to be after it.
    pub fn migrate(&self, guest: &str, kind: GuestKind, route: Route) -> Result<()> {
        let (from, to) = self.here_and_there(guest)?;
        let moved = self.lab.migrate(guest, kind, from, to, route)?;
        let pause = moved.pause_ms.map_or(String::new(), |ms| format!("pause {ms} ms, "));
        note(format!(
            "{} to {} in {:.1} s; {pause}gap in the guest {} ms, {} bad pages",
            moved.from,
            moved.to,
            Duration::from_millis(moved.total_ms).as_secs_f64(),
            moved.guest_gap_ms,
            moved.bad_pages
        ));
        ensure!(moved.bad_pages == 0, "{} pages of {guest} are bad", moved.bad_pages);
        self.settle(guest)
    }

    /// Saves a guest, restores it where it was and verifies it.
    ///
    /// # Errors
    /// Either failed, or anything is not as it has to be after it.
    pub fn save_and_restore(&self, guest: &str, route: Route) -> Result<()> {
        let (host, _) = self.here_and_there(guest)?;
        let done = self.lab.save_and_restore(guest, host, route)?;
        note(format!(
            "saved in {:.1} s, restored in {:.1} s, {} MiB, {} bad pages",
            done.save.as_secs_f64(),
            done.restore.as_secs_f64(),
            done.file_bytes >> 20,
            done.bad_pages
        ));
        ensure!(done.bad_pages == 0, "{} pages of {guest} are bad", done.bad_pages);
        self.settle(guest)
    }

    /// Checks that a guest runs on `host` and nowhere else, that all of its memory is right, and
    /// that no migration has left anything.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, guest: &str, host: &Host) -> Result<GuestReport> {
        self.settle(guest)?;
        let report = self.lab.check_guest(guest)?;
        ensure!(report.host == host.name(), "{guest} runs on {}", report.host);
        ensure!(report.pages_checked > 0, "{guest} has checked no page");
        ensure!(
            report.bad_pages == 0,
            "{} of {} pages of {guest} are bad, the first {:?}",
            report.bad_pages,
            report.pages_checked,
            report.first_bad_pages
        );
        Ok(report)
    }

    /// Waits until no process of a migration runs and no domain of one is left.
    pub(crate) fn settle(&self, guest: &str) -> Result<()> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        loop {
            let left = self.leftovers(guest)?;
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "left behind: {}", left.join(", "));
        }
    }

    /// Domains with a suffix of a migration, and processes of one.
    fn leftovers(&self, guest: &str) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for host in self.lab.hosts() {
            let domains = domains(host)?.into_iter();
            let domains = domains.filter(|name| name != guest && is_or_was(name, guest));
            let processes = host.run(MIGRATION_PROCESSES)?;
            let all = domains.chain(processes.lines().map(str::to_owned));
            left.extend(all.map(|what| format!("{what} on {}", host.name())));
        }
        Ok(left)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.is_ours {
            take_down(&self.store);
        }
    }
}

fn take_down(store: &Store) {
    if let Err(error) = Lab::down(store) {
        note(format!("cannot take the lab down: {error:#}"));
    }
}

/// Ends this process at the first signal to end, which drops no [`Session`], without its lab.
fn take_down_on_signals(store: Store) -> Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            take_down(&store);
            process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Prints the command lines of what takes part in a migration, a save or a restore: either end,
/// guards, transports and helpers. A daemon called `xl migrate-receive` or `xl restore` is none:
/// it has become the process that watches the domain, and keeps its name.
const MIGRATION_PROCESSES: &str = "\
    ps -eo ppid=,args= | \
    grep -E '^ *[0-9]+ [^ ]*(xl|ssh|libxl-save-helper) ' | \
    grep -E ' (migrate|migrate-receive|save|restore|domain-guard|--save-.*|--restore-.*)( |$)' | \
    grep -vE '^ *1 [^ ]*/xl (migrate-receive|restore)' || true";

/// Whether a lab has at least what is asked for; rates do not count, they can be changed.
fn suffices(have: &Shape, want: &Shape) -> bool {
    let same = (1..=want.hosts).all(|host| have.release(host) == want.release(host));
    same && have.hosts >= want.hosts && have.nics >= want.nics && have.vcpus >= want.vcpus
}

/// A guest of the least memory that its kind boots with.
#[must_use]
pub fn spec(guest: &str, kind: GuestKind) -> GuestSpec {
    let memory_mib = match kind {
        GuestKind::Pv => 128,
        GuestKind::Pvh => 192,
        GuestKind::Hvm => 256,
    };
    GuestSpec::new(guest, kind, memory_mib)
}

/// Names of all domains of a host.
fn domains(host: &Host) -> Result<Vec<String>> {
    let list = host.run("xl list")?;
    let names = list.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    Ok(names.map(str::to_owned).collect())
}

/// Whether a domain is the guest or a copy of it that a migration made.
pub(crate) fn is_or_was(name: &str, guest: &str) -> bool {
    name.strip_prefix(guest).is_some_and(|suffix| suffix.is_empty() || suffix.starts_with("--"))
}

/// A command that ended, for an error message.
#[must_use]
pub fn describe(finished: &Finished) -> String {
    format!("ended with {}: {}", finished.status, finished.stderr.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_with_fewer_nics_does_not_suffice() {
        let shape = |nics| Shape { nics, ..Shape::default() };
        assert!(suffices(&shape(4), &shape(2)) && !suffices(&shape(1), &shape(2)));
    }

    #[test]
    fn a_copy_that_a_migration_made_is_told_from_another_guest() {
        assert!(is_or_was("pv", "pv") && is_or_was("pv--incoming", "pv"));
        assert!(!is_or_was("pv1", "pv") && !is_or_was("pv1--incoming", "pv"));
    }
}
