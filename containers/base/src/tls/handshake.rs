//! A connection's handshake: driven by rustls, record by record, and handed over to the record layer at its end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::socket::Socket;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion, ServerConfig};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::config::SecretCapture;
use super::message::Partial;
use super::record::{Counters, HEADER_BYTES, RECORD_BYTES_MAX, RecordLayer, Session};
use super::secrets::{Aead, KEY_BYTES_MAX, Traffic, TrafficKeys, TrafficSecret, Version};
use super::stream::TlsStream;

/// What a client may send before its handshake is over: two hellos, if the first had no usable key share, and the
/// few hundred bytes that finish it.
const HANDSHAKE_BYTES_MAX: usize = 2 * common::limits::CLIENT_HELLO_BYTES as usize + 4096;

/// Most hellos fit, those with a post-quantum key share too.
const FIRST_READ_BYTES: usize = 4096;

/// No content type has this number.
const NOT_A_RECORD: [u8; HEADER_BYTES] = [0xff, 3, 3, 0, 0];

/// An alert goes into an empty socket buffer. Where that takes time, the client isn't worth it.
const ALERT_WITHIN: Duration = Duration::from_secs(1);

/// The socket of a connection that didn't become a session. The client has been told why.
#[derive(Debug)]
pub struct HandshakeFailure {
    pub socket: Socket,
    pub error: HandshakeError,
}

#[derive(Debug, Error)]
pub enum HandshakeError {
    #[error("the connection failed during the handshake")]
    Io(#[from] io::Error),
    #[error("the client left during the handshake")]
    Closed,
    #[error("the handshake took too long")]
    TimedOut,
    #[error("the client sent more than a handshake needs")]
    TooLong,
    #[error("the client doesn't speak TLS")]
    NotTls,
    #[error("the handshake failed: {0}")]
    Tls(Box<rustls::Error>),
    #[error("the handshake ended in a state that can't be taken over: {0}")]
    Unsupported(&'static str),
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(Box::new(error))
    }
}

impl HandshakeError {
    /// For what rustls doesn't know of; its own errors make their own alerts.
    fn alert(&self) -> AlertDescription {
        match self {
            Self::TimedOut => AlertDescription::UserCanceled,
            Self::TooLong => AlertDescription::DecodeError,
            Self::NotTls => AlertDescription::UnexpectedMessage,
            Self::Io(_) | Self::Closed | Self::Tls(_) | Self::Unsupported(_) => {
                AlertDescription::InternalError
            }
        }
    }
}

/// A fatal alert for a client with which no keys are agreed.
pub fn plaintext_alert(description: AlertDescription) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description.into()]
}

pub(super) async fn accept(
    config: Arc<ServerConfig>,
    secrets: &SecretCapture,
    socket: Socket,
    within: Duration,
) -> Result<TlsStream, HandshakeFailure> {
    let connection = match UnbufferedServerConnection::new(config) {
        Ok(connection) => connection,
        Err(error) => return Err(HandshakeFailure { socket, error: error.into() }),
    };
    let mut handshake = Handshake {
        socket,
        connection,
        input: Vec::new(),
        fed_bytes: 0,
        received_bytes: 0,
        output: Vec::new(),
        answered: false,
    };
    let outcome = timeout(within, handshake.run()).await.unwrap_or(Err(HandshakeError::TimedOut));
    match outcome {
        Ok(()) => handshake.finish(secrets),
        Err(error) => Err(handshake.fail(error).await),
    }
}

struct Handshake {
    socket: Socket,
    connection: UnbufferedServerConnection,
    /// What was received. rustls sees only the first `fed_bytes`, whole records: what comes after the client's last
    /// handshake record is left for the record layer, because extraction would silently drop it.
    input: Vec<u8>,
    fed_bytes: usize,
    received_bytes: usize,
    output: Vec<u8>,
    /// rustls has produced something, so a plaintext alert may come too late.
    answered: bool,
}

enum Progress {
    NeedsRecord,
    Complete,
}

impl Handshake {
    async fn run(&mut self) -> Result<(), HandshakeError> {
        loop {
            let progress = self.advance()?;
            let tickets_only = matches!(progress, Progress::Complete)
                && self.connection.protocol_version() == Some(ProtocolVersion::TLSv1_3);
            // Nobody waits for TLS 1.3's tickets: they go with the first answer.
            if !tickets_only {
                self.flush().await?;
            }
            match progress {
                Progress::Complete => return Ok(()),
                Progress::NeedsRecord => self.feed_record().await?,
            }
        }
    }

