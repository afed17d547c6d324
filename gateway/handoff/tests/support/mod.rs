//! A directory with a listening socket, and connections to hand over.
#![allow(dead_code, reason = "every test file uses a part of it")]
use std::{
    io::{ErrorKind, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use common::Protocol;
use handoff::{
    AllowedUids, Connection, GatewayEnd, Greeting, Hello, InstanceEnd, PoolListener, Purpose, StatusReader,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};
use tempfile::TempDir;

pub const HELLO: Hello = Hello { worker: 0, workers: 1, pid: 1, features: 0 };

/// A functions' directory with one listening socket.
pub struct Pool {
    pub listener: PoolListener,
    pub path: PathBuf,
    _directory: TempDir,
}

impl Pool {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("echo.sock");
        Self { listener: PoolListener::new(listening(&path)).unwrap(), path, _directory: directory }
    }

    pub fn connected(&self) -> (GatewayEnd, StatusReader, InstanceEnd) {
        let gateway = GatewayEnd::connect(&self.path).unwrap();
        let connection = self.listener.accept(&AllowedUids::RootAndOwn).unwrap().unwrap();
        let instance = InstanceEnd::greet(connection, &HELLO).unwrap();
        let (hello, status) = hello(&gateway);
        assert_eq!(hello, HELLO);
        (gateway, status, instance)
    }
}

pub fn listening(path: &std::path::Path) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 16).unwrap();
    socket
}

/// Waits for the instance's HELLO.
pub fn hello(gateway: &GatewayEnd) -> (Hello, StatusReader) {
    wait_readable(gateway.as_fd());
    match gateway.receive_hello().unwrap() {
        Greeting::Hello(hello, status) => (hello, status),
        _ => panic!("no HELLO"),
    }
}

pub fn wait_readable(fd: BorrowedFd) {
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).unwrap();
}

pub fn connection(id: u64) -> Connection {
    Connection {
        id,
        accepted_at_ns: 1,
        protocol: Protocol::Http,
        purpose: Purpose::Serve("echo".parse().unwrap()),
        peer: None,
        local: None,
    }
}

/// Client's ends and the ends to hand over, in the same order.
pub fn clients(count: usize) -> (Vec<UnixStream>, Vec<UnixStream>) {
    (0..count).map(|_| UnixStream::pair().unwrap()).unzip()
}

pub fn borrowed(sockets: &[UnixStream]) -> Vec<BorrowedFd<'_>> {
    sockets.iter().map(AsFd::as_fd).collect()
}

/// Whether every copy of the other end is closed.
pub fn is_closed(client: &mut UnixStream) -> bool {
    client.set_nonblocking(true).unwrap();
    match client.read(&mut [0]) {
        Ok(0) => true,
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        other => panic!("{other:?}"),
    }
}
