//! The eBPF compiler and linker: found or made once, kept in the user's cache, shared by all checkouts.
//!
//! `gateway/build.rs` takes them from `<cache>/pointsman/ebpf-1/current`, a link to a directory with
//! `bin/rustc`, `bin/cargo`, `bin/bpf-linker` and `bootstrap` (the value of RUSTC_BOOTSTRAP, or empty).

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, process};

use anyhow::{Context, Result, bail};

use crate::progress::announce;

pub mod compiler;
mod debian;
mod linker;

/// Counts up when the cache's layout changes; gateway/build.rs has the same path below the user's cache.
const CACHE: &str = "ebpf-1";
/// Names a toolchain: one of rustup's, or an absolute directory with `bin/rustc`.
const OVERRIDE: &str = "POINTSMAN_EBPF_TOOLCHAIN";

/// A toolchain that is ready for gateway/build.rs.
pub struct Installed {
    pub directory: PathBuf,
    pub compiler: String,
    pub linker: String,
}

/// Gives the toolchain, after making it if this machine has none yet.
pub fn ensure() -> Result<Installed> {
    let cache = cache_directory()?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    if let Some(installed) = find(&cache) {
        return Ok(installed);
    }
    let _lock = lock(&cache)?;
    if let Some(installed) = find(&cache) {
        return Ok(installed);
    }
    remove_abandoned(&cache)?;
    let chosen = compiler::choose(&cache, requested().as_deref())?;
    install(&cache, &chosen)?;
    find(&cache).context("the eBPF toolchain was made but does not run")
}

/// What is ready now, without making anything.
pub fn find(cache: &Path) -> Option<Installed> {
    let directory = fs::canonicalize(cache.join("current")).ok()?;
    let identity = fs::read_to_string(directory.join("identity")).ok()?;
    let compiler = compiler::version(&directory.join("bin/rustc")).ok()?;
    if identity != self::identity(&compiler) {
        return None;
    }
    let linker = linker::version(&directory.join("bin/bpf-linker")).ok()?;
    let compiler = compiler.lines().next().unwrap_or_default().to_owned();
    Some(Installed { directory, compiler, linker })
}

pub fn cache_directory() -> Result<PathBuf> {
    Ok(user_cache()?.join(CACHE))
}

/// What is fetched or made once for all checkouts.
pub fn user_cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        // The XDG specification: a relative path is ignored.
        Some(base) if Path::new(&base).is_absolute() => PathBuf::from(base),
        _ => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("pointsman"))
}

fn requested() -> Option<String> {
    env::var(OVERRIDE).ok().filter(|value| !value.is_empty())
}

/// Changes when the compiler was updated in place, when another one is asked for, or with our linker's version.
fn identity(compiler_version: &str) -> String {
    format!("{compiler_version}linker: {}\nrequested: {}\n", linker::VERSION, requested().unwrap_or_default())
}

fn lock(cache: &Path) -> Result<File> {
    let path = cache.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => announce("waiting for the set-up that another checkout has begun"),
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Removes what a set-up that was killed left; the lock says that none is at work.
fn remove_abandoned(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("unfinished-") {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// A directory to work in, later renamed to its own name, so that a half-made one is never taken.
fn unfinished(cache: &Path) -> Result<PathBuf> {
    let directory = cache.join(format!("unfinished-{}", process::id()));
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

fn install(cache: &Path, compiler: &compiler::Compiler) -> Result<()> {
    let directory = cache.join(format!("{}-{}", compiler.label(), digest(&identity(&compiler.version))));
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    let work = unfinished(cache)?;
    let libraries = compiler.libraries()?;
    fs::create_dir_all(work.join("bin"))?;
    fs::create_dir_all(work.join("lib"))?;
    let llvm = compiler.llvm_library(&libraries)?;
    symlink(&llvm, work.join("lib/libLLVM.so"))?;
    linker::build(&work, compiler.llvm_major()?, &libraries)?;
    // Wrappers, because neither Debian's rustc nor bpf-linker finds its libraries outside of /usr/lib by itself.
    script(&work.join("bin/rustc"), &with_libraries(&libraries, &compiler.rustc.display().to_string()))?;
    script(
        &work.join("bin/bpf-linker"),
        &with_libraries(&libraries, &directory.join("libexec/bin/bpf-linker").display().to_string()),
    )?;
    let cargo = match &compiler.cargo {
        Some(cargo) => quote(&cargo.display().to_string()),
        // A compiler without its own cargo is driven by the one that runs gateway/build.rs.
        None => "\"${CARGO:?}\"".to_owned(),
    };
    script(&work.join("bin/cargo"), &format!("exec {cargo} \"$@\""))?;
    fs::write(work.join("bootstrap"), if compiler.is_nightly() { "" } else { "aya_ebpf" })?;
    fs::write(work.join("identity"), identity(&compiler.version))?;
    fs::rename(&work, &directory).with_context(|| format!("cannot rename {}", work.display()))?;
    let link = cache.join(format!("unfinished-link-{}", process::id()));
    symlink(&directory, &link)?;
    fs::rename(&link, cache.join("current")).context("cannot replace the link to the current toolchain")?;
    Ok(())
}

fn with_libraries(libraries: &Path, program: &str) -> String {
    let libraries = quote(&libraries.display().to_string());
    format!(
        "LD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\nexport LD_LIBRARY_PATH\nexec {} \"$@\"",
        quote(program)
    )
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn script(path: &Path, body: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, format!("#!/bin/sh\n{body}\n"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// FNV-1a: distinguishes directories, protects nothing.
fn digest(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

/// A short command's stdout, or why it failed.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot run {shown}"))?;
    if !output.status.success() {
        bail!("{shown} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{shown} printed something that is not text"))
}
