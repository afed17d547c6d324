//! How connections go on at another instance of their function when this one stops.
use std::{cell::Cell, rc::Rc, time::Duration};

use common::Protocol;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};

use super::{Mover, Place};

/// Connections that look for a place at once: as many as leave with one message. Each answer wakes all who wait for it,
/// which must not be everybody.
const TURNS: usize = handoff::MAX_MOVES;

/// How long another instance is looked for: one that was there and is not may be starting again, or full for a moment,
/// and a busy host slow to answer.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// How soon it is looked again.
const PAUSE: Duration = Duration::from_millis(20);

/// One for each worker; by the default nothing goes on.
#[derive(Clone)]
pub struct Succession(Rc<Inner>);

#[derive(Default)]
struct Inner {
    mover: Mover,
    http: Line,
    https: Line,
}

/// The connections of one protocol, which wait for their turn.
struct Line {
    turns: Semaphore,
    prospect: Cell<Prospect>,
    /// Since when nobody has found a place; each one's own search may be too short to tell.
    failing_since: Cell<Option<Instant>>,
}

/// What connections can expect when the function stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prospect {
    /// Nobody has looked, or who has waits for the answer.
    #[default]
    Unknown,
    /// Another instance takes them.
    Successor,
    /// They end here.
    Nobody,
}

impl Default for Line {
    fn default() -> Self {
        Self { turns: Semaphore::new(TURNS), prospect: Cell::default(), failing_since: Cell::default() }
    }
}

impl Default for Succession {
    fn default() -> Self {
        Self::new(Mover::default())
    }
}

impl Succession {
    pub fn new(mover: Mover) -> Self {
        let succession = Inner { mover, ..Inner::default() };
        if !succession.mover.moves() {
            [&succession.http, &succession.https]
                .into_iter()
                .for_each(|line| line.prospect.set(Prospect::Nobody));
        }
        Self(Rc::new(succession))
    }

    /// A place at another instance; `None` once nobody takes any.
    pub async fn place(&self, protocol: Protocol) -> Option<Place> {
        let line = self.line(protocol);
        let _turn = line.turns.acquire().await.ok()?;
        let place = self.find(protocol).await;
        if place.is_none() {
            line.prospect.set(Prospect::Nobody);
            // Everybody behind learns it without asking.
            line.turns.close();
        } else if !line.turns.is_closed() {
            line.prospect.set(Prospect::Successor);
        }
        place
    }

    async fn find(&self, protocol: Protocol) -> Option<Place> {
        let line = self.line(protocol);
        loop {
            let begun = Instant::now();
            let reserved = self.0.mover.reserve_successor(protocol, PATIENCE).await.ok();
            if reserved.is_some() {
                line.failing_since.set(None);
                return reserved;
            }
            let since = line.failing_since.get().unwrap_or(begun);
            line.failing_since.set(Some(since));
            let was_there = line.prospect.get() == Prospect::Successor;
            if !was_there || since.elapsed() >= PATIENCE {
                return None;
            }
            sleep(PAUSE).await;
        }
    }

    /// Whether connections are going on elsewhere.
    pub fn goes_on(&self) -> bool {
        [Protocol::Http, Protocol::Https]
            .map(|protocol| self.prospect(protocol))
            .contains(&Prospect::Successor)
    }

    pub fn prospect(&self, protocol: Protocol) -> Prospect {
        self.line(protocol).prospect.get()
    }

    /// Looks for a successor on behalf of those who have no time to look.
    pub async fn look(&self) {
        let look = async |protocol| drop(self.place(protocol).await);
        tokio::join!(look(Protocol::Http), look(Protocol::Https));
    }

    fn line(&self, protocol: Protocol) -> &Line {
        match protocol {
            Protocol::Http => &self.0.http,
            Protocol::Https => &self.0.https,
        }
    }
}
