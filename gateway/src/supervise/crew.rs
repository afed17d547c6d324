//! Starts the instances of functions, and knows the tasks that keep them.
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::{Context as _, Result};
use common::FunctionName;
use handoff::{TicketKeysWriter, TicketPeriod};
use tokio::{
    sync::{mpsc, watch},
    task::{self, JoinSet},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};

use super::{
    keeper::{Event, Id, Keeper, Order},
    memory::Memory,
    program::{Credentials, Program},
    sockets::{Directory, Listener},
};
use crate::logs::Log;

/// How often it is looked whether keys for session tickets are needed or over. Often, because this clock stands still
/// while the host sleeps, and theirs does not.
const RENEWAL: Duration = Duration::from_secs(60);

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
    /// Those with other credentials have other keys, as whoever had the old ones may have the old keys as well.
    ticket_keys: HashMap<FunctionName, Vec<(Credentials, Weak<TicketKeysWriter>)>>,
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

    /// The keys that go with this program's credentials, which live as long as an instance has them.
    fn ticket_keys_of(&mut self, program: &Program) -> Result<Option<Arc<TicketKeysWriter>>> {
        let Some(credentials) = program.credentials() else { return Ok(None) };
        let known = self.ticket_keys.entry(program.name).or_default();
        let mut fitting = known.iter().filter(|(of, _)| *of == credentials);
        if let Some(keys) = fitting.find_map(|(_, keys)| keys.upgrade()) {
            return Ok(Some(keys));
        }
        let keys = Arc::new(TicketKeysWriter::create().context("its keys for session tickets")?);
        known.push((credentials, Arc::downgrade(&keys)));
        Ok(Some(keys))
    }

    /// Renews the keys of those who still have any.
    fn renew_ticket_keys(&mut self, now: TicketPeriod, soon: TicketPeriod) {
        self.ticket_keys.retain(|function, all| {
            all.retain(|(_, keys)| {
                let Some(keys) = keys.upgrade() else { return false };
                if let Err(error) = keys.renew(now, soon) {
                    tracing::error!(%function, %error, "can't renew the keys for session tickets");
                }
                true
            });
            !all.is_empty()
        });
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
                    self.renew_ticket_keys(TicketPeriod::now(), TicketPeriod::soon());
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use handoff::TicketKeysReader;
    use tokio::time::{interval, timeout};

    use super::*;
    use crate::{
        config::Bytes,
        logs::{Format, Logs},
    };

    fn crew(folder: &std::path::Path) -> Crew {
        let directory = Directory::open(&folder.join("functions")).unwrap();
        Crew::new(directory, Logs::to(std::io::sink(), Format::Text).unwrap().log()).0
    }

    fn program(name: &str) -> Program {
        let mut program = Program::bare(name.parse().unwrap(), "/bin/false".into());
        program.files.push(("certificate", "/etc/hostname".into()));
        program
    }

    #[tokio::test]
    async fn keys_go_with_credentials_and_end_with_the_last_who_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut crew = crew(folder.path());
        let (program, mut changed) = (program("echo"), program("echo"));
        let keys = crew.ticket_keys_of(&program).unwrap().unwrap();
        changed.memory_max = Some(Bytes(1 << 30));
        let same = crew.ticket_keys_of(&changed).unwrap().unwrap();
        assert!(Arc::ptr_eq(&keys, &same));
        let bare = Program::bare(program.name, "/bin/false".into());
        assert!(crew.ticket_keys_of(&bare).unwrap().is_none());
        changed.files.push(("key", "/etc/hostname".into()));
        let others = crew.ticket_keys_of(&changed).unwrap().unwrap();
        assert!(!Arc::ptr_eq(&keys, &others));
        // As when what changed can't be started, and what runs goes on.
        drop(others);
        assert!(Arc::ptr_eq(&keys, &crew.ticket_keys_of(&program).unwrap().unwrap()));
        drop((keys, same));
        // The clock that renews keys also forgets them.
        crew.renewal = interval(Duration::from_millis(1));
        assert!(timeout(Duration::from_millis(50), crew.ended()).await.is_err());
        assert!(crew.ticket_keys.is_empty());
    }

    #[tokio::test]
    async fn keys_are_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let mut crew = crew(folder.path());
        let keys = crew.ticket_keys_of(&program("echo")).unwrap().unwrap();
        let reader = TicketKeysReader::open(keys.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let next = TicketPeriod::now().after().after();
        assert!(reader.key(next).is_none());
        crew.renew_ticket_keys(next, next);
        assert!(reader.key(next).is_some());
    }
}
