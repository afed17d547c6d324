//! The same loop under TLS, with a client of its own.
use std::{
    io::{Read, Write},
    sync::Arc,
    thread,
};

use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring};

use super::*;
use crate::tls::Acceptor;

#[test]
fn requests_pass_through_tls_unchanged() {
    let site = rcgen::generate_simple_self_signed(vec!["echo.faas.local".to_owned()]).unwrap();
    let acceptor =
        Acceptor::from_pem(site.cert.pem().as_bytes(), site.signing_key.serialize_pem().as_bytes()).unwrap();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut roots = RootCertStore::empty();
        roots.add(site.cert.der().clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (client, socket) = sockets();
        let body: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
        let expected = body.clone();
        let client = thread::spawn(move || {
            let session =
                ClientConnection::new(Arc::new(config), "echo.faas.local".try_into().unwrap()).unwrap();
            let mut stream = StreamOwned::new(session, client);
            // Half of it at a time, so that the answer's beginning needn't wait in a buffer.
            let mut received = Vec::new();
            stream
                .write_all(
                    format!(
                        "PUT /x HTTP/1.1\r\nHost: echo.faas.local\r\nContent-Length: {}\r\n\r\n",
                        body.len()
                    )
                    .as_bytes(),
                )
                .unwrap();
            for piece in body.chunks(100_000) {
                stream.write_all(piece).unwrap();
                let mut bytes = vec![0; 150_000];
                while received.len() < 50_000 || received.len() < piece.len() {
                    let read = stream.read(&mut bytes).unwrap();
                    received.extend_from_slice(&bytes[..read]);
                }
            }
            while Answer::parse(&received, "PUT", false).is_none() {
                let mut bytes = vec![0; 150_000];
                let read = stream.read(&mut bytes).unwrap();
                received.extend_from_slice(&bytes[..read]);
            }
            stream.write_all(b"GET /bye HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
            let mut last = Vec::new();
            // Without close_notify this would be an error.
            stream.read_to_end(&mut last).unwrap();
            (received, last)
        });
        run(async {
            let stream = acceptor.accept(socket, PATIENCE).await.unwrap();
            let shared = shared(Limits::default());
            let mut connection =
                Connection::new(Stream::Tls(stream), Protocol::Https, Origin::default(), shared);
            let finish = connection.serve(&mut tower::service_fn(echo)).await;
            connection.finish(finish, ()).await;
        });
        let (received, last) = client.join().unwrap();
        assert!(Answer::parse_all(&received, &["PUT"])[0].body == expected);
        assert_eq!(Answer::parse_all(&last, &["GET"])[0].status, 200);
    }
}
