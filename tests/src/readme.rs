//! A first-time user's walk through the README: each command that it shows for real hosts is copied
//! from it and run, on this machine or on host1 of a lab of three, with a guest that is called
//! GUEST. What the README leaves to the user (a transport, names of network cards, certificates) is
//! filled in; docs/tls.md says how to make certificates, and its commands are run too.
//!
//! What it is not: the two commands of "Try it", of which one is CI and the other has a table as
//! its result.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rxl_lab::{Finished, GuestKind, GuestSpec, Host, Route, Shape, quote};

use crate::background::Background;
use crate::bad_input;
use crate::lab::{Session, describe, spec};
use crate::tally::{Tally, note};

const TLS: &str = include_str!("../../docs/tls.md");
/// The guest that the commands name.
const GUEST: &str = "GUEST";
/// Pages that it rewrites per second.
const DIRTY_PAGES_PER_S: u64 = 100;
/// How long a command may take in emulation.
const TIMEOUT: Duration = Duration::from_secs(300);
/// The port that `rxl migrate --tls` tries.
const LISTEN: &str = "rxl migrate-receive --listen 8002 --forever";

/// Where a command is typed, and what has to come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Typed on this machine; it succeeds.
    Built,
    /// The guest runs at another host.
    Moved,
    /// The same, once a listener is there.
    MovedByTls,
    /// The guest runs here, or at another host: whatever the pause allows.
    MovedOrNot,
    /// It runs here, and something was printed.
    Kept,
    /// It has no domain; it is restored from FILE.
    Saved,
    /// It is paused here; it is destroyed, and restored from F at host2.
    Copied,
    /// It runs here; this ends a migration that is under way.
    Cancelled,
}

use Then::{Built, Cancelled, Copied, Kept, Moved, MovedByTls, MovedOrNot, Saved};

/// The commands, in an order in which a user may come to them.
const WALK: [(&str, Then); 27] = [
    ("apt install libxen-dev libclang-dev pkg-config dpkg-dev", Built),
    ("dom0-setup/package", Built),
    ("dpkg -i rxl_0.1.0_amd64.deb", Kept),
    ("rxl migrate GUEST host2", Moved),
    ("rxl migrate --report out.json GUEST host2", Moved),
    ("rxl migrate -s '' GUEST 'COMMAND'", Moved),
    ("rxl migrate --receiver xl GUEST host2", Moved),
    ("rxl migrate --nics eth1,eth2 GUEST host2", Moved),
    ("rxl migrate --no-encrypt GUEST host2", Moved),
    ("rxl migrate --streams 0 GUEST host2", Moved),
    ("rxl migrate --reduce none GUEST host2", Moved),
    ("rxl migrate --rate 800 GUEST host2", Moved),
    ("rxl migrate --tls GUEST host2", MovedByTls),
    ("rxl migrate --verify GUEST host2", Moved),
    ("rxl migrate --max-pause 100 --on-limit cancel GUEST host2", MovedOrNot),
    ("rxl migrate --dry-run GUEST host2", Kept),
    ("rxl save GUEST FILE", Saved),
    ("rxl save -p GUEST - | ssh host2 'cat > F'", Copied),
    ("rxl evacuate --to host2,host3", Moved),
    ("rxl status", Kept),
    ("rxl cancel GUEST", Cancelled),
    ("rxl list", Kept),
    ("LIBXL_SAVE_HELPER=/usr/bin/rxl xl migrate GUEST host2", Moved),
    ("rxl divert", Kept),
    ("rxl divert --as-xl", Kept),
    ("rxl divert --undo", Kept),
    ("rxl man", Kept),
];

/// Opens a lab of three hosts with two network cards each; nothing of rxl is on them.
///
/// # Errors
/// It does not come up, or a smaller one is up.
pub fn open() -> Result<Session> {
    Session::open_shaped(Shape { hosts: 3, nics: 2, ..Shape::default() })
}

/// Runs all of it.
pub fn run(tally: &mut Tally, session: &Session) {
    let spec = GuestSpec { dirty_pages_per_s: DIRTY_PAGES_PER_S, ..spec(GUEST, GuestKind::Pv) };
    tally.case("the guest starts", || session.start_spec(&spec));
    for (command, then) in WALK {
        if tally.case(command, || take(session, command, then)).is_none() {
            // The next command is typed where there is a guest to type it for.
            tally.case("the guest starts again", || session.start_spec(&spec));
        }
    }
    tally.case("the guest stops", || session.remove(GUEST));
}

/// Types one command, and looks at what has come of it. The guest is on host1 before and after.
fn take(session: &Session, command: &str, then: Then) -> Result<()> {
    let here = session.host(1)?;
    match then {
        Built => return build(session, command),
        Cancelled => {
            ensure!(command == format!("rxl cancel {GUEST}"), "it cancels something else");
            bad_input::cancelled_from_elsewhere(session, GUEST)?;
            return session.check(GUEST, here).map(drop);
        }
        MovedByTls => certify(session)?,
        _ => {}
    }
    let listens = (then == MovedByTls).then(|| Background::start(session.host(2)?, LISTEN));
    let listens = listens.transpose()?;
    let finished = here.finish(&filled_in(here, command)?, TIMEOUT)?;
    if let Some(listens) = listens {
        listens.signal_group("TERM")?;
        let ended = listens.finish(TIMEOUT)?;
        ensure!(ended.status.success(), "{LISTEN}: {}", describe(&ended));
    }
    ensure!(finished.status.success() || then == MovedOrNot, "{}", describe(&finished));
    settled(session, here, &finished, then)
}

