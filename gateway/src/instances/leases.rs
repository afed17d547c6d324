//! Places at other workers that one worker was granted, and has not used yet.
use handoff::WorkerId;

/// A worker asks for another function's places when it needs them, so there are few at a time.
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

    /// Uses one place; false if there is none.
    pub fn spend(&mut self, to: WorkerId) -> bool {
        let Some(index) = self.0.iter().position(|lease| lease.to == to) else { return false };
        let lease = &mut self.0[index];
        let Some(left) = lease.places.checked_sub(1) else { return false };
        lease.places = left;
        if left == 0 && !lease.revoked {
            self.0.swap_remove(index);
        }
        true
    }

    /// True when the holder has to be told.
    pub fn revoke(&mut self, to: WorkerId) -> bool {
        match self.0.iter_mut().find(|lease| lease.to == to) {
            Some(lease) => !std::mem::replace(&mut lease.revoked, true),
            None => false,
        }
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
        for _ in 0..3 {
            assert!(leases.spend(A));
        }
        assert!(!leases.spend(A) && !leases.holds(A));
        assert!(leases.spend(B) && !leases.spend(B));
    }

    #[test]
    fn a_revoked_lease_stays_until_its_holder_has_confirmed() {
        let mut leases = Leases::default();
        leases.add(A, 2);
        assert!(leases.revoke(A) && !leases.revoke(A) && !leases.revoke(B));
        // What the holder sent before it was told.
        assert!(leases.spend(A) && leases.spend(A) && !leases.spend(A));
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
        assert!(!leases.holds(A) && !leases.spend(B));
    }
}
