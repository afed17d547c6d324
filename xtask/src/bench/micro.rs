//! `cargo xtask bench micro`: the pieces that every connection or request passes, each measured alone by criterion.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::progress::announce;
use crate::workspace;

/// Crate and benchmark.
const BENCHMARKS: [(&str, &str); 3] = [("common", "scanner"), ("handoff", "wire"), ("base", "pieces")];

#[derive(clap::Args)]
pub struct Arguments {
    /// Only benchmarks whose name contains this
    filter: Option<String>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    for (package, benchmark) in BENCHMARKS {
        announce(&format!("{package}: {benchmark}"));
        let mut cargo = workspace::cargo();
        cargo.args(["bench", "--locked", "--package", package, "--bench", benchmark]);
        cargo.arg("--").args(&arguments.filter);
        if !cargo.status().context("cannot start cargo")?.success() {
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}
