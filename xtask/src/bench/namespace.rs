//! A network namespace that the whole benchmark runs in: its ports are its own, and its tuning touches nobody.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};

use crate::privilege::find_program;

/// As on a server that takes thousands of connections a second; the same for every side.
const SYSCTLS: [(&str, &str); 5] = [
    ("net/core/somaxconn", "8192"),
    ("net/ipv4/tcp_max_syn_backlog", "8192"),
    // Clients' ports; the sides listen below.
    ("net/ipv4/ip_local_port_range", "12000 64999"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    // Closed connections don't pile up over the rounds.
    ("net/ipv4/tcp_max_tw_buckets", "8192"),
];

/// Moves the calling thread, and what it starts from now on, into a namespace that ends with the last of them.
pub fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    let ip = find_program("ip").context("`ip` is not in PATH: apt-get install iproute2")?;
    if !Command::new(ip).args(["link", "set", "lo", "up"]).status()?.success() {
        bail!("the loopback of the benchmark's network namespace can't be brought up");
    }
    for (name, value) in SYSCTLS {
        let path = format!("/proc/sys/{name}");
        fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))?;
    }
    Ok(())
}
