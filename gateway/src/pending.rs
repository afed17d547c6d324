//! The connections that `accept` returned and no verdict has come for, each with its deadline.
use std::{
    collections::{HashMap, VecDeque},
    os::fd::OwnedFd,
    time::Duration,
};

use common::Protocol;
use tokio::time::Instant;

/// A connection in the gateway's hands.
pub struct Accepted {
    pub socket: OwnedFd,
    pub protocol: Protocol,
    pub accepted_at: Instant,
    pub accepted_at_ns: u64,
    /// Who waits for it to become complete: user space, if the kernel does not follow it.
    pub peeked: bool,
}

/// Held connections by socket cookie, the oldest first to be cut.
pub struct Pending {
    held: HashMap<u64, Accepted>,
    /// In the order of their deadlines, because all have the same time; entries of those that left are stale.
    order: VecDeque<(Instant, u64)>,
    patience: Duration,
    capacity: usize,
}

impl Pending {
    pub fn new(patience: Duration, capacity: usize) -> Self {
        Self { held: HashMap::new(), order: VecDeque::new(), patience, capacity }
    }

    /// Holds a connection; gives back the oldest when there is no room for both.
    pub fn hold(&mut self, cookie: u64, accepted: Accepted) -> Option<(u64, Accepted)> {
        let evicted = if self.held.len() >= self.capacity { self.take_oldest() } else { None };
        self.order.push_back((accepted.accepted_at + self.patience, cookie));
        self.held.insert(cookie, accepted);
        evicted
    }

    pub fn get(&self, cookie: u64) -> Option<&Accepted> {
        self.held.get(&cookie)
    }

    pub fn take(&mut self, cookie: u64) -> Option<Accepted> {
        self.held.remove(&cookie)
    }

    /// When the next connection is to be cut.
    pub fn next_deadline(&mut self) -> Option<Instant> {
        self.drop_stale();
        self.order.front().map(|(deadline, _)| *deadline)
    }

    pub fn take_expired(&mut self, now: Instant) -> Option<(u64, Accepted)> {
        self.drop_stale();
        self.order.front().filter(|(deadline, _)| *deadline <= now)?;
        self.take_oldest()
    }

    pub fn len(&self) -> usize {
        self.held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub fn take_oldest(&mut self) -> Option<(u64, Accepted)> {
        while let Some((_, cookie)) = self.order.pop_front() {
            if let Some(accepted) = self.held.remove(&cookie) {
                return Some((cookie, accepted));
            }
        }
        None
    }

    fn drop_stale(&mut self) {
        while self.order.front().is_some_and(|(_, cookie)| !self.held.contains_key(cookie)) {
            self.order.pop_front();
        }
        // The front may be fresh for long while stale entries pile up behind it.
        if self.order.len() > 2 * self.held.len() + 1024 {
            self.order.retain(|(_, cookie)| self.held.contains_key(cookie));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn accepted(at: Instant) -> Accepted {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap().into();
        Accepted { socket, protocol: Protocol::Http, accepted_at: at, accepted_at_ns: 0, peeked: false }
    }

    #[test]
    fn connections_expire_in_their_order() {
        let start = Instant::now();
        let mut pending = Pending::new(PATIENCE, 10);
        for cookie in 0..3 {
            assert!(pending.hold(cookie, accepted(start + Duration::from_secs(cookie))).is_none());
        }
        assert!(pending.take(0).is_some());
        assert_eq!(pending.next_deadline(), Some(start + Duration::from_secs(11)));
        assert!(pending.take_expired(start + PATIENCE).is_none());
        assert_eq!(pending.take_expired(start + Duration::from_secs(11)).map(|(cookie, _)| cookie), Some(1));
        assert!(pending.take_expired(start + Duration::from_secs(11)).is_none());
        assert_eq!(pending.len(), 1);
    }

    #[test]
    fn a_full_table_gives_back_the_oldest() {
        let start = Instant::now();
        let mut pending = Pending::new(PATIENCE, 2);
        for cookie in 0..2 {
            assert!(pending.hold(cookie, accepted(start)).is_none());
        }
        assert_eq!(pending.hold(2, accepted(start)).map(|(cookie, _)| cookie), Some(0));
        assert_eq!(pending.len(), 2);
    }

    #[test]
    fn what_left_takes_no_room() {
        let start = Instant::now();
        let mut pending = Pending::new(PATIENCE, 10);
        pending.hold(0, accepted(start));
        for cookie in 1..5000 {
            pending.hold(cookie, accepted(start));
            pending.take(cookie);
            pending.next_deadline();
        }
        assert!(pending.order.len() <= 1030);
        assert!(pending.get(0).is_some());
    }
}
