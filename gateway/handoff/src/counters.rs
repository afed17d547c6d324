//! What a worker counts on its status page: how long connections waited for it, and the requests that it answered.
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Upper bounds of a histogram's buckets; whatever is longer falls into one more.
pub const BUCKETS: usize = 16;

/// From a worker that runs when its connection comes to a client that takes ten seconds to say what it wants.
pub const WAIT_BOUNDS_NS: [u64; BUCKETS] = nanos([
    10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 500_000, 1_000_000,
    10_000_000,
]);

/// From an answer that is made of nothing to the usual time-outs of clients.
pub const DURATION_BOUNDS_NS: [u64; BUCKETS] = nanos([
    50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 10_000_000,
]);

/// Kinds of requests, each a method and a status, that a page has room for: more than a function answers with, and
/// whatever a client provokes beyond them is counted as the kind `OTHER`.
const KINDS: usize = 24;

/// Statuses of HTTP; what lies beyond is none.
const STATUSES: std::ops::RangeInclusive<u16> = 100..=599;

/// A request's method; those that are rare are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Method {
    Get,
    Head,
    Post,
    Put,
    Patch,
    Delete,
    Options,
    Other,
}

impl Method {
    pub const ALL: [Self; 8] =
        [Self::Get, Self::Head, Self::Post, Self::Put, Self::Patch, Self::Delete, Self::Options, Self::Other];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
            Self::Options => "OPTIONS",
            Self::Other => "other",
        }
    }
}

/// A method and a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind {
    pub method: Method,
    /// `None` for what a page had no room for.
    pub status: Option<u16>,
}

impl Kind {
    pub const OTHER: Self = Self { method: Method::Other, status: None };

    pub fn new(method: Method, status: u16) -> Self {
        Self { method, status: Some(status) }
    }

    /// Never zero, which is what a page holds where nothing was counted.
    const fn key(self) -> u64 {
        let status = match self.status {
            Some(status) => status,
            None => 0,
        };
        1 << 32 | (status as u64) << 8 | self.method as u64
    }

    /// An instance can write what it likes: whatever is no kind is `OTHER`.
    fn of_key(key: u64) -> Self {
        let method = Method::ALL.into_iter().find(|&method| method as u64 == key & 0xff);
        let status = u16::try_from(key >> 8 & 0xff_ffff).ok().filter(|status| STATUSES.contains(status));
        match (method, status) {
            (Some(method), Some(status)) => Self::new(method, status),
            _ => Self::OTHER,
        }
    }
}

/// A histogram's values; counts of all buckets add up to the count of observations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    pub sum_ns: u64,
    pub buckets: [u64; BUCKETS + 1],
}

impl Histogram {
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Saturates, because an instance can write what it likes.
    pub fn add(&mut self, other: &Self) {
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        for (sum, count) in self.buckets.iter_mut().zip(other.buckets) {
            *sum = sum.saturating_add(count);
        }
    }
}

/// Everything that a page counts, as values that can be kept when it is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// From `accept` to the worker.
    pub waits: Histogram,
    /// From a request's head to the end of its answer.
    pub requests: BTreeMap<Kind, Histogram>,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.waits.add(&other.waits);
        for (kind, durations) in &other.requests {
            self.requests.entry(*kind).or_default().add(durations);
        }
    }
}

/// The counters themselves, in shared memory or in a worker's own: one thread writes them, any may read them.
#[derive(Default)]
#[repr(C)]
pub struct Counters {
    waits: Cells,
    /// In the order of their first request; a kind keeps its place.
    requests: [Entry; KINDS],
    others: Entry,
}

// docs/wire.md says where each counter lies.
const _: () =
    assert!(size_of::<Cells>() == 144 && size_of::<Entry>() == 152 && size_of::<Counters>() == 3944);

#[derive(Default)]
#[repr(C)]
struct Entry {
    key: AtomicU64,
    durations: Cells,
}

#[derive(Default)]
#[repr(C)]
struct Cells {
    sum_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS + 1],
}

impl Counters {
    pub fn wait(&self, wait: Duration) {
        self.waits.observe(wait, &WAIT_BOUNDS_NS);
    }

    pub fn request(&self, kind: Kind, duration: Duration) {
        self.entry(kind.key()).durations.observe(duration, &DURATION_BOUNDS_NS);
    }

    /// Takes over what other counters hold, and leaves them at zero.
    pub fn take_from(&self, other: &Self) {
        self.waits.take_from(&other.waits);
        for entry in other.requests.iter().chain([&other.others]) {
            let key = entry.key.swap(0, Relaxed);
            if key != 0 {
                self.entry(key).durations.take_from(&entry.durations);
            }
        }
    }

