//! Root's rights: whether this process has them, and how a command gets them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command that runs as root, by sudo where that is needed; `why` ends the sentence if there is no way.
pub fn as_root(program: &Path, why: &str) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let mut command = Command::new(sudo(why)?);
    command.arg("--").arg(program);
    Ok(command)
}

pub fn sudo(why: &str) -> Result<PathBuf> {
    match find_program("sudo") {
        Some(sudo) => Ok(sudo),
        None => bail!("{why} needs root, and sudo is not installed: run this as root"),
    }
}

pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps some programs where only root looks.
    let administrators = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(administrators)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}
