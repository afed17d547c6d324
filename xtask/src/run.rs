//! `cargo xtask run`: from a checkout to a gateway that answers.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::poll::PollTimeout;
use nix::sys::signal::{SigHandler, Signal, signal};
use toml::{Table, Value};

use crate::authority::{self, Authority};
use crate::privilege;
use crate::progress::announce;
use crate::runner::{self, Event, Events, Plan};
use crate::workspace;

#[derive(clap::Args)]
pub struct Arguments {
    /// Build with optimisation
    #[arg(long)]
    release: bool,
    /// Who judges connections: the kernel, the gateway by peeking, or whichever the self-test allows
    #[arg(long)]
    verdict: Option<Verdict>,
    /// A configuration; without it echo, hello and resize are served
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to listen for HTTP
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Where to listen for HTTPS
    #[arg(long, value_name = "ADDR")]
    https: Option<SocketAddr>,
    /// Where to tell metrics and state
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Verdict {
    Auto,
    Sockmap,
    Peek,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let programs = workspace::build(arguments.release)?;
    let mut config = effective_config(&programs, arguments.config.as_deref())?;
    override_by(&mut config, arguments)?;
    // The kernel path needs root; peeking does not, unless root asks for it.
    let needs_root = !privilege::is_root() && gateway(&mut config)?["verdict"].as_str() != Some("peek");
    let sudo = match needs_root {
        true => Some(privilege::sudo("loading BPF programs (--verdict peek does without)")?),
        false => None,
    };
    announce("making certificates");
    let authority = certify(&mut config)?;
    let plan = Plan { programs, authority };
    match sudo {
        None => runner::serve(&plan, config, None),
        Some(sudo) => elevated(&sudo, &plan, &config),
    }
}

/// Runs the rest as root. The pipe that carries the configuration stays open until this process ends, however that
/// comes about, and its end is what stops the runner: a user can't send signals to root's processes.
fn elevated(sudo: &Path, plan: &Plan, config: &Table) -> Result<ExitCode> {
    let own = std::env::current_exe().context("cannot find this program")?;
    announce("starting the runner by sudo");
    let mut child = Command::new(sudo)
        .arg("--")
        .arg(own)
        .args(plan.arguments())
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start sudo")?;
    let mut pipe = child.stdin.take().context("sudo has no standard input")?;
    pipe.write_all(config.to_string().as_bytes()).and_then(|()| pipe.write_all(&[runner::END_OF_CONFIG]))?;
    // Ctrl-C reaches the runner by itself; this process only has to outlive it.
    // SAFETY: ignoring a signal installs no code.
    unsafe { signal(Signal::SIGINT, SigHandler::SigIgn) }.context("cannot ignore Ctrl-C")?;
    let events = Events::catch(&[Signal::SIGTERM, Signal::SIGHUP])?;
    let mut open = Some(pipe);
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for sudo")? {
            return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if events.wait(None, PollTimeout::NONE)? == Event::Stop {
            drop(open.take());
        }
    }
}

/// What the gateway makes of the file, or of none: every default filled in, every path absolute.
fn effective_config(programs: &Path, file: Option<&Path>) -> Result<Table> {
    let mut check = Command::new(programs.join("pointsman"));
    check.arg("check");
    if let Some(file) = file {
        check.arg("--config").arg(file);
    }
    let output = check.output().context("cannot run pointsman check")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}", said.trim().trim_start_matches("pointsman: "));
    }
    let text =
        String::from_utf8(output.stdout).context("pointsman check printed something that is not text")?;
    text.parse().context("pointsman check printed something that is not TOML")
}

fn override_by(config: &mut Table, arguments: &Arguments) -> Result<()> {
    let gateway = gateway(config)?;
    let mut set = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            gateway.insert(key.to_owned(), Value::from(value));
        }
    };
    set("http", arguments.http.map(|address| address.to_string()));
    set("https", arguments.https.map(|address| address.to_string()));
    set("admin", arguments.admin.map(|address| address.to_string()));
    let verdict = arguments.verdict.and_then(|verdict| verdict.to_possible_value());
    set("verdict", verdict.map(|verdict| verdict.get_name().to_owned()));
    Ok(())
}

/// Gives a certificate to each function that is to be started and has none; returns the CA's.
fn certify(config: &mut Table) -> Result<PathBuf> {
    let domains = runner::strings(&gateway(config)?["domains"]);
    let Some(Value::Table(functions)) = config.get_mut("functions") else { bail!("there are no functions") };
    let hosts = |function: &Value| function.get("hosts").map(runner::strings).unwrap_or_default();
    let permitted: BTreeSet<String> =
        domains.iter().cloned().chain(functions.iter().flat_map(|(_, function)| hosts(function))).collect();
    let authority = Authority::open(&authority::directory()?, &permitted)?;
    for (name, function) in functions.iter_mut() {
        if function.get("command").is_none() || function.get("certificate").is_some() {
            continue;
        }
        let names: Vec<String> =
            domains.iter().map(|domain| format!("{name}.{domain}")).chain(hosts(function)).collect();
        let issued = authority.issue(name, &names)?;
        let Value::Table(function) = function else { bail!("functions.{name} is not a table") };
        function.insert("certificate".to_owned(), Value::from(path_text(&issued.chain)?));
        function.insert("key".to_owned(), Value::from(path_text(&issued.key)?));
    }
    let certificate = authority.certificate();
    let anchors = Value::from(path_text(&certificate)?);
    // So that functions know each other, and TLS sessions move between them.
    gateway(config)?.entry("anchors").or_insert(anchors);
    Ok(certificate)
}

fn gateway(config: &mut Table) -> Result<&mut Table> {
    config.get_mut("gateway").and_then(Value::as_table_mut).context("the configuration has no [gateway]")
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("the path {} is not UTF-8", path.display()))
}
