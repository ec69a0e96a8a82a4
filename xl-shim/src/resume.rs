//! `rxl resume`: the last step by hand after a migration of which nobody knows how it ended.

use anyhow::bail;
use rxl_migrate::xl::AWAY;
use rxl_toolstack::lifecycle::{DomainState, Lifecycle};

use crate::Exit;
use crate::cli::Globals;
use crate::host::{self, Progress};
use crate::lock::Lock;
use crate::outgoing;
use crate::output::Screen;

pub(crate) fn run(globals: &Globals, domain: &str) -> anyhow::Result<Exit> {
    let host = host::open(globals, Progress::Lines)?;
    let _lock = match host.resolve(domain) {
        Ok(domid) => Some(Lock::of_domain(domid, domain)?),
        Err(_) => None,
    };
    resume(&host, domain, &Screen::stderr())?;
    Ok(Exit::Success)
}

/// Lets a suspended domain run on, under the name that it had before the migration.
pub(crate) fn resume(host: &dyn Lifecycle, domain: &str, screen: &Screen) -> anyhow::Result<()> {
    let domid = outgoing::resolve(host, domain)?;
    let name = host.name(domid)?;
    if host.state(domid)? != DomainState::Suspended {
        bail!("{name} is not suspended");
    }
    let own = name.strip_suffix(AWAY).unwrap_or(&name);
    if own != name {
        host.rename(domid, &name, own)?;
    }
    host.resume(domid)?;
    screen.line(&format!("rxl: {own} runs here."));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Condition, FakeHost};

    #[test]
    fn a_suspended_domain_runs_again_under_its_own_name_and_no_other_is_touched() {
        let host = FakeHost::default();
        host.add("web--migratedaway", Condition::Suspended);
        host.add("db", Condition::Runs);
        let screen = Screen::buffer();
        resume(&host, "web--migratedaway", &screen).unwrap();
        let expected = ["web", "db"].map(|name| (name.to_owned(), Condition::Runs));
        assert_eq!(host.domains(), expected);
        assert_eq!(screen.text(), "rxl: web runs here.");
        assert_eq!(resume(&host, "db", &screen).unwrap_err().to_string(), "db is not suspended");
        let text = resume(&host, "mail", &screen).unwrap_err().to_string();
        assert_eq!(text, "mail is an invalid domain identifier (rc=-21)");
    }
}
