//! What `xl` says of hosts: which guests are here, and how much memory is free there.
//!
//! `xl list` and `xl info` are read as text, because any Xen's `xl` answers so, here and on a
//! target that has no rxl.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use rxl_migrate::xl::{away_name, incoming_name};

use super::plan::{Guest, Health};
use crate::passthrough;
use crate::transport::{REMOTE_PATH, quoted};

/// MiB that a domain takes beside its memory: 1 for each vCPU and 1/128 of the memory for the
/// tables that Xen keeps of it (libxl's rule, `libxl_get_required_shadow_memory`), 2 for a device
/// model.
fn need_mib(memory_mib: u64, vcpus: u64) -> u64 {
    memory_mib + vcpus + memory_mib / 128 + 2
}

/// A domain here that does not leave.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Staying {
    pub(super) name: String,
    pub(super) why: &'static str,
}

/// The domains of this host that are to leave, and those that cannot.
pub(super) fn guests() -> anyhow::Result<(Vec<Guest>, Vec<Staying>)> {
    let xl = passthrough::find_xl()?;
    let output = Command::new(&xl).arg("list").stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("running {} list", xl.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "xl list failed: {}", said.trim());
    parse_list(&String::from_utf8_lossy(&output.stdout))
}

/// Lines of name, number, MiB, vCPUs, state and time, below a heading.
fn parse_list(text: &str) -> anyhow::Result<(Vec<Guest>, Vec<Staying>)> {
    let (mut guests, mut staying) = (Vec::new(), Vec::new());
    for line in text.lines().skip(1).filter(|line| !line.trim().is_empty()) {
        let mut words = line.split_whitespace();
        let mut next = || words.next().with_context(|| format!("xl list said: {line}"));
        let (name, domid, memory, vcpus, state) = (next()?, next()?, next()?, next()?, next()?);
        let number = |text: &str| text.parse().with_context(|| format!("xl list said: {line}"));
        if number(domid)? == 0 {
            continue;
        }
        match why_not(name, state) {
            Some(why) => staying.push(Staying { name: name.to_owned(), why }),
            None => guests.push(Guest {
                name: name.to_owned(),
                need_mib: need_mib(number(memory)?, number(vcpus)?),
            }),
        }
    }
    Ok((guests, staying))
}

/// Why a domain of that name and state does not leave.
fn why_not(name: &str, state: &str) -> Option<&'static str> {
    let is_half = |suffix: &str| name.ends_with(suffix);
    if is_half(&away_name("")) || is_half(&incoming_name("")) {
        return Some("it is half of a migration");
    }
    let flags = [
        ('d', "it is being destroyed"),
        ('c', "it has crashed"),
        ('s', "it is suspended or has shut down"),
    ];
    flags.iter().find(|(flag, _)| state.contains(*flag)).map(|(_, why)| *why)
}

/// Asks a target how much memory is free.
pub(super) fn ask(ssh: &str, host: &str) -> Health {
    let remote = format!("{REMOTE_PATH} exec xl info");
    let command = format!("exec {ssh} {host} {}", quoted(&remote));
    let output = Command::new("sh").args(["-c", &command]).stdin(Stdio::null()).output();
    let output = match output {
        Ok(output) if output.status.success() => output,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or("nothing was said").trim();
            return Health::Lost(format!("it does not answer ({}: {last})", output.status));
        }
        Err(error) => return Health::Lost(format!("it cannot be asked: {error}")),
    };
    match free_memory(&String::from_utf8_lossy(&output.stdout)) {
        Some(free) => Health::Room(Some(free)),
        None => Health::Lost("its xl info says nothing of free memory".to_owned()),
    }
}

fn free_memory(info: &str) -> Option<u64> {
    let fields = info.lines().filter_map(|line| line.split_once(':'));
    let mut values = fields.filter(|(name, _)| name.trim() == "free_memory");
    values.next()?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_the_domains_that_run_or_are_paused() {
        let text = "\
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1024     1     r-----      36.4
one                                          1   256     2     -b----       2.1
two                                          2  1024     1     --p---       0.0
three                                        3   128     1     ---s--       0.0
four--incoming                               4   128     1     --p---       0.0
";
        let (guests, staying) = parse_list(text).unwrap();
        let guests: Vec<_> = guests.iter().map(|g| (g.name.as_str(), g.need_mib)).collect();
        assert_eq!(guests, [("one", 256 + 2 + 2 + 2), ("two", 1024 + 1 + 8 + 2)]);
        let staying: Vec<_> = staying.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(staying, ["three", "four--incoming"]);
        assert!(parse_list("Name\none 1 many 1 r 0\n").is_err());
    }

    #[test]
    fn a_target_says_how_much_is_free_or_why_not() {
        let ask = |said: &str| super::ask(&format!("sh -c '{said}' "), "host2");
        let said = "echo host : a; echo free_memory            : 512";
        assert_eq!(ask(said), Health::Room(Some(512)));
        let Health::Lost(why) = ask("echo no route >&2; exit 255") else { panic!() };
        assert!(why.contains("no route"), "{why}");
        assert!(matches!(ask("echo free_memory : much"), Health::Lost(_)));
    }
}
