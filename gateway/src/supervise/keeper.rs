//! Keeps one instance of a function running until it is told to stop it.
use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use handoff::{GatewayEnd, Greeting, TicketKeysWriter};
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};

use super::{
    backoff::Backoff,
    child::{Child, Life},
    memory::Bounded,
    program::Program,
    sockets::Listener,
};
use crate::{
    logs::Log,
    readable::{OwnsDescriptor, watch as watch_readable},
};

/// How soon it is tried again whether an instance is up, and how long one that hung up has to die.
const UP_POLL: Duration = Duration::from_millis(50);

/// What the supervisor wants; each one includes what stands before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Run,
    Stop,
    Kill,
}

/// Tells instances apart; never used again.
pub type Id = u64;

/// What the supervisor hears of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It takes pool connections.
    Up(Id),
    /// Its process has ended before that.
    Failed(Id),
}

pub struct Keeper {
    id: Id,
    child: Child,
    /// After the process that is in it.
    bounded: Option<Bounded>,
    /// Outlives the processes, so that no pool connection is lost while none runs.
    listener: Listener,
    program: Arc<Program>,
    /// Those of all its function's instances.
    ticket_keys: Option<Arc<TicketKeysWriter>>,
    log: Log,
    events: mpsc::UnboundedSender<Event>,
}

// SAFETY: the end of a pool connection owns its descriptor and never replaces it.
unsafe impl OwnsDescriptor for GatewayEnd {}

impl Keeper {
    /// Must be called within a runtime, in the supervisor's main thread.
    pub fn start(
        id: Id,
        program: Arc<Program>,
        ticket_keys: Option<Arc<TicketKeysWriter>>,
        listener: Listener,
        bounded: Option<Bounded>,
        log: Log,
        events: mpsc::UnboundedSender<Event>,
    ) -> io::Result<Self> {
        let child = spawn(&program, ticket_keys.as_deref(), &listener, bounded.as_ref(), &log)?;
        tracing::debug!(instance = listener.label(), pid = child.pid().as_raw_pid(), "started");
        Ok(Self { id, child, bounded, listener, program, ticket_keys, log, events })
    }

    pub fn id(&self) -> Id {
        self.id
    }

    pub fn label(&self) -> &str {
        self.listener.label()
    }

    pub async fn keep(mut self, mut orders: watch::Receiver<Order>) {
        let mut backoff = Backoff::new(self.program.restart_limit);
        let mut is_up = false;
        loop {
            tokio::select! {
                biased;
                () = self.child.ended() => {}
                _ = orders.changed() => return self.stop(orders).await,
                () = up(&self.listener), if !is_up => {
                    is_up = true;
                    self.tell(Event::Up(self.id));
                    continue;
                }
            }
            if !is_up {
                self.tell(Event::Failed(self.id));
            }
            let Some(child) = self.restart(&mut backoff, &mut orders).await else { return };
            self.child = child;
        }
    }

    fn tell(&self, event: Event) {
        // Who is stopping hears of nothing any more.
        let _ = self.events.send(event);
    }

    /// The next process, or `None` if none is wanted.
    async fn restart(&mut self, backoff: &mut Backoff, orders: &mut watch::Receiver<Order>) -> Option<Child> {
        let mut lived = match self.child.reap() {
            Ok(Life { status, length }) => {
                let instance = self.listener.label();
                tracing::warn!(instance, %status, after = ?length, "ended; it is started again");
                length
            }
            Err(error) => {
                tracing::error!(instance = self.label(), %error, "can't learn how it ended; it is started again");
                Duration::ZERO
            }
        };
        if self.bounded.as_mut().is_some_and(Bounded::was_exceeded) {
            tracing::error!(
                instance = self.label(),
                "was killed, because it needed more than its memory_max"
            );
        }
        let instance = self.listener.label();
        loop {
            let Some(wait) = backoff.next(lived) else {
                tracing::error!(
                    instance,
                    "is given up, because it failed too often; a reload starts it again"
                );
                self.listener.withdraw();
                return None;
            };
            if !wait.is_zero() {
                tracing::info!(instance, ?wait, "waits before its next start");
                tokio::select! {
                    () = sleep(wait) => {}
                    _ = orders.changed() => return None,
                }
            }
            let ticket_keys = self.ticket_keys.as_deref();
            match spawn(&self.program, ticket_keys, &self.listener, self.bounded.as_ref(), &self.log) {
                Ok(child) => {
                    tracing::info!(instance, pid = child.pid().as_raw_pid(), "runs again");
                    return Some(child);
                }
                Err(error) => tracing::error!(instance, %error, "can't be started again"),
            }
            lived = Duration::ZERO;
        }
    }

    async fn stop(mut self, mut orders: watch::Receiver<Order>) {
        // First, so that the gateway looks for it no more; pool connections that it has are served on.
        self.listener.withdraw();
        loop {
            match *orders.borrow_and_update() {
                Order::Run | Order::Stop => self.child.terminate(),
                Order::Kill => self.child.kill(),
            }
            tokio::select! {
                biased;
                () = self.child.ended() => break,
                _ = orders.changed() => {}
            }
        }
        let instance = self.listener.label();
        match self.child.reap() {
            Ok(Life { status, .. }) if status.success() => tracing::info!(instance, "stopped"),
            Ok(Life { status, .. }) => tracing::warn!(instance, %status, "stopped"),
            Err(error) => tracing::error!(instance, %error, "can't learn how it ended"),
        }
    }
}

fn spawn(
    program: &Program,
    ticket_keys: Option<&TicketKeysWriter>,
    listener: &Listener,
    bounded: Option<&Bounded>,
    log: &Log,
) -> io::Result<Child> {
    let ticket_keys = ticket_keys.map(AsFd::as_fd);
    let cgroup = bounded.map(Bounded::entrance);
    Child::spawn(program, listener.label(), listener.socket(), ticket_keys, cgroup, log.clone())
}

/// Done when the instance takes pool connections: it greets whoever connects, as it will greet the gateway.
async fn up(listener: &Listener) {
    loop {
        if let Some(Ok(end)) = listener.path().map(GatewayEnd::connect)
            && greets(end).await
        {
            return;
        }
        sleep(UP_POLL).await;
    }
}

async fn greets(end: GatewayEnd) -> bool {
    let Ok(end) = watch_readable(end) else { return false };
    loop {
        let Ok(mut ready) = end.readable().await else { return false };
        match end.get_ref().receive_hello() {
            Ok(Greeting::Hello(..)) => return true,
            Ok(Greeting::WouldBlock) => ready.clear_ready(),
            Ok(Greeting::Closed) => {
                // It let somebody in and didn't know him, as with --gateway-uid; unless it is dying, which shows soon.
                sleep(UP_POLL).await;
                return true;
            }
            Err(_) => return false,
        }
    }
}
