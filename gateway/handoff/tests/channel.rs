//! Both ends of a pool connection over real sockets: what arrives, what is refused, and that nothing leaks.
mod support;

use std::{
    io::{IoSlice, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use handoff::{
    AllowedUids, DecodeError, Error, FromInstance, GatewayEnd, Greeting, InstanceEnd, MAX_BATCH, MAX_MOVES,
    MessageBuffer, Move, PAYLOAD_BYTES, PoolListener, ReceiveBuffer, Received, SendError, WorkerId, message,
    moving,
};
use rustix::{
    cmsg_space,
    io::{FdFlags, fcntl_getfd},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use support::*;

/// Sends what a broken or foreign peer could.
fn send_raw(end: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd]) {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(100))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    sendmsg(end, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn encoded(connections: usize) -> message::Bytes {
    let records: Vec<_> = (0..connections as u64).map(connection).collect();
    let mut bytes = message::Bytes::new();
    message::encode_connections(&records, &mut bytes);
    bytes
}

fn error(instance: &InstanceEnd) -> Error {
    match instance.receive(&mut ReceiveBuffer::default()) {
        Err(error) => error,
        Ok(_) => panic!("it was accepted"),
    }
}

#[test]
fn a_full_batch_arrives_in_order_with_its_sockets() {
    let pool = Pool::new();
    let (gateway, status, instance) = pool.connected();
    let (mut clients, sockets) = clients(MAX_BATCH + 1);
    let records: Vec<_> = (0..=MAX_BATCH as u64).map(connection).collect();

    assert_eq!(gateway.send(&records, &borrowed(&sockets)).unwrap(), MAX_BATCH);
    drop(sockets);
    assert_eq!(status.taken(), 0);

    let mut buffer = ReceiveBuffer::default();
    let Ok(Received::Connections(arrivals)) = instance.receive(&mut buffer) else { panic!("no connections") };
    let arrived: Vec<_> = arrivals.collect();
    assert_eq!(arrived.len(), MAX_BATCH);
    assert_eq!(status.taken(), MAX_BATCH as u64);
    for ((record, socket), client) in arrived.into_iter().zip(&mut clients) {
        assert!(fcntl_getfd(&socket).unwrap().contains(FdFlags::CLOEXEC));
        UnixStream::from(socket).write_all(&record.id.to_le_bytes()).unwrap();
        let mut id = [0; 8];
        std::io::Read::read_exact(client, &mut id).unwrap();
        assert_eq!(u64::from_le_bytes(id), record.id);
    }
    assert_eq!(records[1].id, 1);
    assert!(clients.iter_mut().all(is_closed));
    assert!(matches!(instance.receive(&mut buffer), Ok(Received::WouldBlock)));
}

#[test]
fn connections_that_nobody_takes_out_are_closed() {
    let pool = Pool::new();
    let (gateway, _status, instance) = pool.connected();
    let (mut clients, sockets) = clients(3);
    gateway.send(&[connection(1); 3], &borrowed(&sockets)).unwrap();
    drop(sockets);
    let mut buffer = ReceiveBuffer::default();
    let Ok(Received::Connections(mut arrivals)) = instance.receive(&mut buffer) else { panic!() };
    let first = arrivals.next();
    drop(arrivals);
    assert!(first.is_some() && !is_closed(&mut clients[0]));
    assert!(is_closed(&mut clients[1]) && is_closed(&mut clients[2]));
}

#[test]
fn a_full_queue_gives_the_connections_back_and_recovers() {
    let pool = Pool::new();
    let (gateway, status, instance) = pool.connected();
    let (_client, socket) = UnixStream::pair().unwrap();
    let mut sent = 0;
    let full = loop {
        match gateway.send(&[connection(sent)], &[socket.as_fd()]) {
            Ok(count) => sent += count as u64,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, SendError::WouldBlock), "{full}");
    assert!(sent >= 256, "the default buffer must hold a window of one-connection messages, held {sent}");

    let mut buffer = ReceiveBuffer::default();
    let mut received = 0;
    while let Received::Connections(arrivals) = instance.receive(&mut buffer).unwrap() {
        for (record, _) in arrivals {
            assert_eq!(record.id, received);
            received += 1;
        }
    }
    assert_eq!((received, status.taken()), (sent, sent));
    assert!(gateway.send(&[connection(sent)], &[socket.as_fd()]).is_ok());
}

#[test]
fn connections_that_move_arrive_in_order_with_their_sockets_and_payloads() {
    let pool = Pool::new();
    let (gateway, status, instance) = pool.connected();
    let (mut clients, sockets) = clients(MAX_MOVES + 1);
    // Each has another length, and all of a message's are as long as they may be.
    let mut payloads: Vec<_> = (0..=MAX_MOVES).map(|index| vec![index as u8; index]).collect();
    let others: usize = (1..MAX_MOVES).sum();
    payloads[0] = vec![0; PAYLOAD_BYTES - others];
    let moves: Vec<_> = (0u64..)
        .zip(&payloads)
        .map(|(id, payload)| Move { connection: connection(id), peer: WorkerId(id), payload })
        .collect();

    assert_eq!(instance.give_back(&moves, &borrowed(&sockets)).unwrap(), MAX_MOVES);
    drop(sockets);
    let mut buffer = MessageBuffer::default();
    let Ok(FromInstance::Return(returned, sockets)) = gateway.receive(&mut buffer) else { panic!("nothing") };
    assert_eq!(returned, moves[..MAX_MOVES]);
    let sockets: Vec<_> = sockets.map(UnixStream::from).collect();

    assert_eq!(gateway.send_moved(&returned, &borrowed(&sockets)).unwrap(), MAX_MOVES);
    drop(sockets);
    let mut buffer = ReceiveBuffer::default();
    let Ok(Received::Moved(arrived, sockets)) = instance.receive(&mut buffer) else { panic!("nothing") };
    assert_eq!(arrived, moves[..MAX_MOVES]);
    assert_eq!(status.taken(), MAX_MOVES as u64);
    for (index, socket) in sockets.enumerate() {
        assert!(fcntl_getfd(&socket).unwrap().contains(FdFlags::CLOEXEC));
        UnixStream::from(socket).write_all(&[index as u8]).unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(&mut clients[index], &mut byte).unwrap();
        assert_eq!(byte, [index as u8]);
    }
    assert!(clients.iter_mut().all(is_closed));
}

#[test]
fn moves_without_their_sockets_or_with_others_are_refused_and_closed() {
    let pool = Pool::new();
    let (gateway, status, instance) = pool.connected();
    let payload = b"luggage";
    let moves = [1, 2].map(|id| Move { connection: connection(id), peer: WorkerId(id), payload });
    let mut message = message::Bytes::new();
    for (encode, to_gateway) in
        [(moving::encode_return as fn(&[_], &mut _), true), (moving::encode_moved, false)]
    {
        encode(&moves, &mut message);
        let bytes = [&message[..], payload, payload].concat();
        for count in [0, 1, 3] {
            let (mut clients, sockets) = clients(count);
            let taken = status.taken();
            let refused = if to_gateway {
                send_raw(&instance, &bytes, &borrowed(&sockets));
                drop(sockets);
                gateway.receive(&mut MessageBuffer::default()).err()
            } else {
                send_raw(&gateway, &bytes, &borrowed(&sockets));
                drop(sockets);
                let refused = instance.receive(&mut ReceiveBuffer::default()).err();
                assert_eq!(status.taken() - taken, count.max(2) as u64);
                refused
            };
            assert!(
                matches!(refused, Some(Error::Descriptors { expected: 2, got }) if got == count),
                "{refused:?}"
            );
            assert!(clients.iter_mut().all(is_closed));
        }
    }
}

#[test]
fn what_comes_with_an_empty_message_is_closed_at_once() {
    let pool = Pool::new();
    let (gateway, status, instance) = pool.connected();
    let (mut clients, sockets) = clients(2);
    let mut buffer = MessageBuffer::default();
    send_raw(&instance, &[], &borrowed(&sockets[..1]));
    assert!(matches!(gateway.receive(&mut buffer), Ok(FromInstance::Closed)));
    let mut buffer = ReceiveBuffer::default();
    send_raw(&gateway, &[], &borrowed(&sockets[1..]));
    assert!(matches!(instance.receive(&mut buffer), Ok(Received::Closed)));
    drop(sockets);
    assert!(clients.iter_mut().all(is_closed));
    assert_eq!(status.taken(), 1);
}

#[test]
fn either_end_notices_the_others_end() {
    let pool = Pool::new();
    let (gateway, _status, instance) = pool.connected();
    drop(instance);
    let (_client, socket) = UnixStream::pair().unwrap();
    assert!(matches!(gateway.send(&[connection(1)], &[socket.as_fd()]), Err(SendError::Closed)));
    assert!(matches!(gateway.receive_hello(), Ok(Greeting::Closed)));

    let (gateway, status, instance) = pool.connected();
    gateway.send(&[connection(1)], &[socket.as_fd()]).unwrap();
    drop(gateway);
    let mut buffer = ReceiveBuffer::default();
    assert!(matches!(instance.receive(&mut buffer), Ok(Received::Connections(_))));
    assert!(matches!(instance.receive(&mut buffer), Ok(Received::Closed)));
    assert_eq!(status.taken(), 1);
}

#[test]
fn an_instance_that_stops_receiving_loses_nothing() {
    let pool = Pool::new();
    let (gateway, status, instance) = pool.connected();
    let (mut clients, sockets) = clients(3);
    gateway.send(&[connection(1); 2], &borrowed(&sockets[..2])).unwrap();
    instance.stop_receiving().unwrap();
    assert!(status.draining());
    assert!(matches!(gateway.send(&[connection(1)], &[sockets[2].as_fd()]), Err(SendError::Closed)));
    assert!(matches!(gateway.receive_hello(), Ok(Greeting::WouldBlock)), "it is still there");
    drop(sockets);

    let mut buffer = ReceiveBuffer::default();
    let Ok(Received::Connections(arrivals)) = instance.receive(&mut buffer) else { panic!() };
    assert_eq!(arrivals.len(), 2);
    let kept: Vec<_> = arrivals.collect();
    assert!(matches!(instance.receive(&mut buffer), Ok(Received::Closed)));
    assert_eq!(status.taken(), 2);
    assert_eq!(clients.iter_mut().map(is_closed).collect::<Vec<_>>(), [false, false, true]);
    drop(kept);
}

#[test]
fn a_message_that_is_not_ours_is_refused_and_its_descriptors_are_closed() {
    let two = encoded(2);
    let mut version = two.clone();
    version[4] = 9;
    let mut hello = message::Bytes::new();
    message::encode_hello(&HELLO, &mut hello);
    type Expected = fn(&Error) -> bool;
    let cases: [(&str, &[u8], usize, Expected); 8] = [
        ("version", &version, 2, |e| matches!(e, Error::Decode(DecodeError::Version(9)))),
        ("kind", &hello, 1, |e| matches!(e, Error::Decode(DecodeError::Kind { .. }))),
        ("short", &two[..two.len() - 1], 2, |e| matches!(e, Error::Decode(DecodeError::Length { .. }))),
        ("too long", &[0; moving::LONGEST_MESSAGE_BYTES + 1], 2, |e| matches!(e, Error::Oversized)),
        ("fewer descriptors", &two, 1, |e| matches!(e, Error::Descriptors { expected: 2, got: 1 })),
        ("no descriptors", &two, 0, |e| matches!(e, Error::Descriptors { expected: 2, got: 0 })),
        ("more descriptors", &two, 3, |e| matches!(e, Error::Descriptors { expected: 2, got: 3 })),
        ("more than there is room for", &two, 99, |e| matches!(e, Error::OutOfDescriptors { .. })),
    ];
    for (name, bytes, descriptors, expected) in cases {
        let pool = Pool::new();
        let (gateway, _status, instance) = pool.connected();
        let (mut clients, sockets) = clients(descriptors);
        send_raw(&gateway, bytes, &borrowed(&sockets));
        drop(sockets);
        let error = error(&instance);
        assert!(expected(&error), "{name}: {error}");
        assert!(clients.iter_mut().all(is_closed), "{name}");
    }
}

#[test]
fn a_hello_comes_with_exactly_one_sound_page() {
    let (_client, socket) = UnixStream::pair().unwrap();
    let two = [socket.as_fd(), socket.as_fd()];
    let mut hello = message::Bytes::new();
    message::encode_hello(&HELLO, &mut hello);
    for descriptors in 0..=2 {
        let pool = Pool::new();
        let gateway = GatewayEnd::connect(&pool.path).unwrap();
        let instance = rustix::net::accept(&pool.listener).unwrap();
        send_raw(&instance, &hello, &two[..descriptors]);
        match (descriptors, gateway.receive_hello()) {
            (1, Err(Error::StatusPage { .. })) => {}
            (_, Err(Error::Descriptors { expected: 1, got })) => assert_eq!(got, descriptors),
            (count, other) => panic!("{count}: {:?}", other.err()),
        }
    }
}

#[test]
fn only_the_gateways_user_is_let_in() {
    let pool = Pool::new();
    assert!(pool.listener.accept(&AllowedUids::RootAndOwn).unwrap().is_none());
    let gateway = GatewayEnd::connect(&pool.path).unwrap();
    let own = rustix::process::geteuid().as_raw();
    let refused = pool.listener.accept(&AllowedUids::Only(own + 1)).err();
    assert!(matches!(refused, Some(Error::ForeignPeer { uid, .. }) if uid == own), "{refused:?}");
    assert!(matches!(gateway.receive_hello(), Ok(Greeting::Closed)));

    let _gateway = GatewayEnd::connect(&pool.path).unwrap();
    assert!(pool.listener.accept(&AllowedUids::Only(own)).unwrap().is_some());
}

#[test]
fn only_a_listening_seqpacket_socket_is_a_pool() {
    let stream = UnixStream::pair().unwrap().0;
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let file = tempfile::tempfile().unwrap();
    let (pool, connected) = (Pool::new(), Pool::new());
    let gateway = GatewayEnd::connect(&connected.path).unwrap();
    for fd in [stream.as_fd(), tcp.as_fd(), file.as_fd(), gateway.as_fd()] {
        let fd = fd.try_clone_to_owned().unwrap();
        assert!(matches!(PoolListener::new(fd), Err(Error::NoListener { .. })));
    }
    assert!(PoolListener::new(pool.listener.as_fd().try_clone_to_owned().unwrap()).is_ok());
}
