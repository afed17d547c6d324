//! How long a function that ended waits for its next start.
use std::time::Duration;

/// The first wait; the first restart of all waits for nothing, so that a crash costs clients the least.
const FIRST: Duration = Duration::from_millis(100);

/// A broken function must not take the machine from the others, and a repaired one must not stay away for long.
const LONGEST: Duration = Duration::from_secs(5);

/// A life of this length shows that the function can run: what ended it is a new failure.
const SOUND_LIFE: Duration = Duration::from_secs(10);

/// Counts the failures that followed each other closely.
#[derive(Default)]
pub struct Backoff {
    failures: u32,
    /// More failures than this are not followed by a start.
    limit: Option<u32>,
}

impl Backoff {
    pub fn new(limit: Option<u32>) -> Self {
        Self { failures: 0, limit }
    }

    /// The wait after a life of this length; `None` when there were too many such lives.
    pub fn next(&mut self, lived: Duration) -> Option<Duration> {
        if lived >= SOUND_LIFE {
            self.failures = 0;
        }
        if self.limit.is_some_and(|limit| self.failures >= limit) {
            return None;
        }
        let wait = match self.failures.checked_sub(1) {
            None => Duration::ZERO,
            Some(doublings) => FIRST.saturating_mul(1 << doublings.min(u32::BITS - 1)).min(LONGEST),
        };
        self.failures = self.failures.saturating_add(1);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits_ms(backoff: &mut Backoff, lived: Duration, count: usize) -> Vec<u128> {
        (0..count).map(|_| backoff.next(lived).unwrap().as_millis()).collect()
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut backoff = Backoff::default();
        let waits = waits_ms(&mut backoff, Duration::ZERO, 9);
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(waits_ms(&mut backoff, Duration::ZERO, 100), [5000; 100]);
    }

    #[test]
    fn a_sound_life_forgets_the_failures() {
        let mut backoff = Backoff::default();
        waits_ms(&mut backoff, Duration::from_millis(9_999), 5);
        assert_eq!(waits_ms(&mut backoff, Duration::from_millis(9_999), 1), [1600]);
        assert_eq!(waits_ms(&mut backoff, Duration::from_secs(10), 1), [0]);
        assert_eq!(waits_ms(&mut backoff, Duration::ZERO, 2), [100, 200]);
    }

    #[test]
    fn failures_never_overflow() {
        let mut backoff = Backoff { failures: u32::MAX, limit: None };
        assert_eq!(waits_ms(&mut backoff, Duration::ZERO, 2), [5000, 5000]);
    }

    #[test]
    fn the_limit_counts_failures_in_a_row() {
        let mut backoff = Backoff::new(Some(2));
        assert_eq!(waits_ms(&mut backoff, Duration::ZERO, 2), [0, 100]);
        assert_eq!(backoff.next(Duration::ZERO), None);
        assert_eq!(backoff.next(SOUND_LIFE), Some(Duration::ZERO));
        assert_eq!(Backoff::new(Some(0)).next(Duration::ZERO), None);
    }
}
