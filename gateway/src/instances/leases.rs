//! Places at other workers that one worker was granted, and has not used yet.
use handoff::WorkerId;

/// A worker asks for places when it needs them, so there are few at a time.
#[derive(Default)]
pub struct Leases(Vec<Lease>);

struct Lease {
    to: WorkerId,
    places: u32,
    /// The holder was told to use it no more, and has not confirmed that it won't.
    revoked: bool,
}

impl Leases {
    pub fn add(&mut self, to: WorkerId, places: u32) {
        match self.0.iter_mut().find(|lease| lease.to == to) {
            Some(lease) => lease.places += places,
            None => self.0.push(Lease { to, places, revoked: false }),
        }
    }

    /// Uses so many places, or all there are; says how many it used.
    pub fn spend(&mut self, to: WorkerId, places: u32) -> u32 {
        let Some(index) = self.0.iter().position(|lease| lease.to == to) else { return 0 };
        let lease = &mut self.0[index];
        let spent = places.min(lease.places);
        lease.places -= spent;
        if lease.places == 0 && !lease.revoked {
            self.0.swap_remove(index);
        }
        spent
    }

    /// True when the holder has to be told.
    pub fn revoke(&mut self, to: WorkerId) -> bool {
        match self.0.iter_mut().find(|lease| lease.to == to) {
            Some(lease) => !std::mem::replace(&mut lease.revoked, true),
            None => false,
        }
    }

    /// Places that are left at a worker.
    pub fn places(&self, to: WorkerId) -> u32 {
        self.0.iter().find(|lease| lease.to == to).map_or(0, |lease| lease.places)
    }

    pub fn holds(&self, to: WorkerId) -> bool {
        self.0.iter().any(|lease| lease.to == to)
    }

    pub fn end(&mut self, to: WorkerId) {
        self.0.retain(|lease| lease.to != to);
    }

    /// Ends all leases, and says at whom.
    pub fn end_all(&mut self) -> Vec<WorkerId> {
        self.0.drain(..).map(|lease| lease.to).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);

    #[test]
    fn no_place_is_used_twice() {
        let mut leases = Leases::default();
        leases.add(A, 2);
        leases.add(B, 1);
        leases.add(A, 1);
        assert_eq!(leases.spend(A, 2), 2);
        assert_eq!((leases.places(A), leases.places(B)), (1, 1));
        assert_eq!(leases.spend(A, 2), 1);
        assert_eq!(leases.spend(A, 1), 0);
        assert!(!leases.holds(A) && leases.places(A) == 0);
        assert_eq!((leases.spend(B, 1), leases.spend(B, 1)), (1, 0));
    }

    #[test]
    fn a_revoked_lease_stays_until_its_holder_has_confirmed() {
        let mut leases = Leases::default();
        leases.add(A, 2);
        assert!(leases.revoke(A) && !leases.revoke(A) && !leases.revoke(B));
        // What the holder sent before it was told.
        assert_eq!(leases.spend(A, 3), 2);
        assert!(leases.holds(A));
        leases.end(A);
        assert!(!leases.holds(A));
    }

    #[test]
    fn whoever_ends_holds_nothing() {
        let mut leases = Leases::default();
        leases.add(A, 5);
        leases.add(B, 7);
        assert_eq!(leases.end_all(), [A, B]);
        assert!(!leases.holds(A));
        assert_eq!(leases.spend(B, 1), 0);
    }
}