    fn advance(&mut self) -> Result<Progress, HandshakeError> {
        loop {
            let UnbufferedStatus { discard, state, .. } =
                self.connection.process_tls_records(&mut self.input[..self.fed_bytes]);
            let progress = match state {
                Ok(ConnectionState::EncodeTlsData(data)) => {
                    self.answered = true;
                    encode(data, &mut self.output).map(|()| None)
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Ok(None)
                }
                Ok(ConnectionState::BlockedHandshake) => Ok(Some(Progress::NeedsRecord)),
                Ok(ConnectionState::WriteTraffic(_)) => Ok(Some(Progress::Complete)),
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(HandshakeError::Closed),
                Ok(_) => Err(HandshakeError::Unsupported("data before its end")),
                Err(error) => Err(error.into()),
            };
            self.input.drain(..discard);
            self.fed_bytes -= discard;
            match progress? {
                None => {}
                Some(Progress::Complete) if self.connection.is_handshaking() => {
                    return Ok(Progress::NeedsRecord);
                }
                Some(progress) => return Ok(progress),
            }
        }
    }

    /// Lets rustls see one more record.
    async fn feed_record(&mut self) -> Result<(), HandshakeError> {
        let record_bytes = loop {
            match record_bytes(&self.input[self.fed_bytes..])? {
                Some(bytes) if self.input.len() >= self.fed_bytes + bytes => break bytes,
                Some(bytes) => self.receive(bytes).await?,
                None => self.receive(FIRST_READ_BYTES).await?,
            }
        };
        self.received_bytes += record_bytes - HEADER_BYTES;
        if self.received_bytes > HANDSHAKE_BYTES_MAX {
            return Err(HandshakeError::TooLong);
        }
        self.fed_bytes += record_bytes;
        Ok(())
    }

    /// Receives until at least something came, with room for so many bytes beyond what rustls has seen.
    async fn receive(&mut self, room_bytes: usize) -> Result<(), HandshakeError> {
        let waiting = self.input.len() - self.fed_bytes;
        self.input.reserve(room_bytes.saturating_sub(waiting).max(1));
        match self.socket.read_buf(&mut self.input).await? {
            0 => Err(HandshakeError::Closed),
            _ => Ok(()),
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        if !self.output.is_empty() {
            self.socket.write_all(&self.output).await?;
            self.output.clear();
        }
        Ok(())
    }

    fn finish(self, secrets: &SecretCapture) -> Result<TlsStream, HandshakeFailure> {
        let Self { socket, connection, input, fed_bytes, output, .. } = self;
        let session = if fed_bytes > 0 {
            Err(HandshakeError::Unsupported("a record left over"))
        } else {
            connection
                .dangerous_into_kernel_connection()
                .map_err(HandshakeError::from)
                .and_then(|(extracted, kernel)| session(kernel.protocol_version(), extracted, secrets))
        };
        match session {
            Ok(session) => Ok(TlsStream::new(socket, RecordLayer::new(session), input, output)),
            Err(error) => Err(HandshakeFailure { socket, error }),
        }
    }

    async fn fail(mut self, error: HandshakeError) -> HandshakeFailure {
        self.queue_alert(&error);
        if !self.output.is_empty() {
            // The error that counts is the one that led here.
            let _ = timeout(ALERT_WITHIN, self.flush()).await;
        }
        HandshakeFailure { socket: self.socket, error }
    }

    fn queue_alert(&mut self, error: &HandshakeError) {
        match error {
            HandshakeError::Io(_) | HandshakeError::Closed => self.output.clear(),
            HandshakeError::Tls(_) => {
                let queued = self.output.len();
                self.queue_rustls_alert();
                if self.output.len() == queued && !self.answered {
                    self.output.extend_from_slice(&plaintext_alert(AlertDescription::DecodeError));
                }
            }
            _ if !self.answered => self.output.extend_from_slice(&plaintext_alert(error.alert())),
            // There may be keys by now, which only rustls has. It is shown what it must refuse.
            HandshakeError::NotTls | HandshakeError::TooLong => {
                self.input.truncate(self.fed_bytes);
                self.input.extend_from_slice(&NOT_A_RECORD);
                self.fed_bytes = self.input.len();
                // Its error says nothing new.
                let _ = self.connection.process_tls_records(&mut self.input);
                self.queue_rustls_alert();
            }
            // rustls has no way to say it, so the end of the connection must do. What is left of a flight may have
            // been sent in part.
            HandshakeError::TimedOut | HandshakeError::Unsupported(_) => self.output.clear(),
        }
    }

    /// Takes what rustls has to say after an error, and no more: to be shown input again would be a second error.
    fn queue_rustls_alert(&mut self) {
        while self.connection.wants_write() {
            let UnbufferedStatus { state, .. } =
                self.connection.process_tls_records(&mut self.input[..self.fed_bytes]);
            let Ok(ConnectionState::EncodeTlsData(data)) = state else {
                return;
            };
            if encode(data, &mut self.output).is_err() {
                return;
            }
        }
    }
}

fn encode(
    mut data: EncodeTlsData<'_, ServerConnectionData>,
    output: &mut Vec<u8>,
) -> Result<(), HandshakeError> {
    let start = output.len();
    let bytes = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(needed)) => {
            output.resize(start + needed.required_size, 0);
            data.encode(&mut output[start..])
        }
        other => other,
    }
    .map_err(|_| HandshakeError::Unsupported("a message that can't be encoded"))?;
    output.truncate(start + bytes);
    Ok(())
}

