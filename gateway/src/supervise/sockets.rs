//! The functions' directory and the listening sockets in it, there for as long as the supervisor.
use std::{
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileTypeExt},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use common::FunctionName;
use handoff::{Error, FunctionsDirectory, GatewayEnd, MAX_WORKERS};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, Mode, OFlags, fchmod, flock, open},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    process::geteuid,
};

use crate::socket_name::{self, SocketName};

/// The gateway's, and root's alone: functions get their sockets passed and need no way to them.
const DIRECTORY_MODE_OF_ROOT: u32 = 0o750;
const DIRECTORY_MODE: u32 = 0o700;

/// What leads to the directory says nothing.
const PARENT_MODE: u32 = 0o755;

/// Pool connections that wait while no process runs: one for each worker, from a gateway and from its successor.
const BACKLOG: i32 = 2 * MAX_WORKERS as i32;

/// How long the functions of a supervisor that was just killed may take to die with it.
const DYING_PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What `sun_path` holds beside its NUL (unix(7)).
const SOCKET_PATH_BYTES: usize = 107;

pub struct Directory {
    path: PathBuf,
    /// The directories that had to be made, the outermost first.
    made: Vec<PathBuf>,
    /// Locked, so that two supervisors can't take each other's sockets for left ones.
    directory: OwnedFd,
    trusted: FunctionsDirectory,
}

impl Directory {
    pub fn open(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path)?;
        let made = make_missing(&path)
            .with_context(|| format!("the functions' directory {} can't be made", path.display()))?;
        let opened = Self::lock(&path);
        if opened.is_err() {
            remove_directories(&made);
        }
        let (trusted, directory) = opened?;
        Ok(Self { path, made, directory, trusted })
    }

    fn lock(path: &Path) -> Result<(FunctionsDirectory, OwnedFd)> {
        let shown = path.display();
        let trusted = FunctionsDirectory::open(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(path, flags, Mode::empty())
            .with_context(|| format!("the functions' directory {shown} can't be opened"))?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok((trusted, directory)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                bail!("another supervisor is at work in the functions' directory {shown}; stop it first")
            }
            Err(errno) => bail!("the functions' directory {shown} can't be locked: {errno}"),
        }
    }

    /// Listening sockets for a function's first instances; those that a dead supervisor left are replaced or removed.
    pub fn listen_first(&self, function: FunctionName, instances: u16) -> Result<Vec<Listener>> {
        let labels: Vec<_> = labels(function, instances).take(instances.into()).collect();
        self.remove_dead(function, &labels);
        labels.into_iter().map(|label| self.listen(label)).collect()
    }

    /// A listening socket for one more instance, of a name that nobody uses.
    pub fn listen_next(&self, function: FunctionName, instances: u16) -> Result<Listener> {
        let is_free = |label: &String| {
            let found = fs::symlink_metadata(self.path.join(socket_name::of_label(label)));
            found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let free = labels(function, instances).find(is_free);
        self.listen(free.context("all names of sockets are in use")?)
    }

    /// A listening socket `LABEL.sock`; one that a dead supervisor left is replaced.
    fn listen(&self, label: String) -> Result<Listener> {
        let name = socket_name::of_label(&label);
        let path = self.path.join(&name);
        self.remove_left(&name, &path)?;
        let socket = self
            .make_socket(&name, &path)
            .with_context(|| format!("the socket {} can't be made", path.display()))?;
        let listener = Listener { label, socket, path: Some(path) };
        listen(&listener.socket, BACKLOG)?;
        Ok(listener)
    }

    fn make_socket(&self, name: &str, path: &Path) -> io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // Before bind, which gives the path the socket's mode: at no time can others connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        if path.as_os_str().len() <= SOCKET_PATH_BYTES {
            bind(&socket, &SocketAddrUnix::new(path)?)?;
        } else {
            let short = format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd());
            bind(&socket, &SocketAddrUnix::new(short)?)?;
        }
        Ok(socket)
    }

    /// Removes other sockets of the function at which nobody listens: a dead supervisor may have had more instances.
    fn remove_dead(&self, function: FunctionName, wanted: &[String]) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if wanted.iter().any(|label| socket_name::of_label(label) == name) {
                continue;
            }
            if SocketName::parse(name).is_some_and(|socket| socket.function == function)
                && let Err(Error::Connect { source, .. }) = self.trusted.connect(name)
                && source.kind() == io::ErrorKind::ConnectionRefused
                && let Err(error) = fs::remove_file(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "an old socket can't be removed");
            }
        }
    }

    /// Removes the socket at `path` if nobody listens there.
    fn remove_left(&self, name: &str, path: &Path) -> Result<()> {
        let shown = path.display();
        match fs::symlink_metadata(path) {
            Ok(metadata) => {
                ensure!(
                    metadata.file_type().is_socket(),
                    "{shown} is in the socket's place and is not a socket"
                );
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => bail!("{shown} can't be looked at: {error}"),
        }
        match self.trusted.connect(name) {
            Ok(end) => ensure_hangs_up(&end).with_context(|| format!("the socket {shown} is in use"))?,
            Err(Error::Connect { source, .. }) if source.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).with_context(|| format!("the socket {shown} is not ours")),
        }
        fs::remove_file(path).with_context(|| format!("the old socket {shown} can't be removed"))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        remove_directories(&self.made);
        // Said, because a process that is about to be started may hold the descriptor for a moment longer. If it
        // fails, the end of that process does the same.
        let _ = flock(&self.directory, FlockOperation::Unlock);
    }
}

