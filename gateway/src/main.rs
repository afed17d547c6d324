//! The `pointsman` command: the gateway, the supervisor of its functions, and what tells whether a host is fit.
use std::{
    io::{self, IsTerminal as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use gateway::{
    config::{Config, VerdictMode},
    inspect,
    logs::{Format, Log, Logs},
    mode::SelfTest,
    reload::{Source, SourceOptions},
};
use tracing_subscriber::EnvFilter;

/// Accepts connections, judges in the kernel which function each is for, and hands it over.
#[derive(Parser)]
#[command(name = "pointsman", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Accept connections and hand each to its function.
    Gateway(GatewayArgs),
    /// Start the functions, restart them when they die, stop them in order.
    Supervise(SuperviseArgs),
    /// Show how a running gateway and its functions are.
    Status(StatusArgs),
    /// Watch a running gateway and its functions.
    Top(TopArgs),
    /// Read the configuration, refuse it or print what it comes to.
    Check(ConfigArgs),
    /// Say what this host has and lacks for the kernel path, and how to remedy it.
    Doctor(SelfTestArgs),
}

#[derive(Args)]
struct ConfigArgs {
    /// The configuration; without it the defaults hold.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Args)]
struct GatewayArgs {
    #[command(flatten)]
    config: SourceOptions,
    /// Who judges connections.
    #[arg(long, value_enum)]
    verdict: Option<VerdictMode>,
    /// Where to listen for HTTP.
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Where to listen for HTTPS.
    #[arg(long, value_name = "ADDR")]
    https: Option<SocketAddr>,
    /// Where to tell metrics and state.
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    log: LogArgs,
    /// Deliver repeated bytes as an unguarded sockmap would, which corrupts data: for tests that must see it.
    #[arg(long, hide = true, env = "POINTSMAN_TEST_NO_TRIM", value_parser = clap::builder::FalseyValueParser::new())]
    unsafe_no_trim: bool,
    #[command(flatten)]
    self_test: SelfTestArgs,
}

#[derive(Args)]
struct SelfTestArgs {
    /// Test the kernel path even if it has passed the test since this host was booted.
    #[arg(long)]
    self_test: bool,
}

impl SelfTestArgs {
    fn when(&self) -> SelfTest {
        if self.self_test { SelfTest::Always } else { SelfTest::Once }
    }
}

#[derive(Args)]
struct SuperviseArgs {
    #[command(flatten)]
    config: SourceOptions,
    #[command(flatten)]
    options: gateway::supervise::Options,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Args)]
struct LogArgs {
    /// How log lines look.
    #[arg(long, value_enum, env = "POINTSMAN_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: Format,
}

#[derive(Args)]
struct AskArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The gateway's admin address, if not the configuration's.
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
}

#[derive(Args)]
struct StatusArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// Print all there is to know as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct TopArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// Print one frame as text and end.
    #[arg(long)]
    once: bool,
    /// How often to look, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    interval_ms: u64,
}

impl AskArgs {
    fn address(&self) -> Result<SocketAddr> {
        if let Some(address) = self.admin {
            return Ok(address);
        }
        let admin = Config::load(self.config.config.as_deref())?.gateway.admin;
        admin.context("the configuration has no admin listener (admin = \"off\"), so nobody can be asked")
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let format = match &cli.command {
        Command::Gateway(args) => args.log.log_format,
        Command::Supervise(args) => args.log.log_format,
        _ => Format::Text,
    };
    match logged(format, |log| run(cli.command, log)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pointsman: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, log: &Log) -> Result<ExitCode> {
    match command {
        Command::Gateway(args) => {
            let source = Source::new(args.config, move |config| {
                let gateway = &mut config.gateway;
                gateway.http = args.http.unwrap_or(gateway.http);
                gateway.https = args.https.unwrap_or(gateway.https);
                gateway.admin = args.admin.or(gateway.admin);
                gateway.verdict = args.verdict.unwrap_or(gateway.verdict);
            });
            let options =
                gateway::start::Options { trim: !args.unsafe_no_trim, self_test: args.self_test.when() };
            gateway::start::run(source, options)?;
        }
        Command::Supervise(args) => {
            gateway::supervise::run(Source::new(args.config, |_| ()), args.options, log)?;
        }
        Command::Status(args) => inspect::status::run(args.ask.address()?, args.json)?,
        Command::Top(args) => {
            inspect::top::run(args.ask.address()?, Duration::from_millis(args.interval_ms), args.once)?;
        }
        Command::Check(args) => print!("{}", Config::load(args.config.as_deref())?.to_toml()),
        Command::Doctor(args) => return Ok(gateway::doctor::run(args.when())),
    }
    Ok(ExitCode::SUCCESS)
}

/// Logs to standard error until the work is done. Levels come from POINTSMAN_LOG, in the syntax of RUST_LOG.
fn logged<T>(format: Format, work: impl FnOnce(&Log) -> Result<T>) -> Result<T> {
    let logs = Logs::to(io::stderr(), format)?;
    let log = logs.log();
    let writer = log.clone();
    let filter = EnvFilter::try_from_env("POINTSMAN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(move || writer.clone());
    match format {
        Format::Text => lines.with_ansi(io::stderr().is_terminal()).init(),
        Format::Json => lines.json().flatten_event(true).init(),
    }
    let done = work(&log);
    logs.finish();
    done
}
