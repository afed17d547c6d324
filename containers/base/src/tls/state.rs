//! A session between two processes: everything needed to go on with it, and its encoding.

use std::ops::RangeInclusive;

use rustls::crypto::cipher::NONCE_LEN;
use thiserror::Error;
use zeroize::Zeroizing;

use super::message::{self, Partial};
use super::record::{self, Counters, Session};
use super::secrets::{Aead, KEY_BYTES_MAX, SECRET_BYTES_MAX, Traffic, TrafficKeys, TrafficSecret, Version};

/// The longest decrypted residue: a request's head and what came in the same records. What is longer stays here.
pub const PLAINTEXT_BYTES_MAX: usize = 128 * 1024;

/// The longest undecrypted residue: what one read can leave.
pub const CIPHERTEXT_BYTES_MAX: usize = super::stream::READ_BYTES_MAX;

const FORMAT: u8 = 1;
const PEER_CLOSED: u8 = 1;
const SKIPPING: u8 = 0xff;

/// Above a key's limit only its last words are sealed: the warnings, a KeyUpdate and an alert.
const SEQUENCE_MARGIN: u64 = 0xff;

/// A session without its socket. It exists once: two processes that go on with the same one would use each nonce
/// twice, so it can't be cloned and its encoding must reach one process at most.
pub struct SessionState {
    pub(super) session: Session,
    pub(super) plaintext: Vec<u8>,
    pub(super) ciphertext: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StateError {
    #[error("a session's state ends too early")]
    Truncated,
    #[error("{0} bytes after the end of a session's state")]
    Trailing(usize),
    #[error("a session's state has the unknown format {0}")]
    UnknownFormat(u8),
    #[error("a session's state has an impossible {0}")]
    Impossible(&'static str),
    #[error("a session's {0} is too long to move")]
    TooLong(&'static str),
}

impl SessionState {
    pub fn version(&self) -> Version {
        self.session.version
    }

    /// Puts back what was read of the stream and not consumed.
    pub fn unread(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        if bytes.len() + self.plaintext.len() > PLAINTEXT_BYTES_MAX {
            return Err(StateError::TooLong("decrypted residue"));
        }
        self.plaintext.splice(..0, bytes.iter().copied());
        Ok(())
    }

    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let Session { version, aead, transmit, receive, counters, message, peer_closed } = &self.session;
        let residue_bytes = self.plaintext.len() + self.ciphertext.len();
        // Reserved at once, because a vector that grows leaves copies of the keys behind.
        let mut output = Zeroizing::new(Vec::with_capacity(FIXED_BYTES_MAX + residue_bytes));
        output.push(FORMAT);
        output.push(encode_version(*version));
        output.push(encode_aead(*aead));
        output.push(if *peer_closed { PEER_CLOSED } else { 0 });
        output.extend_from_slice(&[counters.empty_records, counters.warnings, counters.key_updates]);
        match message {
            Partial::Begun { kept, kept_bytes } => {
                output.push(*kept_bytes);
                output.extend_from_slice(&kept[..usize::from(*kept_bytes)]);
            }
            Partial::Skipping { rest_bytes } => {
                output.push(SKIPPING);
                output.extend_from_slice(&rest_bytes.to_le_bytes());
            }
        }
        for traffic in [transmit, receive] {
            output.extend_from_slice(&traffic.sequence.to_le_bytes());
            output.extend_from_slice(&traffic.keys.key[..aead.key_bytes()]);
            output.extend_from_slice(&traffic.keys.iv[..]);
            if let Some(secret) = &traffic.secret {
                output.extend_from_slice(&secret.0[..aead.secret_bytes()]);
            }
        }
        for residue in [&self.plaintext, &self.ciphertext] {
            output.extend_from_slice(&(residue.len() as u32).to_le_bytes());
            output.extend_from_slice(residue);
        }
        output
    }

    pub fn decode(input: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader(input);
        match reader.byte()? {
            FORMAT => {}
            unknown => return Err(StateError::UnknownFormat(unknown)),
        }
        let version = decode_version(reader.byte()?)?;
        let aead = decode_aead(reader.byte()?)?;
        let peer_closed = match reader.byte()? {
            0 => false,
            PEER_CLOSED => true,
            _ => return Err(StateError::Impossible("flag")),
        };
        let counters = Counters {
            empty_records: reader.at_most(record::EMPTY_RECORDS_MAX, "number of empty records")?,
            warnings: reader.at_most(record::WARNINGS_MAX, "number of warnings")?,
            key_updates: reader.at_most(record::KEY_UPDATES_MAX, "number of KeyUpdates")?,
        };
        let message = reader.message(version)?;
        let transmit = reader.traffic(version, aead, 0..=aead.records_max() + SEQUENCE_MARGIN)?;
        let receive = reader.traffic(version, aead, 0..=u64::MAX)?;
        let plaintext = reader.residue(PLAINTEXT_BYTES_MAX, "decrypted residue")?;
        let ciphertext = reader.residue(CIPHERTEXT_BYTES_MAX, "undecrypted residue")?;
        match reader.0.len() {
            0 => {}
            trailing => return Err(StateError::Trailing(trailing)),
        }
        let session = Session { version, aead, transmit, receive, counters, message, peer_closed };
        Ok(Self { session, plaintext, ciphertext })
    }
}

/// Everything but the residue: a header of 7 bytes, a message, two directions, two lengths.
const FIXED_BYTES_MAX: usize =
    7 + (1 + message::KEPT_BYTES_MAX) + 2 * (8 + KEY_BYTES_MAX + NONCE_LEN + SECRET_BYTES_MAX) + 2 * 4;

fn encode_version(version: Version) -> u8 {
    match version {
        Version::Tls12 => 2,
        Version::Tls13 => 3,
    }
}

fn decode_version(byte: u8) -> Result<Version, StateError> {
    match byte {
        2 => Ok(Version::Tls12),
        3 => Ok(Version::Tls13),
        _ => Err(StateError::Impossible("version")),
    }
}

fn encode_aead(aead: Aead) -> u8 {
    match aead {
        Aead::Aes128Gcm => 1,
        Aead::Aes256Gcm => 2,
        Aead::Chacha20Poly1305 => 3,
    }
}

fn decode_aead(byte: u8) -> Result<Aead, StateError> {
    match byte {
        1 => Ok(Aead::Aes128Gcm),
        2 => Ok(Aead::Aes256Gcm),
        3 => Ok(Aead::Chacha20Poly1305),
        _ => Err(StateError::Impossible("cipher")),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, StateError> {
        self.array().map(|[byte]| byte)
    }

    fn at_most(&mut self, max: u8, what: &'static str) -> Result<u8, StateError> {
        let value = self.byte()?;
        if value <= max { Ok(value) } else { Err(StateError::Impossible(what)) }
    }

    /// Goes through the parser, so that only what the parser could have left comes back.
    fn message(&mut self, version: Version) -> Result<Partial, StateError> {
        let impossible = StateError::Impossible("handshake message");
        match self.byte()? {
            SKIPPING => match (version, u32::from_le_bytes(self.array()?)) {
                (Version::Tls12, rest_bytes @ 1..=message::SKIPPED_BYTES_MAX) => {
                    Ok(Partial::Skipping { rest_bytes })
                }
                _ => Err(impossible),
            },
            kept_bytes => {
                if usize::from(kept_bytes) >= message::KEPT_BYTES_MAX {
                    return Err(impossible);
                }
                let mut partial = Partial::NONE;
                let mut kept = self.take(usize::from(kept_bytes))?;
                match partial.next(&mut kept, version) {
                    Ok(None) if matches!(partial, Partial::Begun { .. }) => Ok(partial),
                    _ => Err(impossible),
                }
            }
        }
    }

    fn traffic(
        &mut self,
        version: Version,
        aead: Aead,
        sequences: RangeInclusive<u64>,
    ) -> Result<Traffic, StateError> {
        let sequence = u64::from_le_bytes(self.array()?);
        if !sequences.contains(&sequence) {
            return Err(StateError::Impossible("sequence number"));
        }
        let mut key = Zeroizing::new([0; KEY_BYTES_MAX]);
        key[..aead.key_bytes()].copy_from_slice(self.take(aead.key_bytes())?);
        let keys = TrafficKeys { key, iv: Zeroizing::new(self.array()?) };
        let secret = match version {
            Version::Tls12 => None,
            Version::Tls13 => TrafficSecret::new(aead, self.take(aead.secret_bytes())?),
        };
        Ok(Traffic { sequence, keys, secret })
    }

    fn residue(&mut self, bytes_max: usize, what: &'static str) -> Result<Vec<u8>, StateError> {
        let bytes = u32::from_le_bytes(self.array()?) as usize;
        if bytes > bytes_max {
            return Err(StateError::TooLong(what));
        }
        self.take(bytes).map(<[u8]>::to_vec)
    }
}
