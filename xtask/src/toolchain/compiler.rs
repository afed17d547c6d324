//! Chooses the compiler for `bpfel-unknown-none`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{OVERRIDE, debian, output};
use crate::progress::announce;

/// The oldest compiler that takes this workspace and aya-ebpf.
const OLDEST: (u32, u32) = (1, 95);
/// What bpf-linker can be built against.
const LLVM_MAJORS: std::ops::RangeInclusive<u32> = 21..=23;

pub struct Compiler {
    pub rustc: PathBuf,
    /// Its own cargo, where it has one: `-Z build-std` needs the cargo of the same nightly.
    pub cargo: Option<PathBuf>,
    pub sysroot: PathBuf,
    /// All of `rustc -vV`.
    pub version: String,
}

pub fn choose(cache: &Path, requested: Option<&str>) -> Result<Compiler> {
    if let Some(requested) = requested {
        let compiler = requested_compiler(requested)?;
        announce(&format!("eBPF compiler: {}, because {OVERRIDE} says so", compiler.label()));
        return Ok(compiler);
    }
    let present = present();
    if let Some(compiler) = present.iter().position(|compiler| compiler.is_nightly() && compiler.has_source())
    {
        return Ok(chosen(present, compiler, "it is a nightly with rust-src"));
    }
    if let Some(compiler) = present.iter().position(Compiler::has_core) {
        return Ok(chosen(present, compiler, "it has a precompiled core for BPF"));
    }
    announce("eBPF compiler: this machine has no nightly with rust-src and no precompiled core for BPF");
    let directory = debian::fetch(cache).with_context(|| {
        "no eBPF compiler could be found or fetched; `rustup toolchain install nightly --component rust-src` \
         provides one (rustup itself: https://rustup.rs)"
    })?;
    Compiler::at(&directory.join("usr/bin/rustc"))
}

fn chosen(mut present: Vec<Compiler>, index: usize, why: &str) -> Compiler {
    let compiler = present.swap_remove(index);
    announce(&format!("eBPF compiler: {} in {}: {why}", compiler.label(), compiler.sysroot.display()));
    compiler
}

fn requested_compiler(requested: &str) -> Result<Compiler> {
    let rustc = if Path::new(requested).is_absolute() {
        Path::new(requested).join("bin/rustc")
    } else {
        let sysroot = output(Command::new("rustup").args(["run", requested, "rustc", "--print", "sysroot"]))
            .with_context(|| format!("{OVERRIDE}={requested}: rustup has no such toolchain"))?;
        Path::new(sysroot.trim()).join("bin/rustc")
    };
    let compiler = Compiler::at(&rustc).with_context(|| format!("{OVERRIDE}={requested}"))?;
    if !(compiler.has_core() || compiler.is_nightly() && compiler.has_source()) {
        bail!(
            "{OVERRIDE}={requested}: {} has neither a precompiled core for bpfel-unknown-none nor, as a nightly, rust-src",
            compiler.sysroot.display()
        );
    }
    compiler.check_age()?;
    Ok(compiler)
}

/// Every compiler of this machine that is young enough, rustup's nightlies first.
fn present() -> Vec<Compiler> {
    let mut compilers: Vec<Compiler> = Vec::new();
    for rustc in rustup_compilers().into_iter().chain(path_compilers()) {
        let Ok(compiler) = Compiler::at(&rustc) else { continue };
        if compiler.check_age().is_ok() && compilers.iter().all(|known| known.sysroot != compiler.sysroot) {
            compilers.push(compiler);
        }
    }
    compilers.sort_by_key(|compiler| !compiler.is_nightly());
    compilers
}

fn rustup_compilers() -> Vec<PathBuf> {
    // A machine without rustup has no toolchains of rustup.
    let list = output(Command::new("rustup").args(["toolchain", "list", "-v"])).unwrap_or_default();
    list.lines()
        .filter_map(|line| line.split_once(" /").map(|(_, path)| Path::new("/").join(path)))
        .map(|directory| directory.join("bin/rustc"))
        .collect()
}

fn path_compilers() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/bin")])
        .map(|directory| directory.join("rustc"))
        .filter(|rustc| rustc.is_file())
        .collect()
}

