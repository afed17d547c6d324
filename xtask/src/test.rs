//! `cargo xtask test`: everything the tests need, then all of them in one run.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::guest::{self, Release};
use crate::progress::announce;
use crate::toolchain::{self, compiler};
use crate::{packages, privilege, workspace};

#[derive(clap::Args)]
pub struct Arguments {
    /// Run the long tests at their full length too (a million connections)
    #[arg(long)]
    long: bool,
    /// Build with optimisation
    #[arg(long)]
    release: bool,
    /// Run the packaged systemd units and the whole stack's tests with this Debian release's kernel, in a virtual machine
    #[arg(long, value_name = "RELEASE", conflicts_with = "long")]
    guest: Option<Release>,
    /// Run the tests whose name contains this
    filter: Option<String>,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    // Said before a build of minutes, not after it.
    let sudo = match privilege::is_root() {
        true => None,
        false => {
            Some(privilege::sudo("loading BPF programs and making network namespaces, as the tests do,")?)
        }
    };
    toolchain::ensure()?;
    if arguments.guest.is_none() {
        packages::ensure(&packages::OF_TESTS, "testing")?;
    }
    announce("building the programs and the tests");
    let profile: &[&str] = if arguments.release { &["--release"] } else { &[] };
    // With the tests, so that both are built with the same features and nothing is built twice.
    let built =
        workspace::cargo().args(["build", "--locked", "--bins", "--lib", "--tests"]).args(profile).status();
    if !built.context("cannot start cargo")?.success() {
        bail!("the build failed; what cargo says stands above");
    }
    if let Some(release) = arguments.guest {
        let programs =
            workspace::target_directory()?.join(if arguments.release { "release" } else { "debug" });
        return guest::run(release, &programs, &whole_stack_tests(profile)?, arguments.filter.as_deref());
    }
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--locked", "--no-fail-fast"]).args(profile);
    cargo.env("POINTSMAN_TEST_LONG", if arguments.long { "1" } else { "0" });
    if let Some(sudo) = sudo {
        // What is built belongs to the calling user; only the test executables run as root.
        let runner = format!("CARGO_TARGET_{}_RUNNER", host_triple()?.to_uppercase().replace('-', "_"));
        cargo.env(runner, format!("{} --preserve-env --", sudo.display()));
    }
    if let Some(filter) = &arguments.filter {
        cargo.arg("--").arg(filter);
    }
    announce("running the tests");
    let status = cargo.status().context("cannot start cargo")?;
    // Nothing is printed after cargo's own closing line.
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The executable of `tests/promises`, which is built by now.
fn whole_stack_tests(profile: &[&str]) -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--locked", "--no-run", "--message-format", "json", "--package", "tests"]);
    let messages = toolchain::output(cargo.args(["--test", "promises"]).args(profile))?;
    let executable = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == "promises";
        is_it.then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    executable.context("cargo names no executable of the tests")
}

fn host_triple() -> Result<String> {
    let version = compiler::version("rustc".as_ref())?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}
