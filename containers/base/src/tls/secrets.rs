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
pub(crate) struct CipherKey(Box<MaybeUninit<LessSafeKey>>);

// Wiping replaces dropping, so there must be nothing to drop.
const _: () = assert!(!std::mem::needs_drop::<LessSafeKey>());

impl CipherKey {
    pub(super) fn new(aead: Aead, keys: &TrafficKeys) -> Self {
        Self::of_bytes(aead.algorithm(), &keys.key[..aead.key_bytes()])
    }

    pub(crate) fn of_bytes(algorithm: &'static aead::Algorithm, bytes: &[u8]) -> Self {
        let key = UnboundKey::new(algorithm, bytes).expect("a key of the algorithm's length");
        Self(Box::new(MaybeUninit::new(LessSafeKey::new(key))))
    }

    pub(crate) fn get(&self) -> &LessSafeKey {
        // SAFETY: `new` is the only constructor and initialises it; only `drop` overwrites it.
        unsafe { self.0.assume_init_ref() }
    }
}

impl Drop for CipherKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use rustls::SupportedCipherSuite;
    use rustls::crypto::ring::cipher_suite;
    use rustls::crypto::tls13::OkmBlock;

    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
        digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
    }

    /// RFC 8448 §3, the application traffic of the simple handshake.
    #[test]
    fn keys_are_those_of_rfc_8448() {
        let cases = [
            (
                "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5",
                "17422dda596ed5d9acd890e3c63f5051",
                "5b78923dee08579033e523d9",
            ),
            (
                "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643",
                "9f02283b6c9c07efc26bb9f2ac92e356",
                "cf782b88dd83549aadf1e984",
            ),
        ];
        for (secret, key, iv) in cases {
            let keys = TrafficSecret::new(Aead::Aes128Gcm, &hex(secret)).unwrap().keys(Aead::Aes128Gcm);
            assert_eq!(keys.key[..16], hex(key));
            assert_eq!(keys.key[16..], [0; 16]);
            assert_eq!(keys.iv[..], hex(iv));
        }
    }

    #[test]
    fn every_derivation_is_that_of_rustls() {
        let suites = [
            (Aead::Aes128Gcm, cipher_suite::TLS13_AES_128_GCM_SHA256, b"\0\x10\x09tls13 key\0", 16, 32),
            (Aead::Aes256Gcm, cipher_suite::TLS13_AES_256_GCM_SHA384, b"\0\x20\x09tls13 key\0", 32, 48),
            (
                Aead::Chacha20Poly1305,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
                b"\0\x20\x09tls13 key\0",
                32,
                32,
            ),
        ];
        for (aead, suite, key_info, key_bytes, secret_bytes) in suites {
            let SupportedCipherSuite::Tls13(suite) = suite else { unreachable!() };
            let mut secret = TrafficSecret::new(aead, &vec![0x5a; secret_bytes]).unwrap();
            let mut current = vec![0x5a; secret_bytes];
            for _ in 0..5 {
                let expander = suite.hkdf_provider.expander_for_okm(&OkmBlock::new(&current));
                let mut key = vec![0; key_bytes];
                expander.expand_slice(&[key_info], &mut key).unwrap();
                let mut iv = [0; 12];
                expander.expand_slice(&[b"\0\x0c\x08tls13 iv\0"], &mut iv).unwrap();
                let keys = secret.keys(aead);
                assert_eq!(keys.key[..key_bytes], key);
                assert_eq!(*keys.iv, iv);

                let mut next = vec![0; secret_bytes];
                let label = [&[0, secret_bytes as u8, 17][..], b"tls13 traffic upd\0"];
                expander.expand_slice(&label, &mut next).unwrap();
                current = next;
                secret = secret.next(aead);
            }
        }
    }

    #[test]
    fn a_secret_has_the_length_of_its_hash() {
        for aead in [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::Chacha20Poly1305] {
            for bytes in 0..64 {
                let made = TrafficSecret::new(aead, &vec![1; bytes]).is_some();
                assert_eq!(made, bytes == aead.secret_bytes(), "{aead:?} {bytes}");
            }
        }
    }

    /// Looks at the freed heap only through the box that is still there.
    #[test]
    fn a_cipher_key_is_wiped() {
        let secret = TrafficSecret::new(Aead::Aes128Gcm, &[7; 32]).unwrap();
        let mut key = CipherKey::new(Aead::Aes128Gcm, &secret.keys(Aead::Aes128Gcm));
        let bytes = size_of::<LessSafeKey>();
        let address = key.0.as_ptr().cast::<u8>();
        // SAFETY: the box holds that many bytes until it is forgotten; MaybeUninit asks for no particular values, and
        // zeroizing initialises them all.
        let wiped = unsafe {
            key.0.zeroize();
            std::slice::from_raw_parts(address, bytes)
        };
        assert!(wiped.iter().all(|byte| *byte == 0));
        std::mem::forget(key);
    }
}
