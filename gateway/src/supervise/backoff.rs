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
}

impl Backoff {
    /// The wait after a life of this length.
    pub fn next(&mut self, lived: Duration) -> Duration {
        if lived >= SOUND_LIFE {
            self.failures = 0;
        }
        let wait = match self.failures.checked_sub(1) {
            None => Duration::ZERO,
            Some(doublings) => FIRST.saturating_mul(1 << doublings.min(u32::BITS - 1)).min(LONGEST),
        };
        self.failures = self.failures.saturating_add(1);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits_ms(backoff: &mut Backoff, lived: Duration, count: usize) -> Vec<u128> {
        (0..count).map(|_| backoff.next(lived).as_millis()).collect()
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
        let mut backoff = Backoff { failures: u32::MAX };
        assert_eq!(waits_ms(&mut backoff, Duration::ZERO, 2), [5000, 5000]);
    }
}
