//! The parent of the functions: makes their sockets, keeps them running, stops them in order.
use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use self::{
    keeper::{Keeper, Order},
    program::Program,
    sockets::Directory,
};
use crate::{
    config::{Config, REFUSAL, own_directory},
    logs::Log,
};

mod backoff;
mod child;
mod keeper;
mod lines;
mod output;
mod program;
mod setup;
mod sockets;
mod user;

#[cfg(test)]
mod tests;

/// Functions drain for up to 10 s after SIGTERM; whoever takes longer is killed.
const FUNCTIONS_PATIENCE: Duration = Duration::from_secs(11);

/// The same for all together: refusal answers in the functions' place until the last of them has ended.
const PATIENCE: Duration = Duration::from_secs(12);

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
pub fn run(config: &Config, options: &Options, log: &Log) -> Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // Before there is anything that a signal would leave behind.
        let requests = stop_signals()?;
        let programs = programs(config, options)?;
        let directory = Directory::open(&config.gateway.functions_dir)?;
        Supervisor::start(directory, programs, log)?.run(requests).await;
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

/// Refusal first, then those that the configuration has a command for.
fn programs(config: &Config, options: &Options) -> Result<Vec<Program>> {
    let domains = &config.gateway.domains;
    let mut programs = vec![Program::of_refusal(refusal(options)?, domains)?];
    for (name, function) in &config.functions {
        programs.extend(Program::of_function(*name, function, config)?);
    }
    Ok(programs)
}

fn refusal(options: &Options) -> Result<PathBuf> {
    Ok(match &options.refusal {
        Some(program) => std::path::absolute(program)?,
        None => own_directory().context("the directory of this program can't be found")?.join(REFUSAL),
    })
}

/// The running functions. What is dropped without a stop is killed.
struct Supervisor {
    functions: Group,
    refusal: Group,
    /// After the groups, whose sockets are in it.
    _directory: Directory,
}

impl Supervisor {
    /// Starts all programs or none; the first one is refusal's.
    fn start(directory: Directory, programs: Vec<Program>, log: &Log) -> Result<Self> {
        let mut keepers = Vec::with_capacity(programs.len());
        for program in programs {
            let name = program.name;
            let listener = directory.listen(name)?;
            let keeper = Keeper::start(program, listener, log.clone());
            keepers.push(keeper.with_context(|| format!("function {name} can't be started"))?);
        }
        let names: Vec<_> = keepers.iter().map(|keeper| keeper.name().to_string()).collect();
        tracing::info!(functions = names.join(" "), "functions are up");
        let mut keepers = keepers.into_iter();
        let refusal = Group::of(keepers.by_ref().take(1));
        Ok(Self { functions: Group::of(keepers), refusal, _directory: directory })
    }

    /// Runs until the first request to stop, then stops in order, or at once on the second one.
    async fn run(mut self, mut requests: mpsc::Receiver<()>) {
        requests.recv().await;
        tracing::info!("stopping the functions");
        let begun = Instant::now();
        let hurried = self.functions.stop(begun + FUNCTIONS_PATIENCE, &mut requests).await;
        let patience = if hurried { Duration::ZERO } else { PATIENCE };
        self.refusal.stop(begun + patience, &mut requests).await;
    }
}

/// Functions that are stopped together.
struct Group {
    keepers: JoinSet<()>,
    orders: watch::Sender<Order>,
}

impl Group {
    fn of(keepers: impl Iterator<Item = Keeper>) -> Self {
        let (orders, _) = watch::channel(Order::Run);
        Self { keepers: keepers.map(|keeper| keeper.keep(orders.subscribe())).collect(), orders }
    }

    /// Lets the functions drain; kills what is left at the deadline or on a request to hurry. Says if it was hurried.
    async fn stop(&mut self, deadline: Instant, requests: &mut mpsc::Receiver<()>) -> bool {
        self.orders.send_replace(Order::Stop);
        let hurried = tokio::select! {
            biased;
            () = all_end(&mut self.keepers) => return false,
            Some(()) = requests.recv() => true,
            () = sleep_until(deadline) => false,
        };
        self.orders.send_replace(Order::Kill);
        all_end(&mut self.keepers).await;
        hurried
    }
}

async fn all_end(keepers: &mut JoinSet<()>) {
    while let Some(ended) = keepers.join_next().await {
        if let Err(error) = ended {
            // Its process was killed with it; the others are kept.
            tracing::error!(%error, "the keeper of a function failed");
        }
    }
}
