//! The names in bpffs under which one gateway's programs, maps and links outlive it.
//!
//! `/sys/fs/bpf/pointsman/SET/{links,programs,maps}/pm_*`, and two labels, which are symbolic links: `layout` says
//! which gateways can go on with the set, `cgroup` leads to the cgroup that the programs are attached to. Whoever holds
//! the lock on the directory owns the set; the lock dies with its process.
use std::{
    fs::{self, DirBuilder},
    io,
    net::SocketAddr,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, symlink},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Map, MapData, MapError, SockHash};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};

use super::bpffs;

/// Links go first, so that nothing new is enrolled while the rest is removed.
const KINDS: [&str; 3] = ["links", "programs", "maps"];

const LAYOUT: &str = "layout";
const CGROUP: &str = "cgroup";

/// Other gateways look whether a set is abandoned, and hold it for some microseconds; a live owner holds on.
const LOCK_PATIENCE: Duration = Duration::from_millis(100);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// The directory of all sets may go between its making and the set's.
const ATTEMPTS: usize = 5;

/// How long another gateway's set is left to it: one that was killed and is started again goes on with what it left.
const RESTART_PATIENCE: Duration = Duration::from_secs(10);

/// More sets of one gateway than this means that something else is wrong.
const SETS: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    FileSystem(#[from] bpffs::Error),
    #[error("can't {operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{SETS} sets of pins named {0} exist; remove those that are not needed from /sys/fs/bpf/pointsman"
    )]
    TooMany(String),
}

/// What tells gateways apart: the addresses they listen on, and in which network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(String);

impl Identity {
    pub fn new(http: SocketAddr, https: SocketAddr, namespace: u64) -> Self {
        Self(format!("{}-{}-net{namespace}", listener(http), listener(https)))
    }

    fn set_name(&self, number: usize) -> String {
        if number == 1 { self.0.clone() } else { format!("{}-{number}", self.0) }
    }

    /// Whether a set of this name is this gateway's.
    pub fn owns(&self, set: &str) -> bool {
        set.strip_prefix(&self.0).is_some_and(|rest| {
            rest.is_empty() || rest.strip_prefix('-').is_some_and(|number| number.parse::<usize>().is_ok())
        })
    }
}

/// A name in bpffs must not have dots.
fn listener(address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        return address.port().to_string();
    }
    format!("{}_{}", address.ip().to_string().replace(['.', ':'], "_"), address.port())
}

/// A set that this process owns. When it is dropped the set goes, unless connections need it still.
pub struct Pins {
    path: PathBuf,
    end: End,
    _lock: OwnedFd,
}

/// What becomes of a set whose owner lets it go.
enum End {
    /// It goes if no connection needs it, which none should.
    Drained,
    /// No connection needs it any more, whatever the maps say.
    GivenUp,
    /// It goes if no connection needs it; else it is a leftover.
    Left,
}

impl Pins {
    /// Makes a set.
    pub fn make(identity: &Identity) -> Result<Self, Error> {
        for number in 1..=SETS {
            let mut attempts = 1;
            loop {
                // Made again each time: the last gateway to leave removes it.
                let path = bpffs::directory()?.join(identity.set_name(number));
                match Self::make_at(&path) {
                    Ok(Some(pins)) => return Ok(pins),
                    // Another's, or in another's hands at this moment.
                    Ok(None) => break,
                    Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < ATTEMPTS => {
                        attempts += 1
                    }
                    Err(source) => return Err(Error::Io { operation: "make", path, source }),
                }
            }
        }
        Err(Error::TooMany(identity.0.clone()))
    }

