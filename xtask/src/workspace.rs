//! This checkout: where it is, and how its programs are built.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::progress::announce;
use crate::toolchain;

/// The packages whose programs are installed side by side, and these programs.
pub const PRODUCT: [(&str, &str); 5] = [
    ("gateway", "pointsman"),
    ("echo", "echo"),
    ("hello", "hello"),
    ("resize", "resize"),
    ("refusal", "refusal"),
];

pub fn root() -> PathBuf {
    let own =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    own.parent().map_or_else(|| own.clone(), Path::to_owned)
}

/// The cargo that runs this program.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

pub fn metadata(arguments: &[&str]) -> Result<Value> {
    let text =
        toolchain::output(cargo().args(["metadata", "--format-version", "1", "--locked"]).args(arguments))?;
    serde_json::from_str(&text).context("cargo metadata printed something that is not JSON")
}

/// Builds the product's programs and gives the directory that they lie in.
pub fn build(release: bool) -> Result<PathBuf> {
    toolchain::ensure()?;
    announce("building the gateway and its functions");
    let mut cargo = cargo();
    cargo.args(["build", "--locked", "--bins"]);
    for (package, _) in PRODUCT {
        cargo.args(["--package", package]);
    }
    if release {
        cargo.arg("--release");
    }
    if !cargo.status().context("cannot start cargo")?.success() {
        bail!("the build failed; what cargo says stands above");
    }
    Ok(target_directory()?.join(if release { "release" } else { "debug" }))
}

pub fn target_directory() -> Result<PathBuf> {
    let metadata = metadata(&["--no-deps"])?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(target))
}
