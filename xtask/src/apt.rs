//! apt as it is used to look and to fetch, without touching the system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::progress;

pub struct Package {
    pub name: String,
    pub version: String,
}

/// `Inst NAME (VERSION ORIGIN [ARCHITECTURE])`
pub fn parse_simulated(line: &str) -> Option<Package> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let version = rest.strip_prefix('(')?.split([' ', ')']).next()?;
    Some(Package { name: name.to_owned(), version: version.to_owned() })
}

pub enum Lists {
    System,
    /// Below this directory, for a machine whose lists are missing or stale and a user who may not renew them.
    Own(PathBuf),
}

impl Lists {
    pub fn own(cache: &Path) -> Result<Self> {
        let directory = cache.join("apt");
        fs::create_dir_all(directory.join("state/lists/partial"))?;
        fs::create_dir_all(directory.join("cache/archives/partial"))?;
        let lists = Self::Own(directory);
        progress::run("apt-get update (into the cache)", lists.apt_get().arg("update"))?;
        Ok(lists)
    }

    pub fn apt_get(&self) -> Command {
        let mut command = Command::new("apt-get");
        // What is parsed must be English; as root, apt's own download user could not write into root's cache.
        command.env("LC_ALL", "C").args(["-q", "-o", "APT::Sandbox::User=root"]);
        if let Self::Own(directory) = self {
            command.arg("-o").arg(format!("Dir::State={}", directory.join("state").display()));
            // An own setting of the system's for these would win otherwise.
            command.arg("-o").arg(format!("Dir::State::lists={}", directory.join("state/lists").display()));
            command
                .arg("-o")
                .arg(format!("Dir::Cache::archives={}", directory.join("cache/archives").display()));
            command.arg("-o").arg(format!("Dir::Cache={}", directory.join("cache").display()));
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_apt_would_install() {
        let line = "Inst libllvm22 (1:22.1.8-1~deb12u1 Debian-Security:12/oldstable-security [amd64])";
        let package = parse_simulated(line).unwrap();
        assert_eq!((package.name.as_str(), package.version.as_str()), ("libllvm22", "1:22.1.8-1~deb12u1"));
        assert!(parse_simulated("Conf libllvm22 (1:22.1.8-1~deb12u1 Debian)").is_none());
        assert!(parse_simulated("Inst libllvm22").is_none());
    }
}
