//! What happens to an established session's keys: updates, renegotiations, wear, and whole conversations with them.

use std::io::IoSlice;

use proptest::prelude::*;

use super::super::fault::Fault;
use super::super::record::{FRAGMENT_BYTES_MAX, KEY_UPDATES_MAX, Opened, RecordLayer, WARNINGS_MAX};
use super::super::secrets::{Aead, Version};
use super::record::{ALERT, DATA, HANDSHAKE, open_all, pair, seal_as, seal_data, seal_padded};
use super::{KINDS, Random, session};

const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
const KEY_UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];

#[test]
fn key_updates_are_followed_and_answered_once() {
    for aead in [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::Chacha20Poly1305] {
        let (mut client, mut server) = pair((Version::Tls13, aead));
        for round in 0..100_u8 {
            // Three requests in a row, as ours: each under new keys of the client.
            for update in [KEY_UPDATE_REQUESTED, KEY_UPDATE, KEY_UPDATE_REQUESTED] {
                let mut record = seal_as(&mut client, HANDSHAKE, &update);
                open_all(&mut server, &mut record).unwrap();
                client.update_transmit_for_test();
            }
            assert!(server.owes());
            assert_eq!(open_all(&mut server, &mut seal_data(&mut client, &[round])), Ok(vec![round]));

            let mut answer = seal_data(&mut server, &[round, round]);
            assert!(!server.owes());
            assert_eq!(server.session().transmit.sequence, 1, "one KeyUpdate, then data under new keys");
            assert_eq!(open_all(&mut client, &mut answer), Ok(vec![round, round]));
            assert!(!client.owes(), "the answer asks for nothing");
        }
    }
}

#[test]
fn key_updates_without_data_are_limited() {
    let (mut client, mut server) = pair((Version::Tls13, Aead::Aes128Gcm));
    for _ in 0..2 {
        for _ in 0..KEY_UPDATES_MAX {
            open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &KEY_UPDATE)).unwrap();
            client.update_transmit_for_test();
        }
        open_all(&mut server, &mut seal_data(&mut client, b"x")).unwrap();
    }
    for _ in 0..KEY_UPDATES_MAX {
        open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &KEY_UPDATE)).unwrap();
        client.update_transmit_for_test();
    }
    let fault = server.open(&mut seal_as(&mut client, HANDSHAKE, &KEY_UPDATE)).unwrap_err();
    assert_eq!(fault, Fault::TooMany("KeyUpdates"));
}

#[test]
fn a_key_update_over_records_counts_when_it_is_whole() {
    let kind = (Version::Tls13, Aead::Aes128Gcm);
    let (mut client, mut server) = pair(kind);
    for byte in KEY_UPDATE_REQUESTED {
        assert!(!server.owes());
        open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &[byte])).unwrap();
    }
    assert!(server.owes());

    let amid = Fault::UnexpectedMessage("a record amid a handshake message");
    for intruder in [(DATA, &b"x"[..]), (ALERT, &[1, 0]), (DATA, &[])] {
        let (mut client, mut server) = pair(kind);
        open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &KEY_UPDATE[..3])).unwrap();
        assert_eq!(server.open(&mut seal_as(&mut client, intruder.0, intruder.1)), Err(amid));
    }

    let (mut client, mut server) = pair(kind);
    let two = [KEY_UPDATE, KEY_UPDATE].concat();
    let fault = server.open(&mut seal_as(&mut client, HANDSHAKE, &two)).unwrap_err();
    assert_eq!(fault, Fault::UnexpectedMessage("bytes after a KeyUpdate"));
}

#[test]
fn renegotiation_is_refused_by_a_warning() {
    let mut hello = vec![1, 0, 1, 0];
    hello.resize(4 + 256, 7);
    for aead in [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::Chacha20Poly1305] {
        let (mut client, mut server) = pair((Version::Tls12, aead));
        // Over three records, with data between.
        open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &hello[..2])).unwrap();
        assert_eq!(open_all(&mut server, &mut seal_data(&mut client, b"x")), Ok(b"x".to_vec()));
        open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &hello[2..100])).unwrap();
        assert!(!server.owes());
        open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &hello[100..])).unwrap();
        assert!(server.owes());

        let mut answer = Vec::new();
        server.settle(&mut answer);
        let Ok(Opened::Control { .. }) = client.open(&mut answer) else { panic!("not a warning") };
        assert_eq!(client.session().counters.warnings, 1);

        for _ in 1..WARNINGS_MAX {
            open_all(&mut server, &mut seal_as(&mut client, HANDSHAKE, &hello)).unwrap();
        }
        let fault = server.open(&mut seal_as(&mut client, HANDSHAKE, &hello)).unwrap_err();
        assert_eq!(fault, Fault::TooMany("renegotiations"));
    }
}

