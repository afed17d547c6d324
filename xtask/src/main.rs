//! The table of this repository's commands.

use clap::{Parser, Subcommand};

mod progress;
mod setup;
mod toolchain;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The commands of this repository")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or make the eBPF compiler and linker (every command that builds does this by itself)
    Setup(setup::Arguments),
}

fn main() -> std::process::ExitCode {
    let outcome = match Cli::parse().command {
        Command::Setup(arguments) => setup::run(&arguments),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
