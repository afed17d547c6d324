//! What keeps a connection's luggage between the two instances that it travels between.
//!
//! Each way between two workers has a key of its own, derived from the secret that their instances agreed on, and numbers
//! what it seals. The number is the AEAD's nonce, so it must never be used twice; the opener takes each at most once, in
//! rising order. What is sealed is bound to the connection by its socket's cookie, which only the kernel assigns.
use ring::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk};
use zeroize::Zeroizing;

use crate::tls::CipherKey;

const VERSION: u8 = 1;
const LABEL: &[u8] = b"pointsman move 1";

pub const SECRET_BYTES: usize = 32;
pub const KEY_ID_BYTES: usize = 16;

const KEY_BYTES: usize = 32;
const HEADER_BYTES: usize = 1 + KEY_ID_BYTES + 2 + 2 + 4 + 8;
const COOKIE_BYTES: usize = 8;

/// A key that was used so often is replaced (AES-GCM, RFC 8446 §5.5 has the arithmetic; luggage is up to 11 records).
const SEALS_MAX: u64 = 1 << 24;

/// Names a secret in public.
pub type KeyId = [u8; KEY_ID_BYTES];

/// What two instances agreed on, for one direction.
#[derive(Clone)]
pub struct PairSecret {
    pub id: KeyId,
    pub secret: Zeroizing<[u8; SECRET_BYTES]>,
}

/// A way from one worker to another. Where they have several pool connections there are several, because only what goes
/// over one keeps its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Way {
    /// The workers' numbers within their instances.
    pub source: u16,
    pub target: u16,
    /// The source's number for it, never given twice by one worker.
    pub number: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("sealed luggage ends too early")]
    Truncated,
    #[error("sealed luggage has the unknown version {0}")]
    UnknownVersion(u8),
    #[error("luggage is sealed with a key that was not agreed on")]
    UnknownKey,
    #[error("luggage is sealed for another worker")]
    Misdirected,
    #[error("luggage came a second time, or late")]
    Replayed,
    #[error("luggage was altered, or belongs to another connection")]
    Altered,
}

/// The public part of sealed luggage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    pub key: KeyId,
    pub way: Way,
    number: u64,
}

pub struct Sealer {
    key: CipherKey,
    label: Label,
}

pub struct Opener {
    key: CipherKey,
    /// The least number that has not come.
    next: u64,
}

impl Sealer {
    pub fn new(pair: &PairSecret, way: Way) -> Self {
        Self { key: derive(pair, way), label: Label { key: pair.id, way, number: 0 } }
    }

    pub fn key(&self) -> KeyId {
        self.label.key
    }

    /// Time for a new secret.
    pub fn is_worn(&self) -> bool {
        self.label.number >= SEALS_MAX
    }

    /// Seals luggage in place; what is returned is all ciphertext.
    pub fn seal(&mut self, luggage: &mut Zeroizing<Vec<u8>>, cookie: u64) -> Vec<u8> {
        let header = self.label.encode();
        let nonce = nonce(self.label.number);
        self.label.number += 1;
        let tag = self
            .key
            .get()
            .seal_in_place_separate_tag(nonce, Aad::from(associated(&header, cookie)), luggage)
            .expect("luggage is shorter than AES-GCM's limit");
        let mut sealed = Vec::with_capacity(HEADER_BYTES + luggage.len() + tag.as_ref().len());
        sealed.extend_from_slice(&header);
        sealed.extend_from_slice(luggage);
        sealed.extend_from_slice(tag.as_ref());
        sealed
    }
}

impl Opener {
    pub fn new(pair: &PairSecret, way: Way) -> Self {
        Self { key: derive(pair, way), next: 0 }
    }

    /// Opens luggage in place. A number counts as used only when its seal was good, so that nobody can use up numbers.
    pub fn open<'a>(
        &mut self,
        label: &Label,
        sealed: &'a mut [u8],
        cookie: u64,
    ) -> Result<&'a [u8], OpenError> {
        if label.number < self.next {
            return Err(OpenError::Replayed);
        }
        let (header, body) = sealed.split_at_mut_checked(HEADER_BYTES).ok_or(OpenError::Truncated)?;
        let header: &[u8; HEADER_BYTES] = (&*header).try_into().map_err(|_| OpenError::Truncated)?;
        let luggage = self
            .key
            .get()
            .open_in_place(nonce(label.number), Aad::from(associated(header, cookie)), body)
            .map_err(|_| OpenError::Altered)?;
        self.next = label.number + 1;
        Ok(luggage)
    }
}

