//! What the gateways of one test have pinned in bpffs.
use std::{
    fs,
    path::{Path, PathBuf},
};

const DIRECTORY: &str = "/sys/fs/bpf/pointsman";

/// The sets whose programs are attached to a cgroup below this one.
pub fn below(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    let mut sets: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|set| fs::read_link(set.join("cgroup")).is_ok_and(|place| place.starts_with(cgroup)))
        .collect();
    sets.sort();
    sets
}

/// After a failed test, whose gateway can't.
pub fn remove(set: &Path) {
    let _ = fs::remove_dir_all(set);
    let _ = fs::remove_dir(DIRECTORY);
}
