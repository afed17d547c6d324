//! Sessions that are taken apart and go on elsewhere: at any point, any number of times, with everything they carry.

use std::io::{IoSlice, Read, Write};

use super::super::fault::Fault;
use super::super::record::{EMPTY_RECORDS_MAX, WARNINGS_MAX};
use super::forger::{forged, read_now};
use super::session::Choppy;
use super::*;

/// Goes on with another descriptor's number and another registration, as in another process.
async fn moved_socket(stream: TlsStream) -> TlsStream {
    let (socket, state) = {
        let mut stream = stream;
        stream.flush().await.unwrap();
        stream.into_parts().unwrap()
    };
    let descriptor = socket.leave().unwrap().try_clone().unwrap();
    let encoded = state.encode();
    drop(state);
    TlsStream::from_parts(Socket::arrived(descriptor, None), SessionState::decode(&encoded).unwrap())
}

#[test]
fn a_connection_moves_after_every_answer() {
    const ROUNDS: u32 = 1000;
    for (suite, site) in all_suites() {
        let server =
            Server::start(site.acceptor(), |stream| echo(stream, async |stream| moved_socket(stream).await));
        let mut client = server.client(site.client_config(suite));
        for round in 0..ROUNDS {
            client.write_all(&round.to_le_bytes()).unwrap();
            let mut answer = [0; 4];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, round.to_le_bytes());
        }
        client.conn.send_close_notify();
        client.flush().unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        server.assert_served();
    }
}

/// Reads a few bytes at a time and moves between, so that decrypted and undecrypted bytes go along.
async fn moving_echo(mut stream: TlsStream, seed: u64) -> io::Result<()> {
    let mut random = Random(seed);
    let mut buffer = vec![0; 20_000];
    loop {
        let wanted = random.size(buffer.len());
        let bytes = stream.read(&mut buffer[..wanted]).await?;
        if bytes == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..bytes]).await?;
        match random.below(6) {
            0 => stream = moved(stream).await,
            1 => stream = moved_socket(stream).await,
            2 if stream.version() == Version::Tls13 => stream.update_keys(),
            _ => {}
        }
    }
}

#[test]
fn many_connections_move_at_random_without_losing_a_byte() {
    const CONNECTIONS: u64 = 4;
    for (suite, site) in all_suites() {
        let server = Server::start(site.acceptor(), |stream| {
            let port = socket2::SockRef::from(&stream.get_ref().fd().unwrap()).peer_addr().unwrap();
            moving_echo(stream, u64::from(port.as_socket().unwrap().port()))
        });
        let clients = (0..CONNECTIONS).map(|seed| {
            let transport = Choppy { socket: server.connect(), random: Random(seed) };
            let mut config = site.client_config(suite);
            config.max_fragment_size = [None, Some(40), Some(1000), Some(16_000)][seed as usize % 4];
            let mut client = client_over(transport, config);
            std::thread::spawn(move || {
                let mut random = Random(seed ^ 0xabcd);
                for _ in 0..60 {
                    let message_bytes = random.size(30_000);
                    let message = random.bytes(message_bytes);
                    client.write_all(&message).unwrap();
                    if random.below(4) == 0
                        && client.conn.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3)
                    {
                        client.conn.refresh_traffic_keys().unwrap();
                    }
                    let mut answer = vec![0; message_bytes];
                    client.read_exact(&mut answer).unwrap();
                    assert!(answer == message);
                }
                client.conn.send_close_notify();
                client.flush().unwrap();
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.join().unwrap();
        }
        for _ in 0..CONNECTIONS {
            server.assert_served();
        }
    }
}

#[test]
fn what_was_read_and_not_used_is_read_again() {
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), async |mut stream: TlsStream| {
            let mut head = [0; 10];
            stream.read_exact(&mut head).await?;
            stream.flush().await?;
            let (socket, mut state) = stream.into_parts().unwrap();
            state.unread(&head[4..]).unwrap();
            let encoded = state.encode();
            let mut stream = TlsStream::from_parts(socket, SessionState::decode(&encoded).unwrap());
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await?;
            stream.write_all(&rest).await?;
            stream.shutdown().await
        });
        let mut client = server.client(site.client_config(suite));
        client.write_all(b"0123456789abcdef").unwrap();
        client.write_all(b"more").unwrap();
        client.conn.send_close_notify();
        client.flush().unwrap();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"456789abcdefmore");
        server.assert_served();
    }
}

#[test]
fn a_session_stays_while_it_can_not_be_taken_apart() {
    let (suite, site) = one_suite_each()[0];
    let server = Server::start(site.acceptor(), async |mut stream: TlsStream| {
        let unmovable = |stream: TlsStream, reason: &str| {
            let refusal = stream.into_parts().err().unwrap();
            assert_eq!(refusal.reason, reason);
            refusal.stream
        };
        stream = unmovable(stream, "it has output to flush");
        stream.read_exact(&mut [0]).await?;
        stream.flush().await?;
        stream = moved(stream).await;
        stream.write_all(b"x").await?;
        stream.shutdown().await?;
        unmovable(stream, "it is closed");
        Ok(())
    });
    let mut client = server.client(site.client_config(suite));
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    server.assert_served();
}

fn fault_of(error: &io::Error) -> Fault {
    *error.get_ref().unwrap().downcast_ref::<Fault>().unwrap()
}

