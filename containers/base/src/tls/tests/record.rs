//! The record layer against rustls' ciphers and against itself: what is sealed, opened and refused.

use std::io::IoSlice;

use rustls::crypto::cipher::{AeadKey, InboundOpaqueMessage, Iv, OutboundChunks, OutboundPlainMessage};
use rustls::crypto::ring::cipher_suite;
use rustls::{AlertDescription, ContentType, ProtocolVersion, SupportedCipherSuite};
use zeroize::Zeroizing;

use super::super::fault::Fault;
use super::super::record::{EMPTY_RECORDS_MAX, FRAGMENT_BYTES_MAX, Opened, RecordLayer, WARNINGS_MAX};
use super::super::secrets::{Aead, TrafficKeys, Version};
use super::{KINDS, Random, session, traffic};

pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const DATA: u8 = 23;

/// Both ends of a session.
pub(super) fn pair((version, aead): (Version, Aead)) -> (RecordLayer, RecordLayer) {
    (RecordLayer::new(session(version, aead, 1, 2)), RecordLayer::new(session(version, aead, 2, 1)))
}

pub(super) fn seal_data(layer: &mut RecordLayer, data: &[u8]) -> Vec<u8> {
    let mut output = Vec::new();
    assert_eq!(layer.seal(&[IoSlice::new(data)], usize::MAX, &mut output), Ok(data.len()));
    output
}

pub(super) fn seal_as(layer: &mut RecordLayer, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut output = Vec::new();
    layer.seal_record(kind, &mut output, |output| output.extend_from_slice(content));
    output
}

/// Content with padding: its true type is followed by zeros, of which the last stands where the type should.
pub(super) fn seal_padded(layer: &mut RecordLayer, kind: u8, content: &[u8], padding: usize) -> Vec<u8> {
    let mut inner = content.to_vec();
    inner.push(kind);
    inner.resize(inner.len() + padding - 1, 0);
    seal_as(layer, 0, &inner)
}

/// Opens everything in the input; the content of data records is joined.
pub(super) fn open_all(layer: &mut RecordLayer, input: &mut [u8]) -> Result<Vec<u8>, Fault> {
    let mut data = Vec::new();
    let mut rest = input;
    while !rest.is_empty() {
        let record_bytes = match layer.open(rest)? {
            Opened::Data { record_bytes, content } => {
                data.extend_from_slice(&rest[content]);
                record_bytes
            }
            Opened::Control { record_bytes } | Opened::CloseNotify { record_bytes } => record_bytes,
            Opened::Incomplete { .. } => panic!("a whole record is there"),
        };
        rest = &mut rest[record_bytes..];
    }
    Ok(data)
}

