//! The running function instances: which there are, and who of them gets which connection.
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    io, mem,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use common::FunctionName;
use handoff::{Connection, MAX_BATCH, MessageBuffer};
use nix::sys::resource::{Resource, getrlimit};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::yield_now,
    time::Instant,
};

use crate::{deadline::at, socket_name::SocketName};

use self::{
    choice::Draws,
    discovery::{Change, Discovery},
    instance::{Instance, Outcome, Round},
    ledger::Ledger,
    moves::{Heard, id_of},
    poller::{Poller, Source},
};

mod backlog;
mod choice;
mod closing;
mod discovery;
mod handover;
mod instance;
mod leases;
mod ledger;
mod moves;
mod poller;
mod view;
mod worker;

pub use discovery::Error as OpenError;
pub use ledger::Totals;
pub use moves::MoveCounts;
pub use view::{FunctionView, InstanceView, WorkerView};
pub use worker::WINDOW;

/// The function that answers for connections that belong to nobody.
pub const REFUSAL: &str = crate::config::REFUSAL;

/// How soon it is looked again whether a full instance has room: its status page changes without an event.
const ROOM_POLL: Duration = Duration::from_millis(1);

/// How soon a functions' directory that vanished is looked for again.
const REOPEN_PAUSE: Duration = Duration::from_millis(100);

/// The share of RLIMIT_NOFILE that may be in flight: the kernel refuses at the limit, counting per user, and this
/// gateway need not be the user's only process.
const IN_FLIGHT_SHARE: u64 = 2;

