//! Established sessions with rustls clients on real sockets: every byte, every end, and what is held meanwhile.

use std::io::{IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::task::Poll;

use rustls::AlertDescription;

use super::super::fault::Fault;
use super::forger::{forged_behind, read_now};
use super::*;

/// Cuts what is sent, and what is received, into pieces of any size.
pub(super) struct Choppy {
    pub(super) socket: TcpStream,
    pub(super) random: Random,
}

impl Read for Choppy {
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        let bytes = self.random.size(20_000).min(output.len());
        self.socket.read(&mut output[..bytes])
    }
}

impl Write for Choppy {
    fn write(&mut self, input: &[u8]) -> io::Result<usize> {
        let bytes = self.random.size(20_000).min(input.len());
        self.socket.write(&input[..bytes])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

fn fault_of(outcome: &Outcome) -> Fault {
    let Outcome::Served(Err(error)) = outcome else { panic!("{outcome:?}") };
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    *error.get_ref().unwrap().downcast_ref::<Fault>().unwrap()
}

fn alert_received(error: &io::Error) -> AlertDescription {
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        _ => panic!("no alert but {error:?}"),
    }
}

#[test]
fn every_byte_arrives_in_any_segmentation_and_record_size() {
    for (suite, site) in all_suites() {
        let mut random = Random(u64::from(u16::from(suite.suite())));
        let server = Server::start(site.acceptor(), plain_echo);
        for record_bytes in [None, Some(32), Some(100), Some(5000)] {
            let mut config = site.client_config(suite);
            config.max_fragment_size = record_bytes;
            let transport = Choppy { socket: server.connect(), random: Random(random.next()) };
            let mut client = client_over(transport, config);
            for _ in 0..25 {
                let message_bytes = random.size(40_000);
                let message = random.bytes(message_bytes);
                client.write_all(&message).unwrap();
                let mut answer = vec![0; message_bytes];
                client.read_exact(&mut answer).unwrap();
                assert!(answer == message);
                if matches!(suite, SupportedCipherSuite::Tls13(_)) && random.below(3) == 0 {
                    client.conn.refresh_traffic_keys().unwrap();
                }
            }
            client.conn.send_close_notify();
            client.flush().unwrap();
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            server.assert_served();
        }
    }
}

#[test]
fn a_large_answer_waits_for_its_reader() {
    const BODY_BYTES: usize = 24 << 20;
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), async |mut stream: TlsStream| {
            let body = Random(9).bytes(BODY_BYTES);
            stream.read_exact(&mut [0]).await?;
            stream.write_all(&body).await?;
            stream.shutdown().await
        });
        let mut client = server.client(site.client_config(suite));
        client.write_all(b"x").unwrap();
        let mut body = Vec::new();
        client.read_to_end(&mut body).unwrap();
        assert!(body == Random(9).bytes(BODY_BYTES));
        server.assert_served();
    }
}

/// The types and lengths of the records in these bytes.
fn records(mut bytes: &[u8]) -> Vec<(u8, usize)> {
    let mut records = Vec::new();
    while let [kind, _, _, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        records.push((*kind, length));
        bytes = &rest[length..];
    }
    records
}

#[test]
fn head_and_body_share_a_record_and_leave_with_the_tickets() {
    let (suite, site) = one_suite_each()[0];
    let server = Server::start(site.acceptor(), async |mut stream: TlsStream| {
        stream.read_exact(&mut [0]).await?;
        let head = [b'h'; 100];
        let body = [b'b'; 1000];
        let written = stream.write_vectored(&[IoSlice::new(&head), IoSlice::new(&body)]).await?;
        assert_eq!(written, 1100);
        stream.read_exact(&mut [0]).await?;
        Ok(())
    });
    let mut client = server.client(site.client_config(suite));
    // Together with the end of the handshake: a server that has to wait sends its tickets first.
    client.conn.writer().write_all(b"x").unwrap();
    client.conn.complete_io(&mut client.sock).unwrap();
    let mut received = vec![0; 1 << 16];
    let bytes = client.sock.read(&mut received).unwrap();
    let records = records(&received[..bytes]);
    let [.., (kind, length)] = records[..] else { panic!("{records:?}") };
    assert_eq!((kind, length), (23, 1100 + 1 + 16));
    assert!(records.len() >= 2, "tickets come before it: {records:?}");
    let mut answer = vec![0; 1100];
    client.conn.read_tls(&mut &received[..bytes]).unwrap();
    client.conn.process_new_packets().unwrap();
    client.conn.reader().read_exact(&mut answer).unwrap();
    client.write_all(b"x").unwrap();
    server.assert_served();
}

#[test]
fn keys_change_whenever_either_side_wants() {
    for (suite, site) in all_suites() {
        if matches!(suite, SupportedCipherSuite::Tls12(_)) {
            continue;
        }
        let server = Server::start(site.acceptor(), |stream| {
            let mut random = Random(11);
            echo(stream, async move |mut stream| {
                for _ in 0..random.below(3) {
                    stream.update_keys();
                }
                stream
            })
        });
        let mut client = server.client(site.client_config(suite));
        let mut random = Random(12);
        for round in 0..300_u32 {
            if random.below(2) == 0 {
                client.conn.refresh_traffic_keys().unwrap();
            }
            client.write_all(&round.to_le_bytes()).unwrap();
            let mut answer = [0; 4];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, round.to_le_bytes());
        }
        client.conn.send_close_notify();
        client.flush().unwrap();
        server.assert_served();
    }
}

