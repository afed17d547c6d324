//! An instance at its limit of file descriptors: what it can't install is lost, counted and said, and it works on.
mod support;

use std::os::{fd::AsFd, unix::net::UnixStream};

use handoff::{Error, ReceiveBuffer, Received};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::*;

#[test]
fn an_instance_without_free_descriptors_goes_on_when_it_has_some() {
    let pool = Pool::new();
    let (gateway, status, instance) = pool.connected();
    let (mut clients, sockets) = clients(4);
    gateway.send(&[connection(1); 4], &borrowed(&sockets)).unwrap();
    drop(sockets);

    let mut buffer = ReceiveBuffer::default();
    let limit = getrlimit(Resource::Nofile);
    // One below the next free number plus two: the kernel installs two of the four and reports truncation.
    let next_free = std::os::fd::AsRawFd::as_raw_fd(&instance.as_fd().try_clone_to_owned().unwrap()) as u64;
    setrlimit(Resource::Nofile, Rlimit { current: Some(next_free + 2), ..limit }).unwrap();
    let error = instance.receive(&mut buffer).err();
    setrlimit(Resource::Nofile, limit).unwrap();

    assert!(matches!(error, Some(Error::OutOfDescriptors { lost: 4 })), "{error:?}");
    assert_eq!(status.taken(), 4);
    assert!(clients.iter_mut().all(is_closed));

    let (_client, socket) = UnixStream::pair().unwrap();
    gateway.send(&[connection(2)], &[socket.as_fd()]).unwrap();
    assert!(matches!(instance.receive(&mut buffer), Ok(Received::Connections(_))));
}