    pub fn read(&self) -> Counts {
        let mut counts = Counts { waits: self.waits.read(), requests: BTreeMap::new() };
        for entry in self.requests.iter().chain([&self.others]) {
            let key = entry.key.load(Relaxed);
            if key != 0 {
                counts.requests.entry(Kind::of_key(key)).or_default().add(&entry.durations.read());
            }
        }
        counts
    }

    fn entry(&self, key: u64) -> &Entry {
        for entry in &self.requests {
            match entry.key.load(Relaxed) {
                taken if taken == key => return entry,
                0 => {
                    entry.key.store(key, Relaxed);
                    return entry;
                }
                _ => {}
            }
        }
        self.others.key.store(Kind::OTHER.key(), Relaxed);
        &self.others
    }
}

impl Cells {
    fn observe(&self, value: Duration, bounds_ns: &[u64; BUCKETS]) {
        let value_ns = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bounds_ns.iter().position(|&bound_ns| value_ns <= bound_ns).unwrap_or(BUCKETS);
        add(&self.sum_ns, value_ns);
        add(&self.buckets[bucket], 1);
    }

    fn take_from(&self, other: &Self) {
        add(&self.sum_ns, other.sum_ns.swap(0, Relaxed));
        for (to, from) in self.buckets.iter().zip(&other.buckets) {
            add(to, from.swap(0, Relaxed));
        }
    }

    fn read(&self) -> Histogram {
        Histogram {
            sum_ns: self.sum_ns.load(Relaxed),
            buckets: std::array::from_fn(|bucket| self.buckets[bucket].load(Relaxed)),
        }
    }
}

/// Without a locked instruction: one thread writes.
fn add(value: &AtomicU64, more: u64) {
    value.store(value.load(Relaxed).wrapping_add(more), Relaxed);
}

const fn nanos(micros: [u64; BUCKETS]) -> [u64; BUCKETS] {
    let mut bounds = micros;
    let mut index = 0;
    while index < BUCKETS {
        bounds[index] *= 1000;
        index += 1;
    }
    bounds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(method: Method, status: u16) -> Kind {
        Kind::new(method, status)
    }

    #[test]
    fn each_kind_has_a_histogram_of_its_own() {
        let counters = Counters::default();
        counters.request(kind(Method::Get, 200), Duration::from_micros(50));
        counters.request(kind(Method::Get, 200), Duration::from_micros(51));
        counters.request(kind(Method::Post, 200), Duration::from_secs(11));
        counters.wait(Duration::from_micros(10));
        let counts = counters.read();
        assert_eq!(counts.requests.len(), 2);
        let get = counts.requests[&kind(Method::Get, 200)];
        assert_eq!((get.count(), get.sum_ns, &get.buckets[..2]), (2, 101_000, &[1, 1][..]));
        assert_eq!(counts.requests[&kind(Method::Post, 200)].buckets[BUCKETS], 1);
        assert_eq!((counts.waits.count(), counts.waits.buckets[0]), (1, 1));
    }

    #[test]
    fn what_has_no_room_is_counted_all_the_same() {
        let counters = Counters::default();
        for status in 200..200 + KINDS as u16 + 5 {
            counters.request(kind(Method::Get, status), Duration::ZERO);
            counters.request(kind(Method::Get, status), Duration::ZERO);
        }
        let counts = counters.read();
        assert_eq!(counts.requests.len(), KINDS + 1);
        assert_eq!(counts.requests[&Kind::OTHER].count(), 10);
        assert_eq!(counts.requests.values().map(Histogram::count).sum::<u64>(), 2 * (KINDS as u64 + 5));
    }

    #[test]
    fn counts_move_and_are_never_doubled() {
        let (from, to) = (Counters::default(), Counters::default());
        for counters in [&from, &to] {
            counters.request(kind(Method::Get, 200), Duration::from_millis(1));
        }
        from.request(kind(Method::Delete, 404), Duration::from_millis(1));
        let mut expected = from.read();
        expected.add(&to.read());
        to.take_from(&from);
        assert_eq!(to.read(), expected);
        assert_eq!(from.read(), Counts::default());
        to.take_from(&from);
        assert_eq!(to.read(), expected);
    }

    #[test]
    fn any_key_is_a_kind() {
        for method in Method::ALL {
            let kind = kind(method, 404);
            assert_eq!(Kind::of_key(kind.key()), kind);
        }
        for key in [1, u64::MAX, Kind::OTHER.key(), kind(Method::Get, 99).key(), 1 << 32 | 200 << 8 | 200] {
            assert_eq!(Kind::of_key(key), Kind::OTHER, "{key:#x}");
        }
    }

    #[test]
    fn bounds_ascend() {
        assert!(WAIT_BOUNDS_NS.is_sorted() && DURATION_BOUNDS_NS.is_sorted());
    }
}