/// Changes one bit of a record's body when it is told to.
struct Corrupting {
    socket: TcpStream,
    corrupt: bool,
}

impl Read for Corrupting {
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        self.socket.read(output)
    }
}

impl Write for Corrupting {
    fn write(&mut self, input: &[u8]) -> io::Result<usize> {
        let mut input = input.to_vec();
        if std::mem::take(&mut self.corrupt) {
            input[7] ^= 1;
        }
        self.socket.write_all(&input)?;
        Ok(input.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

#[test]
fn a_corrupted_record_is_answered_by_bad_record_mac() {
    for (suite, site) in all_suites() {
        for moving in [false, true] {
            let server = Server::start(site.acceptor(), move |stream| {
                echo(stream, async move |stream| if moving { moved(stream).await } else { stream })
            });
            let transport = Corrupting { socket: server.connect(), corrupt: false };
            let mut client = client_over(transport, site.client_config(suite));
            client.write_all(b"sound").unwrap();
            client.read_exact(&mut [0; 5]).unwrap();
            client.sock.corrupt = true;
            client.write_all(b"corrupted").unwrap();
            // These stay unread, and must not turn the alert into a reset.
            client.write_all(&[0; 50_000]).unwrap();
            client.sock.socket.shutdown(Shutdown::Write).unwrap();
            let error = client.read(&mut [0]).unwrap_err();
            assert_eq!(alert_received(&error), AlertDescription::BadRecordMac);
            assert_eq!(fault_of(&server.outcome()), Fault::BadRecordMac);
        }
    }
}

#[test]
fn an_end_without_close_notify_is_an_error() {
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), plain_echo);
        let mut client = server.client(site.client_config(suite));
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        client.sock.shutdown(Shutdown::Write).unwrap();
        let outcome = server.outcome();
        let Outcome::Served(Err(error)) = &outcome else { panic!("{outcome:?}") };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn a_client_that_closes_its_side_still_gets_its_answer() {
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), async |mut stream: TlsStream| {
            let mut request = Vec::new();
            stream.read_to_end(&mut request).await?;
            assert_eq!(request, b"request");
            assert_eq!(stream.read(&mut [0]).await?, 0, "the end stays");
            stream = moved(stream).await;
            assert_eq!(stream.read(&mut [0]).await?, 0, "the end moves along");
            stream.write_all(b"answer").await?;
            stream.shutdown().await?;
            stream.shutdown().await?;
            let error = stream.write_all(b"more").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
            Ok(())
        });
        let mut client = server.client(site.client_config(suite));
        client.write_all(b"request").unwrap();
        client.conn.send_close_notify();
        client.flush().unwrap();
        client.sock.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"answer");
        server.assert_served();
    }
}

#[test]
fn an_idle_connection_holds_no_buffer() {
    const { assert!(TlsStream::KEPT_BYTES < 3 * 1024) };
    for (suite, site) in one_suite_each() {
        let server = Server::start(site.acceptor(), async |mut stream: TlsStream| {
            for bytes in [1, 3000, 100_000] {
                let mut buffer = vec![0; bytes];
                stream.read_exact(&mut buffer).await?;
                stream.write_all(&buffer).await?;
                let mut idle = true;
                std::future::poll_fn(|context| {
                    let mut buffer = [0];
                    let mut buffer = tokio::io::ReadBuf::new(&mut buffer);
                    let read = tokio::io::AsyncRead::poll_read(
                        std::pin::Pin::new(&mut stream),
                        context,
                        &mut buffer,
                    );
                    idle = read.is_pending() && stream.unsent_bytes() == 0;
                    assert!(!idle || stream.held_bytes() == 0, "{} bytes held", stream.held_bytes());
                    if idle { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            }
            Ok(())
        });
        let mut client = server.client(site.client_config(suite));
        for bytes in [1, 3000, 100_000] {
            client.write_all(&vec![5; bytes]).unwrap();
            let mut answer = vec![0; bytes];
            client.read_exact(&mut answer).unwrap();
        }
        server.assert_served();
    }
}

#[tokio::test]
async fn answers_that_nobody_fetches_are_not_hoarded() {
    let (mut stream, mut forger) = forged_behind(4096, Version::Tls13, Aead::Aes128Gcm, 0);
    socket2::SockRef::from(&stream.get_ref().fd().unwrap()).set_send_buffer_size(4096).unwrap();
    let mut rounds_blocked = 0;
    while rounds_blocked < 1000 {
        forger.send(22, &[24, 0, 0, 1, 1]);
        forger.record.update_keys(&mut Vec::new());
        forger.send(23, b"x");
        // Events are heard of only while the runtime has its turn.
        tokio::task::yield_now().await;
        while read_now(&mut stream).is_some() {}
        rounds_blocked += u32::from(stream.unsent_bytes() > 0);
        assert!(stream.unsent_bytes() <= 5 + 5 + 1 + 16, "one KeyUpdate at most");
    }
}

#[test]
fn a_stream_can_go_to_another_thread() {
    fn sendable<T: Send + Unpin>() {}
    sendable::<TlsStream>();
    sendable::<SessionState>();
}