/// The names that a function's instances go by, in the order in which they are given: an only one needs no number.
fn labels(function: FunctionName, instances: u16) -> impl Iterator<Item = String> {
    let alone = (instances == 1).then(|| function.to_string());
    alone.into_iter().chain((1..=u16::MAX).map(move |number| format!("{function}@{number}")))
}

/// An instance's listening socket; its path is removed with it.
pub struct Listener {
    label: String,
    socket: OwnedFd,
    path: Option<PathBuf>,
}

impl Listener {
    /// What the instance goes by: `NAME` or `NAME@NUMBER`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// `None` when it was taken out of the directory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the socket out of the directory; whoever is connected stays so.
    pub fn withdraw(&mut self) {
        if let Some(path) = self.path.take()
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "a socket can't be removed");
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// Waits until a listener that took a connection is gone: it was a dying process's if it is soon.
fn ensure_hangs_up(end: &GatewayEnd) -> Result<()> {
    // POLLHUP and POLLERR are always asked for.
    let mut asked = [PollFd::new(end, PollFlags::empty())];
    if poll(&mut asked, Some(&DYING_PATIENCE))? == 0 {
        let peer = getsockopt(&end.as_fd(), PeerCredentials)?;
        bail!("process {} of user {} listens there; stop it first", peer.pid(), peer.uid());
    }
    Ok(())
}

fn make_missing(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mode = if geteuid().is_root() { DIRECTORY_MODE_OF_ROOT } else { DIRECTORY_MODE };
    let mut made = Vec::new();
    let mut missing: Vec<_> = path.ancestors().take_while(|ancestor| !ancestor.exists()).collect();
    while let Some(directory) = missing.pop() {
        let mode = if missing.is_empty() { mode } else { PARENT_MODE };
        if let Err(error) = DirBuilder::new().mode(mode).create(directory) {
            remove_directories(&made);
            return Err(error);
        }
        made.push(directory.to_owned());
    }
    Ok(made)
}

/// Removes the directories that are empty, the innermost first.
fn remove_directories(made: &[PathBuf]) {
    for directory in made.iter().rev() {
        // One that somebody else uses by now is not empty, and stays.
        let _ = fs::remove_dir(directory);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{MetadataExt, PermissionsExt},
        thread,
    };

    use rustix::net::accept;

    use super::*;

    fn echo() -> FunctionName {
        "echo".parse().unwrap()
    }

    fn listen(directory: &Directory) -> Result<Listener> {
        Ok(directory.listen_first(echo(), 1)?.remove(0))
    }

    fn refused<T>(result: Result<T>) -> String {
        format!("{:#}", result.err().expect("it was not refused"))
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn what_was_made_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/functions");
        let directory = Directory::open(&path).unwrap();
        let mut listener = listen(&directory).unwrap();
        let socket = path.join("echo.sock");
        assert_eq!(mode(&path), if geteuid().is_root() { 0o750 } else { 0o700 });
        assert_eq!(mode(&socket), 0o600);
        let end = GatewayEnd::connect(&socket).unwrap();
        listener.withdraw();
        assert!(!socket.exists());
        let mut asked = [PollFd::new(&end, PollFlags::empty())];
        assert_eq!(poll(&mut asked, Some(&Timespec::default())).unwrap(), 0, "the pool connection was cut");
        drop((listener, directory));
        assert!(!folder.path().join("run").exists() && folder.path().exists());

        fs::create_dir(folder.path().join("run")).unwrap();
        let directory = Directory::open(&path).unwrap();
        fs::write(path.join("somebody's"), "").unwrap();
        drop(directory);
        assert!(path.join("somebody's").exists());
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let refusal = refused(Directory::open(folder.path()));
        assert!(refusal.contains("can't be trusted") && refusal.contains("chmod"), "{refusal}");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(refused(Directory::open(&file)).contains("file"));
        assert!(refused(Directory::open(&file.join("below"))).contains("can't be made"));
    }

    #[test]
    fn one_supervisor_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = Directory::open(folder.path()).unwrap();
        assert!(refused(Directory::open(folder.path())).contains("another supervisor is at work"));
        drop(first);
        Directory::open(folder.path()).unwrap();
    }

