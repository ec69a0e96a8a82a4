//! How it is on the hosts after a migration: which copies of a guest there are, and what there is
//! that was not there before.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rxl_lab::Host;

use crate::lab::{Session, is_or_was};

/// How long what takes part in a migration may take to end after it: a guard waits for a guest
/// longer than libxl does.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(300);
/// Time to look for what is left, on an emulated host.
const REMAINS_TIMEOUT: Duration = Duration::from_secs(120);

/// A domain that is a guest, or one of the copies of it that a migration makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) name: String,
    /// As `xl list` shows it: `r` runs, `b` waits, `p` paused, `s` suspended, `c` crashed, `d`
    /// dying.
    pub(super) state: String,
}

impl Copy {
    /// Whether its vCPUs may run.
    pub(super) fn runs(&self) -> bool {
        !self.state.contains(['p', 's', 'c', 'd'])
    }
}

/// All copies of a guest on a host.
pub(super) fn copies_on(host: &Host, guest: &str) -> Result<Vec<Copy>> {
    copies_in(&host.run("xl list")?, guest)
}

fn copies_in(list: &str, guest: &str) -> Result<Vec<Copy>> {
    let mut copies = Vec::new();
    for line in list.lines().skip(1) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [name, _, _, _, state, _] = words.as_slice() else {
            anyhow::bail!("xl list says `{line}`");
        };
        // A domain that was never given a name, or that is gone but for memory that is mapped.
        ensure!(*name != "(null)", "a domain without a name: {line}");
        if is_or_was(name, guest) {
            copies.push(Copy { name: (*name).to_owned(), state: (*state).to_owned() });
        }
    }
    Ok(copies)
}

/// Prints the command lines of what takes part in a migration: either end, guards, helpers,
/// workers and transports. The processes that watch a domain stay with it, and are none.
const TAKES_PART: &str = "ps -eo args= | grep -E '^[^ ]*(rxl|rxl-relay|lab-rsh|save-helper) ' | \
    grep -E ' (migrate|migrate-receive|resume|domain-guard|--(save|restore)-.*|host[0-9])( |$)' \
    || true";

/// Waits until nothing that takes part in a migration runs any more.
pub(super) fn settle(session: &Session) -> Result<()> {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let running = session.lab().on_all_hosts(|host| host.run(TAKES_PART))?.concat();
        if running.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "still there: {}", running.trim().replace('\n', "; "));
        thread::sleep(POLL);
    }
}

/// Things on a host, by kind and name with all numbers taken out, and how many of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Things(BTreeMap<String, usize>);

/// Locks are names of sockets; what maps a guest's memory has privcmd in its maps. What `/run` has
/// of the tests' own connections is not the migration's; and how an rxl ended is kept in `/run/rxl`
/// for a minute, for whoever waits for it. One that was killed has said no end. libxl notes which
/// numbers of domains were used lately.
const SCRIPT: &str = r#"
ps -eo args= | grep -o '[d]omain-monitor' | sed 's/^/process /'
grep -o '@rxl/.*' /proc/net/unix | sed 's/^/lock /'
for maps in $(grep -ls privcmd /proc/[0-9]*/maps); do
    echo "mapping by $(cat ${maps%maps}comm)"
done
xenstore-ls -f | sed 's/ = .*//; s/^/xenstore /'
find /tmp /run /var/tmp /var/lib/xen -xdev |
    grep -vE '^/run/(sshd|rxl/|xen/domid-history)' | sed 's/^/file /'
grep -L '"exit":' /run/rxl/* 2>/dev/null | sed 's/^/file /'
true
"#;

impl Things {
    /// Finds them.
    pub(super) fn on(host: &Host) -> Result<Things> {
        let text = host.run_within(SCRIPT, REMAINS_TIMEOUT).context("looking for what is left")?;
        Ok(Things::parse(&text))
    }

    fn parse(text: &str) -> Things {
        let mut things = BTreeMap::new();
        for line in text.lines() {
            // Domains, processes and UUIDs have other numbers each time.
            let name: Vec<String> = line.split('/').map(without_numbers).collect();
            *things.entry(name.join("/")).or_insert(0) += 1;
        }
        Things(things)
    }

    /// What there is more of than `before`.
    pub(super) fn beyond(&self, before: &Things) -> Vec<String> {
        let more = self
            .0
            .iter()
            .filter(|(name, count)| **count > before.0.get(*name).copied().unwrap_or(0));
        more.map(|(name, _)| name.clone()).collect()
    }

    /// The larger count of each.
    pub(super) fn or(mut self, other: &Things) -> Things {
        for (name, count) in &other.0 {
            let have = self.0.entry(name.clone()).or_insert(0);
            *have = (*have).max(*count);
        }
        self
    }
}

fn without_numbers(part: &str) -> String {
    let is_uuid = part.len() == 36 && part.matches('-').count() == 4;
    let digits = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
    if is_uuid { "UUID".to_owned() } else { digits(part) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_is_suspended_or_paused_does_not_run() {
        let list = "Name ID Mem VCPUs State Time(s)\n\
            Domain-0   0 1024 1 r----- 10.0\n\
            web        7  128 1 ------  1.0\n\
            web--incoming 9 20 1 --p--- 0.0\n\
            web2       8  128 1 -b----  1.0\n\
            web--migratedaway 3 128 1 ---s-- 1.0\n";
        let copies = copies_in(list, "web").unwrap();
        let running: Vec<_> = copies.iter().filter(|c| c.runs()).map(|c| &c.name).collect();
        assert_eq!((copies.len(), running), (3, vec![&"web".to_owned()]));
        assert!(copies_in(&format!("{list}(null) 10 0 1 --p--d 0.0\n"), "web").is_err());
    }

    #[test]
    fn what_there_is_more_of_is_left_over_whatever_its_number() {
        let before = Things::parse("xenstore /local/domain/3/name\nfile /run/x\n");
        let after = "xenstore /local/domain/14/name\nxenstore /local/domain/15/name\nlock @rxl/7\n";
        let left = Things::parse(after).beyond(&before);
        assert_eq!(left, ["lock @rxl/", "xenstore /local/domain//name"]);
        assert!(Things::parse("file /run/x\n").beyond(&before).is_empty());
        assert!(Things::parse(after).beyond(&Things::parse(after).or(&before)).is_empty());
    }
}
