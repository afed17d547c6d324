//! The kernel's bound on descriptors in flight: the gateway learns of it and keeps its connections.
mod support;

use std::os::{fd::AsFd, unix::net::UnixStream};

use handoff::{MAX_BATCH, ReceiveBuffer, Received, SendError};
use nix::unistd::{Uid, setresuid};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::*;

#[test]
fn descriptors_in_flight_are_bounded_per_user() {
    let pool = Pool::new();
    let (gateway, _status, instance) = pool.connected();
    let (_client, socket) = UnixStream::pair().unwrap();
    let limit = Rlimit { current: Some(100), ..getrlimit(Resource::Nofile) };
    setrlimit(Resource::Nofile, limit).unwrap();
    if Uid::effective().is_root() {
        // Root's capabilities lift the bound, and the kernel counts per user: become one that nobody else is.
        let user = Uid::from_raw(0x7000_0000 + std::process::id());
        setresuid(user, user, user).unwrap();
    }

    let batch = [connection(1); MAX_BATCH];
    let descriptors = [socket.as_fd(); MAX_BATCH];
    let mut in_flight = 0;
    let refused = loop {
        match gateway.send(&batch, &descriptors) {
            Ok(count) => in_flight += count,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, SendError::TooManyReferences), "{refused}");
    assert_eq!(in_flight, 2 * MAX_BATCH, "one message may pass the limit, the next is refused");

    let mut buffer = ReceiveBuffer::default();
    while let Ok(Received::Connections(_)) = instance.receive(&mut buffer) {}
    assert!(gateway.send(&batch, &descriptors).is_ok());
}
