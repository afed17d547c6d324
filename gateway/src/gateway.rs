//! The gateway's loop: accept, judge, hand over.
use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use common::{Protocol, Refusal, Verdict, limits::ROUTES};
use handoff::Purpose;
use nix::time::{ClockId, clock_gettime};
use socket2::Socket;
use tokio::{io::unix::AsyncFd, sync::mpsc, task::yield_now, time::Instant};

use crate::{
    admin::snapshot::{Inquiry, Snapshot},
    counters::Counters,
    deadline::at,
    instances::{Instances, Ready},
    listener,
    mode::{Chain, Sockmap},
    moderation::Moderation,
    peek::{Peek, Waiting},
    pending::Pending,
    readable::{OwnsDescriptor, readable, watch},
    reload::Following,
    routes::{Generations, Routes},
    signals::Signals,
};

mod verdicts;

/// One turn accepts at most this many, so that late verdicts and deadlines get their turn under load.
const ACCEPT_BATCH: usize = 64;

/// How long a connection waits for an instance that is being restarted.
const INSTANCE_PATIENCE: Duration = Duration::from_millis(100);

/// Connections that wait for an instance; more than this in the patience's time is an outage, not a restart.
const UNPLACED: usize = 4096;

/// How much longer than a connection may be without a verdict the routes are kept that its scanner may have begun with.
const ROUTES_MARGIN: Duration = Duration::from_secs(1);

/// How long accepting pauses when descriptors or memory have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a gateway that stops waits for what had begun: a client whose handshake was under way has sent its request by
/// then.
const CLOSING_PATIENCE: Duration = Duration::from_secs(2);

/// How often it looks whether all has come.
const CLOSING_POLL: Duration = Duration::from_millis(10);

pub struct Parts {
    pub http: Socket,
    pub https: Socket,
    pub routes: Routes,
    pub following: Following,
    pub instances: Instances,
    pub sockmap: Option<Sockmap>,
    pub head_timeout: Duration,
    /// Connections without a verdict that may be held at once.
    pub pending_capacity: usize,
    /// Descriptors from this number on are not for clients.
    pub descriptor_ceiling: RawFd,
    /// Whoever wants to know how things are.
    pub inquiries: mpsc::Receiver<Inquiry>,
}

pub struct Gateway {
    http: AsyncFd<Socket>,
    https: AsyncFd<Socket>,
    routes: Generations,
    following: Following,
    head_timeout: Duration,
    /// When a configuration that found no room in the kernel's table is to be read again.
    reload_at: Option<Instant>,
    instances: Instances,
    sockmap: Option<AsyncFd<Events>>,
    peek: Peek,
    waiting: AsyncFd<Waiting>,
    pending: Pending,
    /// What has a verdict and leaves with the next batch.
    ready: Vec<Ready>,
    /// What found no instance, the oldest first.
    unplaced: VecDeque<Ready>,
    /// Whose connections are accepted first in the next turn.
    first: Protocol,
    paused_until: Option<Instant>,
    descriptor_ceiling: RawFd,
    inquiries: mpsc::Receiver<Inquiry>,
    not_enrolled_was_said: bool,
    moderation: Moderation,
    /// Until when what is under way may still arrive, once the gateway was told to stop.
    closes_at: Option<Instant>,
    next_id: u64,
    counters: Counters,
}

enum Wake {
    Signal,
    Reload,
    Accept,
    Events,
    Complete,
    Instances,
    Timer,
    Inquiry(Inquiry),
}

impl Gateway {
    /// Must be called within a runtime.
    pub fn new(parts: Parts) -> io::Result<Self> {
        Ok(Self {
            http: watch(parts.http)?,
            https: watch(parts.https)?,
            routes: Generations::new(parts.routes),
            following: parts.following,
            head_timeout: parts.head_timeout,
            reload_at: None,
            instances: parts.instances,
            sockmap: parts.sockmap.map(|sockmap| watch(Events(sockmap))).transpose()?,
            peek: Peek::new(),
            waiting: watch(Waiting::new()?)?,
            pending: Pending::new(parts.head_timeout, parts.pending_capacity),
            ready: Vec::with_capacity(ACCEPT_BATCH),
            unplaced: VecDeque::new(),
            first: Protocol::Http,
            paused_until: None,
            descriptor_ceiling: parts.descriptor_ceiling,
            inquiries: parts.inquiries,
            not_enrolled_was_said: false,
            moderation: Moderation::new(Instant::now()),
            closes_at: None,
            next_id: 0,
            counters: Counters::default(),
        })
    }

