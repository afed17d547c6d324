//! The TLS client's configuration, and the shape in which its first flight leaves.

use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::client::{ClientSessionMemoryCache, Resumption};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::order::{Hello, Tls, Version};

/// Long enough that a gateway has taken one segment before the next one comes.
const BETWEEN_SEGMENTS: Duration = Duration::from_millis(2);
/// What Ethernet leaves of 1500 bytes with TCP's time stamps.
const SEGMENT_BYTES: usize = 1448;
/// What an X25519MLKEM768 key share adds to a hello (1184 + 32 bytes and their header), given by names of protocols
/// that nobody speaks: what counts for a gateway is the length.
const PADDING_PROTOCOLS: usize = 5;
const PADDING_PROTOCOL_BYTES: usize = 243;

/// Sessions of one client: it resumes its own.
const SESSIONS: usize = 8;

#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    hello: Hello,
    pub resume: bool,
}

impl Client {
    pub fn new(tls: &Tls) -> Result<Self> {
        let pem = fs::read(&tls.authority)
            .with_context(|| format!("cannot read the CA {}", tls.authority.display()))?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&pem).context("the CA's certificate")?)?;
        let versions = match tls.version {
            Version::V12 => &[&rustls::version::TLS12],
            Version::V13 => &[&rustls::version::TLS13],
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = match tls.resume {
            true => Resumption::store(Arc::new(ClientSessionMemoryCache::new(SESSIONS))),
            false => Resumption::disabled(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        if tls.hello == Hello::Large {
            let padding =
                (0..PADDING_PROTOCOLS).map(|index| vec![b'a' + index as u8; PADDING_PROTOCOL_BYTES]);
            config.alpn_protocols.extend(padding);
        }
        Ok(Self { config: Arc::new(config), hello: tls.hello, resume: tls.resume })
    }

    /// The connection with its first flight in the buffer.
    pub fn begin(&self, host: &str) -> Result<ClientConnection> {
        let name = ServerName::try_from(host.to_owned())?;
        Ok(ClientConnection::new(Arc::clone(&self.config), name)?)
    }

    pub async fn send_hello(&self, session: &mut ClientConnection, socket: &mut TcpStream) -> io::Result<()> {
        let mut hello = Vec::new();
        while session.wants_write() {
            session.write_tls(&mut hello)?;
        }
        match self.hello {
            Hello::Whole => socket.write_all(&hello).await,
            Hello::Large => {
                for segment in hello.chunks(SEGMENT_BYTES) {
                    socket.write_all(segment).await?;
                }
                Ok(())
            }
            Hello::Split { segments } => {
                for (index, segment) in hello.chunks(hello.len().div_ceil(segments.max(1))).enumerate() {
                    if index > 0 {
                        sleep(BETWEEN_SEGMENTS).await;
                    }
                    socket.write_all(segment).await?;
                }
                Ok(())
            }
        }
    }
}
