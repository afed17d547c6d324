//! `cargo xtask bench`: every side at every kind of work, in one run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::interrupt;
use crate::progress::announce;
use crate::{packages, privilege, workspace};

mod descriptors;
mod docs;
mod figure;
mod goals;
mod host;
mod listener;
mod loader;
mod measure;
mod micro;
mod moves;
mod namespace;
mod peers;
mod plots;
mod proc;
mod process;
mod report;
mod results;
mod settings;
mod side;
mod stage;
mod statistics;
mod syscalls;
mod tables;
mod words;
mod work;

use measure::Bench;
use results::{Outcome, Results, SideInfo, WorkResults};
use settings::Settings;
use side::Side;
use stage::Stage;
use work::{Kind, WORKS, Work};

/// Works whose system calls are counted.
const COUNTED: [&str; 3] = ["http-new", "tls-new", "http-keepalive"];

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    only: Option<Only>,
    /// Few and short rounds: an impression within two minutes
    #[arg(long)]
    quick: bool,
    /// Only these sides (what they are compared to is measured only if it is named)
    #[arg(long, value_enum, value_delimiter = ',')]
    side: Vec<Side>,
    /// Only works whose name contains one of these; `--work list` names them all
    #[arg(long, value_delimiter = ',')]
    work: Vec<String>,
    /// How often each side is measured at each work
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// Write docs/benchmarks.md from this run
    #[arg(long)]
    write_docs: bool,
    /// Measure nothing: show an earlier run, from its results.json
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Where everything lies that was built: this process is the part that needs root
    #[arg(long, hide = true, global = true)]
    programs: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Only {
    /// What it costs that a kept connection changes its function
    Move(moves::Arguments),
    /// The parser, the wire, the record layer and the HTTP loop, each alone
    Micro(micro::Arguments),
}