    /// Serves until a signal comes, and what is under way then until the next one; then gives back the kernel path, whose
    /// connections may outlive the gateway.
    pub async fn run(mut self, signals: &mut Signals) -> Option<Sockmap> {
        loop {
            match self.wake(signals).await {
                Wake::Signal if self.closes_at.is_some() => break,
                Wake::Signal => self.close(),
                Wake::Reload => self.reload(Instant::now()),
                Wake::Accept => {}
                Wake::Events => self.take_events(),
                Wake::Complete => self.look_again(),
                Wake::Instances => {
                    self.retry_unplaced();
                    self.take_orphans();
                }
                Wake::Timer => self.expire(Instant::now()),
                Wake::Inquiry(inquiry) => self.answer(inquiry),
            }
            let now = Instant::now();
            let before = self.counters.accepted;
            let more = self.accept_from_both(now);
            self.hand_over();
            self.moderation.turn(now, self.counters.accepted - before);
            if self.is_done() {
                break;
            }
            if more {
                // Under load the loop never waits, and the runtime asks epoll for other events only while it does.
                yield_now().await;
            }
        }
        self.refuse_all_held();
        self.counters.log();
        self.sockmap.map(|events| events.into_inner().0)
    }

    /// Lets no further connection begin; those that have begun are served as ever.
    fn close(&mut self) {
        for listener in [&self.http, &self.https] {
            if let Err(error) = listener::stop_listening(listener.get_ref()) {
                tracing::warn!(%error, "connections that come until the gateway has stopped are reset");
            }
        }
        self.closes_at = Some(Instant::now() + CLOSING_PATIENCE);
        tracing::info!("stops: what has begun is served, and nothing new");
    }

    fn is_done(&self) -> bool {
        let Some(closes_at) = self.closes_at else { return false };
        let is_idle = || {
            self.pending.is_empty()
                && self.unplaced.is_empty()
                && [&self.http, &self.https].iter().all(|listener| is_quiet(listener.get_ref()))
        };
        Instant::now() >= closes_at || is_idle()
    }

    async fn wake(&mut self, signals: &mut Signals) -> Wake {
        let accepting = self.paused_until.is_none();
        let deadline = self.next_deadline();
        tokio::select! {
            // Signals first; then what ends waiting, before more is let in.
            biased;
            () = signals.next() => Wake::Signal,
            () = self.following.asked() => Wake::Reload,
            _ = readable(self.sockmap.as_ref()) => Wake::Events,
            _ = readable(Some(&self.waiting)) => Wake::Complete,
            () = self.instances.changed() => Wake::Instances,
            () = at(deadline) => Wake::Timer,
            Some(inquiry) = self.inquiries.recv() => Wake::Inquiry(inquiry),
            _ = readable(Some(&self.http)), if accepting => Wake::Accept,
            _ = readable(Some(&self.https)), if accepting => Wake::Accept,
        }
    }

    /// Takes new verdicts from the routes of the configuration as it is now. Connections keep the verdicts that they
    /// have, and those whose first flight is being scanned are judged by the routes that it began with.
    fn reload(&mut self, now: Instant) {
        self.reload_at = None;
        let Some(config) = self.following.read() else { return };
        let routes = match Routes::of(&config, self.routes.next_generation()) {
            Ok(routes) => routes,
            Err(error) => {
                return tracing::error!(%error, "the configuration is refused; the running one stays");
            }
        };
        if self.routes.entries() + routes.len() > ROUTES {
            self.reload_at = self.routes.next_retirement();
            return tracing::info!(
                "the new configuration waits until connections have let go of former routes"
            );
        }
        if let Some(events) = &mut self.sockmap
            && let Err(error) = events.get_mut().0.follow(&routes)
        {
            return tracing::error!(error = %Chain(&error), "the kernel doesn't take the new routes; the running ones stay");
        }
        tracing::info!(
            functions = config.functions.len(),
            generation = routes.generation(),
            "the configuration was read again"
        );
        self.instances.set_weights(config.weights());
        self.instances.set_known(config.functions.keys().copied());
        self.routes.replace(routes, now + self.head_timeout + ROUTES_MARGIN);
    }

