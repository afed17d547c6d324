//! A cgroup per stack: programs attach to it, and whoever is left in it at the end was left behind.
use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::PATIENCE;

pub struct Cgroup {
    path: PathBuf,
    processes: OwnedFd,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Not the product's, which takes an empty cgroup of its own prefix for one that a dead gateway left.
const PREFIX: &str = "test-of-pointsman";

impl Cgroup {
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::at(mount_point().join(format!("{PREFIX}.{}.{number}", std::process::id())))
    }

    pub fn child(&self, name: &str) -> Self {
        Self::at(self.path.join(name))
    }

    fn at(path: PathBuf) -> Self {
        fs::create_dir(&path)
            .unwrap_or_else(|error| panic!("making the cgroup {} needs root: {error}", path.display()));
        let file = fs::OpenOptions::new().write(true).open(path.join("cgroup.procs"));
        Self { processes: file.expect("opening cgroup.procs").into(), path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whoever writes `0` here joins.
    pub fn entrance(&self) -> BorrowedFd<'_> {
        self.processes.as_fd()
    }

    /// The processes here, children's not included.
    pub fn processes(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Ends every process here and in cgroups below.
    pub fn kill(&self) {
        if fs::write(self.path.join("cgroup.kill"), "1").is_err() {
            // Linux before 5.14.
            for pid in self.processes() {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            }
        }
    }

    pub fn assert_empty(&self) {
        let names = |pids: Vec<i32>| -> Vec<String> {
            let name = |pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            pids.into_iter().map(|pid| format!("{pid} {}", name(pid).trim())).collect()
        };
        let left = self.processes();
        assert!(left.is_empty(), "processes are left behind: {:?}", names(left));
        let children = self.children();
        assert!(children.is_empty(), "cgroups are left behind: {children:?}");
    }

    /// Lets children bound their memory, where cgroup2 has that controller.
    pub fn divide_memory(&self) {
        let has = fs::read_to_string(self.path.join("cgroup.controllers")).expect("a cgroup's controllers");
        if has.split_whitespace().any(|controller| controller == "memory") {
            fs::write(self.path.join("cgroup.subtree_control"), "+memory")
                .expect("dividing a cgroup of one's own");
        }
    }

    /// Removes what was made below, as systemd does when a unit's last process has ended.
    pub fn remove_children(&self) -> io::Result<()> {
        self.children().iter().try_for_each(fs::remove_dir)
    }

    fn children(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.path()).collect()
    }
}

impl Default for Cgroup {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for child in self.children() {
            let _ = fs::remove_dir(child);
        }
        // A killed process leaves its cgroup a moment after its parent has reaped it.
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = fs::remove_dir(&self.path) {
            if Instant::now() > deadline {
                // A second panic would hide the first.
                assert!(thread::panicking(), "the cgroup {} stays: {error}", self.path.display());
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Where the unified hierarchy is mounted, alone or beside the old one.
fn mount_point() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("reading the mounts");
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let mount =
        mount.expect("a cgroup2 file system must be mounted: mount -t cgroup2 none /sys/fs/cgroup/unified");
    PathBuf::from(mount.split(' ').nth(1).expect("a mount has a place"))
}
