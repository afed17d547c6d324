//! The table of this repository's commands.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod apt;
mod authority;
mod bench;
mod doctor;
mod guest;
mod interrupt;
mod invitation;
mod licences;
mod lint;
mod load;
mod packages;
mod privilege;
mod progress;
mod run;
mod runner;
mod setup;
mod test;
mod toolchain;
mod workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The commands of this repository")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build everything, start the gateway and its functions, and print curl lines to paste
    Run(run::Arguments),
    /// Build everything and run all tests
    Test(test::Arguments),
    /// Measure Pointsman beside the function alone and beside other proxies
    Bench(bench::Arguments),
    /// Say what this machine has and lacks, what each is for, and the remedy
    Doctor,
    /// Find or make the eBPF compiler and linker (every command that builds does this by itself)
    Setup,
    /// Check format, clippy and licences
    Lint,
    /// Check that every dependency's licence allows what ours promise
    Licences,
    /// The part of `run` that needs root
    #[command(hide = true)]
    Runner(runner::Arguments),
    /// The load generator of `bench`
    #[command(hide = true)]
    Load,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Doctor => doctor::run(),
        Command::Setup => setup::run(),
        Command::Lint => lint::run(),
        Command::Licences => licences::run(),
        Command::Runner(arguments) => runner::run(&arguments),
        Command::Load => load::run(),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