    fn retire_routes(&mut self, now: Instant) {
        while let Some(routes) = self.routes.take_retired(now) {
            if let Some(events) = &mut self.sockmap {
                events.get_mut().0.kernel.withdraw(routes.entries().map(|(key, _)| key));
            }
        }
    }

    fn answer(&mut self, inquiry: Inquiry) {
        let snapshot = Snapshot {
            counters: self.counters.clone(),
            routed: self.routes.current().functions().collect(),
            functions: self.instances.view(),
            batches: self.instances.batches(),
            moves: self.instances.moves().clone(),
            pending: self.pending.len(),
            unplaced: self.unplaced.len(),
        };
        // Whoever asked may have lost patience.
        let _ = inquiry.send(snapshot);
    }

    /// Sends what is ready; what finds no instance waits for one.
    fn hand_over(&mut self) {
        if self.ready.is_empty() {
            return;
        }
        let counters = &mut self.counters;
        self.instances.hand_over(&mut self.ready, |connection| match connection.purpose {
            Purpose::Serve(_) => counters.served += 1,
            Purpose::Refuse(refusal) => counters.refused(refusal),
        });
        if self.ready.is_empty() {
            return;
        }
        let wait_until = Instant::now() + INSTANCE_PATIENCE;
        for mut ready in self.ready.drain(..) {
            ready.wait_until.get_or_insert(wait_until);
            self.unplaced.push_back(ready);
        }
        let excess = self.unplaced.len().saturating_sub(UNPLACED);
        self.give_up(excess);
    }

    /// Instances have come or have room again.
    fn retry_unplaced(&mut self) {
        self.ready.extend(self.unplaced.drain(..));
    }

    /// Connections that moved to nobody are refused; how long they were served before is no wait.
    fn take_orphans(&mut self) {
        let now_ns = monotonic_ns();
        self.ready.extend(self.instances.take_orphans().map(|mut orphan| {
            orphan.connection.accepted_at_ns = now_ns;
            orphan
        }));
    }

    /// Nobody took the oldest ones in time: they get a refusal, and what can't even be refused is closed.
    fn give_up(&mut self, count: usize) {
        for mut ready in self.unplaced.drain(..count) {
            match ready.connection.purpose {
                Purpose::Serve(_) => {
                    ready.connection.purpose = Purpose::Refuse(Refusal::Unavailable);
                    ready.wait_until = None;
                    self.ready.push(ready);
                }
                Purpose::Refuse(_) => self.counters.dropped += 1,
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = (!self.has_descriptors()).then(|| now + ACCEPT_PAUSE);
        }
        while let Some((cookie, accepted)) = self.pending.take_expired(now) {
            let verdict = self.last_word(cookie, &accepted);
            self.release(accepted, verdict);
        }
        let given_up = self
            .unplaced
            .iter()
            .take_while(|ready| ready.wait_until.is_none_or(|until| until <= now))
            .count();
        self.give_up(given_up);
        // Last: what was held until now may have a verdict that they are needed for.
        self.retire_routes(now);
        if self.reload_at.is_some_and(|at| at <= now) {
            self.reload(now);
        }
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        let unplaced = self.unplaced.front().and_then(|ready| ready.wait_until);
        let routes = self.routes.next_retirement();
        // Nothing announces that a handshake was given up.
        let closing = self.closes_at.map(|closes_at| closes_at.min(Instant::now() + CLOSING_POLL));
        let pending = self.pending.next_deadline();
        [pending, unplaced, self.paused_until, routes, closing].into_iter().flatten().min()
    }

    /// At the end nobody is left without an answer.
    fn refuse_all_held(&mut self) {
        while let Some((_, accepted)) = self.pending.take_oldest() {
            self.release(accepted, Verdict::Refused(Refusal::Unavailable));
        }
        self.retry_unplaced();
        self.hand_over();
        self.give_up(self.unplaced.len());
        self.hand_over();
        self.give_up(self.unplaced.len());
    }
}

/// The kernel path as something that becomes readable with a late verdict.
struct Events(Sockmap);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.kernel.as_raw_fd()
    }
}

// SAFETY: the kernel path keeps its ring for as long as it lives.
unsafe impl OwnsDescriptor for Events {}

/// Nobody waits to be accepted, or is about to.
fn is_quiet(listener: &Socket) -> bool {
    // The second question is the dear one; a handshake that is complete between it and the first is seen by the third.
    !listener::has_waiting(listener) && !listener::is_half_open(listener) && !listener::has_waiting(listener)
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
