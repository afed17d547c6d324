//! Which instances there are: the sockets in the functions' directory, as they come and go.
use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    time::SystemTime,
};

use common::FunctionName;
use handoff::{FunctionsDirectory, GatewayEnd};
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use crate::socket_name::SocketName;

/// Readable and searchable by functions of other users, writable by nobody else.
const DIRECTORY_MODE: u32 = 0o755;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("creating the functions' directory {path}: {source}")]
    Create { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Open(#[from] handoff::Error),
    #[error("watching the functions' directory {path}: {source}")]
    Watch { path: PathBuf, source: io::Error },
}

pub struct Discovery {
    /// Opened and checked anew for each use: whoever keeps a directory open is not told of its end.
    path: PathBuf,
    inotify: Inotify,
    known: HashMap<String, Identity>,
}

/// What tells a socket from another one of the same name: some file systems use inode numbers again at once, and
/// those know when a file was born.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity {
    inode: u64,
    born: Option<SystemTime>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Appeared { function: FunctionName, socket: String },
    Disappeared { socket: String },
}

/// Why the directory is no longer watched.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error("it was removed or renamed")]
    Gone,
    #[error(transparent)]
    Unusable(#[from] handoff::Error),
    #[error("reading it: {0}")]
    Io(#[from] io::Error),
}

impl Discovery {
    /// Creates the directory if need be, so that gateway and functions may start in any order.
    pub fn open(path: &Path) -> Result<Self, Error> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(path)
            .map_err(|source| Error::Create { path: path.to_owned(), source })?;
        let directory = FunctionsDirectory::open(path)?;
        let inotify = watch(&directory)
            .map_err(|errno| Error::Watch { path: path.to_owned(), source: errno.into() })?;
        Ok(Self { path: path.to_owned(), inotify, known: HashMap::new() })
    }

    pub fn connect(&self, socket: &str) -> Result<GatewayEnd, handoff::Error> {
        GatewayEnd::connect(&self.path.join(socket))
    }

    /// Takes what inotify has to say, after which only a new change makes it readable again. When it has said
    /// something, or `always`, the directory is read and compared: names in events could be of sockets that are
    /// gone, and an overflow has none.
    pub fn changes(&mut self, always: bool) -> Result<Vec<Change>, Lost> {
        let mut changed = always;
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(Lost::Io(errno.into())),
            };
            let ends =
                AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_IGNORED;
            if events.iter().any(|event| event.mask.intersects(ends)) {
                return Err(Lost::Gone);
            }
            changed = true;
        }
        if changed { Ok(self.compare(self.list()?)) } else { Ok(Vec::new()) }
    }

    /// Everything that was known, as gone.
    pub fn forget(&mut self) -> Vec<Change> {
        self.compare(HashMap::new())
    }

    fn list(&self) -> Result<HashMap<String, Identity>, Lost> {
        let directory = FunctionsDirectory::open(&self.path)?;
        let mut sockets = HashMap::new();
        for entry in fs::read_dir(directory.handle())? {
            let entry = entry?;
            // A socket that goes while it is looked at is gone, not an error.
            let Ok(metadata) = entry.metadata() else { continue };
            let Ok(name) = entry.file_name().into_string() else { continue };
            if metadata.file_type().is_socket() {
                sockets.insert(name, Identity { inode: metadata.ino(), born: metadata.created().ok() });
            }
        }
        Ok(sockets)
    }

    fn compare(&mut self, now: HashMap<String, Identity>) -> Vec<Change> {
        let before = std::mem::replace(&mut self.known, now);
        let same = |name: &str, a: &HashMap<String, Identity>, b: &HashMap<String, Identity>| {
            a.get(name) == b.get(name)
        };
        // Those that go first, because one of the same name may come.
        let gone = before.keys().filter(|name| !same(name, &before, &self.known));
        let mut changes: Vec<_> = gone
            .filter(|name| function_of(name).is_some())
            .map(|name| Change::Disappeared { socket: name.clone() })
            .collect();
        for name in self.known.keys().filter(|name| !same(name, &before, &self.known)) {
            match function_of(name) {
                Some(function) => changes.push(Change::Appeared { function, socket: name.clone() }),
                None => tracing::warn!(
                    socket = name,
                    "not an instance's socket: NAME.sock or NAME@ID.sock is, NAME of a-z, 0-9 and '-'"
                ),
            }
        }
        changes
    }
}

impl AsFd for Discovery {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

fn watch(directory: &FunctionsDirectory) -> nix::Result<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let events = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF;
    inotify.add_watch(directory.handle().as_str(), events)?;
    Ok(inotify)
}

fn function_of(socket: &str) -> Option<FunctionName> {
    SocketName::parse(socket).map(|name| name.function)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn appeared(name: &str) -> Change {
        Change::Appeared { function: "echo".parse().unwrap(), socket: name.to_owned() }
    }

    fn disappeared(name: &str) -> Change {
        Change::Disappeared { socket: name.to_owned() }
    }

    #[test]
    fn sockets_come_and_go() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let mut discovery = Discovery::open(&path).unwrap();
        assert_eq!(discovery.changes(true).unwrap(), []);
        fs::write(path.join("file.sock"), "").unwrap();
        UnixListener::bind(path.join("Bad.sock")).unwrap();
        UnixListener::bind(path.join("echo.sock")).unwrap();
        assert_eq!(discovery.changes(false).unwrap(), [appeared("echo.sock")]);
        assert_eq!(discovery.changes(true).unwrap(), []);

        fs::remove_file(path.join("echo.sock")).unwrap();
        UnixListener::bind(path.join("echo.sock")).unwrap();
        assert_eq!(discovery.changes(false).unwrap(), [disappeared("echo.sock"), appeared("echo.sock")]);

        fs::rename(path.join("echo.sock"), path.join("echo@2.sock")).unwrap();
        assert_eq!(discovery.changes(false).unwrap(), [disappeared("echo.sock"), appeared("echo@2.sock")]);
        assert_eq!(discovery.forget(), [disappeared("echo@2.sock")]);
        assert_eq!(discovery.changes(true).unwrap(), [appeared("echo@2.sock")]);
    }

    #[test]
    fn the_directorys_own_end_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("functions");
        let mut discovery = Discovery::open(&path).unwrap();
        fs::remove_dir(&path).unwrap();
        assert!(matches!(discovery.changes(false), Err(Lost::Gone)));
        let mut discovery = Discovery::open(&path).unwrap();
        fs::rename(&path, root.path().join("elsewhere")).unwrap();
        assert!(matches!(discovery.changes(false), Err(Lost::Gone)));
    }
}
