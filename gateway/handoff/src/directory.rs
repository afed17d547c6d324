//! The functions' directory: whose sockets the gateway trusts.
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, fstat, open},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
    process::geteuid,
};

use crate::{Error, GatewayEnd};

const WRITABLE_BY_OTHERS: u32 = 0o022;

/// A directory that only root or this process's user can put sockets into.
///
/// It is opened once and connected through, so that what was checked is what is used.
pub struct FunctionsDirectory {
    directory: OwnedFd,
    path: PathBuf,
}

impl FunctionsDirectory {
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed =
            |errno: rustix::io::Errno| Error::OpenDirectory { path: path.to_owned(), source: errno.into() };
        let untrusted = |reason| Error::UntrustedDirectory { path: path.to_owned(), reason };
        let directory =
            open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let status = fstat(&directory).map_err(failed)?;
        let own = geteuid().as_raw();
        if status.st_uid != 0 && status.st_uid != own {
            return Err(untrusted(format!(
                "it belongs to user {}, neither to root nor to user {own}",
                status.st_uid
            )));
        }
        if status.st_mode & WRITABLE_BY_OTHERS != 0 {
            return Err(untrusted(format!(
                "others than its owner may write to it (mode {:04o}); chmod go-w makes it safe",
                status.st_mode & 0o7777
            )));
        }
        Ok(Self { directory, path: path.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Begins a pool connection to the instance that listens at `socket`, a name in this directory.
    ///
    /// It succeeds while the socket's backlog has room, whether or not an instance is there to accept; the instance's
    /// HELLO is what says that one is. Never blocks: a full backlog is an error of kind `WouldBlock`.
    pub fn connect(&self, socket: &str) -> Result<GatewayEnd, Error> {
        self.connect_socket(socket)
            .map(GatewayEnd::new)
            .map_err(|source| Error::Connect { path: self.path.join(socket), source })
    }

    fn connect_socket(&self, name: &str) -> io::Result<OwnedFd> {
        if name.contains('/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket's name has no slash"));
        }
        // Through the descriptor, because a path could lead elsewhere by now and `sun_path` holds 107 bytes only.
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &address)?;
        Ok(socket)
    }
}
