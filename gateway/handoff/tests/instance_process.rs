//! An instance as a process of its own: it finds its socket by LISTEN_FDS, and its death by SIGKILL is counted exactly.
mod support;

use std::{
    env,
    io::{BufRead, BufReader, Read},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Command, Stdio, exit},
};

use handoff::{
    AllowedUids, GatewayEnd, Greeting, Hello, InstanceEnd, ListenFds, PoolListener, ReceiveBuffer, Received,
};
use support::*;

const POOL_FD: i32 = 3;

fn main() {
    if env::var_os("LISTEN_FDS").is_some() {
        instance();
    }
    what_a_killed_instance_had_not_taken_is_lost_and_counted();
    println!("what_a_killed_instance_had_not_taken_is_lost_and_counted ... ok");
}

/// Takes one message, says so and waits to be killed.
fn instance() {
    let mut passed = ListenFds::take().unwrap();
    let listener = PoolListener::new(passed.remove("pool").unwrap()).unwrap();
    assert!(passed.remove("pool").is_none() && passed.names().next().is_none());
    assert!(["LISTEN_FDS", "LISTEN_FDNAMES"].iter().all(|variable| env::var_os(variable).is_none()));
    wait_readable(std::os::fd::AsFd::as_fd(&listener));
    let connection = listener.accept(&AllowedUids::RootAndOwn).unwrap().unwrap();
    let hello = Hello { worker: 1, workers: 4, pid: std::process::id(), features: 0 };
    let end = InstanceEnd::greet(connection, &hello).unwrap();
    let mut buffer = ReceiveBuffer::default();
    wait_readable(std::os::fd::AsFd::as_fd(&end));
    let Ok(Received::Connections(arrivals)) = end.receive(&mut buffer) else { panic!("no connections") };
    let _kept: Vec<_> = arrivals.collect();
    println!("taken");
    let _ = std::io::stdin().read(&mut [0]);
    exit(1);
}

fn what_a_killed_instance_had_not_taken_is_lost_and_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo.sock");
    let listener = listening(&path);
    let pool_fd = listener.as_raw_fd();
    let mut command = Command::new(env::current_exe().unwrap());
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "pool");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // SAFETY: the child only makes system calls that are safe between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // Not in one step, because a descriptor duplicated onto itself would stay close-on-exec.
            let copy = nix::libc::fcntl(pool_fd, nix::libc::F_DUPFD, POOL_FD + 1);
            if nix::libc::dup2(copy, POOL_FD) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let gateway = GatewayEnd::connect(&path).unwrap();
    let mut child = command.spawn().unwrap();
    let (hello, status) = hello(&gateway);
    assert_eq!(hello, Hello { worker: 1, workers: 4, pid: child.id(), features: 0 });

    let (mut clients, sockets) = clients(15);
    for range in [0..3, 3..8, 8..15] {
        let records: Vec<_> = range.clone().map(|id| connection(id as u64)).collect();
        gateway.send(&records, &borrowed(&sockets[range])).unwrap();
    }
    drop(sockets);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "taken\n");
    assert!(!clients.iter_mut().any(is_closed));

    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(gateway.receive_hello(), Ok(Greeting::Closed)));
    assert_eq!(15 - status.taken(), 12);
    assert!(clients.iter_mut().all(is_closed));

    // The socket outlives the instance: the next one will find the gateway in its backlog.
    let again = GatewayEnd::connect(&path).unwrap();
    assert!(matches!(again.receive_hello(), Ok(Greeting::WouldBlock)));
}
