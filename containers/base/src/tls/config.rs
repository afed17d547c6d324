//! One function's TLS configuration, made of its certificate chain and key.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::socket::Socket;
use rustls::crypto::ring;
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

use super::handshake::{self, HandshakeFailure};
use super::stream::TlsStream;
use super::tickets::Tickets;

/// The functions speak nothing else (RFC 7301 §6).
const ALPN: &[u8] = b"http/1.1";

/// A chain is a few KiB; a longer file is not one.
const PEM_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("can't read {origin}")]
    Read { origin: String, source: io::Error },
    #[error("{origin} is not PEM")]
    Pem { origin: String, source: pem::Error },
    #[error("{origin} holds no certificate")]
    NoCertificate { origin: String },
    #[error("{origin} holds no private key")]
    NoKey { origin: String },
    #[error("{origin} holds no private key that TLS can use")]
    Key { origin: String, source: rustls::Error },
    #[error("the key in {key} doesn't belong to the certificate in {certificate}")]
    Mismatch { certificate: String, key: String, source: rustls::Error },
    #[error("{origin} holds a certificate that can't be a trust anchor")]
    Anchor { origin: String, source: rustls::Error },
    #[error("can't make keys for session tickets")]
    Tickets(#[source] rustls::Error),
    #[error("the parent's keys for session tickets")]
    SharedTickets(#[source] io::Error),
    #[error("can't set up TLS")]
    Setup(#[source] rustls::Error),
}

/// The server's side of TLS with one certificate. All workers of an instance share one.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    /// `None`: this instance's alone, which the configuration has.
    tickets: Option<Arc<Tickets>>,
    identity: Arc<CertifiedKey>,
}

impl Acceptor {
    pub fn from_paths(certificate: &Path, key: &Path) -> Result<Self, ConfigError> {
        let open = |path: &Path| {
            let origin = path.display().to_string();
            File::open(path)
                .map_err(|source| ConfigError::Read { origin: origin.clone(), source })
                .and_then(|file| Pem::read(&file, origin))
        };
        Self::new(&open(certificate)?, &open(key)?, None)
    }

    /// For files that a parent has opened. Their offset is shared with whoever else holds them and doesn't matter. The
    /// memory is that of the keys by which the function's instances know each other's session tickets; without it, this one
    /// knows only its own.
    pub fn from_files(
        certificate: &File,
        key: &File,
        ticket_keys: Option<OwnedFd>,
    ) -> Result<Self, ConfigError> {
        let certificate = Pem::read(certificate, "the certificate's file".to_owned())?;
        let key = Pem::read(key, "the key's file".to_owned())?;
        Self::new(&certificate, &key, ticket_keys)
    }

    pub fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Self, ConfigError> {
        let certificate =
            Pem { origin: "the certificate".to_owned(), bytes: Zeroizing::new(certificate.to_vec()) };
        let key = Pem { origin: "the key".to_owned(), bytes: Zeroizing::new(key.to_vec()) };
        Self::new(&certificate, &key, None)
    }

    fn new(certificate: &Pem, key: &Pem, ticket_keys: Option<OwnedFd>) -> Result<Self, ConfigError> {
        let mut certified = CertifiedKey::new(certificate.chain()?, key.signing_key()?);
        // An unknown consistency is that of a key whose public half can't be had; ring's all can.
        certified.keys_match().map_err(|source| ConfigError::Mismatch {
            certificate: certificate.origin.clone(),
            key: key.origin.clone(),
            source,
        })?;
        certified.ocsp = None;
        let identity = Arc::new(certified);
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(ConfigError::Setup)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&identity))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_secret_extraction = true;
        // A replayed request must not reach a function.
        config.max_early_data_size = 0;
        let certificate = identity.end_entity_cert().map_err(ConfigError::Setup)?;
        let tickets = ticket_keys
            .map(|memory| Tickets::new(memory, certificate).map(Arc::new))
            .transpose()
            .map_err(ConfigError::SharedTickets)?;
        if tickets.is_none() {
            config.ticketer = ring::Ticketer::new().map_err(ConfigError::Tickets)?;
        }
        // Tickets need nothing to be kept here; a cache would keep the secrets of clients that never come back.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), tickets, identity })
    }

    /// The function's certificate and key, which also prove to other functions who it is.
    pub fn identity(&self) -> &Arc<CertifiedKey> {
        &self.identity
    }

    /// Makes the handshake, which must be over `within` this time. On failure the client has been told, and the
    /// socket comes back for a lingering close: an unread byte would turn the alert into a reset.
    pub async fn accept(&self, socket: Socket, within: Duration) -> Result<TlsStream, HandshakeFailure> {
        let secrets = Arc::new(SecretCapture::default());
        let mut config = ServerConfig::clone(&self.config);
        config.key_log = Arc::<SecretCapture>::clone(&secrets);
        if let Some(tickets) = &self.tickets {
            config.ticketer = tickets.for_connection();
        }
        handshake::accept(Arc::new(config), &secrets, socket, within).await
    }
}

/// Certificates that vouch for others, from a file that the parent has opened.
pub fn anchors_from_file(file: &File) -> Result<RootCertStore, ConfigError> {
    anchors(&Pem::read(file, "the trust anchors' file".to_owned())?)
}

