//! The directory in the BPF file system under which gateways pin what has to outlive them.
use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use rustix::{fs::statfs, process::geteuid};

/// Where systemd mounts it and everybody looks for it.
pub const MOUNT_POINT: &str = "/sys/fs/bpf";

/// include/uapi/linux/magic.h
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// Whoever may open a pinned map may write verdicts into it.
const MODE: u32 = 0o700;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no BPF file system is mounted on {MOUNT_POINT}, and it can't be mounted")]
    Mount(#[source] io::Error),
    #[error("can't {operation} {}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{} belongs to another user, or others may write to it", .0.display())]
    NotOurs(PathBuf),
}

/// The directory; mounts the file system and makes the directory where they are missing.
pub fn directory() -> Result<PathBuf, Error> {
    mount_missing().map_err(Error::Mount)?;
    let path = Path::new(MOUNT_POINT).join("pointsman");
    match DirBuilder::new().mode(MODE).create(&path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::Io { operation: "make", path, source });
        }
        _ => {}
    }
    trusted(path)
}

/// The directory, if an earlier gateway has left it.
pub fn existing() -> Option<PathBuf> {
    trusted(Path::new(MOUNT_POINT).join("pointsman")).ok()
}

fn trusted(path: PathBuf) -> Result<PathBuf, Error> {
    let metadata = fs::symlink_metadata(&path).map_err(|source| Error::Io {
        operation: "look at",
        path: path.clone(),
        source,
    })?;
    let ours = metadata.is_dir() && metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if ours { Ok(path) } else { Err(Error::NotOurs(path)) }
}

pub fn is_mounted() -> io::Result<bool> {
    // The type's width is the architecture's.
    Ok(statfs(MOUNT_POINT)?.f_type as u32 == BPF_FS_MAGIC)
}

fn mount_missing() -> io::Result<()> {
    if is_mounted()? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RELATIME;
    mount(Some("bpf"), MOUNT_POINT, Some("bpf"), flags, Some("mode=700"))?;
    tracing::info!("mounted a BPF file system on {MOUNT_POINT}");
    Ok(())
}