impl Compiler {
    pub fn at(rustc: &Path) -> Result<Self> {
        let version = version(rustc)?;
        let sysroot = PathBuf::from(output(Command::new(rustc).args(["--print", "sysroot"]))?.trim());
        // What is named may be rustup's proxy, which answers differently in another directory.
        let own = sysroot.join("bin/rustc");
        let rustc = if own.is_file() { own } else { rustc.to_owned() };
        let cargo = Some(sysroot.join("bin/cargo")).filter(|cargo| cargo.is_file());
        Ok(Self { rustc, cargo, sysroot, version })
    }

    pub fn label(&self) -> String {
        format!("rustc-{}", self.field("release").unwrap_or("unknown"))
    }

    pub fn is_nightly(&self) -> bool {
        self.field("release").is_some_and(|release| release.contains("-nightly"))
    }

    pub fn has_source(&self) -> bool {
        self.sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
    }

    pub fn has_core(&self) -> bool {
        let directory = self.sysroot.join("lib/rustlib/bpfel-unknown-none/lib");
        fs::read_dir(directory).is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
        })
    }

    pub fn llvm_major(&self) -> Result<u32> {
        let version = self.field("LLVM version").context("rustc -vV names no LLVM version")?;
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        match major {
            Some(major) if LLVM_MAJORS.contains(&major) => Ok(major),
            _ => bail!(
                "{} uses LLVM {version}; bpf-linker {} is made for LLVM {} to {}",
                self.label(),
                super::linker::VERSION,
                LLVM_MAJORS.start(),
                LLVM_MAJORS.end()
            ),
        }
    }

    /// The directory with the compiler's shared libraries.
    pub fn libraries(&self) -> Result<PathBuf> {
        let lib = self.sysroot.join("lib");
        let is_driver = |path: &Path| file_name(path).starts_with("librustc_driver-");
        let multiarch = fs::read_dir(&lib)?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        std::iter::once(lib.clone())
            .chain(multiarch)
            .find(|directory| entries(directory).iter().any(|path| is_driver(path)))
            .with_context(|| format!("no librustc_driver under {}", lib.display()))
    }

    pub fn llvm_library(&self, libraries: &Path) -> Result<PathBuf> {
        let major = self.llvm_major()?;
        let names = [format!("libLLVM.so.{major}"), format!("libLLVM-{major}"), "libLLVM.so".to_owned()];
        let files = entries(libraries);
        names
            .iter()
            .find_map(|name| files.iter().find(|path| file_name(path).starts_with(name) && path.is_file()))
            .cloned()
            .with_context(|| format!("no libLLVM of LLVM {major} in {}", libraries.display()))
    }

    fn check_age(&self) -> Result<()> {
        let release = self.field("release").context("rustc -vV names no release")?;
        let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
        let age = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if age < OLDEST {
            bail!("rustc {release} is older than {}.{}", OLDEST.0, OLDEST.1);
        }
        self.llvm_major().map(drop)
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.version.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

pub fn version(rustc: &Path) -> Result<String> {
    output(Command::new(rustc).arg("-vV"))
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(OsStr::to_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler(version: &str) -> Compiler {
        Compiler { rustc: "/r".into(), cargo: None, sysroot: "/".into(), version: version.to_owned() }
    }

    #[test]
    fn reads_what_rustc_says_of_itself() {
        let stable = compiler("rustc 1.96.0 (ac68faa20 2026-05-25)\nrelease: 1.96.0\nLLVM version: 22.1.8\n");
        assert_eq!(stable.label(), "rustc-1.96.0");
        assert!(!stable.is_nightly());
        assert_eq!(stable.llvm_major().unwrap(), 22);
        assert!(stable.check_age().is_ok());
        let nightly = compiler("release: 1.97.0-nightly\nLLVM version: 22.1.4\n");
        assert!(nightly.is_nightly());
    }

    #[test]
    fn refuses_compilers_that_cannot_build_this() {
        assert!(compiler("release: 1.85.0\nLLVM version: 22.1.0\n").check_age().is_err());
        assert!(compiler("release: 1.99.0\nLLVM version: 24.1.0\n").check_age().is_err());
        assert!(compiler("release: 1.99.0\n").check_age().is_err());
        assert!(compiler("").check_age().is_err());
    }
}