/// What the measurements run with.
pub struct Prepared {
    /// Programs built for speed.
    programs: PathBuf,
    /// Where results go.
    target: PathBuf,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(Only::Micro(arguments)) = &arguments.only {
        return micro::run(arguments);
    }
    if arguments.work.iter().any(|work| work == "list") {
        WORKS.iter().for_each(|work| println!("{:24} {}", work.key, work.title));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(file) = &arguments.from {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let target = file.parent().context("the results lie in no directory")?;
        return present(arguments, target, &serde_json::from_slice(&text)?);
    }
    let programs = match &arguments.programs {
        Some(programs) => programs.clone(),
        None => {
            // Said before a build of minutes, not after it.
            let why = "measuring, in a network namespace and with BPF programs,";
            let sudo = (!privilege::is_root()).then(|| privilege::sudo(why)).transpose()?;
            packages::ensure(&packages::OF_TESTS, "the benchmark")?;
            let programs = build()?;
            if let Some(sudo) = sudo {
                return elevated(&sudo, &programs);
            }
            programs
        }
    };
    let target = programs.parent().context("the programs lie in no directory")?.join("bench");
    fs::create_dir_all(&target)?;
    let prepared = Prepared { programs, target };
    // Before there are other threads.
    interrupt::catch()?;
    match &arguments.only {
        Some(Only::Move(arguments)) => {
            descriptors::raise()?;
            moves::run(arguments, &prepared)
        }
        _ => compare(arguments, &prepared),
    }
}

/// Builds everything for speed: the product, the load generator, and the function that moves large bodies.
fn build() -> Result<PathBuf> {
    let programs = workspace::build(true)?;
    announce("building the load generator");
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--locked", "--release", "--package=xtask", "--bin=xtask"]);
    cargo.args(["--package=base", "--example=bulk"]);
    if !cargo.status().context("cannot start cargo")?.success() {
        bail!("the build failed; what cargo says stands above");
    }
    // Made by whom it belongs to, so that what root writes into it can be removed.
    fs::create_dir_all(programs.with_file_name("bench"))?;
    Ok(programs)
}

fn elevated(sudo: &Path, programs: &Path) -> Result<ExitCode> {
    announce("measuring as root, by sudo");
    let mut command = Command::new(sudo);
    command.args(["--preserve-env=HOME,XDG_CACHE_HOME,CARGO_MANIFEST_DIR,PATH", "--"]);
    command.arg(programs.join("xtask")).args(std::env::args_os().skip(1)).arg("--programs").arg(programs);
    let status = command.status().context("cannot start sudo")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compare(arguments: &Arguments, prepared: &Prepared) -> Result<ExitCode> {
    let mut settings = settings(arguments);
    settings.idle_connections =
        settings.idle_connections.min(descriptors::connections(descriptors::raise()?));
    let works = works(&arguments.work)?;
    let mut infos = Vec::new();
    let mut wanted = Vec::new();
    for side in Side::ALL {
        if !arguments.side.is_empty() && !arguments.side.contains(&side) {
            continue;
        }
        let installed = side.peer().map(peers::ensure).transpose();
        let (version, absent) = match &installed {
            Ok(None) => (format!("pointsman {}", env!("CARGO_PKG_VERSION")), None),
            Ok(Some(installed)) => (format!("{} {}", side.as_str(), installed.version), None),
            Err(error) => (String::new(), Some(format!("{error:#}"))),
        };
        infos.push(SideInfo { side, version, absent });
        if let Ok(installed) = installed {
            wanted.push((side, installed));
        }
    }
    let mut results = Results {
        host: host::describe()?,
        command: command_line(),
        began: OffsetDateTime::now_utc().replace_nanosecond(0)?.format(&Rfc3339)?,
        settings,
        sides: infos,
        works: Vec::new(),
        syscalls: Vec::new(),
    };
    namespace::enter()?;
    let (mut stage, absent) = Stage::set(&prepared.programs, &wanted)?;
    for (side, why) in absent {
        for info in results.sides.iter_mut().filter(|info| info.side == side) {
            info.absent = Some(why.clone());
        }
    }
    results.works = works
        .iter()
        .map(|work| WorkResults { key: work.key.into(), title: work.title.into(), sides: BTreeMap::new() })
        .collect();
    for round in 0..results.settings.rounds {
        announce(&format!("round {} of {}", round + 1, results.settings.rounds));
        self::round(round, &works, prepared, &mut results, &stage)?;
        stage.check()?;
    }
    count_syscalls(&works, prepared, &mut results, &stage)?;
    drop(stage);
    present(arguments, &prepared.target, &results)
}

/// Every side at every work, once; each round begins with another side.
fn round(
    round: usize,
    works: &[&'static Work],
    prepared: &Prepared,
    results: &mut Results,
    stage: &Stage,
) -> Result<()> {
    let settings = results.settings.clone();
    let bench = Bench { programs: &prepared.programs, settings: &settings, stage };
    for (work, found) in works.iter().zip(&mut results.works) {
        if work.kind == Kind::Idle && round >= settings.idle_rounds {
            continue;
        }
        let sides = stage.sides();
        for index in 0..sides.len() {
            let running = &sides[(index + round) % sides.len()];
            let outcome = found.sides.entry(running.side).or_default();
            if let Some(why) = running.side.lacks(work.port) {
                outcome.trouble = Some(why.to_owned());
                continue;
            }
            if outcome.trouble.is_some() && outcome.rounds.is_empty() {
                // It could not do it in the first round.
                continue;
            }
            match bench.measure(running, work) {
                Ok(measured) => {
                    outcome.trouble = measured.trouble.or_else(|| outcome.trouble.take());
                    if !measured.figures.is_empty() {
                        outcome.rounds.push(measured.figures);
                    }
                }
                Err(error) => {
                    interrupt::check()?;
                    outcome.trouble = Some(format!("{error:#}"));
                }
            }
        }
        eprintln!("    {:22} {}", work.key, latest(found));
    }
    Ok(())
}

fn count_syscalls(
    works: &[&'static Work],
    prepared: &Prepared,
    results: &mut Results,
    stage: &Stage,
) -> Result<()> {
    let settings = results.settings.clone();
    let bench = Bench { programs: &prepared.programs, settings: &settings, stage };
    for work in works.iter().filter(|work| COUNTED.contains(&work.key)) {
        announce(&format!("counting system calls: {}", work.title));
        for running in stage.sides().iter().filter(|running| running.side.lacks(work.port).is_none()) {
            match bench.syscalls(running, work) {
                Ok(counted) => results.syscalls.push(counted),
                Err(error) => {
                    interrupt::check()?;
                    announce(&format!(
                        "system calls of {} were not counted: {error:#}",
                        running.side.as_str()
                    ));
                }
            }
        }
    }
    Ok(())
}

fn present(arguments: &Arguments, target: &Path, results: &Results) -> Result<ExitCode> {
    let mut tables = tables::of_works(results);
    tables.extend(tables::of_syscalls(results));
    tables.extend([tables::overview(results), tables::processor_overview(results), goals::table(results)]);
    for table in tables {
        println!("\n{}\n\n{table}", table.title);
        if !table.note.is_empty() {
            println!("{}", table.note);
        }
    }
    println!("{}", words::noise(results));
    let json = target.join("results.json");
    fs::write(&json, serde_json::to_string_pretty(results)?)?;
    let html = target.join("report.html");
    fs::write(&html, report::html(results)?)?;
    println!("\n{}\n{}", json.display(), html.display());
    if arguments.write_docs {
        let path = workspace::root().join("docs/benchmarks.md");
        fs::write(&path, docs::markdown(results))?;
        println!("{}", path.display());
    }
    for side in &results.sides {
        if let Some(why) = &side.absent {
            println!("not measured: {}: {why}", side.side.as_str());
        }
    }
    // A peer that can't be had is said; what is ours has to be there.
    let own = |info: &SideInfo| info.side.peer().is_none() && info.absent.is_some();
    Ok(if results.sides.iter().any(own) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn settings(arguments: &Arguments) -> Settings {
    let mut settings = if arguments.quick { Settings::QUICK } else { Settings::FULL };
    if let Some(rounds) = arguments.rounds {
        settings.rounds = rounds as usize;
        settings.idle_rounds = settings.idle_rounds.min(settings.rounds);
    }
    settings
}

fn works(filters: &[String]) -> Result<Vec<&'static Work>> {
    for filter in filters {
        if !WORKS.iter().any(|work| work.key.contains(filter.as_str())) {
            bail!("no work's name contains {filter:?}; `--work list` names them all");
        }
    }
    let wanted = |work: &&Work| {
        filters.is_empty()
            || match filters.iter().find(|filter| work.key == filter.as_str()) {
                Some(_) => true,
                // A whole name means that work alone.
                None => filters
                    .iter()
                    .any(|filter| Work::find(filter).is_none() && work.key.contains(filter.as_str())),
            }
    };
    Ok(WORKS.iter().filter(wanted).collect())
}

fn command_line() -> String {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let own = arguments.iter().position(|argument| argument == "--programs").unwrap_or(arguments.len());
    format!("cargo xtask {}", arguments[..own].join(" "))
}

/// One line of what the round has just found.
fn latest(found: &WorkResults) -> String {
    let headline = found.headline();
    let cell = |(side, outcome): (&Side, &Outcome)| {
        let value = outcome.values(headline).last().map_or("-".to_owned(), |value| match *value {
            small if small < 100.0 => format!("{small:.2}"),
            large => format!("{large:.0}"),
        });
        format!("{} {value}", side.as_str())
    };
    format!("{}: {}", headline.label(), found.sides.iter().map(cell).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_name_means_that_work_and_a_part_every_work_that_has_it() {
        let keys = |filters: &[&str]| -> Result<Vec<&str>> {
            let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
            Ok(works(&filters)?.iter().map(|work| work.key).collect())
        };
        assert_eq!(keys(&["http-keepalive"]).unwrap(), ["http-keepalive"]);
        assert_eq!(keys(&["split"]).unwrap(), ["hello-split-2", "hello-split-4"]);
        assert_eq!(keys(&[]).unwrap().len(), WORKS.len());
        assert!(keys(&["nothing-like-it"]).is_err());
    }
}
