//! Remembers that the self-test passed, for as long as the kernel and the programs stay the same.
use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process,
};

use nix::libc;
use rustix::process::geteuid;

use super::OBJECT_ID;

/// Other files of Pointsman's live beside it, and what leads to those may be read.
const DIRECTORY_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o600;

/// A boot id, a kernel's release (at most 64 bytes) and an object's id.
const PROOF_BYTES: u64 = 256;

/// Where a proof is kept, and what it has to say to hold here and now.
pub struct Proof {
    path: PathBuf,
    text: String,
}

impl Proof {
    /// `None` where there is no directory that only this user can write to.
    pub fn here() -> Option<Self> {
        let path = runtime_directory()?.join("self-test");
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
        Some(Self { path, text: format!("{} {} {OBJECT_ID}\n", boot.trim(), release.trim()) })
    }

    pub fn holds(&self) -> bool {
        read(&self.path).is_ok_and(|text| text == self.text)
    }

    pub fn remember(&self) {
        if let Err(error) = self.write() {
            tracing::debug!(%error, path = %self.path.display(), "can't remember the self-test's result");
        }
    }

    pub fn forget(&self) {
        let _ = fs::remove_file(&self.path);
    }

    fn write(&self) -> io::Result<()> {
        let draft = self.path.with_extension(process::id().to_string());
        let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&draft)?;
        let written = file.write_all(self.text.as_bytes()).and_then(|()| fs::rename(&draft, &self.path));
        if written.is_err() {
            let _ = fs::remove_file(&draft);
        }
        written
    }
}

/// A file that nobody but this user can have written.
fn read(path: &Path) -> io::Result<String> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || !is_ours(&metadata, 0o077) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    text(file)
}

fn text(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(PROOF_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn is_ours(metadata: &fs::Metadata, forbidden: u32) -> bool {
    metadata.uid() == geteuid().as_raw() && metadata.mode() & forbidden == 0
}

/// What systemd made for this service, or else what the user's files that end with the boot lie in.
fn runtime_directory() -> Option<PathBuf> {
    let named = |variable| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let path = match named("RUNTIME_DIRECTORY") {
        Some(path) => path,
        None if geteuid().is_root() => PathBuf::from("/run/pointsman"),
        None => named("XDG_RUNTIME_DIR")?.join("pointsman"),
    };
    match DirBuilder::new().mode(DIRECTORY_MODE).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return None,
        _ => {}
    }
    let metadata = fs::symlink_metadata(&path).ok()?;
    (metadata.is_dir() && is_ours(&metadata, 0o022)).then_some(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn proof(folder: &Path, text: &str) -> Proof {
        Proof { path: folder.join("self-test"), text: text.to_owned() }
    }

    #[test]
    fn it_holds_for_what_was_proved_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let now = proof(folder.path(), "boot 6.18 object\n");
        assert!(!now.holds());
        now.remember();
        assert!(now.holds());
        assert!(!proof(folder.path(), "boot 6.18 other\n").holds());
        now.remember();
        now.forget();
        assert!(!now.holds());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_others_can_write_proves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let proof = proof(folder.path(), "boot 6.18 object\n");
        proof.remember();
        fs::set_permissions(&proof.path, fs::Permissions::from_mode(0o620)).unwrap();
        assert!(!proof.holds());
        fs::set_permissions(&proof.path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(proof.holds());
        let elsewhere = folder.path().join("elsewhere");
        fs::rename(&proof.path, &elsewhere).unwrap();
        symlink(&elsewhere, &proof.path).unwrap();
        assert!(!proof.holds());
    }
}
