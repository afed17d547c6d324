//! What the gateways of one test have pinned in bpffs.
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::programs;

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

/// What bpftool says of a pinned object, as JSON.
pub fn bpftool(arguments: &[&str], path: &Path) -> Result<Value> {
    let bpftool = programs::client("bpftool", "bpftool");
    let output = Command::new(bpftool).arg("-j").args(arguments).arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Not its exit code: some versions end `link show` with whatever error the last system call but one had.
    let shown: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(shown.get("error").is_none(), "{arguments:?} {}: {text}", path.display());
    Ok(shown)
}

/// A counter of the programs, summed over the CPUs.
pub fn counter(set: &Path, key: usize) -> Result<u64> {
    let dump = bpftool(&["map", "dump", "pinned"], &set.join("maps/pm_counters"))?;
    let values = dump[key]["formatted"]["values"].as_array().with_context(|| format!("{dump}"))?;
    Ok(values.iter().filter_map(|value| value["value"].as_u64()).sum())
}

/// After a failed test, whose gateway can't.
pub fn remove(set: &Path) {
    let _ = fs::remove_dir_all(set);
    let _ = fs::remove_dir(DIRECTORY);
}
