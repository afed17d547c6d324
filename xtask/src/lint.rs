//! `cargo xtask lint`: format, clippy, fuzz targets and licences, as CI checks them.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::progress::announce;
use crate::{licences, toolchain, workspace};

pub fn run() -> Result<ExitCode> {
    // For gateway/build.rs, which clippy runs too.
    toolchain::ensure()?;
    let mut format = workspace::cargo();
    format.args(["fmt", "--all", "--check"]);
    let mut host = workspace::cargo();
    host.args(["clippy", "--locked", "--all-targets", "--", "-D", "warnings"]);
    let steps = [
        ("format", format),
        ("clippy", host),
        ("clippy of the BPF programs", ebpf()?),
        ("the fuzz targets", fuzz_targets()?),
    ];
    for (step, mut command) in steps {
        announce(step);
        if !command.status().with_context(|| format!("cannot run {command:?}"))?.success() {
            return Ok(ExitCode::FAILURE);
        }
    }
    announce("licences");
    licences::run()
}

/// As if for the host, because the toolchain for BPF has no clippy: the code is the same but for what it links to.
fn ebpf() -> Result<Command> {
    let target = workspace::target_directory()?.join("ebpf-lint");
    let mut command = workspace::cargo();
    command
        .args(["clippy", "--locked", "--package", "gateway-ebpf", "--bins", "--target-dir"])
        .arg(target)
        .args(["--", "-D", "warnings"])
        // aya-ebpf uses a feature that only nightly compilers, or those told so, have.
        .env("RUSTC_BOOTSTRAP", "aya_ebpf")
        // There is no std that could unwind.
        .env("CARGO_PROFILE_DEV_PANIC", "abort");
    Ok(command)
}

/// A workspace of its own, with a lock file of its own, so that nothing else compiles it.
fn fuzz_targets() -> Result<Command> {
    let mut command = workspace::cargo();
    command
        .args(["clippy", "--locked", "--manifest-path", "gateway/fuzz/Cargo.toml", "--target-dir"])
        .arg(workspace::target_directory()?.join("fuzz-lint"))
        .args(["--", "-D", "warnings"])
        // Checking links nothing, so libFuzzer needs no building, nor a C++ compiler.
        .env("CUSTOM_LIBFUZZER_PATH", "/nonexistent/libfuzzer.a");
    Ok(command)
}
