//! One worker's keys: what it seals luggage with, and what it opens luggage with.
use std::{collections::HashMap, sync::Arc};

use handoff::WorkerId;
use tokio::time::{Duration, Instant};
use zeroize::Zeroizing;

use super::{
    mover::Moving,
    pairs::Peer,
    sealing::{KeyId, Label, OpenError, Opener, Sealer, Way},
};

/// How long one key is used, so that a secret that leaks opens little.
const EPOCH: Duration = Duration::from_secs(3600);

/// Ways to and from workers of other instances that this one has keys for.
const KEYS_MAX: usize = 4096;

/// Where luggage goes: what is sealed for one of these arrives in its order.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Destination {
    pub peer: Peer,
    /// The worker's number within its instance.
    pub worker: u16,
    /// The pool connections over which it goes there: this worker's own, and the other's at the gateway.
    pub by: (u32, WorkerId),
}

pub struct Keyring {
    moving: Arc<Moving>,
    /// This worker's number within its instance.
    own: u16,
    sealers: HashMap<Destination, Sealing>,
    ways: u32,
    openers: HashMap<(KeyId, Way), Opening>,
}

struct Opening {
    opener: Opener,
    used: Instant,
}

struct Sealing {
    sealer: Sealer,
    until: Instant,
}

impl Keyring {
    pub fn new(moving: Arc<Moving>, own: u16) -> Self {
        Self { moving, own, sealers: HashMap::new(), ways: 0, openers: HashMap::new() }
    }

    /// Whether luggage for this worker can be sealed; if not, its instance and this one have to agree on a secret.
    pub fn can_seal(&mut self, to: Destination) -> bool {
        let now = Instant::now();
        if let Some(sealing) = self.sealers.get(&to) {
            if now < sealing.until && !sealing.sealer.is_worn() {
                return true;
            }
            self.moving.pairs.retire_outgoing(&to.peer, &sealing.sealer.key());
        }
        let Some(secret) = self.moving.pairs.outgoing(&to.peer) else { return false };
        if self.sealers.len() >= KEYS_MAX {
            self.forget_sealers();
        }
        let way = Way { source: self.own, target: to.worker, number: self.ways };
        self.ways = self.ways.wrapping_add(1);
        self.sealers.insert(to, Sealing { sealer: Sealer::new(&secret, way), until: now + EPOCH });
        true
    }

    /// `None` unless `can_seal` said that it can be.
    pub fn seal(
        &mut self,
        to: Destination,
        luggage: &mut Zeroizing<Vec<u8>>,
        cookie: u64,
    ) -> Option<Vec<u8>> {
        Some(self.sealers.get_mut(&to)?.sealer.seal(luggage, cookie))
    }

    pub fn open<'a>(&mut self, sealed: &'a mut [u8], cookie: u64) -> Result<&'a [u8], OpenError> {
        let label = Label::decode(sealed)?;
        if label.way.target != self.own {
            return Err(OpenError::Misdirected);
        }
        let at = (label.key, label.way);
        if !self.openers.contains_key(&at) {
            let secret = self.moving.pairs.incoming(&label.key).ok_or(OpenError::UnknownKey)?;
            if self.openers.len() >= KEYS_MAX {
                self.forget_openers();
            }
            let opener = Opener::new(&secret, label.way);
            self.openers.insert(at, Opening { opener, used: Instant::now() });
        }
        let opening = self.openers.get_mut(&at).ok_or(OpenError::UnknownKey)?;
        opening.used = Instant::now();
        opening.opener.open(&label, sealed, cookie)
    }

    /// With each goes its instance's secret, which other ways may have used for as long.
    fn forget_sealers(&mut self) {
        for (to, sealing) in self.sealers.drain() {
            self.moving.pairs.retire_outgoing(&to.peer, &sealing.sealer.key());
        }
    }

    /// Those first that nobody seals for any more: a secret is used for an epoch by the last way that began with it, which
    /// is no later than an epoch after the first. With each goes its secret, because an opener that began anew would take
    /// numbers a second time.
    fn forget_openers(&mut self) {
        let now = Instant::now();
        let worn = |opening: &Opening| now.duration_since(opening.used) >= 2 * EPOCH;
        let all = !self.openers.values().any(worn);
        for ((key, _), _) in self.openers.extract_if(|_, opening| all || worn(opening)) {
            self.moving.pairs.retire_incoming(&key);
        }
    }
}