/// The suites whose keys rustls lets be made of bytes.
fn rustls_suites() -> [(Version, Aead, SupportedCipherSuite); 4] {
    [
        (Version::Tls13, Aead::Aes256Gcm, cipher_suite::TLS13_AES_256_GCM_SHA384),
        (Version::Tls13, Aead::Chacha20Poly1305, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256),
        (Version::Tls12, Aead::Aes256Gcm, cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
        (Version::Tls12, Aead::Chacha20Poly1305, cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
    ]
}

fn rustls_key(keys: &TrafficKeys) -> AeadKey {
    AeadKey::from(*keys.key)
}

#[test]
fn records_are_those_of_rustls_at_any_sequence_number() {
    let mut random = Random(3);
    for (version, aead, suite) in rustls_suites() {
        for sequence in [0, 1, 255, 256, (1 << 24) - 1, random.next() >> 41] {
            let mut layer = RecordLayer::new({
                let mut session = session(version, aead, 1, 2);
                session.transmit.sequence = sequence;
                session.receive.sequence = sequence;
                session
            });
            let sent = traffic(version, aead, 1).keys;
            let received = traffic(version, aead, 2).keys;
            let (mut decrypter, mut encrypter) = match suite {
                SupportedCipherSuite::Tls13(suite) => (
                    suite.aead_alg.decrypter(rustls_key(&sent), Iv::from(*sent.iv)),
                    suite.aead_alg.encrypter(rustls_key(&received), Iv::from(*received.iv)),
                ),
                SupportedCipherSuite::Tls12(suite) => {
                    let fixed = suite.aead_alg.key_block_shape().fixed_iv_len;
                    (
                        suite.aead_alg.decrypter(rustls_key(&sent), &sent.iv[..fixed]),
                        suite.aead_alg.encrypter(
                            rustls_key(&received),
                            &received.iv[..fixed],
                            &received.iv[fixed..],
                        ),
                    )
                }
            };

            let data = random.bytes(777);
            let mut record = seal_data(&mut layer, &data);
            let message = InboundOpaqueMessage::new(
                ContentType::ApplicationData,
                ProtocolVersion::TLSv1_2,
                &mut record[5..],
            );
            let opened = decrypter.decrypt(message, sequence).unwrap();
            assert_eq!(opened.payload, data);
            assert_eq!(opened.typ, ContentType::ApplicationData);

            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_2,
                payload: OutboundChunks::Single(&data),
            };
            let mut record = encrypter.encrypt(message, sequence).unwrap().encode();
            assert_eq!(open_all(&mut layer, &mut record), Ok(data));
        }
    }
}

#[test]
fn an_incomplete_record_says_how_long_it_is() {
    for kind in KINDS {
        let (mut client, mut server) = pair(kind);
        let mut record = seal_data(&mut client, b"0123456789");
        let whole = record.len();
        for bytes in 0..whole {
            let expected = if bytes < 5 { 5 } else { whole };
            assert_eq!(server.open(&mut record[..bytes]), Ok(Opened::Incomplete { record_bytes: expected }));
        }
        assert_eq!(open_all(&mut server, &mut record), Ok(b"0123456789".to_vec()));
    }
}

#[test]
fn writes_are_cut_into_the_fewest_records() {
    for kind in KINDS {
        let (mut client, mut server) = pair(kind);
        let data = Random(4).bytes(3 * FRAGMENT_BYTES_MAX + 1);
        let slices: Vec<IoSlice<'_>> =
            [&data[..0], &data[..1], &data[1..20_000], &data[20_000..20_000], &data[20_000..]]
                .map(IoSlice::new)
                .to_vec();
        let mut output = Vec::new();
        let sealed = client.seal(&slices, 2 * FRAGMENT_BYTES_MAX, &mut output).unwrap();
        assert_eq!(sealed, 2 * FRAGMENT_BYTES_MAX);
        assert_eq!(client.session().transmit.sequence, 2);
        assert!(open_all(&mut server, &mut output).unwrap() == data[..sealed]);

        let mut output = Vec::new();
        assert_eq!(client.seal(&slices, usize::MAX, &mut output), Ok(data.len()));
        assert_eq!(client.session().transmit.sequence, 6);
        assert!(open_all(&mut server, &mut output).unwrap() == data);
    }
}

#[test]
fn one_changed_bit_anywhere_is_found() {
    for kind in KINDS {
        let (mut client, _) = pair(kind);
        let record = seal_data(&mut client, b"sixteen bytes, +");
        for bit in 0..record.len() * 8 {
            let (_, mut server) = pair(kind);
            let mut changed = record.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let outcome = server.open(&mut changed);
            let (at, fault) = (bit / 8, outcome.clone().err());
            match at {
                // Type, version and length: each has its own error, or the record seems longer than it is.
                0 => assert!(matches!(fault, Some(Fault::UnexpectedMessage(_) | Fault::BadRecordMac))),
                1 => assert_eq!(fault, Some(Fault::Decode("a record's version"))),
                3 | 4 => assert!(
                    matches!(fault, Some(Fault::RecordOverflow | Fault::BadRecordMac))
                        || matches!(outcome, Ok(Opened::Incomplete { .. }))
                ),
                _ => assert_eq!(fault, Some(Fault::BadRecordMac), "byte {at}"),
            }
        }
    }
}

#[test]
fn a_record_can_be_neither_repeated_nor_skipped() {
    for kind in KINDS {
        let (mut client, mut server) = pair(kind);
        let mut first = seal_data(&mut client, b"first");
        let mut again = first.clone();
        let mut third = {
            seal_data(&mut client, b"second");
            seal_data(&mut client, b"third")
        };
        assert_eq!(open_all(&mut server, &mut first), Ok(b"first".to_vec()));
        assert_eq!(open_all(&mut server, &mut again), Err(Fault::BadRecordMac));
        assert_eq!(open_all(&mut server, &mut third), Err(Fault::BadRecordMac));
    }
}

#[test]
fn headers_are_judged_before_their_records_arrive() {
    let unexpected = Err(Fault::UnexpectedMessage("a record's type"));
    for kind in KINDS {
        let (limit, plain) = match kind.0 {
            Version::Tls12 => (FRAGMENT_BYTES_MAX + 2048, Ok(Opened::Incomplete { record_bytes: 7 })),
            Version::Tls13 => (FRAGMENT_BYTES_MAX + 256, unexpected.clone()),
        };
        let header = |kind: u8, bytes: usize| [kind, 3, 3, (bytes >> 8) as u8, bytes as u8];
        let open = |mut bytes: [u8; 5]| pair(kind).1.open(&mut bytes);
        assert_eq!(open(header(DATA, limit)), Ok(Opened::Incomplete { record_bytes: limit + 5 }));
        assert_eq!(open(header(DATA, limit + 1)), Err(Fault::RecordOverflow));
        assert_eq!(open(header(ALERT, 2)), plain);
        assert_eq!(open(header(20, 1)), unexpected);
        assert_eq!(open(header(24, 1)), unexpected);
        assert_eq!(open(*b"GET /"), unexpected);
        assert_eq!(open([DATA, 2, 3, 0, 9]), Err(Fault::Decode("a record's version")));
        // Too short for a tag.
        for bytes in 0..16 {
            let mut record = [&header(DATA, bytes)[..], &vec![0; bytes]].concat();
            assert_eq!(pair(kind).1.open(&mut record), Err(Fault::BadRecordMac));
        }
    }
}

#[test]
fn a_record_with_too_much_content_overflows() {
    for kind in KINDS {
        let (mut client, mut server) = pair(kind);
        let mut longest = seal_as(&mut client, DATA, &vec![1; FRAGMENT_BYTES_MAX]);
        assert_eq!(open_all(&mut server, &mut longest).map(|data| data.len()), Ok(FRAGMENT_BYTES_MAX));
        let mut overlong = seal_as(&mut client, DATA, &vec![1; FRAGMENT_BYTES_MAX + 1]);
        assert_eq!(server.open(&mut overlong), Err(Fault::RecordOverflow));
    }
}

#[test]
fn padding_is_removed_and_padding_alone_is_refused() {
    let kind = (Version::Tls13, Aead::Aes128Gcm);
    let (mut client, mut server) = pair(kind);
    for padding in [1, 2, 100, FRAGMENT_BYTES_MAX - 3] {
        let mut record = seal_padded(&mut client, DATA, b"abc", padding);
        assert_eq!(open_all(&mut server, &mut record), Ok(b"abc".to_vec()), "{padding}");
    }
    let mut record = seal_padded(&mut client, DATA, b"abc", FRAGMENT_BYTES_MAX - 2);
    assert_eq!(server.open(&mut record), Err(Fault::RecordOverflow));

    let (mut client, mut server) = pair(kind);
    let mut record = seal_as(&mut client, 0, &[0; 30]);
    assert_eq!(server.open(&mut record), Err(Fault::UnexpectedMessage("a record without a content type")));
}

#[test]
fn inner_types_and_empty_contents_are_judged() {
    for kind in KINDS {
        let refuse = |inner: u8, content: &[u8]| {
            let (mut client, mut server) = pair(kind);
            server.open(&mut seal_as(&mut client, inner, content)).unwrap_err()
        };
        for inner in [20, 24, 255] {
            assert!(matches!(refuse(inner, &[1]), Fault::UnexpectedMessage(_)));
        }
        assert_eq!(refuse(HANDSHAKE, &[]), Fault::UnexpectedMessage("an empty handshake record"));
        assert_eq!(refuse(ALERT, &[]), Fault::UnexpectedMessage("an empty alert record"));
        assert_eq!(refuse(ALERT, &[1]), Fault::Decode("an alert"));
        assert_eq!(refuse(ALERT, &[1, 0, 0]), Fault::Decode("an alert"));
    }
}

#[test]
fn empty_records_are_allowed_until_they_are_too_many() {
    for kind in KINDS {
        let (mut client, mut server) = pair(kind);
        for _ in 0..3 {
            for _ in 0..EMPTY_RECORDS_MAX {
                assert_eq!(open_all(&mut server, &mut seal_as(&mut client, DATA, &[])), Ok(vec![]));
            }
            // A byte of data, and they may begin again.
            assert_eq!(open_all(&mut server, &mut seal_data(&mut client, b"x")), Ok(b"x".to_vec()));
        }
        for _ in 0..EMPTY_RECORDS_MAX {
            open_all(&mut server, &mut seal_as(&mut client, DATA, &[])).unwrap();
        }
        let fault = server.open(&mut seal_as(&mut client, DATA, &[])).unwrap_err();
        assert_eq!(fault, Fault::TooMany("empty records"));
        assert_eq!(fault.alert(), Some(AlertDescription::UnexpectedMessage));
    }
}

#[test]
fn alerts_end_the_session_or_are_counted() {
    for kind in KINDS {
        let close = [1, 0];
        let (mut client, mut server) = pair(kind);
        let mut record = seal_as(&mut client, ALERT, &close);
        let record_bytes = record.len();
        assert_eq!(server.open(&mut record), Ok(Opened::CloseNotify { record_bytes }));
        assert!(server.session().peer_closed);

        let (mut client, mut server) = pair(kind);
        let fault = server.open(&mut seal_as(&mut client, ALERT, &[2, 48])).unwrap_err();
        assert_eq!(fault, Fault::PeerAlert(AlertDescription::UnknownCA));
        assert_eq!(fault.alert(), None, "an alert isn't answered");

        // user_canceled is a warning in both versions.
        let (mut client, mut server) = pair(kind);
        for _ in 0..WARNINGS_MAX {
            assert_eq!(open_all(&mut server, &mut seal_as(&mut client, ALERT, &[1, 90])), Ok(vec![]));
        }
        let fault = server.open(&mut seal_as(&mut client, ALERT, &[1, 90])).unwrap_err();
        assert_eq!(fault, Fault::TooMany("warnings"));

        let (mut client, mut server) = pair(kind);
        let warning = server.open(&mut seal_as(&mut client, ALERT, &[1, 100]));
        let odd_level = server.open(&mut seal_as(&mut client, ALERT, &[3, 90]));
        match kind.0 {
            Version::Tls12 => {
                assert!(matches!(warning, Ok(Opened::Control { .. })));
                assert_eq!(odd_level, Err(Fault::IllegalParameter("an alert's level")));
            }
            Version::Tls13 => {
                assert_eq!(warning, Err(Fault::PeerAlert(AlertDescription::NoRenegotiation)));
                assert!(matches!(odd_level, Ok(Opened::Control { .. })), "the level means nothing");
            }
        }
    }
}

#[test]
fn exported_keys_are_those_in_use() {
    for (version, aead) in KINDS {
        let session = RecordLayer::new(session(version, aead, 1, 2)).into_session();
        assert!(session.transmit.keys.equal(&traffic(version, aead, 1).keys));
        let other = TrafficKeys { key: Zeroizing::new([0; 32]), iv: Zeroizing::new([0; 12]) };
        assert!(!session.transmit.keys.equal(&other));
    }
}
