//! Handshakes: every suite and version, what is negotiated, and what each bad one gets.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use rustls::crypto::ring;
use rustls::{AlertDescription, HandshakeKind};

use super::*;

fn roundtrip<T: Read + Write>(client: &mut Client<T>, message: &[u8]) {
    client.write_all(message).unwrap();
    let mut answer = vec![0; message.len()];
    client.read_exact(&mut answer).unwrap();
    assert!(answer == message);
}

fn close<T: Read + Write>(mut client: Client<T>) {
    client.conn.send_close_notify();
    client.flush().unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the server says close_notify too");
}

fn alert_received(error: &io::Error) -> AlertDescription {
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        _ => panic!("no alert but {error:?}"),
    }
}

fn read_all(mut socket: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn every_suite_carries_bytes_both_ways() {
    for (suite, site) in all_suites() {
        let server = Server::start(site.acceptor(), plain_echo);
        let mut client = server.client(site.client_config(suite));
        roundtrip(&mut client, b"first");
        roundtrip(&mut client, &Random(1).bytes(40_000));
        assert_eq!(client.conn.negotiated_cipher_suite(), Some(suite));
        close(client);
        server.assert_served();
    }
}

#[test]
fn only_http_1_1_is_negotiated() {
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), plain_echo);

        let mut config = site.client_config(suite);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let mut client = server.client(config);
        roundtrip(&mut client, b"picked");
        assert_eq!(client.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
        close(client);
        server.assert_served();

        let mut config = site.client_config(suite);
        config.alpn_protocols = vec![b"h2".to_vec()];
        let error = server.client(config).write_all(b"refused").unwrap_err();
        assert_eq!(alert_received(&error), AlertDescription::NoApplicationProtocol);
        assert!(matches!(server.outcome(), Outcome::Refused(HandshakeError::Tls(_))));
    }
}

/// The gateway routes by name. A connection that is here gets this function's certificate, whatever it asks for.
#[test]
fn another_server_name_gets_the_same_certificate() {
    let (suite, site) = one_suite_each()[0];
    let server = Server::start(site.acceptor(), plain_echo);
    let name = ServerName::try_from("other.example").unwrap();
    let connection = ClientConnection::new(Arc::new(site.client_config(suite)), name).unwrap();
    let error = StreamOwned::new(connection, server.connect()).write_all(b"x").unwrap_err();
    let reason = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    assert!(
        matches!(
            reason,
            Some(rustls::Error::InvalidCertificate(rustls::CertificateError::NotValidForNameContext { .. }))
        ),
        "the client itself refuses the certificate that it got: {error:?}"
    );
}

#[test]
fn tickets_resume_sessions() {
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), plain_echo);
        let config = site.client_config(suite);
        for expected in [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed] {
            let mut client = server.client(config.clone());
            roundtrip(&mut client, b"again");
            assert_eq!(client.conn.handshake_kind(), Some(expected), "{suite:?}");
            close(client);
            server.assert_served();
        }
    }
}

/// Cuts the client's records into records of one byte each, and sends them byte by byte.
struct Shredder(TcpStream);

impl Write for Shredder {
    fn write(&mut self, input: &[u8]) -> io::Result<usize> {
        assert_eq!(input[0], 22, "only the hello is shredded");
        let content_bytes = usize::from(u16::from_be_bytes([input[3], input[4]]));
        for byte in &input[5..5 + content_bytes] {
            self.0.write_all(&[22, 3, 1])?;
            self.0.write_all(&[0, 1, *byte])?;
        }
        Ok(5 + content_bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_hello_in_records_of_one_byte_is_understood() {
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), plain_echo);
        let mut client = server.client(site.client_config(suite));
        let mut shredder = Shredder(client.sock.try_clone().unwrap());
        while client.conn.wants_write() {
            client.conn.write_tls(&mut shredder).unwrap();
        }
        roundtrip(&mut client, b"understood");
        close(client);
        server.assert_served();
    }
}

#[test]
fn a_hello_cut_anywhere_is_understood() {
    let (suite, site) = one_suite_each()[0];
    let server = Server::start(site.acceptor(), plain_echo);
    let mut random = Random(7);
    for _ in 0..40 {
        let mut client = server.client(site.client_config(suite));
        let mut hello = Vec::new();
        while client.conn.wants_write() {
            client.conn.write_tls(&mut hello).unwrap();
        }
        let cut = random.below(hello.len());
        client.sock.write_all(&hello[..cut]).unwrap();
        client.sock.write_all(&hello[cut..]).unwrap();
        roundtrip(&mut client, b"understood");
        close(client);
        server.assert_served();
    }
}