#[test]
fn aes_gcm_keys_are_changed_before_they_are_worn() {
    for aead in [Aead::Aes128Gcm, Aead::Aes256Gcm] {
        let worn = |version| {
            let mut ends = [session(version, aead, 1, 2), session(version, aead, 2, 1)];
            ends[0].transmit.sequence = (1 << 24) - 2;
            ends[1].receive.sequence = (1 << 24) - 2;
            ends.map(RecordLayer::new)
        };
        let data = Random(5).bytes(5 * FRAGMENT_BYTES_MAX);

        let [mut ours, mut peer] = worn(Version::Tls13);
        let mut sealed = seal_data(&mut ours, &data);
        assert_eq!(ours.session().transmit.sequence, 3, "two under the old key, three under the new");
        assert!(open_all(&mut peer, &mut sealed).unwrap() == data);
        assert!(!peer.owes());

        let [mut ours, mut peer] = worn(Version::Tls12);
        let mut sealed = Vec::new();
        let slices = [IoSlice::new(&data)];
        assert_eq!(ours.seal(&slices, usize::MAX, &mut sealed), Ok(2 * FRAGMENT_BYTES_MAX));
        let fault = ours.seal(&slices, usize::MAX, &mut sealed).unwrap_err();
        assert_eq!(fault, Fault::KeysExhausted);
        ours.fail(fault, &mut sealed);
        assert!(open_all(&mut peer, &mut sealed).unwrap() == data[..2 * FRAGMENT_BYTES_MAX]);
        assert!(peer.session().peer_closed, "TLS 1.2 has nothing but the end");
    }
}

#[test]
fn a_sequence_number_never_wraps() {
    for kind in KINDS {
        let mut worn = session(kind.0, kind.1, 2, 1);
        worn.receive.sequence = u64::MAX;
        let (mut client, _) = pair(kind);
        let mut record = seal_data(&mut client, b"x");
        assert_eq!(RecordLayer::new(worn).open(&mut record), Err(Fault::KeysExhausted));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Data(Vec<u8>),
    Empty,
    Padded(Vec<u8>, usize),
    KeyUpdate { requested: bool },
    ServerKeyUpdate,
    Answer(Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    let data = || prop::collection::vec(any::<u8>(), 1..2000);
    prop_oneof![
        4 => data().prop_map(Step::Data),
        1 => Just(Step::Empty),
        1 => (data(), 1..400_usize).prop_map(|(data, padding)| Step::Padded(data, padding)),
        1 => any::<bool>().prop_map(|requested| Step::KeyUpdate { requested }),
        1 => Just(Step::ServerKeyUpdate),
        3 => data().prop_map(Step::Answer),
    ]
}

proptest! {
    /// Whatever the two sides do, and however the bytes are cut, all data arrive in order.
    #[test]
    fn conversations_arrive(
        kind in prop::sample::select(&KINDS[..]),
        steps in prop::collection::vec(step(), 1..30),
        cuts in prop::collection::vec(1..3000_usize, 1..20),
    ) {
        let (mut client, mut server) = pair(kind);
        let tls13 = kind.0 == Version::Tls13;
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        let (mut sent, mut answered) = (Vec::new(), Vec::new());
        let mut received = Vec::new();
        let mut cuts = cuts.iter().cycle();
        for step in steps {
            match step {
                Step::Data(data) => {
                    to_server.extend(seal_data(&mut client, &data));
                    sent.extend(data);
                }
                Step::Empty => to_server.extend(seal_as(&mut client, DATA, &[])),
                Step::Padded(data, padding) if tls13 => {
                    to_server.extend(seal_padded(&mut client, DATA, &data, padding));
                    sent.extend(data);
                }
                Step::KeyUpdate { requested } if tls13 => {
                    let update = if requested { KEY_UPDATE_REQUESTED } else { KEY_UPDATE };
                    to_server.extend(seal_as(&mut client, HANDSHAKE, &update));
                    client.update_transmit_for_test();
                }
                Step::ServerKeyUpdate if tls13 => server.update_keys(&mut to_client),
                Step::Answer(data) => {
                    server.seal(&[IoSlice::new(&data)], usize::MAX, &mut to_client).unwrap();
                    answered.extend(data);
                }
                Step::Padded(..) | Step::KeyUpdate { .. } | Step::ServerKeyUpdate => {}
            }
            // The server sees what has come so far, a piece at a time.
            let mut seen = 0;
            while !to_server.is_empty() {
                seen = (seen + cuts.next().unwrap()).min(to_server.len());
                match server.open(&mut to_server[..seen]).unwrap() {
                    Opened::Incomplete { record_bytes } => prop_assert!(record_bytes > seen),
                    Opened::Data { record_bytes, content } => {
                        received.extend_from_slice(&to_server[content]);
                        to_server.drain(..record_bytes);
                        seen -= record_bytes;
                    }
                    Opened::Control { record_bytes } | Opened::CloseNotify { record_bytes } => {
                        to_server.drain(..record_bytes);
                        seen -= record_bytes;
                    }
                }
            }
        }
        prop_assert!(received == sent);
        prop_assert!(open_all(&mut client, &mut to_client).unwrap() == answered);
    }

    /// Bytes of anybody neither panic nor authenticate.
    #[test]
    fn strangers_bytes_are_refused(
        kind in prop::sample::select(&KINDS[..]),
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        header in any::<bool>(),
    ) {
        if header && bytes.len() >= 5 {
            let body = bytes.len() - 5;
            bytes[..5].copy_from_slice(&[DATA, 3, 3, 0, body as u8]);
        }
        match pair(kind).1.open(&mut bytes) {
            Ok(Opened::Incomplete { record_bytes }) => prop_assert!(record_bytes > bytes.len()),
            Ok(opened) => prop_assert!(false, "{opened:?}"),
            Err(_) => {}
        }
    }
}

/// What the peers of these tests do after a KeyUpdate that they sealed by hand.
impl RecordLayer {
    fn update_transmit_for_test(&mut self) {
        let mut discarded = Vec::new();
        // Sealing one more under the old keys changes nothing: they are gone afterwards.
        self.update_keys(&mut discarded);
    }
}
