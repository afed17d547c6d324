//! What `/proc` says of processes: who belongs to whom, their processor time, their memory.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

/// The parent of the kernel's own threads.
const KTHREADD: i32 = 2;

/// Who is whose child, at one moment.
pub struct Family {
    parents: BTreeMap<i32, i32>,
}

impl Family {
    pub fn now() -> Result<Self> {
        let mut parents = BTreeMap::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process that has just ended has no parent to tell.
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            if let Some(parent) = parent_of(&stat) {
                parents.insert(pid, parent);
            }
        }
        Ok(Self { parents })
    }

    /// These processes and all that descend from them.
    pub fn trees(&self, roots: &[i32]) -> Vec<i32> {
        let descends = |mut pid: i32| loop {
            if roots.contains(&pid) {
                return true;
            }
            match self.parents.get(&pid) {
                Some(&parent) if parent != pid => pid = parent,
                _ => return false,
            }
        };
        self.parents.keys().copied().filter(|&pid| descends(pid)).collect()
    }

    /// Workers, softirq and RCU threads, which finish what connections leave behind.
    pub fn kernel_threads(&self) -> Vec<i32> {
        let is_kernels = |(&pid, &parent): (&i32, &i32)| (parent == KTHREADD).then_some(pid);
        self.parents.iter().filter_map(is_kernels).collect()
    }
}

/// The second number behind the name, which is in parentheses and may hold anything (proc(5)).
fn parent_of(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Seconds of processor time of all threads that these processes have now.
pub fn cpu_seconds(pids: &[i32]) -> f64 {
    let nanoseconds: u64 = pids.iter().flat_map(|&pid| threads(pid)).map(|path| cpu_nanoseconds(&path)).sum();
    nanoseconds as f64 / 1e9
}

fn threads(pid: i32) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.flatten().map(|entry| format!("{}/schedstat", entry.path().display())).collect()
}

fn cpu_nanoseconds(schedstat: &str) -> u64 {
    let text = fs::read_to_string(schedstat).unwrap_or_default();
    text.split(' ').next().and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// Seconds in which any processor was busy with anything, and the number of processors.
pub fn machine_busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|value| value.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|&index| ticks.get(index)).sum();
    Ok(busy / nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100) as f64)
}

/// MiB of memory that is these processes' own: anonymous pages, which nobody shares.
pub fn memory_mib(pids: &[i32]) -> f64 {
    let kib: u64 = pids.iter().filter_map(|pid| field_kib(&format!("/proc/{pid}/status"), "RssAnon:")).sum();
    kib as f64 / 1024.0
}

/// MiB of the kernel's small objects, sockets among them.
pub fn slab_mib() -> f64 {
    field_kib("/proc/meminfo", "Slab:").unwrap_or(0) as f64 / 1024.0
}

fn field_kib(path: &str, field: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok())
}

/// Descriptors that these processes have open.
pub fn descriptors(pids: &[i32]) -> usize {
    pids.iter().filter_map(|pid| Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_anything() {
        assert_eq!(parent_of("12 (a) b) S 7 12 12 0"), Some(7));
        assert_eq!(parent_of("12 (a"), None);
    }

    #[test]
    fn this_process_descends_from_its_parent_and_uses_time() {
        let own = std::process::id() as i32;
        let family = Family::now().unwrap();
        assert!(family.trees(&[nix::unistd::getppid().as_raw()]).contains(&own));
        assert!(!family.trees(&[i32::MAX]).contains(&own));
        assert!(cpu_seconds(&[own]) > 0.0 && memory_mib(&[own]) > 0.0 && slab_mib() > 0.0);
        assert!(descriptors(&[own]) >= 3 && machine_busy_seconds().unwrap() > 0.0);
    }
}
