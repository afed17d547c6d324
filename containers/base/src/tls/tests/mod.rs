//! TLS against real clients: the certificates, servers and clients that the tests share.

mod clients;
mod forger;
mod handshake;
mod moves;
mod record;
mod rekeying;
mod session;

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::crypto::ring;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedCipherSuite,
    SupportedProtocolVersion,
};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

use super::handshake::HandshakeError;
use super::message::Partial;
use super::record::{Counters, Session};
use super::secrets::{Aead, Traffic, TrafficSecret, Version};
use super::{Acceptor, SessionState, TlsStream};
use crate::socket::Socket;

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A certificate of either kind of key, of one authority.
pub(super) struct Site {
    pub(super) certificate_pem: String,
    pub(super) key_pem: String,
    pub(super) authority_pem: String,
    roots: Arc<RootCertStore>,
}

pub(super) fn ecdsa_site() -> &'static Site {
    static SITE: OnceLock<Site> = OnceLock::new();
    SITE.get_or_init(|| Site::new(&KeyPair::generate().unwrap()))
}

pub(super) fn rsa_site() -> &'static Site {
    static SITE: OnceLock<Site> = OnceLock::new();
    SITE.get_or_init(|| {
        let made = Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"])
            .output()
            .expect("openssl runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Site::new(&KeyPair::from_pem(&String::from_utf8(made.stdout).unwrap()).unwrap())
    })
}

impl Site {
    fn new(key: &KeyPair) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // OpenSSL takes a certificate whose issuer has its own name for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, "Authority of the tests");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let params = CertificateParams::new(["echo.faas.local".to_owned()]).unwrap();
        let certificate = params.signed_by(key, &authority).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        Self {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            authority_pem: authority.pem(),
            roots: Arc::new(roots),
        }
    }

    pub(super) fn acceptor(&self) -> Acceptor {
        Acceptor::from_pem(self.certificate_pem.as_bytes(), self.key_pem.as_bytes()).unwrap()
    }

    pub(super) fn client_config(&self, suite: SupportedCipherSuite) -> ClientConfig {
        let mut provider = ring::default_provider();
        provider.cipher_suites = vec![suite];
        ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[suite_version(suite)])
            .unwrap()
            .with_root_certificates(Arc::clone(&self.roots))
            .with_no_client_auth()
    }
}

fn suite_version(suite: SupportedCipherSuite) -> &'static SupportedProtocolVersion {
    match suite {
        SupportedCipherSuite::Tls13(_) => &rustls::version::TLS13,
        SupportedCipherSuite::Tls12(_) => &rustls::version::TLS12,
    }
}

/// Every suite there is, with a site whose key fits.
pub(super) fn all_suites() -> Vec<(SupportedCipherSuite, &'static Site)> {
    ring::ALL_CIPHER_SUITES
        .iter()
        .map(|suite| {
            let rsa = format!("{:?}", suite.suite()).contains("_RSA_");
            (*suite, if rsa { rsa_site() } else { ecdsa_site() })
        })
        .collect()
}

