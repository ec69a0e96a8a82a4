//! That only who shows the right certificate comes through, and that what goes through arrives.

#![allow(clippy::unwrap_used, reason = "what is not there is to stop the test")]

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

use super::credentials::{CredentialsError, Files};
use super::listener::{STRANGERS_MAX, Visitor};
use super::relay::{Until, connect, relay};
use super::{Credentials, Listener};
use crate::tls::Tls;

/// Somebody who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    fn new() -> Authority {
        // By their names it is known who has signed what.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, format!("authority {number}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), certificate }
    }

    /// What an end has whose certificate is for `name`, and which trusts `peer`.
    fn end(&self, name: &str, expired: bool, peer: &Authority) -> Credentials {
        let directory = tempfile::tempdir().unwrap();
        Credentials::read(&self.files(directory.path(), name, expired, peer)).unwrap()
    }

    fn files(&self, directory: &Path, name: &str, expired: bool, peer: &Authority) -> Files {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        if expired {
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        let write = |name: &str, text: &str, mode| {
            let path = directory.join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        Files {
            certificate: write("cert.pem", &certificate, 0o644),
            key: write("key.pem", &key.serialize_pem(), 0o600),
            peer_ca: write("ca.pem", &peer.certificate, 0o644),
        }
    }
}

fn listener(credentials: &Credentials) -> Listener {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Listener::open(any, credentials.server().unwrap()).unwrap()
}

/// Waits for the first about whom something is known.
fn visitor(listener: &mut Listener) -> Visitor {
    visitors(listener, 1).remove(0)
}

/// Waits until something is known about `count`; one wait may tell of more than one.
fn visitors(listener: &mut Listener, count: usize) -> Vec<Visitor> {
    let (wake, _waker) = UnixStream::pair().unwrap();
    let mut known = Vec::new();
    while known.len() < count {
        known.extend(listener.wait(wake.as_fd()).unwrap());
    }
    known
}

/// Two ends that want to talk: what the one that listens makes of the other, and what the other
/// comes to, if it goes on to read a word of the first.
fn meet(
    server: &Credentials,
    client: &Credentials,
    name: &str,
) -> (io::Result<()>, io::Result<()>) {
    let mut listener = listener(server);
    let port = listener.address().unwrap().port();
    thread::scope(|scope| {
        // Whoever is let in is hung up on: the other end waits for something to be said.
        let visitor = scope.spawn(move || match visitor(&mut listener) {
            Visitor::Welcome(..) => Ok(()),
            Visitor::Refused(_, why) => Err(why),
        });
        let heard = connect(name, port, client.client().unwrap()).and_then(|mut tls| {
            // With TLS 1.3 a client is done before the server has looked at its certificate.
            let mut word = [0];
            loop {
                match tls.receive(&mut word) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
                    result => return result.map(drop),
                }
            }
        });
        (visitor.join().unwrap(), heard)
    })
}

#[test]
fn two_ends_that_trust_each_other_meet_and_all_others_are_refused_with_a_reason() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let server = ours.end("localhost", false, &ours);
    let client = ours.end("host1", false, &ours);
    let (visitor, _) = meet(&server, &client, "localhost");
    assert!(visitor.is_ok(), "{visitor:?}");

    for (server, client, refused, heard) in [
        (&server, &theirs.end("host1", false, &ours), "unknownissuer", "fatal alert"),
        (&server, &ours.end("host1", true, &ours), "expired", "fatal alert"),
        (&server, &ours.end("host1", false, &theirs), "fatal alert", "unknownissuer"),
        (&ours.end("localhost", true, &ours), &client, "fatal alert", "expired"),
        (&ours.end("host2", false, &ours), &client, "fatal alert", "not valid for name"),
    ] {
        let (visitor, end) = meet(server, client, "localhost");
        let (why, end) = (visitor.unwrap_err().to_string(), end.unwrap_err().to_string());
        assert!(why.to_lowercase().contains(refused), "{refused}: {why}");
        assert!(end.to_lowercase().contains(heard), "{heard}: {end}");
    }
}

