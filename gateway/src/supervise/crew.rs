//! Starts the instances of functions, and knows the tasks that keep them.
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::{
    sync::{mpsc, watch},
    task::{self, JoinSet},
};

use super::{
    keeper::{Event, Id, Keeper, Order},
    memory::Memory,
    program::Program,
    sockets::{Directory, Listener},
};
use crate::logs::Log;

/// What shall run for a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub program: Arc<Program>,
    pub instances: u16,
}

/// A running instance, in the care of its keeper.
pub struct Instance {
    pub id: Id,
    pub task: task::Id,
    pub orders: watch::Sender<Order>,
}

pub struct Crew {
    keepers: JoinSet<()>,
    next_id: Id,
    events: mpsc::UnboundedSender<Event>,
    log: Log,
    /// Looked for when the first function is bounded.
    memory: Option<Memory>,
    /// After the keepers, whose sockets are in it.
    directory: Directory,
}

impl Crew {
    pub fn new(directory: Directory, log: Log) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (events, heard) = mpsc::unbounded_channel();
        (Self { keepers: JoinSet::new(), next_id: 0, events, log, memory: None, directory }, heard)
    }

    /// Starts a function's first instances, or none. What is dropped before it is employed is killed.
    pub fn start_first(&mut self, wanted: &Wanted) -> Result<Vec<Keeper>> {
        let listeners = self.directory.listen_first(wanted.program.name, wanted.instances)?;
        listeners.into_iter().map(|listener| self.start(&wanted.program, listener)).collect()
    }

    /// Starts further instances, or none.
    pub fn start_more(&mut self, wanted: &Wanted, count: usize) -> Result<Vec<Keeper>> {
        (0..count)
            .map(|_| {
                let listener = self.directory.listen_next(wanted.program.name, wanted.instances)?;
                self.start(&wanted.program, listener)
            })
            .collect()
    }

    fn start(&mut self, program: &Arc<Program>, listener: Listener) -> Result<Keeper> {
        let name = program.name;
        let failed = || format!("function {name} can't be started");
        let bounded = match program.memory_max {
            None => None,
            Some(most) => {
                let memory = match self.memory.take() {
                    Some(memory) => memory,
                    None => Memory::find().with_context(failed)?,
                };
                let bounded = memory.bound(listener.label(), most).with_context(failed);
                self.memory = Some(memory);
                Some(bounded?)
            }
        };
        self.next_id += 1;
        let (program, log, events) = (Arc::clone(program), self.log.clone(), self.events.clone());
        Keeper::start(self.next_id, program, listener, bounded, log, events).with_context(failed)
    }

    /// Gives each keeper a task of its own.
    pub fn employ(&mut self, keepers: Vec<Keeper>) -> Vec<Instance> {
        let employ = |keeper: Keeper| {
            let (orders, heard) = watch::channel(Order::Run);
            let id = keeper.id();
            let task = self.keepers.spawn(keeper.keep(heard)).id();
            Instance { id, task, orders }
        };
        keepers.into_iter().map(employ).collect()
    }

    /// The next task that ends; never while there is none.
    pub async fn ended(&mut self) -> task::Id {
        match self.keepers.join_next_with_id().await {
            Some(Ok((task, ()))) => task,
            Some(Err(error)) => {
                // Its process was killed with it; the others are kept.
                tracing::error!(%error, "the keeper of an instance failed");
                error.id()
            }
            None => std::future::pending().await,
        }
    }
}
