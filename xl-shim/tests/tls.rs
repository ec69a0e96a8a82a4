//! A sender and a listener as processes, on this machine's loopback, with real certificates. What
//! would need Xen is not reached: a receiver that is started here says so and ends, or, where there
//! is Xen, hears the end of its input.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};

/// A directory with the three files of one end.
struct End(tempfile::TempDir);

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), certificate }
    }

    fn end(&self, name: &str, expired: bool) -> End {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        if expired {
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        let end = End(tempfile::tempdir().unwrap());
        fs::write(end.path("cert.pem"), certificate).unwrap();
        fs::write(end.path("key.pem"), key.serialize_pem()).unwrap();
        fs::set_permissions(end.path("key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(end.path("ca.pem"), &self.certificate).unwrap();
        end
    }
}

impl End {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn rxl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rxl"));
        command.args(arguments);
        for (option, file) in
            [("--tls-cert", "cert.pem"), ("--tls-key", "key.pem"), ("--tls-peer-ca", "ca.pem")]
        {
            command.arg(option).arg(self.path(file));
        }
        command.stdin(Stdio::null());
        command
    }
}

/// A listener, ended when it is dropped.
struct Listener {
    child: Child,
    said: BufReader<ChildStderr>,
    port: String,
}

impl Listener {
    fn start(end: &End, more: &[&str]) -> Listener {
        let arguments = [&["migrate-receive", "--listen", "127.0.0.1:0"], more].concat();
        let mut child = end.rxl(&arguments).stderr(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stderr.take().unwrap());
        let mut listener = Listener { child, said, port: String::new() };
        let line = listener.line();
        listener.port = line.trim().rsplit(':').next().unwrap().to_owned();
        assert!(line.starts_with("rxl: listening on 127.0.0.1:"), "{line}");
        listener
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line
    }

    /// What the sender's end of the connection comes to.
    fn connect(&self, end: &End, host: &str) -> Output {
        let target = format!("{host}:{}", self.port);
        end.rxl(&["tls-connect", &target]).output().unwrap()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_sender_that_is_trusted_has_a_receiver_started_and_the_listener_ends_with_it() {
    let authority = Authority::new();
    let mut listener = Listener::start(&authority.end("localhost", false), &[]);
    let out = listener.connect(&authority.end("host1", false), "localhost");
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(listener.line().contains(" sends a domain"));
    if !Path::new("/proc/xen/capabilities").exists() {
        // Xen's libraries may have their say first.
        let mut line = listener.line();
        while !line.is_empty() && !line.starts_with("rxl: ") {
            line = listener.line();
        }
        assert!(line.starts_with("rxl: "), "the receiver says why it cannot be");
    }
    assert_eq!(listener.child.wait().unwrap().code(), Some(1));
}

#[test]
fn who_is_not_trusted_or_does_not_trust_is_refused_and_the_listener_goes_on() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mut listener = Listener::start(&ours.end("localhost", false), &[]);
    let mut wrong = ours.end("host1", false);
    fs::write(wrong.path("ca.pem"), &theirs.certificate).unwrap();
    for (end, why) in [
        (&theirs.end("host1", false), "not trusted here"),
        (&ours.end("host1", true), "expired"),
        (&wrong, "does not trust the listener"),
    ] {
        if why == "not trusted here" {
            fs::write(end.path("ca.pem"), &ours.certificate).unwrap();
        }
        let out = listener.connect(end, "localhost");
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{why}: {said}");
        assert!(said.contains("the two ends do not trust each other"), "{why}: {said}");
        let line = listener.line();
        assert!(line.contains(" is not let in: "), "{why}: {line}");
    }
    wrong = ours.end("host1", false);
    let out = listener.connect(&wrong, "127.0.0.1");
    assert!(text(&out.stderr).contains("not valid for name"), "{}", text(&out.stderr));
    assert!(listener.line().contains(" is not let in: "));
    assert!(listener.connect(&wrong, "localhost").status.success());
    assert!(listener.line().contains(" sends a domain"));
}

#[test]
fn what_cannot_work_is_said_before_anything_is_started() {
    let authority = Authority::new();
    let end = authority.end("localhost", false);
    fs::set_permissions(end.path("key.pem"), fs::Permissions::from_mode(0o644)).unwrap();
    let out = end.rxl(&["migrate-receive", "--listen", "127.0.0.1:0"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("key.pem can be read by others: chmod 600"));
    for arguments in [
        &["migrate", "--tls", "-p", "web", "host2"][..],
        &["migrate", "--tls", "-s", "rsh", "web", "host2"],
        &["migrate-receive", "--forever"],
        &["migrate-receive", "--listen", "host2:1"],
    ] {
        let out = end.rxl(arguments).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{arguments:?}: {}", text(&out.stderr));
    }
}