#[tokio::test]
async fn tolerance_is_not_renewed_by_a_move() {
    for (version, aead) in KINDS {
        // Empty records.
        let (mut stream, mut forger) = forged(version, aead, 0);
        for _ in 0..EMPTY_RECORDS_MAX / 2 {
            forger.send(23, &[]);
        }
        let mut buffer = [0; 8];
        forger.send(21, &[1, 90]);
        forger.send(23, b"x");
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 1);
        for _ in 0..EMPTY_RECORDS_MAX {
            forger.send(23, &[]);
        }
        assert_eq!(read_now(&mut stream), None);
        stream = moved(stream).await;
        forger.send(23, &[]);
        let fault = fault_of(&stream.read(&mut buffer).await.unwrap_err());
        assert_eq!(fault, Fault::TooMany("empty records"));

        // Warnings.
        let (mut stream, mut forger) = forged(version, aead, 0);
        for _ in 0..WARNINGS_MAX {
            forger.send(21, &[1, 90]);
            assert_eq!(read_now(&mut stream), None);
            stream = moved(stream).await;
        }
        forger.send(21, &[1, 90]);
        let fault = fault_of(&stream.read(&mut buffer).await.unwrap_err());
        assert_eq!(fault, Fault::TooMany("warnings"));
        let refusal = stream.into_parts().err().unwrap();
        assert_eq!(refusal.reason, "it failed");
        let told = forger.receive().unwrap_err();
        assert_eq!(told, Fault::PeerAlert(rustls::AlertDescription::UnexpectedMessage));
    }
}

#[tokio::test]
async fn a_message_that_has_begun_ends_elsewhere() {
    // A KeyUpdate, cut after every byte.
    for bytes in 1..5 {
        let (mut stream, mut forger) = forged(Version::Tls13, Aead::Aes256Gcm, 0);
        let update = [24, 0, 0, 1, 1];
        forger.send(22, &update[..bytes]);
        assert_eq!(read_now(&mut stream), None);
        stream = moved(stream).await;
        forger.send(22, &update[bytes..]);
        forger.record.update_keys(&mut Vec::new());
        forger.send(23, b"new keys");
        let mut buffer = [0; 8];
        stream.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"new keys");
        stream = moved(stream).await;
        stream.write_all(b"ours too").await.unwrap();
        assert_eq!(forger.receive().unwrap(), b"ours too");
        assert_eq!(forger.record.session().receive.sequence, 1, "the answer changed the keys");
    }

    // A renegotiation.
    let mut hello = vec![1, 0, 0, 200];
    hello.resize(204, 9);
    for bytes in [1, 3, 4, 100, 203] {
        let (mut stream, mut forger) = forged(Version::Tls12, Aead::Aes256Gcm, 0);
        forger.send(22, &hello[..bytes]);
        assert_eq!(read_now(&mut stream), None);
        stream = moved(stream).await;
        forger.send(22, &hello[bytes..]);
        forger.send(23, b"after it");
        let mut buffer = [0; 8];
        stream.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"after it");
        let refusal = stream.into_parts().err().unwrap();
        assert_eq!(refusal.reason, "it owes an answer");
        stream = moved(refusal.stream).await;
        stream.write_all(b"refused").await.unwrap();
        assert_eq!(forger.receive().unwrap(), b"refused");
        assert_eq!(forger.record.session().counters.warnings, 1);
    }
}

#[tokio::test]
async fn the_wear_of_keys_is_counted_across_moves() {
    for aead in [Aead::Aes128Gcm, Aead::Aes256Gcm] {
        let almost = aead.records_max() - 3;
        let (mut stream, mut forger) = forged(Version::Tls13, aead, almost);
        for round in 0..6_u8 {
            stream.write_all(&[round]).await.unwrap();
            stream = moved(stream).await;
            assert_eq!(forger.receive().unwrap(), [round]);
        }
        assert_eq!(forger.record.session().receive.sequence, 3, "three under the new keys");

        let (mut stream, mut forger) = forged(Version::Tls12, aead, almost);
        for round in 0..3_u8 {
            stream.write_all(&[round]).await.unwrap();
            stream = moved(stream).await;
            assert_eq!(forger.receive().unwrap(), [round]);
        }
        let error = stream.write_all(b"x").await.unwrap_err();
        assert_eq!(fault_of(&error), Fault::KeysExhausted);
        assert_eq!(forger.receive().unwrap(), b"", "close_notify");
    }
}

/// A whole record and a half of the next, neither opened before the move.
#[tokio::test]
async fn undecrypted_bytes_go_along() {
    for (version, aead) in KINDS {
        let (mut stream, mut forger) = forged(version, aead, 0);
        let mut sealed = Vec::new();
        let ends = [&b"one"[..], b"two", b"three"].map(|data| {
            forger.record.seal(&[IoSlice::new(data)], usize::MAX, &mut sealed).unwrap();
            sealed.len()
        });
        let cut = sealed.len() - 7;
        forger.socket.write_all(&sealed[..cut]).unwrap();
        let mut buffer = [0; 3];
        stream.read_exact(&mut buffer[..1]).await.unwrap();
        stream.flush().await.unwrap();
        let (socket, state) = stream.into_parts().unwrap();
        assert_eq!(state.plaintext, b"ne");
        assert!(state.ciphertext == sealed[ends[0]..cut]);
        let encoded = state.encode();
        let mut stream = TlsStream::from_parts(socket, SessionState::decode(&encoded).unwrap());
        forger.socket.write_all(&sealed[cut..]).unwrap();
        let mut all = [0; 10];
        stream.read_exact(&mut all).await.unwrap();
        assert_eq!(&all, b"netwothree");
    }
}
