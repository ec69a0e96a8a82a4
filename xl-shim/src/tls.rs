//! `rxl migrate --tls`: what takes the place of ssh, a process that moves bytes between rxl's pipes
//! and the target's `rxl migrate-receive --listen`.
//!
//! Certificates, TLS and moving are [`rxl_toolstack::secure`]'s.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, ensure};
use rxl_toolstack::secure::credentials::Files;
use rxl_toolstack::secure::{Credentials, relay};

use crate::Exit;
use crate::cli::TlsArgs;

/// Where a receiver listens that says nothing else: the port of xend's relocation, when there was
/// one.
const PORT: u16 = 8002;

/// A receiver that is reached by TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The name that its certificate has to be for, or an address.
    host: String,
    port: u16,
}

impl FromStr for Target {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Target, Self::Err> {
        let bracketed = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let (host, port) = match bracketed {
            Some((host, "")) => (host, None),
            Some((host, rest)) => (host, Some(rest.strip_prefix(':').unwrap_or("none"))),
            // More than one colon: an IPv6 address without a port.
            None if text.matches(':').count() == 1 => {
                text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)))
            }
            None => (text, None),
        };
        let port = port.map_or(Ok(PORT), |port| port.parse().map_err(|_| "no port number"))?;
        if host.is_empty() {
            return Err("HOST, HOST:PORT or [IPV6-ADDRESS]:PORT is wanted");
        }
        Ok(Target { host: host.to_owned(), port })
    }
}

impl TlsArgs {
    /// Where they are.
    pub(crate) fn files(&self) -> Files {
        Files {
            certificate: self.tls_cert.clone(),
            key: self.tls_key.clone(),
            peer_ca: self.tls_peer_ca.clone(),
        }
    }
}

/// The shell command of the process for `target`, which is as the user says it. What is wrong with
/// it, or with the files, is said now.
pub(crate) fn command(program: &Path, target: &str, files: &TlsArgs) -> anyhow::Result<String> {
    target.parse::<Target>().map_err(anyhow::Error::msg).with_context(|| target.to_owned())?;
    Credentials::read(&files.files())?.client()?;
    let mut words = vec![program.as_os_str(), OsStr::new("tls-connect")];
    let options = [
        ("--tls-cert", &files.tls_cert),
        ("--tls-key", &files.tls_key),
        ("--tls-peer-ca", &files.tls_peer_ca),
    ];
    for (option, path) in options {
        words.extend([OsStr::new(option), path.as_os_str()]);
    }
    words.extend([OsStr::new("--"), OsStr::new(target)]);
    let words: Vec<String> = words.into_iter().map(quoted).collect::<anyhow::Result<_>>()?;
    Ok(format!("exec {}", words.join(" ")))
}

/// A word for the shell.
fn quoted(word: &OsStr) -> anyhow::Result<String> {
    let word = word.to_str().with_context(|| format!("{} is no text", word.display()))?;
    ensure!(!word.contains('\0'), "a zero byte in {word}");
    Ok(format!("'{}'", word.replace('\'', r"'\''")))
}

/// The process.
pub(crate) fn connect(target: &Target, files: &TlsArgs) -> anyhow::Result<Exit> {
    let Target { host, port } = target;
    let config = Credentials::read(&files.files())?.client()?;
    let explain = |error: &io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("{host} port {port}: the two ends do not trust each other (docs/tls.md)")
        }
        _ => format!("{host} port {port}"),
    };
    let tls = relay::connect(host, *port, config);
    let tls = tls.map_err(|error| (explain(&error), error));
    let tls = tls.map_err(|(what, error)| anyhow::Error::new(error).context(what))?;
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    relay::relay(tls, input, output, relay::Until::Goodbye)
        .map_err(|error| (explain(&error), error))
        .map_err(|(what, error)| anyhow::Error::new(error).context(what))?;
    Ok(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_name_or_an_address_with_a_port_or_without() {
        let target = |text: &str| text.parse::<Target>().map(|t| (t.host, t.port));
        let is = |host: &str, port| Ok((host.to_owned(), port));
        assert_eq!(target("host2"), is("host2", PORT));
        assert_eq!(target("host2.example:7"), is("host2.example", 7));
        assert_eq!(target("192.0.2.1"), is("192.0.2.1", PORT));
        assert_eq!(target("2001:db8::1"), is("2001:db8::1", PORT));
        assert_eq!(target("[2001:db8::1]:7"), is("2001:db8::1", 7));
        assert_eq!(target("[2001:db8::1]"), is("2001:db8::1", PORT));
        for text in ["", ":7", "host2:", "host2:x", "host2:65536", "[::1]7"] {
            assert!(target(text).is_err(), "{text}");
        }
    }

    #[test]
    fn words_come_through_the_shell_as_they_are() {
        let word = "it's $HOME `x` \"y\" \\";
        let out = std::process::Command::new("sh")
            .args(["-c", &format!("printf %s {}", quoted(word.as_ref()).unwrap())])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), word);
    }
}
