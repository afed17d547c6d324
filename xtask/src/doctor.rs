//! `cargo xtask doctor`: what this machine has and lacks for building, testing and running.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::{packages, privilege, toolchain, workspace};

pub fn run() -> Result<ExitCode> {
    println!("Building\n");
    let cache = toolchain::cache_directory()?;
    match toolchain::find(&cache) {
        Some(installed) => {
            report(
                "ok",
                "eBPF compiler",
                &installed.compiler,
                "compiling the programs that run in the kernel",
                None,
            );
            report("ok", "eBPF linker", &installed.linker, "linking them", None);
        }
        None => report(
            "absent",
            "eBPF compiler and linker",
            &format!("not in {}", cache.display()),
            "compiling the programs that run in the kernel",
            Some("none needed: they are made now, as by every command that builds"),
        ),
    }
    let linker = privilege::find_program("cc");
    match &linker {
        Some(linker) => {
            report("ok", "C linker", &linker.display().to_string(), "linking every program", None)
        }
        None => report(
            "MISSING",
            "C linker",
            "no cc in PATH",
            "linking every program",
            Some("apt-get install gcc libc6-dev"),
        ),
    }
    println!("\nTesting\n");
    let missing = packages::missing(&packages::OF_TESTS);
    if missing.is_empty() {
        report("ok", "clients and observers", "all in PATH", "`cargo xtask test`", None);
    } else {
        let install = format!(
            "none needed: `cargo xtask test` installs them; by hand: apt-get install {}",
            missing.join(" ")
        );
        report("absent", "clients and observers", &missing.join(" "), "`cargo xtask test`", Some(&install));
    }
    match (privilege::is_root(), privilege::find_program("sudo")) {
        (true, _) => report("ok", "root", "this is root", "tests and `cargo xtask run`", None),
        (false, Some(_)) => report("ok", "root", "by sudo", "tests and `cargo xtask run`", None),
        (false, None) => report(
            "MISSING",
            "root",
            "neither root nor sudo",
            "tests and `cargo xtask run`, but for --verdict peek",
            Some("run as root, or install sudo"),
        ),
    }
    println!("\nRunning\n");
    let programs = workspace::build(false)?;
    host(&programs)
}

/// The host's part, said by the program that has to live with it.
fn host(programs: &Path) -> Result<ExitCode> {
    let program = programs.join("pointsman");
    let mut command = match privilege::as_root(&program, "the self-test") {
        Ok(command) => command,
        // Without root it still tells most, and that root is missing.
        Err(_) => std::process::Command::new(&program),
    };
    let status =
        command.arg("doctor").status().with_context(|| format!("cannot run {}", program.display()))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(state: &str, name: &str, found: &str, purpose: &str, remedy: Option<&str>) {
    println!("{state:8} {name}: {found}\n         for {purpose}");
    if let Some(remedy) = remedy {
        println!("         remedy: {remedy}");
    }
}
