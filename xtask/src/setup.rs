//! `cargo xtask setup`: makes the eBPF toolchain ready.

use std::process::ExitCode;

use crate::toolchain;

pub fn run() -> anyhow::Result<ExitCode> {
    let installed = toolchain::ensure()?;
    println!("eBPF compiler: {}", installed.compiler);
    println!("eBPF linker:   {}", installed.linker);
    println!("in:            {}", installed.directory.display());
    Ok(ExitCode::SUCCESS)
}
