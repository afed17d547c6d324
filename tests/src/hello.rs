//! ClientHellos of every shape, good and bad.

/// A ClientHello before it is bytes. As it comes from [`Hello::new`] it ends in TLS 1.2, whose answer shows the
/// certificate in the clear, so that a test sees which function took it without finishing the handshake.
#[derive(Clone, Debug)]
pub struct Hello {
    pub session_id: Vec<u8>,
    pub cipher_suites: Vec<u16>,
    pub compression: Vec<u8>,
    /// In the order in which they are sent.
    pub extensions: Vec<(u16, Vec<u8>)>,
}

pub const EXTENSION_SERVER_NAME: u16 = 0;
pub const EXTENSION_PADDING: u16 = 21;
pub const EXTENSION_SUPPORTED_VERSIONS: u16 = 43;
pub const EXTENSION_KEY_SHARE: u16 = 51;
/// A value that means nothing and must be ignored (RFC 8701).
pub const GREASE: u16 = 0x3a3a;

/// The bytes of an X25519MLKEM768 client share: a public key of ML-KEM-768 and one of X25519.
const POST_QUANTUM_SHARE_BYTES: usize = 1184 + 32;

impl Default for Hello {
    fn default() -> Self {
        Self::new()
    }
}

impl Hello {
    /// A hello without a server name.
    pub fn new() -> Self {
        let list = |values: &[u16]| -> Vec<u8> {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_be_bytes()).collect();
            [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat()
        };
        Self {
            session_id: vec![7; 32],
            // ECDHE with ECDSA and AES-128-GCM, AES-256-GCM, ChaCha20.
            cipher_suites: vec![0xc02b, 0xc02c, 0xcca9],
            compression: vec![0],
            extensions: vec![
                // supported_groups: x25519, secp256r1.
                (10, list(&[0x001d, 0x0017])),
                // ec_point_formats: uncompressed.
                (11, vec![1, 0]),
                // signature_algorithms: ecdsa_secp256r1_sha256, ecdsa_secp384r1_sha384, rsa_pss_rsae_sha256.
                (13, list(&[0x0403, 0x0503, 0x0804])),
                // extended_master_secret.
                (23, vec![]),
            ],
        }
    }

    pub fn named(name: &[u8]) -> Self {
        Self::new().with(EXTENSION_SERVER_NAME, server_name(name))
    }

    /// Appends an extension.
    pub fn with(mut self, kind: u16, body: impl Into<Vec<u8>>) -> Self {
        self.extensions.push((kind, body.into()));
        self
    }

    /// Puts an extension in front of all others.
    pub fn led_by(mut self, kind: u16, body: impl Into<Vec<u8>>) -> Self {
        self.extensions.insert(0, (kind, body.into()));
        self
    }

    /// With the key share that makes a browser's hello larger than one segment.
    pub fn post_quantum(self) -> Self {
        let share =
            [&0x11ec_u16.to_be_bytes()[..], &(POST_QUANTUM_SHARE_BYTES as u16).to_be_bytes()].concat();
        let share = [share, vec![0x5a; POST_QUANTUM_SHARE_BYTES]].concat();
        self.led_by(EXTENSION_KEY_SHARE, [&(share.len() as u16).to_be_bytes()[..], &share].concat())
    }

    /// The handshake message.
    pub fn message(&self) -> Vec<u8> {
        let extensions: Vec<u8> = self
            .extensions
            .iter()
            .flat_map(|(kind, body)| {
                [&kind.to_be_bytes()[..], &(body.len() as u16).to_be_bytes(), body].concat()
            })
            .collect();
        let suites: Vec<u8> = self.cipher_suites.iter().flat_map(|suite| suite.to_be_bytes()).collect();
        let mut body = vec![3, 3];
        body.extend([0x42; 32]);
        body.push(self.session_id.len() as u8);
        body.extend(&self.session_id);
        body.extend((suites.len() as u16).to_be_bytes());
        body.extend(suites);
        body.push(self.compression.len() as u8);
        body.extend(&self.compression);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1];
        message.extend(&(body.len() as u32).to_be_bytes()[1..]);
        message.extend(body);
        message
    }

    /// The message in one record.
    pub fn bytes(&self) -> Vec<u8> {
        records(&self.message(), MAX_FRAGMENT_BYTES)
    }
}

