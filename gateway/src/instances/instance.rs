//! One instance of a function: its pool connections, of which there should be one for each of its workers.
use std::time::Duration;

use common::FunctionName;
use handoff::{Error, GatewayEnd, Greeting as First};
use tokio::time::Instant;

use super::{
    choice,
    worker::{Load, Worker},
};

/// The first pause before a connection that failed is tried again; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest pause, because a function that comes back should be served again within this.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Processes of an instance whose pool connections are kept at once: each but the last takes nothing more and has yet to
/// close its own. One that never does must not make the gateway open ever more.
const GENERATIONS: usize = 4;
/// One that breaks off sooner after its HELLO is tried again as if it had never come.
const PROVEN_AFTER: Duration = Duration::from_secs(1);

pub struct Instance {
    pub function: FunctionName,
    pub socket: String,
    /// Tells this process from all others that this gateway has had to do with; a new one with each HELLO of a new
    /// process.
    pub number: u64,
    /// Its share, compared with the function's other instances.
    pub weight: u32,
    pub workers: Vec<Worker>,
    /// A pool connection whose HELLO has not come. One at a time, because HELLO says how many more are wanted.
    greeting: Option<Greeting>,
    wanted: usize,
    /// Its socket is still in the directory; one that isn't gets nothing new.
    listed: bool,
    pause: Duration,
    /// When its last HELLO came, until it has proved itself.
    greeted_at: Option<Instant>,
    retry_at: Option<Instant>,
    refreshed_in: u64,
    life: Life,
}

/// Which process serves, and how often that was another one.
#[derive(Default)]
struct Life {
    pid: Option<u32>,
    /// All its pool connections have reached their end, as they do when a process ends.
    ended: bool,
    restarts: u64,
}

/// One look at the loads.
#[derive(Clone, Copy)]
pub struct Round {
    pub number: u64,
    pub at: Instant,
}

struct Greeting {
    serial: u32,
    end: GatewayEnd,
}

/// What an event on a pool connection meant.
pub enum Outcome {
    Nothing,
    /// Another worker takes connections.
    Up {
        pid: u32,
        /// By another process than before.
        restarted: bool,
    },
    /// A worker that said HELLO before has said something.
    Said,
    /// It ended before HELLO.
    NotGreeted,
    Failed(Error),
}

impl Instance {
    pub fn new(function: FunctionName, socket: String) -> Self {
        Self {
            function,
            socket,
            number: 0,
            weight: 1,
            workers: Vec::new(),
            greeting: None,
            wanted: 1,
            listed: true,
            pause: Duration::ZERO,
            greeted_at: None,
            retry_at: None,
            refreshed_in: 0,
            life: Life::default(),
        }
    }

    pub fn is_listed(&self) -> bool {
        self.listed
    }

    pub fn wanted(&self) -> usize {
        self.wanted
    }

    pub fn pid(&self) -> Option<u32> {
        self.life.pid
    }

    pub fn restarts(&self) -> u64 {
        self.life.restarts
    }

    /// Reads the status pages, once in a round; true when it did and some worker takes nothing more.
    pub fn refresh(&mut self, round: Round) -> bool {
        if self.refreshed_in == round.number {
            return false;
        }
        self.refreshed_in = round.number;
        self.workers.iter_mut().for_each(|worker| worker.refresh(round.at));
        self.workers.iter().any(|worker| !worker.is_taking())
    }

    /// The worker that has the least to do, and how much that is.
    pub fn least_loaded(&self) -> Option<(usize, Load)> {
        choice::of_all(self.workers.iter().map(Worker::load))
    }

    pub fn taking(&self) -> usize {
        self.workers.iter().filter(|worker| worker.is_taking()).count()
    }

    /// Whether another pool connection should be begun now.
    pub fn should_connect(&self, now: Instant) -> bool {
        self.lacks_workers() && self.retry_at.is_none_or(|at| at <= now)
    }

