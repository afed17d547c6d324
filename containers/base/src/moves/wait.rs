//! Something that several tasks wait for, and that comes once.
use std::cell::Cell;

use tokio::sync::Notify;

pub struct Wait<T> {
    outcome: Cell<Option<T>>,
    came: Notify,
}

impl<T: Copy> Wait<T> {
    pub fn new() -> Self {
        Self { outcome: Cell::new(None), came: Notify::new() }
    }

    pub fn finish(&self, outcome: T) {
        self.outcome.set(Some(outcome));
        self.came.notify_waiters();
    }

    pub async fn outcome(&self) -> T {
        loop {
            let came = self.came.notified();
            if let Some(outcome) = self.outcome.get() {
                return outcome;
            }
            came.await;
        }
    }
}
