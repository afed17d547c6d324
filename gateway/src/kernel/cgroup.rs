//! The cgroup of the gateway's own listeners, so that the programs run for no other socket of the host.
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    process,
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no cgroup2 file system is mounted (see /proc/self/mountinfo)")]
    NotMounted,
    #[error("this process is in no cgroup of cgroup2 (see /proc/self/cgroup)")]
    NotMember,
    #[error("can't {operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

/// Names the cgroup; the rest is the process id of its gateway.
const PREFIX: &str = "pointsman-";

/// A cgroup below the one that the process was started in, and the process in it; undone when dropped.
pub struct Cgroup {
    path: PathBuf,
    parent: PathBuf,
    directory: File,
}

impl Cgroup {
    /// Makes the cgroup and moves this process into it: sockets belong to the cgroup that made them.
    pub fn enter() -> Result<Self, Error> {
        let parent = current()?;
        remove_abandoned(&parent);
        let path = parent.join(format!("{PREFIX}{}", process::id()));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::Io { operation: "make", path, source: error });
            }
            _ => {}
        }
        let directory = File::open(&path).map_err(|source| Error::Io {
            operation: "open",
            path: path.clone(),
            source,
        })?;
        let cgroup = Self { path, parent, directory };
        join(&cgroup.path)?;
        Ok(cgroup)
    }
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
        if let Err(error) = fs::remove_dir(&self.path) {
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

/// A gateway that was killed leaves its cgroup behind; the kernel refuses to remove one that is in use.
fn remove_abandoned(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX))
            && fs::remove_dir(entry.path()).is_ok()
        {
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