/// The length of the record at the front, as soon as its header is there. Refuses what can't be TLS at once, since
/// the length in other protocols' bytes would be waited for.
fn record_bytes(input: &[u8]) -> Result<Option<usize>, HandshakeError> {
    match *input {
        [] => Ok(None),
        [20..=23, 3, _, high, low, ..] => {
            let bytes = HEADER_BYTES + usize::from(u16::from_be_bytes([high, low]));
            if bytes > RECORD_BYTES_MAX { Err(HandshakeError::TooLong) } else { Ok(Some(bytes)) }
        }
        [20..=23] | [20..=23, 3] | [20..=23, 3, _] | [20..=23, 3, _, _] => Ok(None),
        _ => Err(HandshakeError::NotTls),
    }
}

/// The session that the record layer goes on with.
fn session(
    version: ProtocolVersion,
    extracted: ExtractedSecrets,
    secrets: &SecretCapture,
) -> Result<Session, HandshakeError> {
    let (version, client, server) = match version {
        ProtocolVersion::TLSv1_2 => (Version::Tls12, None, None),
        ProtocolVersion::TLSv1_3 => {
            let missing = || HandshakeError::Unsupported("without traffic secrets");
            let client = secrets.client.get().ok_or_else(missing)?;
            (Version::Tls13, Some(client), Some(secrets.server.get().ok_or_else(missing)?))
        }
        _ => return Err(HandshakeError::Unsupported("the version")),
    };
    let (aead, transmit) = traffic(extracted.tx, server)?;
    let (receive_aead, receive) = traffic(extracted.rx, client)?;
    if aead != receive_aead {
        return Err(HandshakeError::Unsupported("two ciphers"));
    }
    Ok(Session {
        version,
        aead,
        transmit,
        receive,
        counters: Counters::default(),
        message: Partial::NONE,
        peer_closed: false,
    })
}

fn traffic(
    (sequence, extracted): (u64, ConnectionTrafficSecrets),
    secret: Option<&Zeroizing<Vec<u8>>>,
) -> Result<(Aead, Traffic), HandshakeError> {
    let (aead, key, iv) = match extracted {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Aead::Aes128Gcm, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Aead::Aes256Gcm, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (Aead::Chacha20Poly1305, key, iv),
        _ => return Err(HandshakeError::Unsupported("the cipher")),
    };
    let mut keys = TrafficKeys {
        key: Zeroizing::new([0; KEY_BYTES_MAX]),
        iv: Zeroizing::new([0; rustls::crypto::cipher::NONCE_LEN]),
    };
    let (key, iv) = (key.as_ref(), iv.as_ref());
    if key.len() != aead.key_bytes() || iv.len() != keys.iv.len() {
        return Err(HandshakeError::Unsupported("a key's length"));
    }
    keys.key[..key.len()].copy_from_slice(key);
    keys.iv.copy_from_slice(iv);
    let secret = match secret {
        None => None,
        Some(secret) => {
            let secret = TrafficSecret::new(aead, secret)
                .filter(|secret| secret.keys(aead).equal(&keys))
                .ok_or(HandshakeError::Unsupported("secrets that don't derive its keys"))?;
            Some(secret)
        }
    };
    Ok((aead, Traffic { sequence, keys, secret }))
}