fn settled(session: &Session, here: &Host, finished: &Finished, then: Then) -> Result<()> {
    match then {
        Kept => {
            ensure!(!finished.stdout.trim().is_empty(), "it prints nothing");
            session.check(GUEST, here)?;
        }
        Saved => {
            ensure!(session.lab().find_guest(GUEST)?.is_empty(), "the guest is still there");
            here.run_within("rxl restore FILE", TIMEOUT)?;
            session.check(GUEST, here)?;
        }
        Copied => {
            here.run("xl destroy GUEST")?;
            session.host(2)?.run_within("rxl restore F", TIMEOUT)?;
            home(session, false)?;
        }
        Moved | MovedByTls => home(session, false)?,
        MovedOrNot => home(session, !finished.status.success())?,
        // They have been seen to.
        Built | Cancelled => {}
    }
    Ok(())
}

/// Checks that the guest runs once, elsewhere or `here`, and brings it back.
fn home(session: &Session, here: bool) -> Result<()> {
    let found = session.lab().find_guest(GUEST)?;
    let [host] = found.as_slice() else {
        anyhow::bail!("it is on {:?}", found.iter().map(|host| host.name()).collect::<Vec<_>>());
    };
    session.check(GUEST, host)?;
    ensure!((host.number() == 1) == here, "it runs on {}", host.name());
    if !here {
        let back =
            session.lab().migrate(GUEST, GuestKind::Pv, host, session.host(1)?, Route::Rxl)?;
        ensure!(back.bad_pages == 0, "{} pages are bad", back.bad_pages);
    }
    Ok(())
}

/// A command with what a user has to put into it.
fn filled_in(host: &Host, command: &str) -> Result<String> {
    let with_addresses = host.run("ip -brief -4 address show to 10.77.0.0/16")?;
    let nics: Vec<&str> =
        with_addresses.lines().filter_map(|line| line.split_ascii_whitespace().next()).collect();
    let command = command.replace("COMMAND", "ssh host2 rxl migrate-receive");
    Ok(command.replace("eth1,eth2", &nics.join(",")))
}

/// Types a command on this machine. The package that one prints the path of goes to all hosts.
fn build(session: &Session, command: &str) -> Result<()> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let said = shell(root, &format!("yes | {command}"))?;
    if let Some(package) = said.trim().lines().last().filter(|line| line.ends_with(".deb")) {
        let content = std::fs::read(package).with_context(|| package.to_owned())?;
        let name = package.rsplit('/').next().unwrap_or(package);
        note(format!("{name}: {} KiB", content.len() >> 10));
        let install = |host: &Host| {
            host.write_file(&format!("/root/{name}"), "644", &content)?;
            // On host1 the walk does it.
            if host.number() == 1 {
                Ok(String::new())
            } else {
                host.run(&format!("dpkg -i {name}"))
            }
        };
        session.lab().on_all_hosts(install)?;
    }
    Ok(())
}

/// Makes certificates by the commands of docs/tls.md, and puts them where they belong.
fn certify(session: &Session) -> Result<()> {
    let directory = tempfile::tempdir().context("Cannot make a directory")?;
    let root = directory.path().to_str().context("a path that is no text")?;
    let blocks = blocks(TLS, "```sh\n");
    let [authority, each] = blocks.as_slice() else {
        anyhow::bail!("docs/tls.md has {} blocks of commands", blocks.len())
    };
    shell(root, authority)?;
    for host in session.lab().hosts() {
        shell(root, &each.replace("host2", &host.name()))?;
        host.run("mkdir -p /etc/rxl/tls")?;
        for (name, mode) in [("ca.pem", "644"), ("cert.pem", "644"), ("key.pem", "600")] {
            let content = std::fs::read(directory.path().join(name)).context(name)?;
            host.write_file(&format!("/etc/rxl/tls/{name}"), mode, &content)?;
        }
    }
    Ok(())
}

/// Runs something here, in `directory`.
fn shell(directory: &str, script: &str) -> Result<String> {
    let output = Command::new("sh").args(["-ec", script]).current_dir(directory).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}: {}", quote(script), output.status, errors.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The texts between lines that begin with `fence` and the ends of these blocks.
fn blocks<'a>(text: &'a str, fence: &str) -> Vec<&'a str> {
    let after = text.split(fence).skip(1);
    after.filter_map(|rest| rest.split("```").next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const README: &str = include_str!("../../README.md");
    /// The section with the commands.
    const SECTION: &str = "## First migration on real hosts";

    /// The commands of the section's block, without what is said of them.
    fn shown() -> Vec<String> {
        let section = README.split(SECTION).nth(1).expect("the section");
        let block = blocks(section, "```\n").into_iter().next().expect("its block").to_owned();
        block.lines().map(|line| line.split(" #").next().unwrap().trim_end().to_owned()).collect()
    }

    #[test]
    fn every_command_of_the_walk_is_in_the_readme_and_every_command_there_in_the_walk() {
        let shown = shown();
        assert!(shown.len() > 10, "{shown:?}");
        let walked: Vec<&str> = WALK.iter().map(|(command, _)| *command).collect();
        for command in &shown {
            assert!(walked.contains(&command.as_str()), "nobody tries `{command}`");
        }
        for command in walked {
            let inline = README.contains(&format!("`{command}`"));
            assert!(inline || shown.iter().any(|line| line == command), "not in it: {command}");
        }
        assert_eq!(blocks(TLS, "```sh\n").len(), 2);
    }
}
