//! The secrets of a TLS session: its traffic keys, how TLS 1.3 derives them, and their end.

use std::mem::MaybeUninit;

use ring::aead::{self, LessSafeKey, UnboundKey};
use ring::hkdf::{self, KeyType, Prk};
use rustls::crypto::cipher::NONCE_LEN;
use zeroize::{Zeroize, Zeroizing};

/// The longest AEAD key, that of AES-256-GCM and ChaCha20-Poly1305.
pub(super) const KEY_BYTES_MAX: usize = 32;

/// The longest traffic secret, one SHA-384.
pub(super) const SECRET_BYTES_MAX: usize = 48;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Tls12,
    Tls13,
}

/// The cipher of a session. In TLS 1.3 it also determines the hash of the key schedule (RFC 8446 §B.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aead {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

impl Aead {
    pub fn key_bytes(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm | Self::Chacha20Poly1305 => 32,
        }
    }

    /// The length of a TLS 1.3 traffic secret.
    pub fn secret_bytes(self) -> usize {
        self.hkdf().len()
    }

    /// How many records one key may seal before AES-GCM's confidentiality margin is used up (RFC 8446 §5.5, rounded
    /// down as rustls does). ChaCha20-Poly1305 is bound by the sequence number alone, which must never wrap.
    pub(super) fn records_max(self) -> u64 {
        match self {
            Self::Aes128Gcm | Self::Aes256Gcm => 1 << 24,
            Self::Chacha20Poly1305 => u64::MAX - 0xffff,
        }
    }

    pub(super) fn algorithm(self) -> &'static aead::Algorithm {
        match self {
            Self::Aes128Gcm => &aead::AES_128_GCM,
            Self::Aes256Gcm => &aead::AES_256_GCM,
            Self::Chacha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }

    fn hkdf(self) -> hkdf::Algorithm {
        match self {
            Self::Aes128Gcm | Self::Chacha20Poly1305 => hkdf::HKDF_SHA256,
            Self::Aes256Gcm => hkdf::HKDF_SHA384,
        }
    }
}

/// One direction of a session: what the next record is sealed or opened with.
pub struct Traffic {
    pub(super) sequence: u64,
    pub(super) keys: TrafficKeys,
    /// What the keys after the next KeyUpdate derive from; TLS 1.2 has none.
    pub(super) secret: Option<TrafficSecret>,
}

/// An AEAD key with its static IV. The key's bytes beyond the cipher's length are zero.
pub(super) struct TrafficKeys {
    pub(super) key: Zeroizing<[u8; KEY_BYTES_MAX]>,
    pub(super) iv: Zeroizing<[u8; NONCE_LEN]>,
}

impl TrafficKeys {
    /// The nonce of the record with this sequence number (RFC 8446 §5.3, RFC 7905 §2; rustls makes the nonces of
    /// AES-GCM in TLS 1.2 the same way).
    pub(super) fn nonce(&self, sequence: u64) -> [u8; NONCE_LEN] {
        let mut nonce = *self.iv;
        for (byte, sequence) in nonce[NONCE_LEN - 8..].iter_mut().zip(sequence.to_be_bytes()) {
            *byte ^= sequence;
        }
        nonce
    }

    pub(super) fn equal(&self, other: &Self) -> bool {
        *self.key == *other.key && *self.iv == *other.iv
    }
}

/// A TLS 1.3 application traffic secret. Bytes beyond the hash's length are zero.
pub(super) struct TrafficSecret(pub(super) Zeroizing<[u8; SECRET_BYTES_MAX]>);

impl TrafficSecret {
    /// `None` unless the length is that of the cipher's hash.
    pub(super) fn new(aead: Aead, secret: &[u8]) -> Option<Self> {
        if secret.len() != aead.secret_bytes() {
            return None;
        }
        let mut bytes = Zeroizing::new([0; SECRET_BYTES_MAX]);
        bytes[..secret.len()].copy_from_slice(secret);
        Some(Self(bytes))
    }

    /// RFC 8446 §7.3.
    pub(super) fn keys(&self, aead: Aead) -> TrafficKeys {
        let secret = self.prk(aead);
        let mut keys =
            TrafficKeys { key: Zeroizing::new([0; KEY_BYTES_MAX]), iv: Zeroizing::new([0; NONCE_LEN]) };
        expand_label(&secret, b"key", &mut keys.key[..aead.key_bytes()]);
        expand_label(&secret, b"iv", &mut keys.iv[..]);
        keys
    }

    /// The secret after a KeyUpdate (RFC 8446 §7.2).
    pub(super) fn next(&self, aead: Aead) -> Self {
        let mut bytes = Zeroizing::new([0; SECRET_BYTES_MAX]);
        expand_label(&self.prk(aead), b"traffic upd", &mut bytes[..aead.secret_bytes()]);
        Self(bytes)
    }

    fn prk(&self, aead: Aead) -> Prk {
        Prk::new_less_safe(aead.hkdf(), &self.0[..aead.secret_bytes()])
    }
}

/// HKDF-Expand-Label with an empty context (RFC 8446 §7.1).
fn expand_label(secret: &Prk, label: &[u8], output: &mut [u8]) {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }

    let prefix = b"tls13 ";
    let length = [0, output.len() as u8];
    let label_length = [(prefix.len() + label.len()) as u8];
    let info: [&[u8]; 5] = [&length, &label_length, prefix, label, &[0]];
    secret
        .expand(&info, Length(output.len()))
        .and_then(|okm| okm.fill(output))
        .expect("no output is longer than one hash, and HKDF gives 255 of them");
}

/// A key ready for use. ring doesn't wipe its keys, so this one lives in one place on the heap and is wiped there.
pub(super) struct CipherKey(Box<MaybeUninit<LessSafeKey>>);

// Wiping replaces dropping, so there must be nothing to drop.
const _: () = assert!(!std::mem::needs_drop::<LessSafeKey>());

impl CipherKey {
    pub(super) fn new(aead: Aead, keys: &TrafficKeys) -> Self {
        let key = UnboundKey::new(aead.algorithm(), &keys.key[..aead.key_bytes()])
            .expect("the slice has the algorithm's key length");
        Self(Box::new(MaybeUninit::new(LessSafeKey::new(key))))
    }

    pub(super) fn get(&self) -> &LessSafeKey {
        // SAFETY: `new` is the only constructor and initialises it; only `drop` overwrites it.
        unsafe { self.0.assume_init_ref() }
    }
}

impl Drop for CipherKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}
