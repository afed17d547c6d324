//! The secrets that this instance shares with others; one for all of its workers.
use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use common::FunctionName;

use super::sealing::{KeyId, PairSecret};

/// Secrets for opening, the oldest of which are forgotten: those of all instances on a large host, and of those that
/// they replaced a moment ago.
const INCOMING_MAX: usize = 4096;

/// Secrets for sealing; instances that are gone leave theirs behind until they are the oldest.
const OUTGOING_MAX: usize = 4096;

/// Another instance, as the gateway numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Whose certificate was seen, so that a wrong number can't lead to another function.
    pub function: FunctionName,
    pub instance: u64,
}

#[derive(Default)]
pub struct Pairs(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    outgoing: HashMap<Peer, PairSecret>,
    outgoing_order: VecDeque<Peer>,
    incoming: HashMap<KeyId, PairSecret>,
    incoming_order: VecDeque<KeyId>,
}

impl Pairs {
    /// What luggage for this instance is sealed with.
    pub fn outgoing(&self, peer: &Peer) -> Option<PairSecret> {
        self.lock().outgoing.get(peer).cloned()
    }

    pub fn add_outgoing(&self, peer: Peer, secret: PairSecret) {
        let mut inner = self.lock();
        if inner.outgoing.insert(peer, secret).is_none() {
            inner.outgoing_order.push_back(peer);
        }
        if inner.outgoing_order.len() > OUTGOING_MAX
            && let Some(oldest) = inner.outgoing_order.pop_front()
        {
            inner.outgoing.remove(&oldest);
        }
    }

    /// This secret is used for sealing no more.
    pub fn retire_outgoing(&self, peer: &Peer, id: &KeyId) {
        let mut inner = self.lock();
        if inner.outgoing.get(peer).is_some_and(|secret| secret.id == *id) {
            inner.outgoing.remove(peer);
            inner.outgoing_order.retain(|other| other != peer);
        }
    }

    pub fn incoming(&self, id: &KeyId) -> Option<PairSecret> {
        self.lock().incoming.get(id).cloned()
    }

    pub fn add_incoming(&self, secret: PairSecret) {
        let mut inner = self.lock();
        let id = secret.id;
        if inner.incoming.insert(id, secret).is_none() {
            inner.incoming_order.push_back(id);
        }
        if inner.incoming_order.len() > INCOMING_MAX
            && let Some(oldest) = inner.incoming_order.pop_front()
        {
            inner.incoming.remove(&oldest);
        }
    }

    /// This secret opens nothing more.
    pub fn retire_incoming(&self, id: &KeyId) {
        let mut inner = self.lock();
        if inner.incoming.remove(id).is_some() {
            inner.incoming_order.retain(|other| other != id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No holder leaves it half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;
    use crate::moves::sealing::{KEY_ID_BYTES, SECRET_BYTES};

    fn secret(number: u32) -> PairSecret {
        let mut id = [0; KEY_ID_BYTES];
        id[..4].copy_from_slice(&number.to_le_bytes());
        PairSecret { id, secret: Zeroizing::new([0; SECRET_BYTES]) }
    }

    fn peer(instance: u64) -> Peer {
        Peer { function: "echo".parse().unwrap(), instance }
    }

    #[test]
    fn a_secret_that_was_replaced_or_retired_does_not_come_back() {
        let pairs = Pairs::default();
        pairs.add_outgoing(peer(1), secret(1));
        assert!(pairs.outgoing(&peer(1)).is_some() && pairs.outgoing(&peer(2)).is_none());
        pairs.add_outgoing(peer(1), secret(2));
        pairs.retire_outgoing(&peer(1), &secret(1).id);
        assert!(pairs.outgoing(&peer(1)).is_some_and(|pair| pair.id == secret(2).id));
        pairs.retire_outgoing(&peer(1), &secret(2).id);
        assert!(pairs.outgoing(&peer(1)).is_none());
        pairs.add_incoming(secret(3));
        pairs.retire_incoming(&secret(3).id);
        assert!(pairs.incoming(&secret(3).id).is_none());
    }

    #[test]
    fn the_oldest_give_way() {
        let pairs = Pairs::default();
        for number in 0..=INCOMING_MAX as u32 {
            pairs.add_incoming(secret(number));
            pairs.add_outgoing(peer(number.into()), secret(number));
        }
        assert!(pairs.incoming(&secret(0).id).is_none() && pairs.outgoing(&peer(0)).is_none());
        assert!(pairs.incoming(&secret(1).id).is_some() && pairs.outgoing(&peer(1)).is_some());
    }
}
