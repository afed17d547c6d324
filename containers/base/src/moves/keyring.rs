//! One worker's keys: what it seals luggage with, and what it opens luggage with.
use std::{collections::HashMap, sync::Arc};

use tokio::time::{Duration, Instant};
use zeroize::Zeroizing;

use super::{
    mover::Moving,
    pairs::Peer,
    sealing::{Ends, KeyId, Label, OpenError, Opener, Sealer},
};

/// How long one key is used, so that a secret that leaks opens little.
const EPOCH: Duration = Duration::from_secs(3600);

/// Workers of other functions that this one has keys for.
const KEYS_MAX: usize = 4096;

pub struct Keyring {
    moving: Arc<Moving>,
    /// This worker's number within its instance.
    own: u16,
    sealers: HashMap<(Peer, u16), Sealing>,
    openers: HashMap<(KeyId, u16), Opener>,
}

struct Sealing {
    sealer: Sealer,
    until: Instant,
}

impl Keyring {
    pub fn new(moving: Arc<Moving>, own: u16) -> Self {
        Self { moving, own, sealers: HashMap::new(), openers: HashMap::new() }
    }

    /// Whether luggage for this worker can be sealed; if not, its instance and this one have to agree on a secret.
    pub fn can_seal(&mut self, peer: Peer, worker: u16) -> bool {
        let now = Instant::now();
        if let Some(sealing) = self.sealers.get(&(peer, worker)) {
            if now < sealing.until && !sealing.sealer.is_worn() {
                return true;
            }
            self.moving.pairs.retire_outgoing(&peer, &sealing.sealer.key());
        }
        let Some(secret) = self.moving.pairs.outgoing(&peer) else { return false };
        if self.sealers.get(&(peer, worker)).is_some_and(|sealing| sealing.sealer.key() == secret.id) {
            // A sealer that began anew would use its numbers a second time.
            return false;
        }
        if self.sealers.len() >= KEYS_MAX {
            self.forget_sealers();
        }
        let sealer = Sealer::new(&secret, Ends { source: self.own, target: worker });
        self.sealers.insert((peer, worker), Sealing { sealer, until: now + EPOCH });
        true
    }

    /// `None` unless `can_seal` said that it can be.
    pub fn seal(
        &mut self,
        peer: Peer,
        worker: u16,
        luggage: &mut Zeroizing<Vec<u8>>,
        cookie: u64,
    ) -> Option<Vec<u8>> {
        Some(self.sealers.get_mut(&(peer, worker))?.sealer.seal(luggage, cookie))
    }

    pub fn open<'a>(&mut self, sealed: &'a mut [u8], cookie: u64) -> Result<&'a [u8], OpenError> {
        let label = Label::decode(sealed)?;
        if label.ends.target != self.own {
            return Err(OpenError::Misdirected);
        }
        let at = (label.key, label.ends.source);
        if !self.openers.contains_key(&at) {
            let secret = self.moving.pairs.incoming(&label.key).ok_or(OpenError::UnknownKey)?;
            if self.openers.len() >= KEYS_MAX {
                self.forget_openers();
            }
            self.openers.insert(at, Opener::new(&secret, label.ends));
        }
        self.openers.get_mut(&at).ok_or(OpenError::UnknownKey)?.open(&label, sealed, cookie)
    }

    /// With each goes its instance's secret, so that none begins anew.
    fn forget_sealers(&mut self) {
        for ((peer, _), sealing) in self.sealers.drain() {
            self.moving.pairs.retire_outgoing(&peer, &sealing.sealer.key());
        }
    }

    /// The same: an opener that began anew would take numbers a second time.
    fn forget_openers(&mut self) {
        for (key, _) in self.openers.drain().map(|(at, _)| at) {
            self.moving.pairs.retire_incoming(&key);
        }
    }
}
