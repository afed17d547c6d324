//! Starts the instances of functions, and knows the tasks that keep them.
use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use common::FunctionName;
use handoff::{TICKET_PERIOD, TicketKeysWriter, TicketPeriod};
use tokio::{
    sync::{mpsc, watch},
    task::{self, JoinSet},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

use super::{
    keeper::{Event, Id, Keeper, Order},
    memory::Memory,
    program::Program,
    sockets::{Directory, Listener},
};
use crate::logs::Log;

/// How often it is looked whether a period has begun: keys are made one ahead, and outlive their use by no more than this.
const RENEWAL: Duration = Duration::from_secs(TICKET_PERIOD.as_secs() / 36);

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
    /// Keys for session tickets, of each function that has a certificate: all its instances know each other's tickets.
    ticket_keys: HashMap<FunctionName, Arc<TicketKeysWriter>>,
    renewal: Interval,
    /// Looked for when the first function is bounded.
    memory: Option<Memory>,
    /// After the keepers, whose sockets are in it.
    directory: Directory,
}

impl Crew {
    /// Must be called within a runtime.
    pub fn new(directory: Directory, log: Log) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (events, heard) = mpsc::unbounded_channel();
        let mut renewal = interval_at(Instant::now() + RENEWAL, RENEWAL);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let crew = Self {
            keepers: JoinSet::new(),
            next_id: 0,
            events,
            log,
            ticket_keys: HashMap::new(),
            renewal,
            memory: None,
            directory,
        };
        (crew, heard)
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
        let ticket_keys = self.ticket_keys_of(program).with_context(failed)?;
        self.next_id += 1;
        let (program, log, events) = (Arc::clone(program), self.log.clone(), self.events.clone());
        Keeper::start(self.next_id, program, ticket_keys, listener, bounded, log, events).with_context(failed)
    }

    fn ticket_keys_of(&mut self, program: &Program) -> Result<Option<Arc<TicketKeysWriter>>> {
        if !program.has_certificate() {
            return Ok(None);
        }
        Ok(Some(Arc::clone(match self.ticket_keys.entry(program.name) {
            Entry::Occupied(keys) => keys.into_mut(),
            Entry::Vacant(place) => {
                let keys = TicketKeysWriter::create().context("its keys for session tickets")?;
                place.insert(Arc::new(keys))
            }
        })))
    }

    fn renew_ticket_keys(&self) {
        for (function, keys) in &self.ticket_keys {
            if let Err(error) = keys.renew(TicketPeriod::now()) {
                tracing::error!(%function, %error, "can't renew the keys for session tickets");
            }
        }
    }

    /// Forgets what was kept for functions that are no more.
    pub fn retain(&mut self, is_there: impl Fn(&FunctionName) -> bool) {
        self.ticket_keys.retain(|function, _| is_there(function));
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

    /// The next task that ends; never while there is none. Meanwhile keys are renewed.
    pub async fn ended(&mut self) -> task::Id {
        loop {
            let ended = tokio::select! {
                Some(ended) = self.keepers.join_next_with_id() => ended,
                _ = self.renewal.tick() => {
                    self.renew_ticket_keys();
                    continue;
                }
            };
            return match ended {
                Ok((task, ())) => task,
                Err(error) => {
                    // Its process was killed with it; the others are kept.
                    tracing::error!(%error, "the keeper of an instance failed");
                    error.id()
                }
            };
        }
    }
}