    fn make_at(path: &Path) -> io::Result<Option<Self>> {
        let mut directory = DirBuilder::new();
        directory.mode(0o700);
        match directory.create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            result => result?,
        }
        let Some(lock) = lock(path)? else { return Ok(None) };
        let pins = Self { path: path.to_owned(), end: End::Drained, _lock: lock };
        for kind in KINDS {
            directory.create(path.join(kind))?;
        }
        Ok(Some(pins))
    }

    /// Takes over a dead gateway's set whose label says that it fits.
    pub fn take_over(identity: &Identity, layout: &str) -> Option<Self> {
        let fits = |path: &PathBuf| {
            identity.owns(&name(path)) && label(path, LAYOUT).is_some_and(|found| found == Path::new(layout))
        };
        let fitting: Vec<_> = sets().into_iter().filter(fits).collect();
        let deadline = Instant::now() + LOCK_PATIENCE;
        while !fitting.is_empty() {
            for path in &fitting {
                if let Ok(Some(lock)) = lock(path) {
                    return Some(Self { path: path.clone(), end: End::Drained, _lock: lock });
                }
            }
            if Instant::now() > deadline {
                break;
            }
            thread::sleep(LOCK_POLL);
        }
        None
    }

    pub fn name(&self) -> String {
        name(&self.path)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn link(&self, name: &str) -> PathBuf {
        self.path.join("links").join(name)
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.path.join("programs").join(name)
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.path.join("maps").join(name)
    }

    /// Says who may take the set over; to be said last, when it is complete.
    pub fn label_layout(&self, layout: &str) -> Result<(), Error> {
        self.write_label(LAYOUT, Path::new(layout))
    }

    pub fn label_cgroup(&self, cgroup: &Path) -> Result<(), Error> {
        self.write_label(CGROUP, cgroup)
    }

    pub fn cgroup(&self) -> Option<PathBuf> {
        label(&self.path, CGROUP)
    }

    /// Whoever used it was told; a destroyed connection stays in the SOCKHASH until its process closes it.
    pub fn give_up(&mut self) {
        self.end = End::GivenUp;
    }

    /// Lets the set lie until no connection needs it.
    pub fn leave(mut self) {
        self.end = End::Left;
    }

    fn write_label(&self, label: &str, value: &Path) -> Result<(), Error> {
        let path = self.path.join(label);
        match symlink(value, &path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::Io { operation: "make", path, source })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if matches!(self.end, End::GivenUp) || is_drained(&self.path) {
            remove(&self.path);
        } else if matches!(self.end, End::Drained) {
            tracing::warn!(
                set = %self.path.display(),
                "connections depend on the BPF programs still: the next start removes these"
            );
        }
    }
}

/// What dead gateways left for connections that depend on it.
pub struct Leftovers {
    identity: Option<Identity>,
    sets: Vec<PathBuf>,
    seen_at: Instant,
}

impl Leftovers {
    /// Removes what no connection needs, and remembers the rest. What is alive now has time to come back when it dies.
    pub fn collect(identity: Option<Identity>) -> Self {
        let is_dead = |path: &PathBuf| matches!(lock(path), Ok(Some(_)));
        let dead = sets().into_iter().filter(is_dead).collect();
        let mut leftovers = Self { identity, sets: dead, seen_at: Instant::now() };
        leftovers.sweep();
        for set in leftovers.own() {
            tracing::info!(
                set = %set.display(),
                "kept what a killed gateway left, until the connections that depend on it end"
            );
        }
        leftovers
    }

    /// Removes what no connection needs any more: its own at once, and others' when nobody has taken them up.
    pub fn sweep(&mut self) {
        let Self { identity, sets, seen_at } = self;
        let is_abandoned = seen_at.elapsed() >= RESTART_PATIENCE;
        sets.retain(|path| {
            let is_own = identity.as_ref().is_some_and(|identity| identity.owns(&name(path)));
            if !is_own && !is_abandoned {
                return true;
            }
            // Only what is dead: a live owner holds the lock.
            let Ok(Some(_lock)) = lock(path) else { return false };
            if !is_drained(path) {
                return true;
            }
            tracing::info!(set = %path.display(), "removed what a killed gateway left");
            remove(path);
            false
        });
    }

    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// The sets that earlier runs of this gateway left.
    pub fn own(&self) -> impl Iterator<Item = &Path> {
        let is_own = |path: &&Path| self.identity.as_ref().is_some_and(|identity| identity.owns(&name(path)));
        self.sets.iter().map(PathBuf::as_path).filter(is_own)
    }

