//! The machine that a run was made on.

use std::fs;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};

use crate::{toolchain, workspace};

use super::results::Host;

pub fn describe() -> Result<Host> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    let processors = read("/proc/cpuinfo")?;
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let memory = read("/proc/meminfo")?;
    let total_kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
    let load = read("/proc/loadavg")?;
    let commit = toolchain::output(
        Command::new("git").current_dir(workspace::root()).args(["describe", "--always", "--dirty"]),
    );
    Ok(Host {
        // The version; what builders append names their builds.
        kernel: read("/proc/sys/kernel/osrelease")?.trim().split('-').next().unwrap_or_default().to_owned(),
        processor: model.map_or("unknown processor", |(_, name)| name.trim()).to_owned(),
        cores: thread::available_parallelism().map_or(1, usize::from),
        memory_mib: total_kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024,
        load_average: load.split(' ').take(3).collect::<Vec<_>>().join(" "),
        // A copy of the sources without their history is measured as well.
        commit: commit.map_or("unknown".to_owned(), |text| text.trim().to_owned()),
    })
}
