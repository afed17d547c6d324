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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{KINDS, session};
    use super::*;

    fn sample((version, aead): (Version, Aead)) -> SessionState {
        let mut session = session(version, aead, 1, 2);
        session.counters = Counters { empty_records: 3, warnings: 2, key_updates: 1 };
        SessionState { session, plaintext: b"GET /".to_vec(), ciphertext: b"\x17\x03\x03\x00".to_vec() }
    }

    fn refusal(encoded: &[u8]) -> Option<StateError> {
        SessionState::decode(encoded).err()
    }

    #[test]
    fn every_prefix_and_every_addition_is_refused() {
        for kind in KINDS {
            let mut encoded = sample(kind).encode();
            for bytes in 0..encoded.len() {
                assert_eq!(refusal(&encoded[..bytes]), Some(StateError::Truncated), "{kind:?} {bytes}");
            }
            assert_eq!(refusal(&encoded), None);
            encoded.push(0);
            assert_eq!(refusal(&encoded), Some(StateError::Trailing(1)));
        }
    }

    #[test]
    fn unknown_values_are_refused() {
        for kind in KINDS {
            let encoded = sample(kind).encode();
            let changed = |at: usize, value: u8| {
                let mut changed = encoded.clone();
                changed[at] = value;
                refusal(&changed)
            };
            assert_eq!(changed(0, 0), Some(StateError::UnknownFormat(0)));
            assert_eq!(changed(0, 2), Some(StateError::UnknownFormat(2)));
            for (at, values, what) in [
                (1, &[0, 1, 4, 255][..], "version"),
                (2, &[0, 4, 255], "cipher"),
                (3, &[2, 3, 128], "flag"),
                (4, &[record::EMPTY_RECORDS_MAX + 1, 255], "number of empty records"),
                (5, &[record::WARNINGS_MAX + 1, 255], "number of warnings"),
                (6, &[record::KEY_UPDATES_MAX + 1, 255], "number of KeyUpdates"),
                (7, &[1, 5, 6, 254, SKIPPING], "handshake message"),
            ] {
                for value in values {
                    assert_eq!(changed(at, *value), Some(StateError::Impossible(what)), "{at} {value}");
                }
            }
        }
    }

    #[test]
    fn overlong_residue_is_refused_before_it_is_looked_for() {
        let encoded = sample(KINDS[0]).encode();
        let plaintext_at = encoded.len() - 4 - 4 - 5 - 4;
        assert_eq!(encoded[plaintext_at..][..4], [5, 0, 0, 0]);
        for (at, max, what) in [
            (plaintext_at, PLAINTEXT_BYTES_MAX, "decrypted residue"),
            (encoded.len() - 8, CIPHERTEXT_BYTES_MAX, "undecrypted residue"),
        ] {
            let mut changed = encoded.clone();
            changed[at..at + 4].copy_from_slice(&(max as u32 + 1).to_le_bytes());
            assert_eq!(refusal(&changed), Some(StateError::TooLong(what)));
            changed[at..at + 4].copy_from_slice(&(max as u32).to_le_bytes());
            assert_eq!(refusal(&changed), Some(StateError::Truncated));
        }
    }

    #[test]
    fn a_sequence_number_that_would_be_used_up_is_refused() {
        for kind in KINDS {
            let mut state = sample(kind);
            state.session.receive.sequence = u64::MAX;
            state.session.transmit.sequence = kind.1.records_max() + SEQUENCE_MARGIN;
            assert_eq!(refusal(&state.encode()), None);
            state.session.transmit.sequence += 1;
            assert_eq!(refusal(&state.encode()), Some(StateError::Impossible("sequence number")));
        }
    }

    #[test]
    fn unread_bytes_come_first_and_within_a_bound() {
        let mut state = sample(KINDS[0]);
        state.unread(b"before ").unwrap();
        state.unread(b"").unwrap();
        assert_eq!(state.plaintext, b"before GET /");
        let room = PLAINTEXT_BYTES_MAX - state.plaintext.len();
        assert_eq!(state.unread(&vec![0; room + 1]), Err(StateError::TooLong("decrypted residue")));
        assert_eq!(state.plaintext, b"before GET /");
        state.unread(&vec![0; room]).unwrap();
        assert_eq!(refusal(&state.encode()), None);
    }

    /// A vector that has grown has left keys behind in freed memory.
    #[test]
    fn encoding_never_reallocates() {
        for kind in KINDS {
            for plaintext_bytes in [0, 1, PLAINTEXT_BYTES_MAX] {
                let mut state = sample(kind);
                state.plaintext = vec![1; plaintext_bytes];
                let residue_bytes = plaintext_bytes + state.ciphertext.len();
                assert_eq!(state.encode().capacity(), FIXED_BYTES_MAX + residue_bytes);
            }
        }
    }

    fn message(version: Version) -> impl Strategy<Value = Partial> {
        let begun: &[u8] = match version {
            Version::Tls12 => &[1, 0x12, 0x34],
            Version::Tls13 => &[24, 0, 0, 1],
        };
        let begun = (0..=begun.len()).prop_map(move |bytes| {
            let mut partial = Partial::NONE;
            partial.next(&mut &begun[..bytes], version).unwrap();
            partial
        });
        let skipping =
            (1..=message::SKIPPED_BYTES_MAX).prop_map(|rest_bytes| Partial::Skipping { rest_bytes });
        match version {
            Version::Tls12 => prop_oneof![begun, skipping].boxed(),
            Version::Tls13 => begun.boxed(),
        }
    }

    fn state() -> impl Strategy<Value = SessionState> {
        let residue = || prop::collection::vec(any::<u8>(), 0..300);
        prop::sample::select(&KINDS[..]).prop_flat_map(move |(version, aead)| {
            (
                message(version),
                any::<[u64; 3]>(),
                (0..=record::EMPTY_RECORDS_MAX, 0..=record::WARNINGS_MAX, 0..=record::KEY_UPDATES_MAX),
                any::<bool>(),
                residue(),
                residue(),
            )
                .prop_map(
                    move |(message, words, counters, peer_closed, plaintext, ciphertext)| {
                        let mut session = session(version, aead, words[0], words[1]);
                        session.message = message;
                        session.transmit.sequence = words[2] % aead.records_max();
                        session.receive.sequence = words[2];
                        session.peer_closed = peer_closed;
                        session.counters = Counters {
                            empty_records: counters.0,
                            warnings: counters.1,
                            key_updates: counters.2,
                        };
                        SessionState { session, plaintext, ciphertext }
                    },
                )
        })
    }

    impl std::fmt::Debug for SessionState {
        fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(formatter, "{:?}", *self.encode())
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(state in state()) {
            let encoded = state.encode();
            let decoded = SessionState::decode(&encoded).unwrap();
            prop_assert_eq!(decoded.session.message, state.session.message);
            prop_assert_eq!(decoded.session.counters, state.session.counters);
            prop_assert!(decoded.session.transmit.keys.equal(&state.session.transmit.keys));
            prop_assert!(decoded.session.receive.keys.equal(&state.session.receive.keys));
            prop_assert_eq!(&decoded.plaintext, &state.plaintext);
            prop_assert_eq!(&decoded.ciphertext, &state.ciphertext);
            prop_assert!(*decoded.encode() == *encoded);
        }

        /// There is one encoding of a state: what is accepted is what would have been sent.
        #[test]
        fn what_is_accepted_is_canonical(
            state in state(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut encoded = state.encode();
            for (index, value) in changes {
                let at = index.index(encoded.len().min(40));
                encoded[at] = value;
            }
            if let Ok(decoded) = SessionState::decode(&encoded) {
                prop_assert!(*decoded.encode() == *encoded);
            }
        }

        #[test]
        fn strangers_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = SessionState::decode(&bytes);
        }
    }
}