/// Two thirds of the hello's limit, by a session ticket that nobody here made.
#[test]
fn a_long_hello_is_understood() {
    let (suite, site) = one_suite_each()[0];
    let server = Server::start(site.acceptor(), plain_echo);
    let mut config = site.client_config(suite);
    config.alpn_protocols =
        (0..60).map(|index| vec![b'a' + index % 26; 200]).chain([b"http/1.1".to_vec()]).collect();
    let mut client = server.client(config);
    roundtrip(&mut client, b"understood");
    close(client);
    server.assert_served();
}

#[test]
fn each_broken_hello_gets_its_alert() {
    let site = ecdsa_site();
    let unexpected = AlertDescription::UnexpectedMessage;
    let decode = AlertDescription::DecodeError;
    let mut endless_hello = Vec::new();
    for _ in 0..8 {
        // A handshake message of 64 KiB, less than which rustls accepts, in full records.
        endless_hello.extend_from_slice(&[22, 3, 1, 0x40, 0]);
        endless_hello.extend_from_slice(&[1, 0, 0xff, 0xff]);
        endless_hello.resize(endless_hello.len() + 0x4000 - 4, 0);
    }
    let cases: [(&str, &[u8], AlertDescription); 8] = [
        ("HTTP", b"GET / HTTP/1.1\r\nHost: echo.faas.local\r\n\r\n", unexpected),
        ("the HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", unexpected),
        ("SSLv2", &[0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10], unexpected),
        ("zeros", &[0; 64], unexpected),
        ("an overlong record", &[22, 3, 1, 0xff, 0xff, 1, 0], decode),
        ("an endless hello", &endless_hello, decode),
        ("a hello of nonsense", &[22, 3, 1, 0, 6, 1, 0, 0, 2, 9, 9], decode),
        ("data first", &[23, 3, 3, 0, 1, 0], unexpected),
    ];
    for (what, bytes, alert) in cases {
        let server = Server::start(site.acceptor(), plain_echo);
        let mut socket = server.connect();
        socket.write_all(bytes).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(socket), super::super::plaintext_alert(alert), "{what}");
        assert!(matches!(server.outcome(), Outcome::Refused(_)), "{what}");
    }
}

/// After its ServerHello, TLS 1.3 says it under the handshake's keys.
#[test]
fn garbage_amid_a_handshake_gets_an_alert_that_the_client_can_read() {
    for (suite, site) in one_suite_each() {
        for garbage in [
            &b"GET / HTTP/1.1\r\n"[..],
            &[22, 3, 3, 0xff, 0xff],
            &[23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
        ] {
            let server = Server::start(site.acceptor(), plain_echo);
            let mut client = server.client(site.client_config(suite));
            while client.conn.wants_write() {
                client.conn.write_tls(&mut client.sock).unwrap();
            }
            client.sock.write_all(garbage).unwrap();
            client.sock.shutdown(Shutdown::Write).unwrap();
            let error = loop {
                if client.conn.read_tls(&mut client.sock).unwrap() == 0 {
                    panic!("the server closed without an alert");
                }
                if let Err(error) = client.conn.process_new_packets() {
                    break error;
                }
            };
            assert!(matches!(error, rustls::Error::AlertReceived(_)), "{suite:?}: {error:?}");
            assert!(matches!(server.outcome(), Outcome::Refused(_)));
        }
    }
}

#[test]
fn a_client_that_leaves_is_not_answered() {
    let (suite, site) = one_suite_each()[0];
    let server = Server::start(site.acceptor(), plain_echo);
    drop(server.connect());
    assert!(matches!(server.outcome(), Outcome::Refused(HandshakeError::Closed)));

    let mut client = server.client(site.client_config(suite));
    let mut hello = Vec::new();
    client.conn.write_tls(&mut hello).unwrap();
    client.sock.write_all(&hello[..hello.len() / 2]).unwrap();
    client.sock.shutdown(Shutdown::Write).unwrap();
    assert!(read_all(client.sock).is_empty());
    assert!(matches!(server.outcome(), Outcome::Refused(HandshakeError::Closed)));
}

#[test]
fn a_silent_client_is_told_so_at_the_deadline() {
    let site = ecdsa_site();
    let server = Server::start_with_deadline(site.acceptor(), Duration::from_millis(50), plain_echo);
    let told = read_all(server.connect());
    assert_eq!(told, super::super::plaintext_alert(AlertDescription::UserCanceled));
    assert!(matches!(server.outcome(), Outcome::Refused(HandshakeError::TimedOut)));
}

#[test]
fn a_client_with_no_common_suite_is_told_so() {
    let server = Server::start(ecdsa_site().acceptor(), plain_echo);
    let config = ecdsa_site().client_config(ring::cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256);
    let error = server.client(config).write_all(b"x").unwrap_err();
    assert_eq!(alert_received(&error), AlertDescription::HandshakeFailure);
}