impl Label {
    pub fn decode(sealed: &[u8]) -> Result<Self, OpenError> {
        let header = sealed.first_chunk::<HEADER_BYTES>().ok_or(OpenError::Truncated)?;
        let [version, rest @ ..] = header;
        if *version != VERSION {
            return Err(OpenError::UnknownVersion(*version));
        }
        let (key, rest) = rest.split_first_chunk().ok_or(OpenError::Truncated)?;
        let (source, rest) = rest.split_first_chunk().ok_or(OpenError::Truncated)?;
        let (target, rest) = rest.split_first_chunk().ok_or(OpenError::Truncated)?;
        let (way, rest) = rest.split_first_chunk().ok_or(OpenError::Truncated)?;
        let number = rest.first_chunk().ok_or(OpenError::Truncated)?;
        let way = Way {
            source: u16::from_le_bytes(*source),
            target: u16::from_le_bytes(*target),
            number: u32::from_le_bytes(*way),
        };
        let number = u64::from_le_bytes(*number);
        if number > SEALS_MAX {
            return Err(OpenError::Replayed);
        }
        Ok(Self { key: *key, way, number })
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let (version, rest) = header.split_at_mut(1);
        let (key, rest) = rest.split_at_mut(KEY_ID_BYTES);
        let (source, rest) = rest.split_at_mut(2);
        let (target, rest) = rest.split_at_mut(2);
        let (way, number) = rest.split_at_mut(4);
        version[0] = VERSION;
        key.copy_from_slice(&self.key);
        source.copy_from_slice(&self.way.source.to_le_bytes());
        target.copy_from_slice(&self.way.target.to_le_bytes());
        way.copy_from_slice(&self.way.number.to_le_bytes());
        number.copy_from_slice(&self.number.to_le_bytes());
        header
    }
}

fn derive(pair: &PairSecret, Way { source, target, number }: Way) -> CipherKey {
    struct Length;
    impl KeyType for Length {
        fn len(&self) -> usize {
            KEY_BYTES
        }
    }
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    Prk::new_less_safe(HKDF_SHA256, &pair.secret[..])
        .expand(&[LABEL, &source.to_le_bytes(), &target.to_le_bytes(), &number.to_le_bytes()], Length)
        .and_then(|okm| okm.fill(&mut bytes[..]))
        .expect("HKDF gives 255 times so much");
    CipherKey::of_bytes(&AES_256_GCM, &bytes[..])
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 8..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn associated(header: &[u8; HEADER_BYTES], cookie: u64) -> [u8; HEADER_BYTES + COOKIE_BYTES] {
    let mut bytes = [0; HEADER_BYTES + COOKIE_BYTES];
    bytes[..HEADER_BYTES].copy_from_slice(header);
    bytes[HEADER_BYTES..].copy_from_slice(&cookie.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAY: Way = Way { source: 1, target: 2, number: 3 };
    const COOKIE: u64 = 77;

    fn pair(seed: u8) -> PairSecret {
        PairSecret { id: [seed; KEY_ID_BYTES], secret: Zeroizing::new([seed; SECRET_BYTES]) }
    }

    fn ends() -> (Sealer, Opener) {
        (Sealer::new(&pair(1), WAY), Opener::new(&pair(1), WAY))
    }

    fn seal(sealer: &mut Sealer, text: &[u8]) -> Vec<u8> {
        sealer.seal(&mut Zeroizing::new(text.to_vec()), COOKIE)
    }

    fn open(opener: &mut Opener, sealed: &[u8], cookie: u64) -> Result<Vec<u8>, OpenError> {
        let label = Label::decode(sealed)?;
        opener.open(&label, &mut sealed.to_vec(), cookie).map(<[u8]>::to_vec)
    }

    #[test]
    fn each_is_opened_once_and_in_order() {
        let (mut sealer, mut opener) = ends();
        let sealed: Vec<_> = (0..4u8).map(|index| seal(&mut sealer, &[index; 100])).collect();
        assert_eq!(Label::decode(&sealed[3]), Ok(Label { key: [1; 16], way: WAY, number: 3 }));
        assert_eq!(open(&mut opener, &sealed[0], COOKIE), Ok(vec![0; 100]));
        assert_eq!(open(&mut opener, &sealed[0], COOKIE), Err(OpenError::Replayed));
        // One that was lost on the way doesn't stop those behind it, and is too late then.
        assert_eq!(open(&mut opener, &sealed[2], COOKIE), Ok(vec![2; 100]));
        assert_eq!(open(&mut opener, &sealed[1], COOKIE), Err(OpenError::Replayed));
        assert_eq!(open(&mut opener, &sealed[3], COOKIE), Ok(vec![3; 100]));
    }

    #[test]
    fn every_altered_byte_is_refused_and_changes_nothing() {
        let (mut sealer, mut opener) = ends();
        let sealed = seal(&mut sealer, b"luggage");
        for at in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            assert!(open(&mut opener, &altered, COOKIE).is_err(), "{at}");
        }
        for length in 0..sealed.len() {
            assert!(open(&mut opener, &sealed[..length], COOKIE).is_err(), "{length}");
        }
        assert_eq!(open(&mut opener, &sealed, COOKIE), Ok(b"luggage".to_vec()));
    }

    #[test]
    fn another_connection_worker_or_pair_opens_nothing() {
        let (mut sealer, mut opener) = ends();
        let sealed = seal(&mut sealer, b"luggage");
        assert_eq!(open(&mut opener, &sealed, COOKIE + 1), Err(OpenError::Altered));
        for (pair, way) in [
            (pair(2), WAY),
            (pair(1), Way { source: 2, ..WAY }),
            (pair(1), Way { target: 1, ..WAY }),
            (pair(1), Way { number: 4, ..WAY }),
        ] {
            assert_eq!(open(&mut Opener::new(&pair, way), &sealed, COOKIE), Err(OpenError::Altered));
        }
    }

    #[test]
    fn nothing_of_the_luggage_is_to_be_seen() {
        let (mut sealer, _) = ends();
        let mut luggage = Zeroizing::new(b"a secret that stands out".to_vec());
        let sealed = sealer.seal(&mut luggage, COOKIE);
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        assert!(!luggage.windows(6).any(|window| window == b"secret"));
    }
}