    /// A listener that somebody else made, without the promise to remove it.
    fn foreign_listener(path: &Path) -> OwnedFd {
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&socket, 1).unwrap();
        socket
    }

    #[test]
    fn names_are_given_in_order_and_never_twice() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::open(folder.path()).unwrap();
        let labels =
            |listeners: &[Listener]| listeners.iter().map(|it| it.label().to_owned()).collect::<Vec<_>>();
        let mut first = directory.listen_first(echo(), 1).unwrap();
        let next = directory.listen_next(echo(), 1).unwrap();
        assert_eq!((labels(&first), next.label()), (vec!["echo".to_owned()], "echo@1"));
        first[0].withdraw();
        assert_eq!(directory.listen_next(echo(), 1).unwrap().label(), "echo");
        assert_eq!(directory.listen_next(echo(), 2).unwrap().label(), "echo@2");

        let several = directory.listen_first("hello".parse().unwrap(), 3).unwrap();
        assert_eq!(labels(&several), ["hello@1", "hello@2", "hello@3"]);
        let somebody = foreign_listener(&folder.path().join("hello@4.sock"));
        assert_eq!(directory.listen_next("hello".parse().unwrap(), 3).unwrap().label(), "hello@5");
        drop(somebody);
    }

    #[test]
    fn what_a_dead_supervisor_had_more_of_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["echo.sock", "echo@7.sock", "other.sock"] {
            drop(foreign_listener(&folder.path().join(name)));
        }
        let alive = foreign_listener(&folder.path().join("echo@8.sock"));
        let directory = Directory::open(folder.path()).unwrap();
        let _listeners = directory.listen_first(echo(), 2).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["echo@1.sock", "echo@2.sock", "echo@8.sock", "other.sock"]);
        drop(alive);
    }

    #[test]
    fn a_dead_supervisors_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("echo.sock");
        drop(foreign_listener(&path));
        let directory = Directory::open(folder.path()).unwrap();
        let listener = listen(&directory).unwrap();
        GatewayEnd::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_dying_functions_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("echo.sock");
        let dying = foreign_listener(&path);
        let dies = thread::spawn(move || drop((accept(&dying).unwrap(), dying)));
        let directory = Directory::open(folder.path()).unwrap();
        let listener = listen(&directory).unwrap();
        dies.join().unwrap();
        GatewayEnd::connect(&path).unwrap();
        drop(listener);
    }

    #[test]
    fn what_others_have_there_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("echo.sock");
        let directory = Directory::open(folder.path()).unwrap();
        let listener = foreign_listener(&path);
        let refusal = refused(listen(&directory));
        let own = format!("process {} of user {}", std::process::id(), geteuid().as_raw());
        assert!(refusal.contains("echo.sock is in use") && refusal.contains(&own), "{refusal}");
        GatewayEnd::connect(&path).unwrap();
        drop(listener);
        fs::remove_file(&path).unwrap();

        fs::write(&path, "a file").unwrap();
        assert!(refused(listen(&directory)).contains("is not a socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "a file");
        fs::remove_file(&path).unwrap();

        let stream = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(refused(listen(&directory)).contains("is not ours"));
        assert!(path.exists());
        drop(stream);
    }

    #[test]
    fn a_path_that_no_socket_address_holds_works_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a".repeat(100));
        let directory = Directory::open(&path).unwrap();
        let listener = listen(&directory).unwrap();
        GatewayEnd::connect(&path.join("echo.sock")).unwrap();
        drop(listener);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }
}
