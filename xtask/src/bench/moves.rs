//! `cargo xtask bench move`: what it costs that a kept connection changes its function.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::load::order::{Hello, Version};
use crate::privilege::find_program;
use crate::progress::announce;

use super::figure::Figure;
use super::measure::Bench;
use super::process;
use super::results::Outcome;
use super::settings::Settings;
use super::side::Side;
use super::stage::{Running, Stage};
use super::statistics::Spread;
use super::tables::Table;
use super::work::{Kind, Port, TlsWork, Work};
use super::{Prepared, namespace, peers};
use crate::interrupt;

const MANY: usize = 32;
/// Enough for the functions that matter to stand out.
const PROFILED_LINES: usize = 40;

#[derive(clap::Args)]
pub struct Arguments {
    /// Only these sides; on one connection the direct one stays with its function
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Side::Sockmap, Side::Peek])]
    side: Vec<Side>,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each is measured
    #[arg(long, default_value_t = 1000, value_name = "MS")]
    measured_ms: u64,
    /// Record where gateway and functions spend their time while requests alternate, if perf is there
    #[arg(long)]
    profile: bool,
}

const PROTOCOLS: [(&str, Option<Version>); 3] =
    [("HTTP", None), ("TLS 1.2", Some(Version::V12)), ("TLS 1.3", Some(Version::V13))];

/// What each protocol is measured at; the others are compared to the first.
const VARIANTS: [&str; 3] = ["same function", "alternating", "new connection"];

/// A line of the table.
struct Line {
    protocol: &'static str,
    variant: &'static str,
    version: Option<Version>,
}

impl Line {
    fn all() -> impl Iterator<Item = Self> {
        PROTOCOLS.into_iter().flat_map(|(protocol, version)| {
            VARIANTS.into_iter().map(move |variant| Self { protocol, variant, version })
        })
    }

    fn work(&self, clients: usize) -> Work {
        let kind = match self.variant {
            "same function" => Kind::KeepAlive { clients },
            "alternating" => Kind::Alternating { clients },
            _ => Kind::NewConnections { clients },
        };
        let tls = self.version.map(|version| TlsWork { version, resume: false, hello: Hello::Whole });
        let port = if tls.is_some() { Port::HttpsByRequest } else { Port::Http };
        Work { key: "move", title: self.variant, kind, port, tls }
    }
}

pub fn run(arguments: &Arguments, prepared: &Prepared) -> Result<ExitCode> {
    let settings =
        Settings { rounds: arguments.rounds.max(1), measured_ms: arguments.measured_ms, ..Settings::FULL };
    let installed = |&side: &Side| Ok((side, side.peer().map(peers::ensure).transpose()?));
    let sides: Vec<_> = arguments.side.iter().map(installed).collect::<Result<_>>()?;
    namespace::enter()?;
    let (stage, absent) = Stage::set(&prepared.programs, &sides)?;
    for (side, why) in &absent {
        println!("{} is not measured: {why}", side.as_str());
    }
    let bench = Bench { programs: &prepared.programs, settings: &settings, stage: &stage };
    for running in stage.sides() {
        println!("\n{}", measure(&bench, running, &settings)?);
        if arguments.profile {
            profile(&bench, running, stage.directory.path())?;
        }
    }
    Ok(if absent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn measure(bench: &Bench<'_>, running: &Running, settings: &Settings) -> Result<Table> {
    let cells = PROTOCOLS.len() * VARIANTS.len();
    let mut single = vec![Outcome::default(); cells];
    let mut many = vec![Outcome::default(); cells];
    for round in 0..settings.rounds {
        announce(&format!("{}: round {} of {}", running.side.as_str(), round + 1, settings.rounds));
        for (cell, line) in Line::all().enumerate() {
            interrupt::check()?;
            for (outcome, clients) in [(&mut single[cell], 1), (&mut many[cell], MANY)] {
                if outcome.trouble.is_some() {
                    continue;
                }
                let measured = bench.measure(running, &line.work(clients))?;
                outcome.trouble = measured.trouble;
                if !measured.figures.is_empty() {
                    outcome.rounds.push(measured.figures);
                }
            }
        }
    }
    Ok(table(running.side, &single, &many))
}

fn table(side: Side, single: &[Outcome], many: &[Outcome]) -> Table {
    let header = ["", "p50 µs", "added µs", "p99 µs", "requests/s", "of same", "CPU total s/10k", "trouble"];
    let mut rows = Vec::new();
    for (cell, Line { protocol, variant, .. }) in Line::all().enumerate() {
        let base = cell - cell % VARIANTS.len();
        let (p50, base_p50) = (single[cell].values(Figure::P50Us), single[base].values(Figure::P50Us));
        let added: Vec<f64> = p50.iter().zip(&base_p50).map(|(own, base)| own - base).collect();
        let rate = many[cell].values(Figure::RequestsPerSecond);
        let share = Spread::of_ratios(&rate, &many[base].values(Figure::RequestsPerSecond));
        let text = |spread: Option<Spread>, digits: usize| {
            spread.map_or("-".to_owned(), |spread| format!("{:.digits$}", spread.median))
        };
        let trouble = [&single[cell].trouble, &many[cell].trouble].into_iter().flatten().next();
        rows.push(vec![
            format!("{protocol}, {variant}"),
            text(Spread::of(&p50), 1),
            if cell == base { String::new() } else { text(Spread::of(&added), 1) },
            text(single[cell].spread(Figure::P99Us), 1),
            text(Spread::of(&rate), 0),
            text(share, 2),
            text(many[cell].spread(Figure::CpuTotal), 3),
            trouble.cloned().unwrap_or_default(),
        ]);
    }
    Table {
        title: side.as_str().to_owned(),
        note: String::new(),
        header: [format!("{}: one client", side.as_str())]
            .into_iter()
            .chain(header.into_iter().skip(1).map(str::to_owned))
            .collect(),
        rows,
    }
}

/// Records gateway and functions while requests alternate, and prints where the time went.
fn profile(bench: &Bench<'_>, running: &Running, directory: &Path) -> Result<()> {
    let Some(perf) = find_program("perf") else {
        println!("no profile: perf is not in PATH (apt-get install linux-perf)");
        return Ok(());
    };
    for line in Line::all().filter(|line| line.variant == "alternating") {
        let (protocol, work) = (line.protocol, line.work(MANY));
        let data = directory.join("perf.data");
        let pids: Vec<String> =
            [running.front()?, running.functions()?].concat().iter().map(ToString::to_string).collect();
        let mut record = Command::new(&perf);
        record.args(["record", "--quiet", "-e", "cpu-clock", "-g", "-p", &pids.join(","), "-o"]).arg(&data);
        record.stdout(Stdio::null()).stderr(Stdio::null());
        let recorder = Recorder(process::spawn(&mut record)?);
        let measured = bench.measure(running, &work)?;
        drop(recorder);
        if let Some(trouble) = measured.trouble {
            println!("{protocol}, alternating, is not profiled: {trouble}");
            continue;
        }
        let report = Command::new(&perf)
            .args(["report", "--stdio", "--no-children", "-g", "none", "--percent-limit", "0.5", "-i"])
            .arg(&data)
            .output()
            .context("cannot run perf report")?;
        println!(
            "\n{}, {protocol}, alternating: where gateway and functions spend their time",
            running.side.as_str()
        );
        let text = String::from_utf8_lossy(&report.stdout);
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
        lines.take(PROFILED_LINES).for_each(|line| println!("{line}"));
    }
    Ok(())
}

/// Asked to finish its file when dropped.
struct Recorder(Child);

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGINT);
        let _ = self.0.wait();
    }
}