    /// Ends the connections that depend on what earlier runs of this gateway left, and removes it.
    pub fn end(&self) {
        for set in self.own() {
            match super::destroy_all(set) {
                Ok(()) => remove(set),
                Err(error) => {
                    tracing::warn!(%error, set = %set.display(), "can't end what a killed gateway left")
                }
            }
        }
    }
}

/// The map of a set that has an entry for each connection that depends on it.
pub fn connections(set: &Path) -> Result<Map, MapError> {
    Map::from_map_data(MapData::from_pin(set.join("maps").join("pm_connections"))?)
}

/// A socket that is enrolled is in the SOCKHASH, whatever the other maps of an older program look like.
fn is_drained(set: &Path) -> bool {
    let path = set.join("maps").join("pm_sockets");
    // A set that was never completed has had no connection.
    if !path.exists() {
        return true;
    }
    let sockets = MapData::from_pin(path).and_then(Map::from_map_data).and_then(SockHash::<_, u64>::try_from);
    sockets.is_ok_and(|sockets| sockets.keys().next().is_none())
}

/// Removes a set and its cgroup, and the directory of all sets when it was the last.
fn remove(set: &Path) {
    let cgroup = label(set, CGROUP);
    let removed = KINDS
        .into_iter()
        .map(|kind| set.join(kind))
        .filter(|path| path.exists())
        .chain([set.to_owned()])
        .try_for_each(fs::remove_dir_all);
    if let Err(error) = removed {
        tracing::warn!(%error, set = %set.display(), "can't remove pins");
    }
    if let Some(cgroup) = cgroup
        && let Err(error) = fs::remove_dir(&cgroup)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %cgroup.display(), "can't remove a gateway's cgroup");
    }
    if let Some(all) = set.parent() {
        // Refused while there are others.
        let _ = fs::remove_dir(all);
    }
}

fn sets() -> Vec<PathBuf> {
    let Some(directory) = bpffs::existing() else { return Vec::new() };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut sets: Vec<_> = entries.map(|entry| entry.path()).collect();
    sets.sort();
    sets
}

/// Whether a set of this name exists, whoever owns it.
pub fn exists(set: &str) -> bool {
    bpffs::existing().is_some_and(|directory| directory.join(set).exists())
}

fn name(set: &Path) -> String {
    set.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn label(set: &Path, label: &str) -> Option<PathBuf> {
    fs::read_link(set.join(label)).ok()
}

/// Locks a directory; `None` when somebody else has it.
fn lock(path: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match open(path, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    // Its last owner may have removed it between the two calls.
    let locked = fstat(&directory)?;
    let same = fs::symlink_metadata(path).is_ok_and(|found| found.ino() == locked.st_ino);
    Ok(same.then_some(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(http: &str, https: &str) -> Identity {
        Identity::new(http.parse().unwrap(), https.parse().unwrap(), 3)
    }

    #[test]
    fn a_set_is_named_after_what_its_gateway_listens_on() {
        assert_eq!(identity("[::]:80", "0.0.0.0:443").0, "80-443-net3");
        assert_eq!(identity("127.0.0.1:80", "[::1]:443").0, "127_0_0_1_80-__1_443-net3");
        assert_eq!(identity("[::]:80", "[::]:443").set_name(2), "80-443-net3-2");
    }

    #[test]
    fn a_gateway_owns_all_its_sets_and_no_others() {
        let own = identity("[::]:80", "[::]:443");
        assert!(own.owns("80-443-net3") && own.owns("80-443-net3-12"));
        for other in ["80-443-net31", "80-443-net3-x", "80-443-net3-", "80-443-net4", "8080-443-net3"] {
            assert!(!own.owns(other), "{other}");
        }
    }

    #[test]
    fn a_lock_is_for_one_and_for_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        assert!(lock(&path).unwrap().is_none(), "it is not there");
        fs::create_dir(&path).unwrap();
        let held = lock(&path).unwrap();
        assert!(held.is_some());
        assert!(lock(&path).unwrap().is_none(), "it is held");
        drop(held);
        assert!(lock(&path).unwrap().is_some());
    }
}
