//! The test's own networks lie as they claim to, and native TCP survives them.
use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
};

use tests::{
    mangle::{Injector, Loss, PerMillion},
    net::Net,
    pattern::{Pattern, Random},
    segments::{self, send_segments},
};

const LOOPBACKS: [&str; 2] = ["127.0.0.1:0", "[::1]:0"];

fn pair(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn read_exactly(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(tests::PATIENCE)).unwrap();
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_segment_ahead_of_time_arrives_and_the_real_one_overlaps_it() {
    let _net = Net::private();
    for address in LOOPBACKS {
        let (mut client, mut server) = pair(address);
        let injector = Injector::new(&client).unwrap();
        client.write_all(b"first ").unwrap();
        assert_eq!(read_exactly(&mut server, 6), b"first ");

        injector.ahead(&client, b"sec").unwrap();
        assert_eq!(read_exactly(&mut server, 3), b"sec", "{address}: nobody but the injector has sent this");
        client.write_all(b"second").unwrap();
        assert_eq!(read_exactly(&mut server, 3), b"ond", "{address}: native TCP trims the overlap");

        injector.astride(&client, b"ond", b" thi").unwrap();
        assert_eq!(read_exactly(&mut server, 4), b" thi", "{address}");
        client.write_all(b" third").unwrap();
        injector.again(&client, b"third").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"rd", "{address}");
    }
}

#[test]
fn native_tcp_survives_every_overlap() {
    let _net = Net::private();
    for address in LOOPBACKS {
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let (client, mut server) = pair(address);
            client.set_nodelay(true).unwrap();
            let length = random.within(1, 5000);
            let bytes = random.bytes(length);
            Injector::new(&client).unwrap().write_with_overlaps(&client, &mut random, &bytes).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            server.set_read_timeout(Some(tests::PATIENCE)).unwrap();
            let mut received = Vec::new();
            server.read_to_end(&mut received).unwrap();
            assert!(received == bytes, "{address}, seed {seed}");
        }
    }
}

#[test]
fn loss_makes_tcp_retransmit_and_duplicates_arrive() {
    const BYTES: usize = 24 << 20;
    let net = Net::private().retransmit_fast();
    for address in LOOPBACKS {
        let retransmitted = net.counter("Tcp", "RetransSegs");
        let old = net.counter("TcpExt", "TCPDSACKOldSent");
        let (client, mut server) = pair(address);
        let loss = Loss::on_loopback(&net, PerMillion::percent(3), PerMillion::percent(5));
        let pattern = Pattern::new(1);
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut client = client;
                let mut part = [0; 1 << 12];
                for offset in (0..BYTES).step_by(part.len()) {
                    pattern.fill(offset as u64, &mut part);
                    client.write_all(&part).unwrap();
                }
            });
            let mut received = Vec::new();
            server.set_read_timeout(Some(tests::PATIENCE)).unwrap();
            server.read_to_end(&mut received).unwrap();
            assert_eq!(received.len(), BYTES);
            assert_eq!(pattern.first_difference(0, &received), None);
        });
        assert!(loss.dropped() > 0 && loss.duplicated() > 0, "{address}: the classifier sees no packet");
        assert!(net.counter("Tcp", "RetransSegs") > retransmitted, "{address}: nothing was sent again");
        assert!(net.counter("TcpExt", "TCPDSACKOldSent") > old, "{address}: nothing came twice");
    }
}

#[test]
fn every_piece_is_a_segment() {
    let _net = Net::private().without_slow_start();
    for address in LOOPBACKS {
        let (client, mut server) = pair(address);
        let bytes = Pattern::new(2).bytes(3000);
        // The function itself fails when two pieces share a segment.
        send_segments(&client, bytes.chunks(1)).unwrap();
        assert_eq!(read_exactly(&mut server, bytes.len()), bytes);
        let sent = segments::sent(&client).unwrap();
        assert_eq!(sent.data_segments - sent.retransmits, 3000);
    }
}

#[test]
fn namespaces_are_apart() {
    let outer = Net::private();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    {
        let _inner = Net::private();
        assert!(TcpStream::connect(address).is_err(), "nobody listens in a new namespace");
    }
    let client = TcpStream::connect(address).unwrap();
    assert_eq!(outer.held_sockets().len(), 2, "the listener and the client: {:?}", outer.held_sockets());
    drop((client, listener));
    outer.assert_no_socket_is_held();
}
