//! The kernel module by DKMS, as docs/kernel.md says, on hosts of both releases of Debian: it is
//! installed, takes the place of an older version of itself, and is removed. With it and without it
//! a guest is saved and restored.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_lab::{GuestKind, Host};

use crate::interop;
use crate::lab::{Session, describe, spec};
use crate::tally::{Tally, note};

/// Time that DKMS may take on an emulated host: removing a module makes all of `modules.dep` anew.
const BUILD_TIMEOUT: Duration = Duration::from_secs(1200);
/// Time that a save or a restore may take there.
const SAVE_TIMEOUT: Duration = Duration::from_secs(300);

/// What DKMS calls the module, and its version in the tree.
const PACKAGE: &str = "rxl-map";
const VERSION: &str = "0.1.0";
/// The version of the upgrade.
const NEXT_VERSION: &str = "0.1.1";

/// Opens a lab whose hosts run different releases.
///
/// # Errors
/// As [`interop::open_newer`].
pub fn open() -> Result<Session> {
    interop::open_newer()
}

/// Runs all of it; each case on all hosts at once.
pub fn run(tally: &mut Tally, session: &Session) {
    if install(tally, session).is_none() {
        note("the rest is left out");
    }
    tally.case("stop", || {
        session.lab().hosts().iter().try_for_each(|host| session.remove(&guest(host)))
    });
}

fn install(tally: &mut Tally, session: &Session) -> Option<()> {
    let lab = session.lab();
    let on_hosts = |work: &(dyn Fn(&Host) -> Result<()> + Sync)| lab.on_all_hosts(work).map(drop);
    let sources = tally.case("DKMS and the module's sources are there", || lab.push_dkms())?;
    tally.case("start", || {
        on_hosts(&|host| lab.start_guest(host, &spec(&guest(host), GuestKind::Pv)))
    })?;
    tally.case("without the module: save and restore", || {
        on_hosts(&|host| save_and_restore(session, host, "privcmd"))
    })?;
    tally.case("install", || {
        on_hosts(&|host| {
            build(host, sources, VERSION)?;
            host.run("modprobe rxl_map")?;
            ensure_loaded(host, VERSION)
        })
    })?;
    tally.case("with the module: save and restore", || {
        on_hosts(&|host| save_and_restore(session, host, "module"))
    })?;
    tally.case("upgrade", || {
        on_hosts(&|host| {
            let next = format!("{sources}-{NEXT_VERSION}");
            host.run(&format!(
                "cp -r {sources} {next} && \
                 sed -i s/{VERSION}/{NEXT_VERSION}/ {next}/dkms.conf {next}/rxl_map_main.c"
            ))?;
            build(host, &next, NEXT_VERSION)?;
            host.run_within(&format!("dkms remove {PACKAGE}/{VERSION} --all"), BUILD_TIMEOUT)?;
            host.run("rmmod rxl_map && modprobe rxl_map")?;
            ensure_loaded(host, NEXT_VERSION)
        })
    })?;
    tally.case("with the upgrade: save and restore", || {
        on_hosts(&|host| save_and_restore(session, host, "module"))
    })?;
    tally.case("remove", || on_hosts(&remove))?;
    tally.case("without it again: save and restore", || {
        on_hosts(&|host| save_and_restore(session, host, "privcmd"))
    })
}

/// The guest of a host.
fn guest(host: &Host) -> String {
    format!("dkms-{}", host.name())
}

fn build(host: &Host, sources: &str, version: &str) -> Result<()> {
    let package = format!("{PACKAGE}/{version}");
    host.run_within(&format!("dkms add {sources} && dkms install {package}"), BUILD_TIMEOUT)?;
    let status = host.run(&format!("dkms status {package}"))?;
    ensure!(status.contains("installed"), "{} says: {status}", host.name());
    Ok(())
}

fn ensure_loaded(host: &Host, version: &str) -> Result<()> {
    let loaded = host.run("test -c /dev/rxl_map && cat /sys/module/rxl_map/version")?;
    ensure!(loaded.trim() == version, "{} has version {loaded}", host.name());
    Ok(())
}

fn remove(host: &Host) -> Result<()> {
    let remove = format!("rmmod rxl_map && dkms remove {PACKAGE}/{NEXT_VERSION} --all");
    host.run_within(&remove, BUILD_TIMEOUT)?;
    let left = host.run(&format!(
        "dkms status {PACKAGE}; find /lib/modules/ /var/lib/dkms -name '*rxl*'; ls /dev/rxl_map \
         2>/dev/null; modprobe rxl_map 2>/dev/null && echo loaded; true"
    ))?;
    ensure!(left.is_empty(), "{} still has: {left}", host.name());
    Ok(())
}

/// Saves the host's guest and restores it. `mapper`: what has to have mapped it.
fn save_and_restore(session: &Session, host: &Host, mapper: &str) -> Result<()> {
    let (guest, file) = (guest(host), "/var/tmp/dkms.save");
    let saved = host.finish(&format!("rxl -v save {guest} {file}"), SAVE_TIMEOUT)?;
    ensure!(saved.status.success(), "rxl save on {} {}", host.name(), describe(&saved));
    let said = saved.stderr.lines().find(|line| line.contains(" mappings by "));
    let said = said.context("rxl does not say what mapped the guest")?;
    ensure!(said.contains(&format!(" by {mapper}, ")), "{} says: {said}", host.name());
    note(format!("{}: {said}", host.name()));
    host.run_within(&format!("rxl restore {file} && rm {file}"), SAVE_TIMEOUT)?;
    session.check(&guest, host).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_tree() {
        let conf = include_str!("../../dom0-setup/kmod/dkms.conf");
        assert!(
            conf.lines().any(|line| line == format!("PACKAGE_VERSION=\"{VERSION}\"")),
            "{conf}"
        );
    }
}