const BREACH: &str = "a pool connection breaks the protocol and is dropped";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Open(#[from] discovery::Error),
    #[error("watching pool connections: {0}")]
    Poll(#[source] io::Error),
    #[error("reading RLIMIT_NOFILE: {0}")]
    Limit(#[source] io::Error),
}

/// The configured weights of instances, by their function and ID.
pub type Weights = HashMap<FunctionName, BTreeMap<String, u32>>;

/// A connection with a verdict, on its way to an instance.
pub struct Ready {
    pub connection: Connection,
    pub socket: OwnedFd,
    /// Until when it may wait for an instance; for the caller's use.
    pub wait_until: Option<Instant>,
}

pub struct Instances {
    path: PathBuf,
    /// `None` after the directory vanished, until it is back.
    discovery: Option<Discovery>,
    poller: AsyncFd<Poller>,
    /// Something readable was not read to its end, which no event will tell.
    unread: bool,
    slots: Vec<Option<Instance>>,
    /// The listed instances of each function, by slot; each stands there as often as it weighs, and is drawn as often.
    functions: HashMap<FunctionName, Vec<usize>>,
    /// The functions that are configured, whether or not there are instances.
    known: HashSet<FunctionName>,
    weights: Weights,
    refusal: FunctionName,
    draws: Draws,
    serial: u32,
    /// Within a round, status pages are read once.
    round: Round,
    /// When a connection or the directory is to be tried again.
    retry_at: Option<Instant>,
    /// Functions whose instances were all full; when one has room, `changed` says so.
    starved: Vec<FunctionName>,
    /// When it is to be looked again for room.
    room_poll_at: Option<Instant>,
    /// Slots where something was seen that wants care.
    touched: Vec<usize>,
    /// Never less than what is in flight; made exact when it meets the bound.
    in_flight_estimate: u64,
    in_flight_bound: u64,
    over_bound: bool,
    ledger: Ledger,
    batches: Batches,
    assignments: Vec<handover::Assignment>,
    handed: Vec<bool>,
    spent: Vec<OwnedFd>,
    /// Memory for what instances say; taken out while it is read.
    message: Option<MessageBuffer>,
    /// Questions for places at functions all of whose workers are full.
    asked: Vec<moves::Asked>,
    moves: MoveCounts,
    /// Connections that moved to nobody and are to be refused.
    orphans: Vec<Ready>,
}

/// Connections by how many went with them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batches {
    pub connections: u64,
    /// Up to 1, 2, 4, ... connections.
    pub messages: [u64; Self::BUCKETS],
}

impl Batches {
    pub const BUCKETS: usize = MAX_BATCH.ilog2() as usize + 1;

    fn add(&mut self, connections: usize) {
        self.connections += connections as u64;
        self.messages[connections.next_power_of_two().ilog2() as usize] += 1;
    }
}

impl Instances {
    /// Begins to watch a directory and connects to what is there. Must be called within a runtime.
    pub fn new(directory: &Path) -> Result<Self, Error> {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_err(|errno| Error::Limit(errno.into()))?.0;
        let poller = Poller::new().and_then(Poller::into_async).map_err(Error::Poll)?;
        let mut instances = Self {
            path: directory.to_owned(),
            discovery: None,
            poller,
            unread: false,
            slots: Vec::new(),
            functions: HashMap::new(),
            known: HashSet::new(),
            weights: Weights::new(),
            refusal: REFUSAL.parse().expect("the refusal function has a valid name"),
            draws: Draws::new(RandomState::new().hash_one(0)),
            serial: 0,
            round: Round { number: 0, at: Instant::now() },
            retry_at: None,
            starved: Vec::new(),
            room_poll_at: None,
            touched: Vec::new(),
            in_flight_estimate: 0,
            in_flight_bound: limit / IN_FLIGHT_SHARE,
            over_bound: false,
            ledger: Ledger::default(),
            batches: Batches::default(),
            assignments: Vec::new(),
            handed: Vec::new(),
            spent: Vec::new(),
            message: None,
            asked: Vec::new(),
            moves: MoveCounts::new(),
            orphans: Vec::new(),
        };
        instances.open_directory()?;
        Ok(instances)
    }

    /// Keeps the pool connections going, and completes when connections that found no instance might find one now.
    /// Nothing is lost when the future is dropped early.
    pub async fn changed(&mut self) {
        loop {
            let deadline = [self.retry_at, self.room_poll_at].into_iter().flatten().min();
            if self.unread {
                // Others come in between: an instance may have more to say than there is time for.
                yield_now().await;
            } else {
                tokio::select! {
                    _ = self.poller.readable() => {}
                    () = at(deadline) => {}
                }
            }
            if self.advance(Instant::now()) {
                return;
            }
        }
    }

    /// Workers of a function that take connections.
    pub fn workers(&self, function: &FunctionName) -> usize {
        let mut slots = self.functions.get(function).cloned().unwrap_or_default();
        slots.dedup();
        slots.into_iter().filter_map(|slot| self.slots[slot].as_ref()).map(Instance::taking).sum()
    }

    /// Connections may move to these from now on.
    pub fn set_known(&mut self, known: impl IntoIterator<Item = FunctionName>) {
        self.known = known.into_iter().collect();
    }

    /// What is chosen from now on is chosen by these weights.
    pub fn set_weights(&mut self, weights: Weights) {
        self.weights = weights;
        for (function, mut slots) in mem::take(&mut self.functions) {
            slots.dedup();
            slots.into_iter().for_each(|slot| self.list(function, slot));
        }
    }

    /// Enters an instance among its function's, next to itself as often as it weighs.
    fn list(&mut self, function: FunctionName, slot: usize) {
        let Some(instance) = &mut self.slots[slot] else { return };
        let id = SocketName::parse(&instance.socket).and_then(|name| name.id);
        let configured = id.and_then(|id| self.weights.get(&function)?.get(id));
        instance.weight = configured.copied().unwrap_or(1);
        let tickets = std::iter::repeat_n(slot, instance.weight as usize);
        self.functions.entry(function).or_default().extend(tickets);
    }

    /// Connections that moved to a function and found nobody there; they are to be refused.
    pub fn take_orphans(&mut self) -> impl Iterator<Item = Ready> {
        self.orphans.drain(..)
    }

    pub fn moves(&self) -> &MoveCounts {
        &self.moves
    }

    /// Connections that were handed over and lost with an instance that had not taken them.
    pub fn lost(&self) -> u64 {
        self.ledger.functions().map(|function| self.ledger.totals(&function).lost).sum()
    }

    /// How many connections went with one message.
    pub fn batches(&self) -> Batches {
        self.batches
    }

    /// Connections that were handed over and not taken yet.
    pub fn in_flight(&self) -> u64 {
        let workers = self.slots.iter().flatten().flat_map(|instance| &instance.workers);
        workers.map(worker::Worker::in_flight).sum()
    }

    fn begin_round(&mut self) {
        self.round = Round { number: self.round.number + 1, at: Instant::now() };
    }

    fn poll_for_room(&mut self) {
        self.room_poll_at.get_or_insert(self.round.at + ROOM_POLL);
    }

    fn advance(&mut self, now: Instant) -> bool {
        let mut useful = false;
        let mut sources = Vec::new();
        let polled = if mem::take(&mut self.unread) {
            self.poller.get_ref().readable(&mut sources)
        } else {
            let none = io::ErrorKind::WouldBlock;
            self.poller.try_io(Interest::READABLE, |poller| {
                // Unless there are more, what comes from now on is another event, and asking again would be a system
                // call for nothing.
                if poller.readable(&mut sources)? { Ok(true) } else { Err(none.into()) }
            })
        };
        match polled {
            Ok(more) => self.unread |= more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::error!(%error, "can't watch the pool connections"),
        }
        for source in sources {
            match source {
                Source::Directory => {
                    self.unread = true;
                    self.read_directory(false);
                }
                Source::Pool { slot, serial } => useful |= self.look(slot as usize, serial, now),
            }
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry(now);
        }
        if self.room_poll_at.is_some_and(|at| at <= now) {
            useful |= self.has_room_again();
        }
        closing::close_all(&mut self.spent);
        useful || !self.orphans.is_empty()
    }

    fn has_room_again(&mut self) -> bool {
        self.room_poll_at = None;
        self.begin_round();
        // Whose instances are gone is told when one comes up.
        let mut starved = mem::take(&mut self.starved);
        starved.retain(|function| self.workers(function) > 0);
        self.starved = starved;
        self.in_flight_estimate = self.in_flight();
        let Self { functions, slots, round, .. } = self;
        let has_room = |function: &FunctionName| {
            functions.get(function).into_iter().flatten().any(|&slot| {
                slots[slot].as_mut().is_some_and(|instance| {
                    instance.refresh(*round);
                    instance.least_loaded().is_some()
                })
            })
        };
        let room = self.in_flight_estimate < self.in_flight_bound && self.starved.iter().any(has_room);
        if room {
            // Whoever finds none when it is tried again comes back.
            self.starved.clear();
        }
        self.send_backlogs();
        self.answer_waiting();
        if !self.starved.is_empty() {
            self.poll_for_room();
        }
        room
    }

    /// Looks at a readable pool connection; true when a worker came up.
    fn look(&mut self, slot: usize, serial: u32, now: Instant) -> bool {
        let Some(instance) = self.slots.get_mut(slot).and_then(Option::as_mut) else { return false };
        instance.prove(now);
        let failed_before = instance.is_backing_off();
        let number = self.draws.draw();
        let outcome = instance.look(serial, number, now);
        let Instance { function, socket, .. } = &*instance;
        match outcome {
            Outcome::Said => {
                match self.hear(id_of(slot, serial)) {
                    // Nothing has changed about the instance.
                    Heard::All => return false,
                    Heard::More => {
                        self.unread = true;
                        return false;
                    }
                    Heard::Ended => self.lose_worker(slot, serial, None, now),
                    Heard::Failed(error) => self.lose_worker(slot, serial, Some(&error), now),
                }
                self.tend(slot, now);
                false
            }
            Outcome::Nothing | Outcome::NotGreeted => {
                self.tend(slot, now);
                false
            }
            Outcome::Up { pid, restarted } => {
                self.unread = true;
                if restarted {
                    self.ledger.restarted(*function);
                }
                if instance.taking() == 1 {
                    tracing::info!(%function, socket, pid, "instance is up");
                }
                self.tend(slot, now);
                true
            }
            Outcome::Failed(error) => {
                // Once, and not at each further attempt.
                if !failed_before {
                    tracing::error!(%function, socket, %error, "{BREACH}");
                }
                self.tend(slot, now);
                false
            }
        }
    }

    /// A pool connection is over, in order or because of an error.
    fn lose_worker(&mut self, slot: usize, serial: u32, error: Option<&handoff::Error>, now: Instant) {
        let Some(instance) = &mut self.slots[slot] else { return };
        let Some(worker) = instance.take_worker(serial) else { return };
        let Instance { function, socket, .. } = &*instance;
        match error {
            // Once, and not at each further attempt.
            Some(error) if !instance.is_backing_off() => {
                tracing::error!(%function, socket, %error, "{BREACH}");
            }
            Some(_) => {}
            None if instance.taking() == 0 => tracing::info!(%function, socket, "instance is down"),
            None => {}
        }
        if error.is_some() || instance.is_unproven() {
            instance.back_off(now);
        }
        if error.is_none() {
            instance.note_end();
        }
        self.bury(slot, worker);
    }

    /// Counts what a worker takes with it, and tells those who had to do with it.
    fn bury(&mut self, slot: usize, worker: worker::Worker) {
        let Some(instance) = &self.slots[slot] else { return };
        let lost = self.ledger.close(instance.function, &worker);
        self.part_with(id_of(slot, worker.serial), worker);
        if lost > 0
            && let Some(Instance { function, socket, .. }) = &self.slots[slot]
        {
            tracing::warn!(%function, socket, lost, "an instance went away with connections that it had not taken");
        }
    }

    fn tend_touched(&mut self) {
        if self.touched.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut touched = mem::take(&mut self.touched);
        for slot in touched.drain(..) {
            self.tend(slot, now);
        }
        self.touched = touched;
    }

    /// Drops workers that can't be trusted, begins the next pool connection if one is wanted, frees the slot of an
    /// instance that is gone.
    fn tend(&mut self, slot: usize, now: Instant) {
        if let Some(instance) = &mut self.slots[slot] {
            instance.prove(now);
        }
        while let Some(liar) = self.slots[slot].as_mut().and_then(Instance::take_liar) {
            if let Some(instance) = &mut self.slots[slot] {
                if !instance.is_backing_off() {
                    tracing::error!(function = %instance.function, socket = instance.socket, pid = liar.hello.pid,
                        "an instance says that it took more connections than it was given, and was dropped");
                }
                instance.back_off(now);
            }
            self.bury(slot, liar);
        }
        let Some(instance) = &mut self.slots[slot] else { return };
        if instance.should_connect(now)
            && let Some(discovery) = &self.discovery
        {
            self.serial = self.serial.wrapping_add(1);
            let source = Source::Pool { slot: slot as u32, serial: self.serial };
            let begun = discovery.connect(&instance.socket).map_err(anyhow::Error::from).and_then(|end| {
                self.poller.get_ref().watch(&end, source)?;
                Ok(end)
            });
            match begun {
                Ok(end) => instance.greet(self.serial, end),
                Err(error) => {
                    if !instance.is_backing_off() {
                        tracing::info!(function = %instance.function, socket = instance.socket, %error, "no instance is there yet");
                    }
                    instance.back_off(now);
                }
            }
        }
        self.retry_at = self.retry_at.into_iter().chain(instance.retry_at()).min();
        if instance.is_gone() {
            self.slots[slot] = None;
        }
    }

    fn retry(&mut self, now: Instant) {
        self.retry_at = None;
        if self.discovery.is_none()
            && let Err(error) = self.open_directory()
        {
            tracing::debug!(%error, "the functions' directory is not back yet");
            self.retry_at = Some(now + REOPEN_PAUSE);
        }
        for slot in 0..self.slots.len() {
            self.tend(slot, now);
        }
        debug_assert!(self.retry_at.is_none_or(|at| at > now), "the loop would turn without rest");
    }

    fn open_directory(&mut self) -> Result<(), Error> {
        let discovery = Discovery::open(&self.path)?;
        self.poller.get_ref().watch(&discovery, Source::Directory).map_err(Error::Poll)?;
        self.discovery = Some(discovery);
        self.read_directory(true);
        Ok(())
    }

    fn read_directory(&mut self, always: bool) {
        let Some(discovery) = &mut self.discovery else { return };
        let changes = match discovery.changes(always) {
            Ok(changes) => changes,
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "lost the functions' directory");
                let gone = discovery.forget();
                self.discovery = None;
                self.retry_at = Some(Instant::now());
                gone
            }
        };
        for change in changes {
            match change {
                Change::Appeared { function, socket } => self.appear(function, socket),
                Change::Disappeared { socket } => self.disappear(&socket),
            }
        }
    }

    fn appear(&mut self, function: FunctionName, socket: String) {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(Instance::new(function, socket));
        self.list(function, slot);
        self.tend(slot, Instant::now());
    }

    fn disappear(&mut self, socket: &str) {
        let listed = self.functions.values().flatten().copied();
        let found = listed
            .into_iter()
            .find(|&slot| self.slots[slot].as_ref().is_some_and(|instance| instance.socket == socket));
        let Some(slot) = found else { return };
        let Some(instance) = &mut self.slots[slot] else { return };
        tracing::info!(function = %instance.function, socket, "instance was taken out of the functions' directory");
        instance.unlist();
        if let Some(slots) = self.functions.get_mut(&instance.function) {
            slots.retain(|&listed| listed != slot);
        }
        self.tend(slot, Instant::now());
    }
}

#[cfg(test)]
mod tests;
