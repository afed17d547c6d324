//! TLS as a client sees it: real sessions by rustls, and the plain part of an answer to a hello of any kind.
use std::{
    io::{self, Read},
    net::{SocketAddr, TcpStream},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, SupportedCipherSuite, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
};
use rustls_pki_types::{CertificateDer, ServerName};

use crate::{
    authority::Authority,
    wire::{Client, Wire},
};

/// Alerts of RFC 8446 §6 and RFC 6066 §3, by number.
pub mod alert {
    pub const CLOSE_NOTIFY: u8 = 0;
    pub const UNEXPECTED_MESSAGE: u8 = 10;
    pub const RECORD_OVERFLOW: u8 = 22;
    pub const HANDSHAKE_FAILURE: u8 = 40;
    pub const ILLEGAL_PARAMETER: u8 = 47;
    pub const DECODE_ERROR: u8 = 50;
    pub const PROTOCOL_VERSION: u8 = 70;
    pub const INTERNAL_ERROR: u8 = 80;
    pub const USER_CANCELED: u8 = 90;
    pub const UNRECOGNIZED_NAME: u8 = 112;
    pub const NO_APPLICATION_PROTOCOL: u8 = 120;
}

pub fn config(authority: &Authority, versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
    config_with(authority, versions, ring::DEFAULT_CIPHER_SUITES.to_vec())
}

pub fn config_with(
    authority: &Authority,
    versions: &[&'static SupportedProtocolVersion],
    cipher_suites: Vec<SupportedCipherSuite>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der()).expect("the authority's own certificate");
    let provider = CryptoProvider { cipher_suites, ..ring::default_provider() };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .expect("a suite for each version")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// A session whose handshake is complete.
pub fn connect(address: SocketAddr, name: &str, config: Arc<ClientConfig>) -> Result<Client> {
    let socket = TcpStream::connect(address).context("connecting")?;
    let session = session(name, config)?;
    finish(socket, session)
}

pub fn session(name: &str, config: Arc<ClientConfig>) -> Result<ClientConnection> {
    Ok(ClientConnection::new(config, ServerName::try_from(name.to_owned())?)?)
}

/// Completes a handshake, whatever of it was sent already.
pub fn finish(mut socket: TcpStream, mut session: ClientConnection) -> Result<Client> {
    socket.set_read_timeout(Some(crate::PATIENCE))?;
    while session.is_handshaking() {
        match session.complete_io(&mut socket) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            progress => drop(progress.context("handshake")?),
        }
    }
    socket.set_read_timeout(None)?;
    Ok(Client::new(Wire::Tls(socket, Box::new(session))))
}

/// The bytes of a real first flight: one record with one ClientHello.
pub fn first_flight(session: &mut ClientConnection) -> Result<Vec<u8>> {
    let mut flight = Vec::new();
    while session.wants_write() {
        session.write_tls(&mut flight)?;
    }
    Ok(flight)
}

/// What came back for a hello, as far as it can be read without keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// TLS 1.2 shows the certificate.
    Certificate(CertificateDer<'static>),
    /// TLS 1.3 hides it.
    ServerHello13,
    HelloRetryRequest,
    /// A fatal alert, and then the connection's end.
    Alert(u8),
    /// An HTTP status, in the clear.
    Http(u16),
    /// The orderly end without a byte.
    Closed,
    Reset,
}

/// Reads until it is clear what the answer is; an alert counts with the end that must follow it.
pub fn answer(socket: &mut TcpStream) -> Result<Answer> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(crate::PATIENCE))?;
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = plain_answer(&bytes)? {
            return Ok(answer);
        }
        let mut part = [0; 1 << 14];
        match socket.read(&mut part) {
            Ok(0) => return ended(&bytes),
            Ok(length) => bytes.extend_from_slice(&part[..length]),
            // A read with a time-out is not restarted when the process was stopped for a moment.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset && bytes.is_empty() => {
                return Ok(Answer::Reset);
            }
            Err(error) => return Err(error).with_context(|| format!("after {bytes:02x?}")),
        }
    }
}

fn ended(bytes: &[u8]) -> Result<Answer> {
    const FATAL: u8 = 2;
    match bytes {
        [] => Ok(Answer::Closed),
        [21, 3, _, 0, 2, FATAL, description] => Ok(Answer::Alert(*description)),
        _ if bytes.starts_with(b"HTTP/1.") => {
            let status = bytes.get(9..12).and_then(|status| str::from_utf8(status).ok()?.parse().ok());
            status.map(Answer::Http).context("an answer without a status")
        }
        _ => bail!("the answer ends in the middle: {bytes:02x?}"),
    }
}

/// The first handshake messages, if all of those that tell are here.
fn plain_answer(bytes: &[u8]) -> Result<Option<Answer>> {
    let Some(messages) = handshake_messages(bytes) else { return Ok(None) };
    let mut rest = &messages[..];
    while let Some((&[kind, l2, l1, l0], tail)) = rest.split_first_chunk::<4>() {
        let length = usize::from(l2) << 16 | usize::from(l1) << 8 | usize::from(l0);
        let Some((body, tail)) = tail.split_at_checked(length) else { return Ok(None) };
        match kind {
            2 => {
                if let Some(answer) = server_hello(body)? {
                    return Ok(Some(answer));
                }
            }
            // The list's length, then the leaf's: three bytes each.
            11 => {
                let leaf = body.get(3..6).context("an empty certificate list")?;
                let length = usize::from(leaf[0]) << 16 | usize::from(leaf[1]) << 8 | usize::from(leaf[2]);
                let leaf = body.get(6..6 + length).context("a cut certificate")?;
                return Ok(Some(Answer::Certificate(leaf.to_vec().into())));
            }
            _ => {}
        }
        rest = tail;
    }
    Ok(None)
}

/// The fragments of all complete handshake records at the beginning.
fn handshake_messages(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut messages = Vec::new();
    let mut rest = bytes;
    while let Some((&[kind, 3, _, high, low], tail)) = rest.split_first_chunk::<5>() {
        let length = usize::from(high) << 8 | usize::from(low);
        let Some((fragment, tail)) = tail.split_at_checked(length) else { break };
        if kind != 22 {
            break;
        }
        messages.extend_from_slice(fragment);
        rest = tail;
    }
    (!messages.is_empty()).then_some(messages)
}

fn server_hello(body: &[u8]) -> Result<Option<Answer>> {
    use tls_parser::{
        TlsExtension, TlsMessageHandshake, parse_tls_extensions, parse_tls_handshake_msg_server_hello,
    };
    /// The random that makes a ServerHello a HelloRetryRequest begins so (RFC 8446 §4.1.3).
    const RETRY: [u8; 4] = [0xcf, 0x21, 0xad, 0x74];
    let Ok((_, TlsMessageHandshake::ServerHello(hello))) = parse_tls_handshake_msg_server_hello(body) else {
        bail!("a ServerHello that can't be parsed: {body:02x?}");
    };
    let extensions = parse_tls_extensions(hello.ext.unwrap_or_default()).map(|(_, found)| found);
    let extensions = extensions.map_err(|error| anyhow::anyhow!("a ServerHello's extensions: {error}"))?;
    let is_13 = extensions.iter().any(|extension| matches!(extension, TlsExtension::SupportedVersions(_)));
    if hello.random.starts_with(&RETRY) {
        return Ok(Some(Answer::HelloRetryRequest));
    }
    Ok(is_13.then_some(Answer::ServerHello13))
}
