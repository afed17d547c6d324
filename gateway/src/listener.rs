//! The listening sockets and the only `accept4`.
use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use nix::libc;
use socket2::{Domain, SockAddr, Socket, Type};

/// Room for the connections of a few milliseconds at full load; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Takes an address, and no connections yet.
pub fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // One listener for both families, as `[::]` is read by everybody.
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Listens so that a connection comes out of `accept` with its first bytes.
pub fn listen(socket: &Socket, defer: Duration) -> io::Result<()> {
    set_defer_accept(socket, defer)?;
    socket.listen(BACKLOG)
}

/// Takes a connection, non-blocking for whoever gets it, and the name that `accept4` gave it.
pub fn accept(listener: &Socket) -> io::Result<(OwnedFd, SocketAddr)> {
    // SAFETY: the storage has the length that the kernel is told, and the kernel fills in the length it wrote.
    let (fd, name) = unsafe {
        SockAddr::try_init(|storage, length| {
            match libc::accept4(
                listener.as_raw_fd(),
                storage.cast(),
                length,
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            ) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(OwnedFd::from_raw_fd(fd)),
            }
        })?
    };
    let name = name.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((fd, name))
}

/// The cookie under which the kernel's maps know the socket.
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the value is as long as the length says.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// TCP_DEFER_ACCEPT (tcp(7)).
pub fn set_defer_accept(socket: &Socket, defer: Duration) -> io::Result<()> {
    let seconds = defer.as_secs() as libc::c_int;
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
