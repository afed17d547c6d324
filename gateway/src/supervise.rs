//! The parent of the functions: makes their sockets, keeps them running, stops them in order.
use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use common::FunctionName;
use nix::sys::prctl;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task,
    time::{Instant, sleep_until},
};

use self::{
    crew::{Crew, Wanted},
    deployment::{Deployment, LEAVE_PATIENCE},
    keeper::Event,
    program::Program,
    sockets::Directory,
    user::Users,
};
use crate::{
    config::{Config, REFUSAL, own_directory},
    deadline::at,
    logs::Log,
    reload::{Reloads, Source},
};

mod backoff;
mod child;
mod crew;
mod deployment;
mod keeper;
mod lines;
mod memory;
mod output;
mod program;
mod setup;
mod sockets;
mod user;

#[cfg(test)]
mod tests;

/// Refusal answers in the functions' place until the last of them has ended.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(12);

#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// The program that answers for connections that belong to nobody; by default `refusal` beside this program.
    #[arg(long, value_name = "PROGRAM")]
    refusal: Option<PathBuf>,
}

/// Runs the functions until SIGTERM or SIGINT; a second one of them ends the functions at once. What functions write
/// goes to the log.
///
/// To be called in the process's main thread: functions are killed when the thread that started them ends.
pub fn run(source: Source, options: Options, log: &Log) -> Result<()> {
    // Its memory has keys of all functions, some of which may have its user.
    prctl::set_dumpable(false).context("can't keep other processes from this one's memory")?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Before there is anything that a signal would leave behind.
        let requests = stop_signals()?;
        let reloads = source.reloads()?;
        let config = source.read()?;
        let wanted = wanted(&config, &options)?;
        let directory = Directory::open(&config.gateway.functions_dir)?;
        let supervisor = Supervisor::start(directory, wanted, log)?;
        supervisor.run(requests, changes(source, options, config, reloads)).await;
        Ok(())
    })
}

/// One message for each request to stop.
fn stop_signals() -> Result<mpsc::Receiver<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, requests) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if sender.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(requests)
}

/// One message for each time that the configuration was read again and can be followed.
fn changes(
    source: Source,
    options: Options,
    first: Config,
    mut reloads: Reloads,
) -> mpsc::Receiver<Vec<Wanted>> {
    let (sender, changes) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            reloads.next().await;
            match reread(&source, &options, &first) {
                Ok(wanted) => {
                    if sender.send(wanted).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::error!(error, "the configuration is refused; what runs goes on");
                }
            }
        }
    });
    changes
}

fn reread(source: &Source, options: &Options, first: &Config) -> Result<Vec<Wanted>> {
    let config = source.read()?;
    if config.gateway.functions_dir != first.gateway.functions_dir {
        tracing::warn!(
            "functions_dir can't change while functions run: it stays as it was until the next start"
        );
    }
    wanted(&config, options)
}

/// Refusal first, then those that the configuration has a command for.
fn wanted(config: &Config, options: &Options) -> Result<Vec<Wanted>> {
    let mut users = Users::default();
    let refusal = Program::of_refusal(refusal(options)?, &mut users)?;
    let mut wanted = vec![Wanted { program: Arc::new(refusal), instances: 1 }];
    for (name, function) in &config.functions {
        let program = Program::of_function(*name, function, config, &mut users)?;
        wanted.extend(
            program.map(|program| Wanted { program: Arc::new(program), instances: function.instances }),
        );
    }
    Ok(wanted)
}

fn refusal(options: &Options) -> Result<PathBuf> {
    Ok(match &options.refusal {
        Some(program) => std::path::absolute(program)?,
        None => own_directory().context("the directory of this program can't be found")?.join(REFUSAL),
    })
}

/// The running functions. What is dropped without a stop is killed.
struct Supervisor {
    functions: BTreeMap<FunctionName, Deployment>,
    refusal: Deployment,
    crew: Crew,
    heard: mpsc::UnboundedReceiver<Event>,
}

