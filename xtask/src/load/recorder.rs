//! What one thread of clients saw, and how the threads' views become one.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

use super::order::Seen;

/// Errors are grouped by their words; more groups than this are one.
const ERROR_KINDS: usize = 16;
/// Latencies are kept to three digits, from a microsecond to this.
const LONGEST_NS: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

/// The time's division: warming up, measured, over.
#[derive(Default)]
pub struct Phase {
    pub measure: AtomicBool,
    pub stop: AtomicBool,
}

pub struct Recorder {
    latencies_ns: Histogram<u64>,
    bytes: u64,
    errors: BTreeMap<String, u64>,
}

impl Recorder {
    #[expect(clippy::expect_used, reason = "the bounds are constants that the histogram takes")]
    pub fn new() -> Self {
        let latencies_ns = Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).expect("sound bounds");
        Self { latencies_ns, bytes: 0, errors: BTreeMap::new() }
    }

    pub fn answered(&mut self, latency: Duration) {
        self.latencies_ns.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn moved(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    pub fn failed(&mut self, error: &anyhow::Error) {
        let words = format!("{error:#}");
        let words = if self.errors.len() < ERROR_KINDS { words } else { "others".to_owned() };
        *self.errors.entry(words).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) -> Result<()> {
        self.latencies_ns.add(&other.latencies_ns).context("adding histograms")?;
        self.bytes += other.bytes;
        for (error, count) in &other.errors {
            *self.errors.entry(error.clone()).or_default() += count;
        }
        Ok(())
    }

    pub fn seen(&self, elapsed: Duration) -> Seen {
        let quantile_us = |quantile| self.latencies_ns.value_at_quantile(quantile) as f64 / 1000.0;
        Seen {
            elapsed_s: elapsed.as_secs_f64(),
            requests: self.latencies_ns.len(),
            bytes: self.bytes,
            p50_us: quantile_us(0.5),
            p99_us: quantile_us(0.99),
            p999_us: quantile_us(0.999),
            errors: self.errors.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_threads_views_become_one() {
        let (mut one, mut other) = (Recorder::new(), Recorder::new());
        for us in 1..=500 {
            one.answered(Duration::from_micros(us));
            other.answered(Duration::from_micros(500 + us));
        }
        one.moved(7);
        other.failed(&anyhow::anyhow!("reset"));
        one.add(&other).unwrap();
        let seen = one.seen(Duration::from_secs(2));
        assert_eq!((seen.requests, seen.bytes, seen.errors()), (1000, 7, 1));
        assert!((seen.p50_us / 500.0 - 1.0).abs() < 0.01 && (seen.p99_us / 990.0 - 1.0).abs() < 0.01);
    }

    #[test]
    fn many_kinds_of_errors_are_bounded() {
        let mut recorder = Recorder::new();
        (0..1000).for_each(|number| recorder.failed(&anyhow::anyhow!("{number}")));
        assert_eq!(recorder.errors.len(), ERROR_KINDS + 1);
        assert_eq!(recorder.seen(Duration::ZERO).errors(), 1000);
    }
}
