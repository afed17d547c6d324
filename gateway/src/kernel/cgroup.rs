//! The cgroup of the gateway's own listeners, so that the programs run for no other socket of the host.
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    process,
};

use nix::libc;

use super::pins::{self, Pins};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no cgroup2 file system is mounted (see /proc/self/mountinfo)")]
    NotMounted,
    #[error("this process is in no cgroup of cgroup2 (see /proc/self/cgroup)")]
    NotMember,
    #[error("the cgroup that the pinned programs are attached to is not this gateway's, or is gone")]
    Gone,
    #[error(transparent)]
    Pins(#[from] pins::Error),
    #[error("can't {operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

/// Names the cgroups; the rest is the name of the pins, or what else tells gateways apart.
const PREFIX: &str = "pointsman-";

/// Another gateway may take a new cgroup for an abandoned one until this process is in it.
const ATTEMPTS: usize = 3;

/// A cgroup below the one that the process was started in, and the process in it; left when dropped.
pub struct Cgroup {
    path: PathBuf,
    parent: PathBuf,
    directory: File,
    /// Its pins remove it.
    pinned: bool,
}

impl Cgroup {
    /// Makes a cgroup for this process alone and moves into it: sockets belong to the cgroup that made them.
    pub fn enter(purpose: &str) -> Result<Self, Error> {
        let parent = current()?;
        remove_abandoned(&parent);
        let path = parent.join(format!("{PREFIX}{purpose}{}", process::id()));
        Self::enter_at(path, parent, false)
    }

    /// Moves into the cgroup of a set of pins, which is made where it is missing and removed with them.
    pub fn enter_pinned(pins: &Pins) -> Result<Self, Error> {
        let parent = current()?;
        remove_abandoned(&parent);
        let path = place(&parent, pins);
        pins.label_cgroup(&path)?;
        Self::enter_at(path, parent, true)
    }

    fn enter_at(path: PathBuf, parent: PathBuf, pinned: bool) -> Result<Self, Error> {
        let mut attempts = 1;
        loop {
            match Self::try_enter(&path, &parent, pinned) {
                Err(Error::Io { source, .. }) if attempts < ATTEMPTS && is_gone(&source) => attempts += 1,
                result => return result,
            }
        }
    }

    fn try_enter(path: &Path, parent: &Path, pinned: bool) -> Result<Self, Error> {
        let failed = |operation| move |source| Error::Io { operation, path: path.to_owned(), source };
        match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed("make")(error)),
            _ => {}
        }
        let directory = File::open(path).map_err(failed("open"))?;
        join(path)?;
        Ok(Self { path: path.to_owned(), parent: parent.to_owned(), directory, pinned })
    }
}

/// The id of the cgroup that a process started here has for these pins; `None` when there is none.
pub fn id_for(pins: &Pins) -> Option<u64> {
    let path = place(&current().ok()?, pins);
    let metadata = fs::metadata(&path).ok()?;
    // A gateway must not leave the cgroup that it was started in for one elsewhere.
    (pins.cgroup()? == path).then_some(metadata.ino())
}

fn place(parent: &Path, pins: &Pins) -> PathBuf {
    parent.join(format!("{PREFIX}{}", pins.name()))
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = join(&self.parent) {
            tracing::warn!(%error, "can't leave the gateway's cgroup");
        }
        if !self.pinned
            && let Err(error) = fs::remove_dir(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "can't remove the gateway's cgroup");
        }
    }
}

fn join(path: &Path) -> Result<(), Error> {
    let path = path.join("cgroup.procs");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(process::id().to_string().as_bytes()))
        .map_err(|source| Error::Io { operation: "write to", path, source })
}

/// A gateway that was killed leaves its cgroup behind; the kernel refuses to remove one that is in use, and one that
/// has pins goes with them.
fn remove_abandoned(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let is_abandoned = |name: &str| name.strip_prefix(PREFIX).is_some_and(|set| !pins::exists(set));
        if entry.file_name().to_str().is_some_and(is_abandoned) && fs::remove_dir(entry.path()).is_ok() {
            tracing::info!(path = %entry.path().display(), "removed a cgroup that an earlier gateway left");
        }
    }
}

/// The directory of the cgroup that this process is in.
fn current() -> Result<PathBuf, Error> {
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|source| Error::Io { operation: "read", path: path.into(), source })
    };
    let mount = mount_point(&read("/proc/self/mountinfo")?).ok_or(Error::NotMounted)?;
    let member = membership(&read("/proc/self/cgroup")?).ok_or(Error::NotMember)?;
    Ok(mount.join(member.trim_start_matches('/')))
}

/// Where cgroup2 is mounted (proc(5), mountinfo: the file system's type stands behind a lone dash).
pub fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let path = mount.split(' ').nth(4)?;
        (file_system.split(' ').next() == Some("cgroup2")).then(|| PathBuf::from(path))
    })
}

/// The path within cgroup2 (cgroups(7): its hierarchy has the number 0 and no controllers).
fn membership(cgroups: &str) -> Option<String> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_in_hybrid_mode() {
        let mountinfo = "30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
                         31 25 0:27 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mountinfo), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("30 25 0:26 / / rw - ext4 /dev/vda rw\n"), None);
    }

    #[test]
    fn the_unified_hierarchy_is_number_zero() {
        assert_eq!(membership("4:cpu:/a\n0::/system.slice/x\n"), Some("/system.slice/x".into()));
        assert_eq!(membership("4:cpu:/a\n"), None);
    }
}