#[test]
fn who_shows_no_certificate_or_speaks_no_tls_is_refused() {
    let ours = Authority::new();
    let server = ours.end("localhost", false, &ours);
    let mut listener = listener(&server);
    let address = listener.address().unwrap();
    let mut stranger = TcpStream::connect(address).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let refused = visitor(&mut listener);
    assert!(matches!(refused, Visitor::Refused(..)), "{refused:?}");

    let mut roots = rustls::RootCertStore::empty();
    let root = rustls::pki_types::pem::PemObject::from_pem_slice(ours.certificate.as_bytes());
    roots.add(root.unwrap()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let nameless = thread::spawn(move || connect("localhost", address.port(), config.into()));
    let Visitor::Refused(_, why) = visitor(&mut listener) else { panic!("it is let in") };
    assert!(why.to_string().contains("no certificates"), "{why}");
    drop(nameless.join().unwrap());
}

#[test]
fn strangers_who_say_nothing_make_room_for_others() {
    let ours = Authority::new();
    let server = ours.end("localhost", false, &ours);
    let mut listener = listener(&server);
    let address = listener.address().unwrap();
    let silent: Vec<TcpStream> =
        (0..STRANGERS_MAX).map(|_| TcpStream::connect(address).unwrap()).collect();
    let client = ours.end("host1", false, &ours);
    let comes = thread::spawn(move || {
        connect("localhost", address.port(), client.client().unwrap()).map(drop)
    });
    let first = silent[0].local_addr().unwrap();
    match &visitors(&mut listener, 2)[..] {
        [Visitor::Refused(from, _), Visitor::Welcome(..)] => assert_eq!(*from, first),
        other => panic!("{other:?}"),
    }
    comes.join().unwrap().unwrap();
}

/// Both ends of a connection between two who trust each other.
fn pair() -> (Tls, Tls) {
    let ours = Authority::new();
    let (server, client) = (ours.end("localhost", false, &ours), ours.end("b", false, &ours));
    let mut listener = listener(&server);
    let port = listener.address().unwrap().port();
    let client = thread::spawn(move || connect("localhost", port, client.client().unwrap()));
    let Visitor::Welcome(server, _) = visitor(&mut listener) else { panic!("it is refused") };
    (*server, client.join().unwrap().unwrap())
}

#[test]
fn what_goes_in_at_one_end_comes_out_at_the_other_and_so_does_the_end() {
    let (server, client) = pair();
    let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (input, output) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
    let far = thread::spawn(move || relay(server, output.into(), input.into(), Until::EndOfInput));
    let (mut to, from) = std::io::pipe().map(|(read, write)| (write, read)).unwrap();
    let (mut back, into) = std::io::pipe().unwrap();
    let near = thread::spawn(move || {
        relay(client, OwnedFd::from(from), OwnedFd::from(into), Until::Goodbye)
    });
    let sent: Vec<u8> = (0..3_000_017_u32).map(|n| (n % 251) as u8).collect();
    let copy = sent.clone();
    let writes = thread::spawn(move || to.write_all(&copy).unwrap());
    let mut heard = Vec::new();
    back.read_to_end(&mut heard).unwrap();
    assert!(heard == sent, "{} bytes came back of {}", heard.len(), sent.len());
    writes.join().unwrap();
    near.join().unwrap().unwrap();
    far.join().unwrap().unwrap();
    assert!(cat.wait().unwrap().success());
}

#[test]
fn who_does_not_read_any_more_ends_it() {
    let (server, client) = pair();
    let (mut from_server, into) = std::io::pipe().unwrap();
    let (nothing, kept) = std::io::pipe().unwrap();
    let near = thread::spawn(move || relay(client, nothing.into(), into.into(), Until::Goodbye));
    let (source, mut sink) = std::io::pipe().unwrap();
    let (_unread, far_out) = std::io::pipe().unwrap();
    let far = thread::spawn(move || relay(server, source.into(), far_out.into(), Until::Goodbye));
    sink.write_all(b"word").unwrap();
    let mut word = [0; 4];
    from_server.read_exact(&mut word).unwrap();
    drop(from_server);
    near.join().unwrap().unwrap();
    far.join().unwrap().unwrap();
    drop(kept);
}

#[test]
fn a_key_that_others_can_read_and_files_that_are_something_else_are_refused_by_name() {
    let ours = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let files = ours.files(directory.path(), "a", false, &ours);
    let why = |files: &Files| Credentials::read(files).unwrap_err().to_string();
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(why(&files).contains("key.pem can be read by others"), "{}", why(&files));
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
    let swapped = Files { certificate: files.key.clone(), ..files.clone() };
    assert!(why(&swapped).contains("key.pem is no certificate in PEM"), "{}", why(&swapped));
    let missing = Files { peer_ca: "/nonexistent/ca.pem".into(), ..files.clone() };
    assert_eq!(why(&missing), "Cannot read /nonexistent/ca.pem");
    let other = ours.files(tempfile::tempdir().unwrap().path(), "b", false, &ours);
    assert!(matches!(Credentials::read(&other), Err(CredentialsError::Read { .. })));
}
