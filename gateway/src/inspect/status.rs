//! `pointsman status`: how a gateway and its functions are, at one moment.
use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
    net::SocketAddr,
};

use anyhow::{Context as _, Result};
use tokio::runtime;

use super::figures::span;
use crate::admin::{
    client,
    report::{Function, Instance, Report, State},
};

pub fn run(address: SocketAddr, json: bool) -> Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(client::fetch(address))?;
    let text = if json { serde_json::to_string_pretty(&report)? + "\n" } else { render(&report) };
    // A reader that has seen enough, such as `head`, is no failure.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing to standard output"),
    }
}

fn render(report: &Report) -> String {
    let mut text = String::new();
    // A String takes all.
    let _ = write(report, &mut text);
    text
}

fn write(report: &Report, out: &mut String) -> fmt::Result {
    let Report { version, pid, uptime_seconds, listeners, verdict, connections, functions, .. } = report;
    writeln!(out, "pointsman {version}, process {pid}, up for {}", span(*uptime_seconds))?;
    writeln!(out, "http {}, https {}, admin {}", listeners.http, listeners.https, listeners.admin)?;
    writeln!(
        out,
        "verdicts come from {}: {} (verdict = \"{}\")",
        if verdict.path == "sockmap" { "the kernel (sockmap)" } else { "user space (peek)" },
        verdict.reason,
        verdict.configured
    )?;
    let refused: u64 = connections.refused.values().sum();
    writeln!(
        out,
        "connections: {} accepted, {} served, {refused} refused, {} closed, {} dropped, {} held, {} waiting",
        connections.accepted,
        connections.served,
        connections.closed + connections.poisoned,
        connections.dropped,
        connections.held,
        connections.waiting
    )?;
    if !report.is_ready() {
        writeln!(out, "not ready: refusal, which answers for connections that belong to nobody, is not up")?;
    }
    writeln!(out)?;
    writeln!(
        out,
        "{:<24} {:<9} {:>8} {:>7} {:>9} {:>6} {:>9} {:>10} {:>6}",
        "FUNCTION", "STATE", "PID", "WORKERS", "IN-FLIGHT", "OPEN", "REQUESTS", "HANDED", "RESTARTS"
    )?;
    for (name, function) in functions {
        write_function(name, function, out)?;
    }
    Ok(())
}

fn write_function(name: &str, function: &Function, out: &mut String) -> fmt::Result {
    let requests: u64 = function.requests.iter().map(|requests| requests.duration.count).sum();
    let state = match function.instances_up() {
        0 => "down".to_owned(),
        up => format!("{up} up"),
    };
    writeln!(
        out,
        "{name:<24} {state:<9} {:>8} {:>7} {:>9} {:>6} {requests:>9} {:>10} {:>6}",
        "", "", function.in_flight, function.open, function.handed_over, function.restarts
    )?;
    function.instances.iter().try_for_each(|instance| write_instance(instance, out))
}

fn write_instance(instance: &Instance, out: &mut String) -> fmt::Result {
    let pid = instance.pid.map(|pid| pid.to_string()).unwrap_or_default();
    writeln!(
        out,
        "  {:<22} {:<9} {pid:>8} {:>7} {:>9} {:>6} {:>9} {:>10} {:>6}",
        instance.socket,
        instance.state.as_str(),
        format!("{}/{}", instance.workers_up, instance.workers),
        instance.in_flight,
        instance.open,
        instance.requests,
        instance.handed_over,
        instance.restarts
    )
}

impl State {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Stalled => "stalled",
            Self::Draining => "draining",
            Self::Down => "down",
        }
    }
}
