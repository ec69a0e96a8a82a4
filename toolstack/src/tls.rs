//! TLS 1.3 over a connection that does not block, for links.
//!
//! The sender of a migration is the server. It makes a key and a certificate for this one
//! migration; the certificate's fingerprint travels in the offer, over the stream, and is all that
//! the receiver trusts. The receiver proves itself by a token of the offer's secret, which it sends
//! through the encrypted connection ([`crate::doorman`]).
//!
//! What it is not: waiting. A call that cannot go on says `WouldBlock`.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{RecvFlags, SendFlags};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct,
    ServerConfig, ServerConnection, SignatureScheme,
};
use rxl_migrate::stream::link::{Fingerprint, fingerprint};
use serde::{Deserialize, Serialize};

/// The name in certificates. Nobody looks at it.
const NAME: &str = "rxl";

/// A key and its certificate.
#[derive(Clone, Serialize, Deserialize)]
pub struct Identity {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity")
    }
}

impl Identity {
    /// A new one.
    ///
    /// # Errors
    /// There is no randomness to be had.
    pub fn new() -> io::Result<Identity> {
        let made = rcgen::generate_simple_self_signed([NAME.to_owned()]);
        let rcgen::CertifiedKey { cert, signing_key } = made.map_err(io::Error::other)?;
        Ok(Identity { certificate: cert.der().to_vec(), key: signing_key.serialize_der() })
    }

    /// What the other end has to be told.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.certificate)
    }
}

/// An encrypted connection.
pub struct Tls {
    connection: Connection,
    socket: OwnedFd,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl AsFd for Tls {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Tls {
    /// The sender's end of the connection `socket`.
    pub(crate) fn server(socket: OwnedFd, identity: &Identity) -> io::Result<Tls> {
        let certificate = CertificateDer::from(identity.certificate.clone());
        let key = PrivatePkcs8KeyDer::from(identity.key.clone());
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .and_then(|config| {
                let config = config.with_no_client_auth();
                config.with_single_cert(vec![certificate], key.into())
            });
        let mut config = config.map_err(io::Error::other)?;
        // Nobody resumes.
        config.send_tls13_tickets = 0;
        let connection = ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
        Tls::over(socket, connection.into())
    }

    /// The receiver's end, which trusts one certificate.
    pub(crate) fn client(socket: OwnedFd, trusted: Fingerprint) -> io::Result<Tls> {
        let provider = provider();
        let schemes = provider.signature_verification_algorithms;
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { trusted, schemes }))
            .with_no_client_auth();
        let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        Tls::over(socket, connection.into())
    }

    /// One that has been set up elsewhere.
    pub(crate) fn over(socket: OwnedFd, mut connection: Connection) -> io::Result<Tls> {
        // Whoever puts something flushes it before the next.
        connection.set_buffer_limit(None);
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Tls { connection, socket })
    }

    /// Whether there is something that the connection has not taken yet.
    pub(crate) fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Encrypts `bytes`, all of them. [`Tls::flush`] sends them.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.connection.writer().write_all(bytes)
    }

    /// Sends what there is to send. `WouldBlock`: the connection takes no more now.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Raw(self.socket.as_fd())) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends so much of what there is to send as the connection takes now.
    pub(crate) fn flush_now(&mut self) -> io::Result<()> {
        match self.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Nothing more will be put: the peer is told, behind all that was.
    pub(crate) fn say_goodbye(&mut self) {
        self.connection.send_close_notify();
    }

    /// Whether the two ends have not agreed on keys yet.
    pub(crate) fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Takes what has come, without reading any of it. `WouldBlock`: there is nothing now.
    pub(crate) fn advance(&mut self) -> io::Result<()> {
        if self.connection.read_tls(&mut Raw(self.socket.as_fd()))? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let state = self.connection.process_new_packets();
        // Whatever is wrong, the peer is told as far as that goes.
        let sent = self.flush();
        state.map_err(|error| io::Error::new(ErrorKind::PermissionDenied, error))?;
        match sent {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Reads into `into`. 0: the connection has ended. `WouldBlock`: there is nothing now.
    pub(crate) fn receive(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(into) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // The peer may end without a word; whether all has come is seen elsewhere.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                result => return result,
            }
            match self.advance() {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => result?,
            }
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The socket without encryption.
struct Raw<'a>(BorrowedFd<'a>);

impl Read for Raw<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(self.0, into, RecvFlags::DONTWAIT)?.0)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(self.0, from, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Trusts the certificate with this fingerprint, whatever is in it, and no other.
#[derive(Debug)]
struct Pinned {
    trusted: Fingerprint,
    schemes: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if fingerprint(certificate) == self.trusted {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.schemes)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.supported_schemes()
    }
}
