//! Keeps one function running until it is told to stop it.
use std::{io, time::Duration};

use common::FunctionName;
use tokio::{sync::watch, time::sleep};

use super::{
    backoff::Backoff,
    child::{Child, Life},
    program::Program,
    sockets::Listener,
};
use crate::logs::Log;

/// What the supervisor wants; each one includes what stands before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Run,
    Stop,
    Kill,
}

pub struct Keeper {
    program: Program,
    /// Outlives the processes, so that no pool connection is lost while none runs.
    listener: Listener,
    child: Child,
    log: Log,
}

impl Keeper {
    /// Must be called within a runtime, in the supervisor's main thread.
    pub fn start(program: Program, listener: Listener, log: Log) -> io::Result<Self> {
        let child = Child::spawn(&program, listener.socket(), log.clone())?;
        tracing::debug!(function = %program.name, pid = child.pid().as_raw_pid(), "started");
        Ok(Self { program, listener, child, log })
    }

    pub fn name(&self) -> FunctionName {
        self.program.name
    }

    pub async fn keep(mut self, mut orders: watch::Receiver<Order>) {
        let mut backoff = Backoff::default();
        loop {
            tokio::select! {
                biased;
                () = self.child.ended() => {}
                _ = orders.changed() => return self.stop(orders).await,
            }
            let Some(child) = self.restart(&mut backoff, &mut orders).await else { return };
            self.child = child;
        }
    }

    /// The next process, or `None` if none is wanted.
    async fn restart(&mut self, backoff: &mut Backoff, orders: &mut watch::Receiver<Order>) -> Option<Child> {
        let name = self.program.name;
        let mut lived = match self.child.reap() {
            Ok(Life { status, length }) => {
                tracing::warn!(function = %name, %status, after = ?length, "ended; it is started again");
                length
            }
            Err(error) => {
                tracing::error!(function = %name, %error, "can't learn how it ended; it is started again");
                Duration::ZERO
            }
        };
        loop {
            let wait = backoff.next(lived);
            if !wait.is_zero() {
                tracing::info!(function = %name, ?wait, "waits before its next start");
                tokio::select! {
                    () = sleep(wait) => {}
                    _ = orders.changed() => return None,
                }
            }
            match Child::spawn(&self.program, self.listener.socket(), self.log.clone()) {
                Ok(child) => {
                    tracing::info!(function = %name, pid = child.pid().as_raw_pid(), "runs again");
                    return Some(child);
                }
                Err(error) => tracing::error!(function = %name, %error, "can't be started again"),
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
        let name = self.program.name;
        match self.child.reap() {
            Ok(Life { status, .. }) if status.success() => tracing::info!(function = %name, "stopped"),
            Ok(Life { status, .. }) => tracing::warn!(function = %name, %status, "stopped"),
            Err(error) => tracing::error!(function = %name, %error, "can't learn how it ended"),
        }
    }
}
