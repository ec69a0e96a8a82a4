//! libvirt's Xen driver saves and restores guests: with the stock helper, and with rxl's in its
//! place (`rxl divert`). What either has saved the other restores, and neither libvirt nor the
//! guest sees a difference.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rxl_lab::{GuestKind, GuestSpec, Host, Shape};

use crate::lab::{Session, spec};
use crate::smoke::DIRTY_PAGES_PER_S;
use crate::tally::{Tally, note};

/// libvirt with its driver for Xen, and `virsh`.
const PACKAGES: [&str; 3] = ["libvirt-daemon", "libvirt-daemon-driver-xen", "libvirt-clients"];

/// Time that libvirt may take on an emulated host, for anything.
const TIMEOUT: Duration = Duration::from_secs(300);

const VIRSH: &str = "virsh --quiet --connect xen:///system";

/// What its daemon needs beside them. A package that is not installed, because it wants systemd,
/// makes the folder and the user, who belongs to a driver that nobody uses here. And every model of
/// a processor that libvirt knows has `vme`, but the one that QEMU emulates: without a model its
/// driver for Xen does not start.
const PREPARE: &str = "mkdir -p /var/log/libvirt && \
    { id libvirt-qemu 2>/dev/null || useradd --system --user-group libvirt-qemu; } && \
    sed -i \"/name='vme'/d\" /usr/share/libvirt/cpu_map/x86_486.xml";

/// Who is libvirt's save helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Helper {
    Stock,
    Rxl,
}

/// Who saves, who restores.
const PAIRINGS: [(&str, Helper, Helper); 4] = [
    ("rxl to rxl", Helper::Rxl, Helper::Rxl),
    ("rxl to stock", Helper::Rxl, Helper::Stock),
    ("stock to rxl", Helper::Stock, Helper::Rxl),
    ("stock to stock", Helper::Stock, Helper::Stock),
];

/// Opens a lab of one host, with rxl on it.
///
/// # Errors
/// It does not come up.
pub fn open() -> Result<Session> {
    let session = Session::open_shaped(Shape { hosts: 1, ..Shape::default() })?;
    session.lab().push_rxl()?;
    Ok(session)
}

/// Runs all of it.
pub fn run(tally: &mut Tally, session: &Session) {
    let Some(host) = tally.case("a host", || session.host(1)) else { return };
    let started = tally.case("libvirt manages it", || {
        session.lab().push_packages(&PACKAGES)?;
        host.run(&format!("{PREPARE} && libvirtd --daemon"))?;
        host.run_within(&format!("until {VIRSH} version; do sleep 1; done"), TIMEOUT)
    });
    if let Some(version) = started {
        version.lines().for_each(note);
        for kind in [GuestKind::Pv, GuestKind::Pvh] {
            one_guest(tally, session, host, kind);
        }
    }
    tally.case("libvirt and the diversion go", || {
        host.run("pkill -x libvirtd; true")?;
        become_helper(host, Helper::Stock)
    });
}

fn one_guest(tally: &mut Tally, session: &Session, host: &Host, kind: GuestKind) {
    let (guest, label) = (format!("virsh-{kind}"), kind.to_string().to_uppercase());
    let spec = GuestSpec { dirty_pages_per_s: DIRTY_PAGES_PER_S, ..spec(&guest, kind) };
    if tally.case(&format!("{label}: start"), || create(session, host, &spec)).is_none() {
        return;
    }
    for (name, saves, restores) in PAIRINGS {
        tally.case(&format!("{label}: save and restore, {name}"), || {
            save_and_restore(session, host, &guest, [saves, restores])
        });
    }
    tally.case(&format!("{label}: stop"), || {
        host.run_within(&format!("{VIRSH} destroy {guest}"), TIMEOUT)?;
        session.remove(&guest)
    });
}

/// Has libvirt start a guest from what xl would start it from.
fn create(session: &Session, host: &Host, spec: &GuestSpec) -> Result<()> {
    session.remove(&spec.name)?;
    let config = session.lab().prepare_guest(spec)?;
    host.run_within(
        &format!(
            "{VIRSH} domxml-from-native xen-xl {config} > {config}.xml && \
             {VIRSH} create {config}.xml"
        ),
        TIMEOUT,
    )?;
    session.lab().await_guest(host, spec)
}

fn save_and_restore(
    session: &Session,
    host: &Host,
    guest: &str,
    [saves, restores]: [Helper; 2],
) -> Result<()> {
    let file = format!("/var/tmp/{guest}.save");
    become_helper(host, saves)?;
    let began = Instant::now();
    host.run_within(&format!("{VIRSH} save {guest} {file}"), TIMEOUT)?;
    let saved = began.elapsed();
    let running = host.run(&format!("{VIRSH} list --name"))?;
    ensure!(!running.lines().any(|name| name == guest), "{guest} still runs");
    become_helper(host, restores)?;
    let began = Instant::now();
    host.run_within(&format!("{VIRSH} restore {file} && rm {file}"), TIMEOUT)?;
    note(format!(
        "saved in {:.1} s, restored in {:.1} s",
        saved.as_secs_f64(),
        began.elapsed().as_secs_f64()
    ));
    let state = host.run(&format!("{VIRSH} domstate {guest}"))?;
    ensure!(state.trim() == "running", "{guest} is {state}");
    session.check(guest, host).map(drop)
}

/// Puts a helper in its place; the other could not be run.
fn become_helper(host: &Host, helper: Helper) -> Result<()> {
    let aside = "/usr/lib/xen-*/bin/libxl-save-helper.distrib";
    let script = match helper {
        Helper::Rxl => format!("rxl divert && chmod a-x {aside}"),
        Helper::Stock => format!(
            "if [ -e {aside} ]; then chmod a+x {aside}; fi; rxl divert --undo && \
             ! [ -L /usr/lib/xen-*/bin/libxl-save-helper ]"
        ),
    };
    host.run(&script).map(drop).context("the save helper")
}
