//! Certificates and keys from PEM files, and what TLS is set up with.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Largest file that is read: a chain of certificates has some KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Permissions that a key's file may not give: any to the group or to others.
const MODE_OF_OTHERS: u32 = 0o077;

/// Files that are of no use.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// One cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One is not what it should be.
    #[error("{} is no {what} in PEM format", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        source: pem::Error,
    },
    /// Others than its owner may read the key.
    #[error("{} can be read by others: chmod 600, and make a new key if one did", path.display())]
    Open {
        /// Which.
        path: PathBuf,
    },
    /// The certificates that are to be trusted are none.
    #[error("{} holds no certificate that can sign others", path.display())]
    Roots {
        /// Which.
        path: PathBuf,
    },
    /// Certificate and key do not go together, or are of a sort that is not known here.
    #[error("certificate and key cannot be used")]
    Tls(#[from] rustls::Error),
    /// The same of the certificates to trust.
    #[error("the certificates to trust cannot be used")]
    Verifier(#[from] VerifierBuilderError),
}

/// Where they are.
#[derive(Clone, Debug)]
pub struct Files {
    /// This end's certificate, and those between it and the one that the peer trusts.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// What the peer's certificate has to be signed by.
    pub peer_ca: PathBuf,
}

/// What an end shows, and what it trusts.
#[derive(Debug)]
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

impl Credentials {
    /// Reads `files`.
    ///
    /// # Errors
    /// One cannot be read or is not what it should be; others may read the key.
    pub fn read(files: &Files) -> Result<Credentials, CredentialsError> {
        let chain = certificates(&files.certificate)?;
        let key = key(&files.key)?;
        let mut roots = RootCertStore::empty();
        let (usable, _) = roots.add_parsable_certificates(certificates(&files.peer_ca)?);
        if usable == 0 {
            return Err(CredentialsError::Roots { path: files.peer_ca.clone() });
        }
        Ok(Credentials { chain, key, roots: Arc::new(roots) })
    }

    /// For the end that listens: whoever connects has to show a certificate.
    ///
    /// # Errors
    /// They do not go together.
    pub fn server(&self) -> Result<Arc<ServerConfig>, CredentialsError> {
        let roots = Arc::clone(&self.roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        // Nobody resumes.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// For the end that connects: the other has to have a certificate for the name by which it is
    /// reached.
    ///
    /// # Errors
    /// They do not go together.
    pub fn client(&self) -> Result<Arc<ClientConfig>, CredentialsError> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        Ok(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let bytes = read(path)?;
    let what = "certificate";
    let failed = |source| CredentialsError::Pem { path: path.to_owned(), what, source };
    let all = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(failed)?;
    if all.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(all) }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    let bytes = read(path)?;
    let mode = fs::metadata(path).map(|metadata| metadata.permissions().mode());
    let mode = mode.map_err(|source| CredentialsError::Read { path: path.to_owned(), source })?;
    if mode & MODE_OF_OTHERS != 0 {
        return Err(CredentialsError::Open { path: path.to_owned() });
    }
    let failed =
        |source| CredentialsError::Pem { path: path.to_owned(), what: "private key", source };
    PrivateKeyDer::from_pem_slice(&bytes).map_err(failed)
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    use io::Read;
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|source| CredentialsError::Read { path: path.to_owned(), source })?;
    Ok(bytes)
}