pub const MAX_FRAGMENT_BYTES: usize = 1 << 14;

/// A message in records of at most `fragment_bytes` each.
pub fn records(message: &[u8], fragment_bytes: usize) -> Vec<u8> {
    message.chunks(fragment_bytes).flat_map(record).collect()
}

pub fn record(fragment: &[u8]) -> Vec<u8> {
    [&[22, 3, 1][..], &(fragment.len() as u16).to_be_bytes(), fragment].concat()
}

/// The handshake messages of a flight that consists of handshake records.
pub fn fragments(flight: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    let mut rest = flight;
    while let Some((&[22, _, _, high, low], tail)) = rest.split_first_chunk::<5>() {
        let (fragment, tail) = tail.split_at(usize::from(high) << 8 | usize::from(low));
        message.extend_from_slice(fragment);
        rest = tail;
    }
    assert!(rest.is_empty(), "not only handshake records");
    message
}

/// The body of a server_name extension with one host name.
pub fn server_name(name: &[u8]) -> Vec<u8> {
    server_names(&[(0, name)])
}

/// The body of a server_name extension with any names of any types.
pub fn server_names(names: &[(u8, &[u8])]) -> Vec<u8> {
    let list: Vec<u8> = names
        .iter()
        .flat_map(|(kind, name)| [&[*kind][..], &(name.len() as u16).to_be_bytes(), name].concat())
        .collect();
    [&(list.len() as u16).to_be_bytes()[..], &list].concat()
}

/// A hello that Chromium 156 on Debian sent for `hello.faas.local`: GREASE, shuffled extensions, ECH GREASE and an
/// X25519MLKEM768 share.
pub const CHROMIUM: &[u8] = include_bytes!("../fixtures/chromium-156-client-hello.bin");

/// The same hello, length and all, with TLS 1.3 blotted out of its supported_versions, so that the server's choice
/// is 1.2 and its certificate visible.
pub fn chromium_for_tls12() -> Vec<u8> {
    let mut hello = CHROMIUM.to_vec();
    let pattern = [0x03, 0x04, 0x03, 0x03];
    let found: Vec<usize> = hello
        .windows(pattern.len())
        .enumerate()
        .filter_map(|(offset, window)| (window == pattern).then_some(offset))
        .collect();
    assert_eq!(found.len(), 1, "supported_versions lists 1.3 before 1.2 in one place");
    hello[found[0]..found[0] + 2].copy_from_slice(&GREASE.to_be_bytes());
    hello
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellos_parse() {
        for hello in [
            Hello::named(b"echo.faas.local").bytes(),
            Hello::named(b"echo.faas.local").post_quantum().led_by(GREASE, [0]).bytes(),
            CHROMIUM.to_vec(),
            chromium_for_tls12(),
        ] {
            let (rest, record) = tls_parser::parse_tls_plaintext(&hello).unwrap();
            assert!(rest.is_empty());
            let tls_parser::TlsMessage::Handshake(tls_parser::TlsMessageHandshake::ClientHello(hello)) =
                &record.msg[0]
            else {
                panic!("not a ClientHello");
            };
            assert!(tls_parser::parse_tls_extensions(hello.ext.unwrap()).unwrap().0.is_empty());
        }
    }

    #[test]
    fn fragmentation_loses_nothing() {
        let message = Hello::named(b"echo.faas.local").message();
        for size in [1, 2, 7, MAX_FRAGMENT_BYTES] {
            assert_eq!(fragments(&records(&message, size)), message);
        }
    }
}
