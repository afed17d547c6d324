//! Listening sockets that are passed to a function, as a socket unit of systemd would.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use socket2::{Domain, Socket, Type};

const BACKLOG: i32 = 8192;
/// As Pointsman's own listeners: a connection is accepted with its first data.
const DEFER_ACCEPT_SECONDS: libc::c_int = 1;
/// The first passed descriptor (sd_listen_fds(3)).
const FIRST_FD: RawFd = 3;
/// Above all that are passed, so that none is overwritten before it is passed.
const CLEAR_OF_PASSED: RawFd = 64;

pub fn listen(port: u16) -> Result<TcpListener> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let open = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        defer_accept(&socket)?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().with_context(|| format!("cannot listen at {address}"))
}

fn defer_accept(socket: &Socket) -> io::Result<()> {
    let seconds = DEFER_ACCEPT_SECONDS;
    // SAFETY: the value is as long as the length says.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The command gets them under these names; they are closed here with the command.
pub fn pass(command: &mut Command, listeners: Vec<(&'static str, TcpListener)>) -> Result<()> {
    let names: Vec<&str> = listeners.iter().map(|(name, _)| *name).collect();
    command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    let mut passed = Vec::new();
    for (_, listener) in listeners {
        let clear = fcntl(&listener, FcntlArg::F_DUPFD_CLOEXEC(CLEAR_OF_PASSED))?;
        // SAFETY: fcntl has just made this descriptor, and nobody else knows it.
        passed.push(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(clear) });
    }
    let place = move || {
        for (fd, target) in passed.iter().zip(FIRST_FD..) {
            // SAFETY: `fd` is open; what `target` was is the parent's and not needed in this process.
            if unsafe { libc::dup2(fd.as_raw_fd(), target) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it only calls dup2.
    unsafe { command.pre_exec(place) };
    Ok(())
}
