//! A function's program under test: this process is its parent and its gateway.
#![allow(dead_code, reason = "each program's tests use a part of it")]
use std::{
    io::{self, Read},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use handoff::{FunctionsDirectory, GatewayEnd, Greeting, Hello, StatusReader};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
    },
    unistd::{Pid, dup2_raw},
};
use tempfile::TempDir;

/// Longer than anything here takes; a hang becomes a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Function {
    child: Child,
    directory: FunctionsDirectory,
    _temporary: TempDir,
}

/// One pool connection after its HELLO.
pub struct Pool {
    pub end: GatewayEnd,
    pub hello: Hello,
    pub status: StatusReader,
}

impl Function {
    /// Starts the program with its listening socket.
    pub fn start(program: &str, arguments: &[&str]) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("function.sock");
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(64).unwrap()).unwrap();
        Self::spawn(program, arguments, "pool", listener, temporary)
    }

    /// Starts the program with a socket of this name at which clients connect, and no gateway.
    pub fn listen(program: &str, arguments: &[&str], name: &str) -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (Self::spawn(program, arguments, name, listener.into(), tempfile::tempdir().unwrap()), address)
    }

    fn spawn(program: &str, arguments: &[&str], name: &str, listener: OwnedFd, temporary: TempDir) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", name);
        // What tests provoke by the hundred needs no line each.
        command.env("POINTSMAN_LOG", "error");
        pass_as_third(&mut command, listener);
        let child = command.spawn().unwrap();
        let directory = FunctionsDirectory::open(temporary.path()).unwrap();
        Self { child, directory, _temporary: temporary }
    }

    pub fn connect(&self) -> Pool {
        let end = self.directory.connect("function.sock").unwrap();
        wait_readable(end.as_fd());
        match end.receive_hello().unwrap() {
            Greeting::Hello(hello, status) => Pool { end, hello, status },
            _ => panic!("the instance did not begin with HELLO"),
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        // A test that failed leaves nothing running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pass_as_third(command: &mut Command, listener: OwnedFd) {
    // SAFETY: between fork and exec only dup2 and fcntl are called, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            if listener.as_raw_fd() == 3 {
                fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
            } else {
                // The number now belongs to the program that is about to start.
                std::mem::forget(dup2_raw(&listener, 3)?);
            }
            Ok(())
        });
    }
}

/// A client of a function that listens itself.
pub fn client(address: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

/// A client's connection and the end that is to be handed over.
pub fn connection() -> (TcpStream, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_nonblocking(true).unwrap();
    (client, server.into())
}

pub fn record(id: u64, protocol: common::Protocol, purpose: handoff::Purpose) -> handoff::Connection {
    handoff::Connection { id, accepted_at_ns: 0, protocol, purpose, peer: None, local: None }
}

pub fn wait_readable(fd: BorrowedFd<'_>) {
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    let ready = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap();
    assert_eq!(ready, 1, "nothing came");
}

pub fn read_to_end(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).map(|_| bytes)
}
