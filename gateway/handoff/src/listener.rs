//! An instance's listening socket, at which only the gateway is let in.
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::{Errno, FdFlags, fcntl_setfd},
    net::{AddressFamily, SocketFlags, SocketType, accept_with, sockopt},
    process::geteuid,
};

use crate::Error;

/// Who may hand connections over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedUids {
    /// Root and the instance's own user.
    RootAndOwn,
    /// The gateway's user.
    Only(u32),
}

impl AllowedUids {
    fn contains(&self, uid: u32) -> bool {
        match self {
            Self::RootAndOwn => uid == 0 || uid == geteuid().as_raw(),
            Self::Only(gateway) => uid == *gateway,
        }
    }
}

/// The listening socket that the instance's parent made and passed on.
pub struct PoolListener {
    socket: OwnedFd,
}

/// A connection from the gateway, before the instance's HELLO.
pub struct PoolConnection {
    pub(crate) socket: OwnedFd,
    peer: i32,
}

impl PoolConnection {
    /// The gateway's process; 0 if it is in a pid namespace that isn't seen from here.
    pub fn peer(&self) -> i32 {
        self.peer
    }
}

impl PoolListener {
    /// Takes a descriptor that must be a listening `SOCK_SEQPACKET` socket of `AF_UNIX`; makes it non-blocking.
    pub fn new(socket: OwnedFd) -> Result<Self, Error> {
        let refused = |reason: String| Error::NoListener { reason };
        let domain =
            sockopt::socket_domain(&socket).map_err(|errno| refused(format!("no socket: {errno}")))?;
        let kind = sockopt::socket_type(&socket).map_err(|errno| refused(format!("no socket: {errno}")))?;
        if domain != AddressFamily::UNIX || kind != SocketType::SEQPACKET {
            return Err(refused(
                "it is not AF_UNIX SOCK_SEQPACKET (systemd: ListenSequentialPacket=)".into(),
            ));
        }
        if !sockopt::socket_acceptconn(&socket).map_err(|errno| refused(errno.to_string()))? {
            return Err(refused("it does not listen".into()));
        }
        let flags = fcntl_getfl(&socket).map_err(|errno| refused(errno.to_string()))?;
        fcntl_setfl(&socket, flags | OFlags::NONBLOCK).map_err(|errno| refused(errno.to_string()))?;
        fcntl_setfd(&socket, FdFlags::CLOEXEC).map_err(|errno| refused(errno.to_string()))?;
        Ok(Self { socket })
    }

    /// The next connection, or `None` when none waits. A peer that isn't allowed is closed and is an error; the
    /// listener goes on.
    pub fn accept(&self, allowed: &AllowedUids) -> Result<Option<PoolConnection>, Error> {
        let socket = match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
            Err(errno) => return Err(Error::Accept(errno.into())),
        };
        // Not rustix's: its pid can't be 0, which is what a peer in another pid namespace has.
        let peer = getsockopt(&socket, PeerCredentials).map_err(|errno| Error::Accept(errno.into()))?;
        if !allowed.contains(peer.uid()) {
            return Err(Error::ForeignPeer { uid: peer.uid(), pid: peer.pid() });
        }
        Ok(Some(PoolConnection { socket, peer: peer.pid() }))
    }
}

impl AsFd for PoolListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// For `tokio::io::unix::AsyncFd`: the number stays the same for life.
impl AsRawFd for PoolListener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
