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
        let directory =
            open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let status = fstat(&directory).map_err(failed)?;
        if let Some(reason) = distrust(status.st_uid, status.st_mode, geteuid().as_raw()) {
            return Err(Error::UntrustedDirectory { path: path.to_owned(), reason });
        }
        Ok(Self { directory, path: path.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path that leads to the directory that was checked, whatever is at `path` by now.
    pub fn handle(&self) -> String {
        format!("/proc/self/fd/{}", self.directory.as_raw_fd())
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

/// Why sockets in a directory could be anybody's.
fn distrust(owner: u32, mode: u32, own: u32) -> Option<String> {
    if owner != 0 && owner != own {
        return Some(format!("it belongs to user {owner}, neither to root nor to user {own}"));
    }
    if mode & WRITABLE_BY_OTHERS != 0 {
        let mode = mode & 0o7777;
        return Some(format!(
            "others than its owner may write to it (mode {mode:04o}); chmod go-w makes it safe"
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn only_root_and_the_own_user_are_trusted() {
        for (owner, mode, trusted) in [
            (0, 0o755, true),
            (7, 0o700, true),
            (8, 0o700, false),
            (7, 0o770, false),
            (7, 0o757, false),
            (0, 0o1777, false),
        ] {
            assert_eq!(distrust(owner, 0o040000 | mode, 7).is_none(), trusted, "{owner} {mode:o}");
        }
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(FunctionsDirectory::open(directory.path()).is_ok());
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(FunctionsDirectory::open(directory.path()), Err(Error::UntrustedDirectory { .. })));
    }

    #[test]
    fn what_is_no_directory_or_no_socket_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file.sock");
        fs::write(&file, "").unwrap();
        assert!(matches!(FunctionsDirectory::open(&file), Err(Error::OpenDirectory { .. })));
        assert!(matches!(GatewayEnd::connect(&file), Err(Error::Connect { .. })));
        assert!(matches!(GatewayEnd::connect(Path::new("/")), Err(Error::NoSocketPath { .. })));
        let opened = FunctionsDirectory::open(directory.path()).unwrap();
        assert!(matches!(opened.connect("none.sock"), Err(Error::Connect { .. })));
        assert!(matches!(opened.connect("../file.sock"), Err(Error::Connect { .. })));
    }
}