/// One suite of each version.
pub(super) fn one_suite_each() -> [(SupportedCipherSuite, &'static Site); 2] {
    [
        (ring::cipher_suite::TLS13_AES_128_GCM_SHA256, ecdsa_site()),
        (ring::cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, ecdsa_site()),
    ]
}

#[derive(Debug)]
pub(super) enum Outcome {
    Served(io::Result<()>),
    Refused(HandshakeError),
}

/// A TLS server on a thread of its own; each connection ends with an outcome.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    outcomes: mpsc::Receiver<Outcome>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn start<Serve, Serving>(acceptor: Acceptor, serve: Serve) -> Self
    where
        Serve: Fn(TlsStream) -> Serving + Send + 'static,
        Serving: Future<Output = io::Result<()>> + 'static,
    {
        Self::start_with_deadline(acceptor, PATIENCE, serve)
    }

    pub(super) fn start_with_deadline<Serve, Serving>(
        acceptor: Acceptor,
        within: Duration,
        serve: Serve,
    ) -> Self
    where
        Serve: Fn(TlsStream) -> Serving + Send + 'static,
        Serving: Future<Output = io::Result<()>> + 'static,
    {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (report, outcomes) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let tasks = tokio::task::LocalSet::new();
            tasks.block_on(&runtime, async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let serve = Rc::new(serve);
                let accepting = async {
                    loop {
                        let socket = listener.accept().await.unwrap().0.into_std().unwrap();
                        let (acceptor, serve, report) = (acceptor.clone(), Rc::clone(&serve), report.clone());
                        tokio::task::spawn_local(async move {
                            let outcome = match acceptor.accept(Socket::from(socket), within).await {
                                Ok(stream) => Outcome::Served(serve(stream).await),
                                Err(failure) => {
                                    linger(failure.socket).await;
                                    Outcome::Refused(failure.error)
                                }
                            };
                            // A test that has seen enough is gone.
                            let _ = report.send(outcome);
                        });
                    }
                };
                tokio::select! {
                    _ = accepting => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, outcomes, stop: Some(stop), thread: Some(thread) }
    }

    pub(super) fn outcome(&self) -> Outcome {
        self.outcomes.recv_timeout(PATIENCE).expect("the connection ends")
    }

    #[track_caller]
    pub(super) fn assert_served(&self) {
        let outcome = self.outcome();
        assert!(matches!(outcome, Outcome::Served(Ok(()))), "{outcome:?}");
    }

    pub(super) fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    pub(super) fn client(&self, config: ClientConfig) -> Client<TcpStream> {
        client_over(self.connect(), config)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// What a caller does with a socket after an alert: nothing unread may turn it into a reset.
pub(super) async fn linger(mut socket: Socket) {
    let _ = socket.shutdown().await;
    let mut discarded = [0; 4096];
    while socket.read(&mut discarded).await.is_ok_and(|bytes| bytes > 0) {}
}

pub(super) type Client<T> = StreamOwned<ClientConnection, T>;

pub(super) fn client_over<T: Read + Write>(transport: T, config: ClientConfig) -> Client<T> {
    let name = ServerName::try_from("echo.faas.local").unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), transport)
}

/// Sends back what comes until close_notify, then closes in the same way. `between` gets the stream after every
/// write.
pub(super) async fn echo<Between>(mut stream: TlsStream, mut between: Between) -> io::Result<()>
where
    Between: AsyncFnMut(TlsStream) -> TlsStream,
{
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let bytes = match stream.read(&mut buffer).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                linger(stream.into_socket()).await;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        if bytes == 0 {
            stream.shutdown().await?;
            return Ok(());
        }
        stream.write_all(&buffer[..bytes]).await?;
        stream = between(stream).await;
    }
}

pub(super) async fn plain_echo(stream: TlsStream) -> io::Result<()> {
    echo(stream, async |stream| stream).await
}

/// Takes the session apart, sends its state through the codec and puts it together again.
pub(super) async fn moved(mut stream: TlsStream) -> TlsStream {
    stream.flush().await.unwrap();
    let (socket, state) = stream.into_parts().unwrap();
    let encoded = state.encode();
    drop(state);
    TlsStream::from_parts(socket, SessionState::decode(&encoded).unwrap())
}

pub(super) const KINDS: [(Version, Aead); 6] = [
    (Version::Tls12, Aead::Aes128Gcm),
    (Version::Tls12, Aead::Aes256Gcm),
    (Version::Tls12, Aead::Chacha20Poly1305),
    (Version::Tls13, Aead::Aes128Gcm),
    (Version::Tls13, Aead::Aes256Gcm),
    (Version::Tls13, Aead::Chacha20Poly1305),
];

fn traffic(version: Version, aead: Aead, seed: u64) -> Traffic {
    let secret = TrafficSecret::new(aead, &Random(seed).bytes(aead.secret_bytes())).unwrap();
    Traffic { sequence: 0, keys: secret.keys(aead), secret: (version == Version::Tls13).then_some(secret) }
}

/// One end of a session with made-up secrets.
pub(super) fn session(version: Version, aead: Aead, transmit_seed: u64, receive_seed: u64) -> Session {
    Session {
        version,
        aead,
        transmit: traffic(version, aead, transmit_seed),
        receive: traffic(version, aead, receive_seed),
        counters: Counters::default(),
        message: Partial::NONE,
        peer_closed: false,
    }
}

/// A repeatable source of choices.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Small numbers as often as large ones.
    pub(super) fn size(&mut self, max: usize) -> usize {
        let bits = self.below(max.ilog2() as usize + 1);
        1 + self.below((2 << bits).min(max))
    }

    pub(super) fn bytes(&mut self, bytes: usize) -> Vec<u8> {
        let mut output = Vec::with_capacity(bytes + 8);
        while output.len() < bytes {
            output.extend_from_slice(&self.next().to_le_bytes());
        }
        output.truncate(bytes);
        output
    }
}
