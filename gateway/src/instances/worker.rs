//! One pool connection: what was sent on it, and how much of that is still in its queue.
use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use handoff::{
    Connection, Error, FromInstance, GatewayEnd, Hello, MessageBuffer, Move, SendError, StatusReader,
};
use tokio::time::Instant;

use super::{backlog::Backlog, leases::Leases};

/// Connections in flight on one pool connection: below the 278 one-connection messages that a send buffer of the
/// default size holds, so that it is this bound that is met and not the kernel's.
pub const WINDOW: u64 = 256;

/// A worker that has something in its queue and took nothing for so long doesn't run: one that does needs no
/// millisecond, and a busy host not much more.
const STALLED_AFTER: Duration = Duration::from_millis(50);

pub struct Worker {
    /// Tells this pool connection's events from others'.
    pub serial: u32,
    pub hello: Hello,
    end: GatewayEnd,
    /// Shared with whoever counts, who may look at it later than the worker lives.
    status: Arc<StatusReader>,
    sent: u64,
    state: State,
    /// As of the last `refresh`, with what was assigned since.
    queued: u64,
    open: u64,
    stalled: bool,
    /// What it had taken when it was last seen to take something or to have nothing to take, and when that was.
    taken: u64,
    moved_at: Instant,
    /// Its places at other workers.
    pub leases: Leases,
    /// What was to be said while its queue was full.
    pub backlog: Backlog,
    waits_to_be_drained: bool,
}

/// What a worker has to do; the lesser is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    pub stalled: bool,
    pub connections: u64,
}

impl Load {
    /// What the load is to an instance of this weight, comparable with those of others.
    pub fn for_weight(self, weight: u32) -> Self {
        /// Keeps one connection more or less visible at the largest weight.
        const SCALE: u64 = 10_000;
        Self { connections: self.connections * SCALE / u64::from(weight), ..self }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Taking,
    /// Takes nothing more; what is in its queue it may still take.
    Draining,
    /// Says that it took more than it was sent.
    Lying,
}

impl Worker {
    pub fn new(serial: u32, end: GatewayEnd, hello: Hello, status: StatusReader) -> Self {
        Self {
            serial,
            hello,
            end,
            status: Arc::new(status),
            sent: 0,
            state: State::Taking,
            queued: 0,
            open: 0,
            stalled: false,
            taken: 0,
            moved_at: Instant::now(),
            leases: Leases::default(),
            backlog: Backlog::default(),
            waits_to_be_drained: false,
        }
    }

    /// Reads the status page.
    pub fn refresh(&mut self, now: Instant) {
        let taken = self.status.taken();
        match self.sent.checked_sub(taken) {
            Some(queued) => self.queued = queued,
            None => self.state = State::Lying,
        }
        if taken != self.taken || self.queued == 0 {
            (self.taken, self.moved_at) = (taken, now);
        }
        self.stalled = now.duration_since(self.moved_at) >= STALLED_AFTER;
        if self.state == State::Taking && self.status.draining() {
            self.state = State::Draining;
        }
        self.open = self.status.open_connections().into();
    }

    /// How much it has to do; `None` when it can't take another connection.
    pub fn load(&self) -> Option<Load> {
        let connections = self.queued + self.waiting() + self.open;
        let load = Load { stalled: self.stalled, connections };
        (self.is_taking() && self.queued < WINDOW).then_some(load)
    }

    pub fn is_taking(&self) -> bool {
        self.state == State::Taking
    }

    pub fn is_lying(&self) -> bool {
        self.state == State::Lying
    }

    /// Counts a connection that will be sent.
    pub fn assign(&mut self) {
        self.queued += 1;
    }

    /// Takes back what was assigned and not sent, and looks full until the next `refresh`.
    pub fn fill(&mut self) {
        self.queued = WINDOW;
    }

    /// Connections that were sent, ever.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// What the worker counts.
    pub fn page(&self) -> Arc<StatusReader> {
        Arc::clone(&self.status)
    }

    /// Connections that move to it and wait for room in its queue.
    pub fn waiting(&self) -> u64 {
        self.backlog.moved() as u64
    }

    /// Connections that were sent and not taken: what its death would lose.
    pub fn in_flight(&self) -> u64 {
        self.sent.saturating_sub(self.status.taken())
    }

    pub fn send(&mut self, connections: &[Connection], sockets: &[BorrowedFd]) -> Result<(), SendError> {
        let result = self.end.send(connections, sockets);
        match &result {
            Ok(sent) => self.sent += *sent as u64,
            Err(SendError::Closed) => self.state = State::Draining,
            Err(_) => self.fill(),
        }
        result.map(|_| ())
    }

    /// Sends what fits into one message, and says how much that was.
    pub fn send_moved(&mut self, moves: &[Move<'_>], sockets: &[BorrowedFd<'_>]) -> Result<usize, SendError> {
        let result = self.end.send_moved(moves, sockets);
        match &result {
            Ok(sent) => self.count_sent(*sent as u64),
            Err(SendError::Closed) => self.state = State::Draining,
            Err(_) => self.fill(),
        }
        result
    }

    pub fn count_sent(&mut self, sent: u64) {
        self.sent += sent;
        self.queued += sent;
    }

    pub fn end(&self) -> &GatewayEnd {
        &self.end
    }

    pub fn receive<'a>(&self, buffer: &'a mut MessageBuffer) -> Result<FromInstance<'a>, Error> {
        self.end.receive(buffer)
    }

    /// It takes nothing new, and waits to hear that nobody will send it anything.
    pub fn begin_draining(&mut self) {
        self.waits_to_be_drained = true;
        if self.state == State::Taking {
            self.state = State::Draining;
        }
    }

    pub fn waits_to_be_drained(&self) -> bool {
        self.waits_to_be_drained
    }

    pub fn note_drained(&mut self) {
        self.waits_to_be_drained = false;
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}