    /// When another pool connection should be tried; `None` while one waits for its HELLO, however late that is.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at.filter(|_| self.lacks_workers())
    }

    fn lacks_workers(&self) -> bool {
        self.listed
            && self.greeting.is_none()
            && self.taking() < self.wanted
            && self.workers.len() < GENERATIONS * self.wanted
    }

    /// Waits for HELLO on a new pool connection.
    pub fn greet(&mut self, serial: u32, end: GatewayEnd) {
        self.retry_at = None;
        self.greeting = Some(Greeting { serial, end });
    }

    /// Waits before the next attempt, longer each time until one succeeds.
    pub fn back_off(&mut self, now: Instant) {
        self.pause = (2 * self.pause).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.retry_at = Some(now + self.pause);
    }

    /// Forgets earlier failures once a worker has lived for a while.
    pub fn prove(&mut self, now: Instant) {
        if self.greeted_at.take_if(|at| now.saturating_duration_since(*at) >= PROVEN_AFTER).is_some() {
            self.pause = Duration::ZERO;
        }
    }

    /// Whether it has said HELLO and not proved itself since.
    pub fn is_unproven(&self) -> bool {
        self.greeted_at.is_some()
    }

    /// Whether attempts have failed since it last proved itself.
    pub fn is_backing_off(&self) -> bool {
        !self.pause.is_zero()
    }

    /// Its socket is gone from the directory: it gets nothing new, and what it has in its queues it may still take.
    pub fn unlist(&mut self) {
        self.listed = false;
        self.greeting = None;
        self.retry_at = None;
    }

    pub fn is_gone(&self) -> bool {
        !self.listed && self.workers.is_empty()
    }

    /// Takes out a worker whose counters can't be true.
    pub fn take_liar(&mut self) -> Option<Worker> {
        let index = self.workers.iter().position(Worker::is_lying)?;
        Some(self.workers.swap_remove(index))
    }

    /// Looks at the pool connection of this serial number, which epoll says is readable. `number` is a new one.
    pub fn look(&mut self, serial: u32, number: u64, now: Instant) -> Outcome {
        match self.greeting.take_if(|greeting| greeting.serial == serial) {
            Some(greeting) => self.look_for_hello(greeting, number, now),
            None if self.workers.iter().any(|worker| worker.serial == serial) => Outcome::Said,
            None => Outcome::Nothing,
        }
    }

    /// Takes out a worker whose pool connection is over.
    pub fn take_worker(&mut self, serial: u32) -> Option<Worker> {
        let index = self.workers.iter().position(|worker| worker.serial == serial)?;
        Some(self.workers.swap_remove(index))
    }

    /// A pool connection has reached its end in order.
    pub fn note_end(&mut self) {
        self.life.ended = self.workers.is_empty();
    }

    fn look_for_hello(&mut self, greeting: Greeting, number: u64, now: Instant) -> Outcome {
        match greeting.end.receive_hello() {
            Ok(First::Hello(hello, status)) => {
                let same_process = self.workers.iter().any(|worker| worker.hello.pid == hello.pid);
                if !same_process {
                    self.number = number;
                }
                self.greeted_at = Some(now);
                self.wanted = hello.workers.into();
                self.workers.push(Worker::new(greeting.serial, greeting.end, hello, status));
                // So that this round's choices see it.
                self.refreshed_in = 0;
                Outcome::Up { pid: hello.pid, restarted: self.life.greet(hello.pid) }
            }
            Ok(First::WouldBlock) => {
                self.greeting = Some(greeting);
                Outcome::Nothing
            }
            Ok(First::Closed) => {
                self.back_off(now);
                Outcome::NotGreeted
            }
            Err(error) => {
                self.back_off(now);
                Outcome::Failed(error)
            }
        }
    }
}

impl Life {
    /// Notes who says HELLO; true when that is another process than before, even if it has the same number, as the
    /// first process of a container has.
    fn greet(&mut self, pid: u32) -> bool {
        let restarted = self.pid.is_some_and(|before| before != pid || self.ended);
        *self = Self { pid: Some(pid), ended: false, restarts: self.restarts + u64::from(restarted) };
        restarted
    }
}
