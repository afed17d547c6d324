//! Installs the distribution's programs that commands use.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::privilege::{self, find_program};
use crate::progress;

/// Program and Debian package.
pub type Package = (&'static str, &'static str);

/// The clients and observers of the tests.
pub const OF_TESTS: [Package; 8] = [
    ("bpftool", "bpftool"),
    ("curl", "curl"),
    ("gnutls-cli", "gnutls-bin"),
    ("ip", "iproute2"),
    ("openssl", "openssl"),
    ("python3", "python3"),
    ("strace", "strace"),
    ("tc", "iproute2"),
];

pub fn missing(needed: &[Package]) -> Vec<&'static str> {
    let mut packages: Vec<_> = needed
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    packages.dedup();
    packages
}

/// Installs what is missing; `user` begins the sentence if that can't be done.
pub fn ensure(needed: &[Package], user: &str) -> Result<()> {
    let missing = missing(needed);
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let Some(apt_get) = find_program("apt-get") else {
        bail!("{user} takes these packages, and there is no apt-get to install them: {list}");
    };
    let install = |what: &str| -> Result<String> {
        let mut command = apt(&apt_get, &list)?;
        command.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
        progress::run(what, &mut command)
    };
    let what = format!("installing what {user} takes: {list}");
    if install(&what).is_err() {
        progress::run(
            "the package lists are missing or stale: apt-get update",
            apt(&apt_get, &list)?.arg("update"),
        )?;
        install(&what)?;
    }
    let still = self::missing(needed);
    if !still.is_empty() {
        bail!("these packages were installed, and their programs are not in PATH: {}", still.join(" "));
    }
    Ok(())
}

fn apt(apt_get: &Path, list: &str) -> Result<Command> {
    let why = format!("installing {list}");
    let mut command = privilege::as_root(Path::new("/usr/bin/env"), &why).context("programs are missing")?;
    command.arg("DEBIAN_FRONTEND=noninteractive").arg(apt_get).arg("-q");
    Ok(command)
}