impl Supervisor {
    /// Starts everything or nothing; the first program is refusal's.
    fn start(directory: Directory, wanted: Vec<Wanted>, log: &Log) -> Result<Self> {
        let (mut crew, heard) = Crew::new(directory, log.clone());
        let mut started = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let keepers = crew.start_first(&wanted)?;
            started.push((wanted, keepers));
        }
        let labels: Vec<_> = started.iter().flat_map(|(_, keepers)| keepers).map(|it| it.label()).collect();
        tracing::info!(functions = labels.join(" "), "functions are up");
        let mut deployments = started.into_iter().map(|(wanted, keepers)| {
            let name = wanted.program.name;
            (name, Deployment::new(wanted, crew.employ(keepers)))
        });
        let (_, refusal) = deployments.next().context("refusal is always wanted")?;
        let functions = deployments.collect();
        Ok(Self { functions, refusal, crew, heard })
    }

    /// Runs until the first request to stop, then stops in order, or at once on the second one.
    async fn run(mut self, mut requests: mpsc::Receiver<()>, mut changes: mpsc::Receiver<Vec<Wanted>>) {
        loop {
            let deadline = self.deployments().filter_map(|it| it.next_deadline()).min();
            tokio::select! {
                biased;
                _ = requests.recv() => break,
                Some(event) = self.heard.recv() => self.deployments().for_each(|it| it.hear(event)),
                task = self.crew.ended() => self.forget(task),
                () = at(deadline) => self.deployments().for_each(|it| it.expire(Instant::now())),
                Some(wanted) = changes.recv() => self.follow(wanted),
            }
        }
        self.stop(requests).await;
    }

    fn deployments(&mut self) -> impl Iterator<Item = &mut Deployment> {
        self.functions.values_mut().chain([&mut self.refusal])
    }

    /// Changes what the configuration changed, and leaves the rest alone.
    fn follow(&mut self, wanted: Vec<Wanted>) {
        let Self { functions, refusal, crew, .. } = self;
        let mut wanted = wanted.into_iter();
        if let Some(wanted) = wanted.next() {
            refusal.change_to(wanted, crew);
        }
        let wanted: BTreeMap<_, _> = wanted.map(|wanted| (wanted.program.name, wanted)).collect();
        for (name, deployment) in functions.iter_mut() {
            if !wanted.contains_key(name) {
                tracing::info!(function = %name, "is configured no more");
                deployment.leave();
            }
        }
        for (name, wanted) in wanted {
            match functions.entry(name) {
                Entry::Occupied(deployment) => deployment.into_mut().change_to(wanted, crew),
                Entry::Vacant(place) => match crew.start_first(&wanted) {
                    Ok(keepers) => {
                        tracing::info!(function = %name, instances = keepers.len(), "is new and was started");
                        let instances = crew.employ(keepers);
                        place.insert(Deployment::new(wanted, instances));
                    }
                    Err(error) => {
                        let error = format!("{error:#}");
                        tracing::error!(function = %name, error, "is new and can't be started");
                    }
                },
            }
        }
    }

    fn forget(&mut self, task: task::Id) {
        self.deployments().for_each(|it| it.forget(task));
        self.functions.retain(|_, deployment| !deployment.is_over());
    }

    async fn stop(mut self, mut requests: mpsc::Receiver<()>) {
        tracing::info!("stopping the functions");
        let begun = Instant::now();
        let hurried = self.end(Group::Functions, begun + LEAVE_PATIENCE, &mut requests).await;
        let patience = if hurried { Duration::ZERO } else { REFUSAL_PATIENCE };
        self.end(Group::Refusal, begun + patience, &mut requests).await;
    }

    /// Lets a group drain; kills what is left at the deadline or on a request to hurry. Says if it was hurried.
    async fn end(&mut self, group: Group, deadline: Instant, requests: &mut mpsc::Receiver<()>) -> bool {
        self.group(group).for_each(Deployment::leave);
        let mut hurried = false;
        let mut killed = false;
        while !self.group(group).all(|it| it.is_over()) {
            tokio::select! {
                biased;
                task = self.crew.ended() => {
                    self.forget(task);
                    continue;
                }
                Some(()) = requests.recv(), if !killed => hurried = true,
                () = sleep_until(deadline), if !killed => {}
            }
            self.group(group).for_each(Deployment::kill);
            killed = true;
        }
        hurried
    }

    fn group(&mut self, group: Group) -> impl Iterator<Item = &mut Deployment> {
        let functions = (group == Group::Functions).then(|| self.functions.values_mut());
        let refusal = (group == Group::Refusal).then_some(&mut self.refusal);
        functions.into_iter().flatten().chain(refusal)
    }
}

/// Functions that are stopped together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    Functions,
    Refusal,
}
