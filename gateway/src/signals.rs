//! The signals that end a gateway: the first asks it to, the second hurries it.
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    came: usize,
}

impl Signals {
    /// Must be called within a runtime.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            came: 0,
        })
    }

    /// Waits for the next one; none is lost when the wait is given up.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        self.came += 1;
    }

    /// Whether somebody has lost patience.
    pub fn hurry(&self) -> bool {
        self.came > 1
    }
}