pub fn anchors_from_path(path: &Path) -> Result<RootCertStore, ConfigError> {
    let origin = path.display().to_string();
    let file = File::open(path).map_err(|source| ConfigError::Read { origin: origin.clone(), source })?;
    anchors(&Pem::read(&file, origin)?)
}

fn anchors(pem: &Pem) -> Result<RootCertStore, ConfigError> {
    let mut roots = RootCertStore::empty();
    for certificate in pem.chain()? {
        roots
            .add(certificate)
            .map_err(|source| ConfigError::Anchor { origin: pem.origin.clone(), source })?;
    }
    Ok(roots)
}

/// Receives the traffic secrets of one connection, which extraction doesn't give and KeyUpdate needs.
#[derive(Default)]
pub(super) struct SecretCapture {
    pub(super) client: OnceLock<Zeroizing<Vec<u8>>>,
    pub(super) server: OnceLock<Zeroizing<Vec<u8>>>,
}

impl SecretCapture {
    fn slot(&self, label: &str) -> Option<&OnceLock<Zeroizing<Vec<u8>>>> {
        match label {
            "CLIENT_TRAFFIC_SECRET_0" => Some(&self.client),
            "SERVER_TRAFFIC_SECRET_0" => Some(&self.server),
            _ => None,
        }
    }
}

impl rustls::KeyLog for SecretCapture {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        if let Some(slot) = self.slot(label) {
            // A connection has one of each; a second one would be found out by the check against the extracted keys.
            let _ = slot.set(Zeroizing::new(secret.to_vec()));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        self.slot(label).is_some()
    }
}

impl fmt::Debug for SecretCapture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SecretCapture")
    }
}

struct Pem {
    origin: String,
    bytes: Zeroizing<Vec<u8>>,
}

impl Pem {
    fn read(file: &File, origin: String) -> Result<Self, ConfigError> {
        match read_from_start(file) {
            Ok(bytes) => Ok(Self { origin, bytes }),
            Err(source) => Err(ConfigError::Read { origin, source }),
        }
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
        let chain = CertificateDer::pem_slice_iter(&self.bytes)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| ConfigError::Pem { origin: self.origin.clone(), source })?;
        if chain.is_empty() {
            return Err(ConfigError::NoCertificate { origin: self.origin.clone() });
        }
        Ok(chain)
    }

    fn signing_key(&self) -> Result<Arc<dyn rustls::sign::SigningKey>, ConfigError> {
        let mut der = PrivateKeyDer::from_pem_slice(&self.bytes).map_err(|source| match source {
            pem::Error::NoItemsFound => ConfigError::NoKey { origin: self.origin.clone() },
            source => ConfigError::Pem { origin: self.origin.clone(), source },
        })?;
        let key = ring::sign::any_supported_type(&der);
        der.zeroize();
        key.map_err(|source| ConfigError::Key { origin: self.origin.clone(), source })
    }
}

/// Reads by position, because a restarted process gets the same open file, with the offset where its predecessor
/// left it.
fn read_from_start(file: &File) -> io::Result<Zeroizing<Vec<u8>>> {
    let length = file.metadata()?.len();
    if length > PEM_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "longer than any certificate chain or key"));
    }
    let mut bytes = Zeroizing::new(vec![0; length as usize]);
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::super::tests::{ecdsa_site, rsa_site};
    use super::*;

    fn file(content: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file
    }

    fn refusal(outcome: Result<Acceptor, ConfigError>) -> String {
        outcome.err().unwrap().to_string()
    }

    #[test]
    fn files_are_read_from_their_start_however_often() {
        let site = ecdsa_site();
        let (certificate, mut key) = (file(&site.certificate_pem), file(&site.key_pem));
        for offset in [0, 10, 1 << 20] {
            key.seek(SeekFrom::Start(offset)).unwrap();
            assert!(Acceptor::from_files(&certificate, &key, None).is_ok());
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_file() {
        let site = ecdsa_site();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str, content: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let certificate = path("certificate.pem", &site.certificate_pem);
        let key = path("key.pem", &site.key_pem);
        let other_key = path("other_key.pem", &rsa_site().key_pem);
        let empty = path("empty.pem", "");
        let cut = path("cut.pem", &site.key_pem[..site.key_pem.len() - 30]);
        let nonsense = path("nonsense.pem", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
        let large = path("large.pem", &"x".repeat(PEM_BYTES_MAX as usize + 1));
        let missing = directory.path().join("missing.pem");
        assert!(Acceptor::from_paths(&certificate, &key).is_ok());
        for (certificate, key, wrong, reason) in [
            (&missing, &key, "missing.pem", "can't read"),
            (&certificate, &missing, "missing.pem", "can't read"),
            (&large, &key, "large.pem", "can't read"),
            (&empty, &key, "empty.pem", "holds no certificate"),
            (&key, &key, "key.pem", "holds no certificate"),
            (&certificate, &empty, "empty.pem", "holds no private key"),
            (&certificate, &certificate, "certificate.pem", "holds no private key"),
            (&certificate, &cut, "cut.pem", "is not PEM"),
            (&certificate, &nonsense, "nonsense.pem", "holds no private key"),
            (&certificate, &other_key, "other_key.pem", "doesn't belong"),
        ] {
            let said = refusal(Acceptor::from_paths(certificate, key));
            assert!(said.contains(wrong) && said.contains(reason), "{wrong}: {said}");
        }
    }
}
