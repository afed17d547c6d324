//! Builds bpf-linker against the chosen compiler's own LLVM.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::output;
use crate::progress;

pub const VERSION: &str = "0.13.0";

/// Builds it into `prefix/libexec`; `prefix/lib/libLLVM.so` is what it is linked with.
pub fn build(prefix: &Path, llvm_major: u32, libraries: &Path) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["install", "bpf-linker", "--version", VERSION, "--locked", "--no-default-features"])
        .args(["--features", &format!("llvm-{llvm_major}"), "--root"])
        .arg(prefix.join("libexec"))
        // cargo's settings of this repository are not meant for it.
        .current_dir(prefix)
        .env("LLVM_PREFIX", prefix)
        .env("LD_LIBRARY_PATH", libraries)
        .env("CARGO_TARGET_DIR", prefix.join("target"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    progress::run(
        &format!("building bpf-linker {VERSION} for LLVM {llvm_major} (1 to 4 minutes, once)"),
        &mut cargo,
    )?;
    std::fs::remove_dir_all(prefix.join("target"))?;
    Ok(())
}

pub fn version(linker: &Path) -> Result<String> {
    Ok(output(Command::new(linker).arg("--version"))?.trim().to_owned())
}
