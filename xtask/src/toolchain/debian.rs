//! Debian's compiler with a precompiled core for BPF, unpacked into the cache without touching the system.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{output, script, unfinished};
use crate::apt::{Lists, Package, parse_simulated};
use crate::progress::{self, announce};

const COMPILER: &str = "rustc-web";
/// Its libraries for this machine, with what they depend on, and its core for BPF.
const LIBRARIES: [&str; 2] = ["libstd-rust-web-dev", "libstd-rust-web-dev-bpf"];

/// Gives the directory that stands for `/`, with the compiler in `usr/bin/rustc`.
pub fn fetch(cache: &Path) -> Result<PathBuf> {
    if output(Command::new("apt-get").arg("--version")).is_err() {
        bail!("apt-get is not there");
    }
    match fetch_by(cache, &Lists::System) {
        Ok(directory) => Ok(directory),
        Err(error) => {
            announce(&format!(
                "the system's package lists do not serve ({error:#}); fetching fresh ones into the cache"
            ));
            let lists = Lists::own(cache)?;
            fetch_by(cache, &lists)
        }
    }
}

fn fetch_by(cache: &Path, lists: &Lists) -> Result<PathBuf> {
    let packages = packages(lists)?;
    let compiler = packages.iter().find(|package| package.name == COMPILER).context("no compiler")?;
    let directory = cache.join(format!("debian-{COMPILER}-{}", compiler.version.replace([':', '/'], "_")));
    if directory.join("usr/bin/rustc").is_file() {
        return Ok(directory);
    }
    let work = unfinished(cache)?;
    let archives = work.join("archives");
    fs::create_dir(&archives)?;
    let wanted = packages.iter().map(|package| format!("{}={}", package.name, package.version));
    progress::run(
        &format!("fetching Debian's {COMPILER} {} (about 120 MB, once)", compiler.version),
        lists.apt_get().arg("download").args(wanted).current_dir(&archives),
    )?;
    announce("unpacking it into the cache (about 540 MB)");
    for archive in fs::read_dir(&archives)? {
        output(Command::new("dpkg-deb").arg("-x").arg(archive?.path()).arg(&work))?;
    }
    fs::remove_dir_all(&archives)?;
    make_relocatable(&work.join("usr"))?;
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::rename(&work, &directory).with_context(|| format!("cannot rename {}", work.display()))?;
    Ok(directory)
}

/// Debian's rustc finds its libraries in the system's directories only: it is wrapped in a script that says where they are.
fn make_relocatable(usr: &Path) -> Result<()> {
    let lib = usr.join("lib");
    let mut triplet = None;
    for entry in fs::read_dir(&lib)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains("-linux-gnu") {
            triplet = Some(name);
        }
    }
    let triplet = triplet.with_context(|| format!("no libraries under {}", lib.display()))?;
    fs::create_dir_all(usr.join("libexec"))?;
    fs::rename(usr.join("bin/rustc"), usr.join("libexec/rustc"))?;
    script(
        &usr.join("bin/rustc"),
        &format!(
            "here=$(dirname \"$0\")\n\
             LD_LIBRARY_PATH=\"$here/../lib/{triplet}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\"\n\
             export LD_LIBRARY_PATH\n\
             exec \"$here/../libexec/rustc\" \"$@\""
        ),
    )?;
    fs::set_permissions(usr.join("libexec/rustc"), fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The compiler's packages, and those libraries it needs that this system lacks.
fn packages(lists: &Lists) -> Result<Vec<Package>> {
    let installed =
        output(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status} ${Package}\n"]))?;
    let is_installed =
        |name: &str| installed.lines().any(|line| line.strip_prefix("installed ") == Some(name));
    // As if nothing were installed, so that the answer names everything and nothing conflicts.
    let simulated = output(
        lists
            .apt_get()
            .args(["-o", "Dir::State::status=/dev/null", "-s", "--no-install-recommends", "install"])
            .args(LIBRARIES),
    )?;
    let mut packages: Vec<Package> = simulated.lines().filter_map(parse_simulated).collect();
    packages.retain(|package| is_compilers_own(&package.name) || !is_installed(&package.name));
    let version =
        packages.iter().find(|package| package.name == LIBRARIES[0]).map(|package| package.version.clone());
    let version = version.with_context(|| format!("apt-get does not know {}", LIBRARIES[0]))?;
    packages.push(Package { name: COMPILER.to_owned(), version });
    Ok(packages)
}

fn is_compilers_own(name: &str) -> bool {
    name.starts_with("libstd-rust-web") || name.starts_with("libllvm")
}
