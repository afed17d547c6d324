//! Everything that can be said of a running gateway, as `/status` says it and as metrics are made of it.
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use common::{Refusal, map_values::Counter};
use handoff::{Counts, DURATION_BOUNDS_NS, Histogram, StatusReader, WAIT_BOUNDS_NS};
use serde::{Deserialize, Serialize};

use super::snapshot::Snapshot;
use crate::{
    config::REFUSAL,
    counters::Counters,
    instances::{Batches, FunctionView, InstanceView},
    kernel::inspect::{self, Inspection},
};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub version: String,
    pub pid: u32,
    pub started_at_unix: u64,
    pub uptime_seconds: f64,
    pub listeners: Listeners,
    pub verdict: VerdictPath,
    pub connections: Connections,
    pub verdicts: Vec<VerdictCount>,
    pub batches: Distribution,
    pub moves: Vec<MoveCount>,
    /// By name; refusal is one of them.
    pub functions: BTreeMap<String, Function>,
    /// Without the kernel path there is nothing to tell of it.
    pub kernel: Option<Kernel>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listeners {
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub admin: SocketAddr,
}

/// Who judges connections.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerdictPath {
    pub configured: String,
    /// `sockmap` or `peek`.
    pub path: String,
    /// Why it is that one.
    pub reason: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connections {
    pub accepted: u64,
    pub served: u64,
    /// By reason.
    pub refused: BTreeMap<String, u64>,
    pub closed: u64,
    pub poisoned: u64,
    pub dropped: u64,
    /// Now without a verdict.
    pub held: usize,
    /// Now without an instance.
    pub waiting: usize,
    pub accept_pauses: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerdictCount {
    pub path: String,
    pub outcome: String,
    pub count: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MoveCount {
    pub source: String,
    pub target: String,
    pub outcome: String,
    pub count: u64,
}

/// A histogram: its buckets' upper bounds, each with the observations since the bound before it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Distribution {
    pub count: u64,
    pub sum: f64,
    /// `None` is beyond all bounds.
    pub buckets: Vec<(Option<f64>, u64)>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Function {
    /// The configuration names it.
    pub routed: bool,
    pub handed_over: u64,
    pub lost: u64,
    pub in_flight: u64,
    pub open: u64,
    pub restarts: u64,
    /// Seconds from `accept` to a worker.
    pub handoff: Distribution,
    pub requests: Vec<Requests>,
    pub instances: Vec<Instance>,
}

/// Requests of one method that got one status.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Requests {
    pub method: String,
    /// A number, or `other`.
    pub status: String,
    /// Seconds.
    pub duration: Distribution,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Instance {
    pub socket: String,
    pub state: State,
    pub pid: Option<u32>,
    pub restarts: u64,
    pub workers: usize,
    pub workers_up: usize,
    pub handed_over: u64,
    pub in_flight: u64,
    pub open: u64,
    pub requests: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Up,
    /// Some workers take nothing out of their queues.
    Stalled,
    /// It finishes what it has.
    Draining,
    Down,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// What the programs count.
    pub events: BTreeMap<String, u64>,
    pub maps: Vec<MapReport>,
    pub programs: Vec<ProgramReport>,
    /// Whether the kernel measures run times.
    pub run_times_measured: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapReport {
    pub name: String,
    pub entries: usize,
    pub capacity: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProgramReport {
    pub name: String,
    pub runs: u64,
    pub run_seconds: f64,
}

/// What does not change while a gateway runs.
#[derive(Clone, Debug)]
pub struct About {
    pub started: SystemTime,
    pub listeners: Listeners,
    pub verdict: VerdictPath,
}

impl Report {
    pub fn new(about: &About, snapshot: &Snapshot, inspection: Option<&Inspection>) -> Self {
        let Snapshot { counters, functions, .. } = snapshot;
        let mut functions: BTreeMap<_, _> =
            functions.iter().map(|view| (view.name.to_string(), Function::new(view))).collect();
        for name in &snapshot.routed {
            functions.entry(name.to_string()).or_insert_with(Function::absent).routed = true;
        }
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at_unix: about.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            uptime_seconds: about.started.elapsed().unwrap_or_default().as_secs_f64(),
            listeners: about.listeners.clone(),
            verdict: about.verdict.clone(),
            connections: Connections::new(counters, snapshot.pending, snapshot.unplaced),
            verdicts: counters
                .verdicts
                .iter()
                .map(|(source, outcome, count)| VerdictCount {
                    path: source.as_str().to_owned(),
                    outcome: outcome.to_owned(),
                    count,
                })
                .collect(),
            batches: Distribution::of_batches(&snapshot.batches),
            moves: snapshot
                .moves
                .iter()
                .map(|((source, target, outcome), count)| MoveCount {
                    source: source.to_string(),
                    target: target.to_string(),
                    outcome: outcome.as_str().to_owned(),
                    count: *count,
                })
                .collect(),
            functions,
            kernel: inspection.map(Kernel::new),
        }
    }

    /// Whether connections would be answered: those for nobody, too.
    pub fn is_ready(&self) -> bool {
        self.functions.get(REFUSAL).is_some_and(|refusal| refusal.instances_up() > 0)
    }

    /// The functions that a user configured.
    pub fn own_functions(&self) -> impl Iterator<Item = (&str, &Function)> {
        self.functions
            .iter()
            .map(|(name, function)| (name.as_str(), function))
            .filter(|(name, _)| *name != REFUSAL)
    }
}

impl Connections {
    fn new(counters: &Counters, held: usize, waiting: usize) -> Self {
        let reasons = Refusal::ALL.into_iter().map(|refusal| refusal.as_str().to_owned());
        Self {
            accepted: counters.accepted,
            served: counters.served,
            refused: reasons.zip(counters.refused).collect(),
            closed: counters.closed,
            poisoned: counters.poisoned,
            dropped: counters.dropped,
            held,
            waiting,
            accept_pauses: counters.pauses,
        }
    }
}

impl Function {
    fn new(view: &FunctionView) -> Self {
        let workers = || view.instances.iter().flat_map(|instance| &instance.workers);
        let pages = || view.unfinished.iter().chain(workers().map(|worker| &worker.page));
        let mut counts = view.totals.counts.clone();
        pages().for_each(|page| counts.add(&page.counts()));
        let instances: Vec<_> = view.instances.iter().map(Instance::new).collect();
        Self {
            routed: false,
            handed_over: view.totals.sent + workers().map(|worker| worker.sent).sum::<u64>(),
            lost: view.totals.lost,
            in_flight: instances.iter().map(|instance| instance.in_flight).sum(),
            open: instances.iter().map(|instance| instance.open).sum(),
            restarts: view.totals.restarts,
            handoff: Distribution::of_durations(&counts.waits, &WAIT_BOUNDS_NS),
            requests: requests(&counts),
            instances,
        }
    }

    fn absent() -> Self {
        Self {
            routed: true,
            handed_over: 0,
            lost: 0,
            in_flight: 0,
            open: 0,
            restarts: 0,
            handoff: Distribution::of_durations(&Histogram::default(), &WAIT_BOUNDS_NS),
            requests: Vec::new(),
            instances: Vec::new(),
        }
    }

    pub fn instances_up(&self) -> usize {
        self.instances.iter().filter(|instance| matches!(instance.state, State::Up | State::Stalled)).count()
    }
}

fn requests(counts: &Counts) -> Vec<Requests> {
    counts
        .requests
        .iter()
        .map(|(kind, durations)| Requests {
            method: kind.method.as_str().to_owned(),
            status: kind.status.map_or_else(|| "other".to_owned(), |status| status.to_string()),
            duration: Distribution::of_durations(durations, &DURATION_BOUNDS_NS),
        })
        .collect()
}

impl Instance {
    fn new(view: &InstanceView) -> Self {
        let pages = || view.workers.iter().map(|worker| &worker.page);
        let up = view.workers.iter().filter(|worker| worker.taking).count();
        Self {
            socket: view.socket.clone(),
            state: match up {
                0 if view.workers.is_empty() => State::Down,
                0 => State::Draining,
                _ if !view.listed => State::Draining,
                _ if view.workers.iter().any(|worker| worker.stalled) => State::Stalled,
                _ => State::Up,
            },
            pid: view.pid,
            restarts: view.restarts,
            workers: view.wanted,
            workers_up: up,
            handed_over: view.workers.iter().map(|worker| worker.sent).sum(),
            in_flight: view
                .workers
                .iter()
                .map(|worker| worker.sent.saturating_sub(worker.page.taken()))
                .sum(),
            open: pages().map(|page| u64::from(page.open_connections())).sum(),
            requests: pages().map(|page| answered(page)).sum(),
        }
    }
}

fn answered(page: &StatusReader) -> u64 {
    page.counts().requests.values().map(Histogram::count).fold(0, u64::saturating_add)
}

impl Distribution {
    fn of_durations(histogram: &Histogram, bounds_ns: &[u64]) -> Self {
        let bounds = bounds_ns.iter().map(|&bound_ns| Some(bound_ns as f64 / 1e9)).chain([None]);
        Self {
            count: histogram.count(),
            sum: histogram.sum_ns as f64 / 1e9,
            buckets: bounds.zip(histogram.buckets).collect(),
        }
    }

    fn of_batches(batches: &Batches) -> Self {
        let bounds = (0..).map(|power| Some(f64::from(1u32 << power)));
        Self {
            count: batches.messages.iter().sum(),
            sum: batches.connections as f64,
            buckets: bounds.zip(batches.messages).collect(),
        }
    }

    /// An upper bound of what this share of the observations stays below; `None` without any.
    pub fn quantile(&self, share: f64) -> Option<Quantile> {
        let wanted = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        let mut last = 0.0;
        for (bound, count) in &self.buckets {
            seen += count;
            if seen >= wanted.max(1) {
                return Some(bound.map_or(Quantile::Above(last), Quantile::AtMost));
            }
            last = bound.unwrap_or(last);
        }
        None
    }

    pub fn add(&mut self, other: &Self) {
        self.combine(other, u64::saturating_add);
        self.sum += other.sum;
    }

    /// What came since an earlier look.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut difference = self.clone();
        difference.combine(earlier, u64::saturating_sub);
        difference.sum -= earlier.sum;
        difference
    }

    fn combine(&mut self, other: &Self, operation: impl Fn(u64, u64) -> u64) {
        self.count = operation(self.count, other.count);
        for ((_, count), (_, others)) in self.buckets.iter_mut().zip(&other.buckets) {
            *count = operation(*count, *others);
        }
    }
}

/// A histogram knows a value by the bounds that it lies between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quantile {
    AtMost(f64),
    Above(f64),
}

impl Kernel {
    fn new(inspection: &Inspection) -> Self {
        let counter = |counter: Counter| (counter.as_str().to_owned(), inspection.counter(counter));
        Self {
            events: Counter::ALL.map(counter).into(),
            maps: inspection
                .occupancy()
                .map(|map| MapReport {
                    name: map.map.to_owned(),
                    entries: map.entries,
                    capacity: map.capacity,
                })
                .into(),
            programs: inspection
                .run_times()
                .into_iter()
                .map(|program| ProgramReport {
                    name: program.program,
                    runs: program.runs,
                    run_seconds: program.time.as_secs_f64(),
                })
                .collect(),
            run_times_measured: inspect::stats_enabled(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distribution(buckets: &[(Option<f64>, u64)]) -> Distribution {
        let count = buckets.iter().map(|(_, count)| count).sum();
        Distribution { count, sum: 0.0, buckets: buckets.to_vec() }
    }

    #[test]
    fn quantiles_are_bounds() {
        let some = distribution(&[(Some(0.1), 98), (Some(1.0), 1), (None, 1)]);
        assert_eq!(some.quantile(0.5), Some(Quantile::AtMost(0.1)));
        assert_eq!(some.quantile(0.98), Some(Quantile::AtMost(0.1)));
        assert_eq!(some.quantile(0.99), Some(Quantile::AtMost(1.0)));
        assert_eq!(some.quantile(1.0), Some(Quantile::Above(1.0)));
        assert_eq!(distribution(&[(Some(0.1), 0), (None, 0)]).quantile(0.5), None);
        let earlier = distribution(&[(Some(0.1), 98), (Some(1.0), 0), (None, 1)]);
        let since = some.since(&earlier);
        assert_eq!((since.count, since.quantile(0.5)), (1, Some(Quantile::AtMost(1.0))));
    }

    #[test]
    fn batches_are_counted_by_powers_of_two() {
        let mut batches = Batches { connections: 71, ..Batches::default() };
        (batches.messages[0], batches.messages[6]) = (7, 1);
        let distribution = Distribution::of_batches(&batches);
        assert_eq!((distribution.count, distribution.sum), (8, 71.0));
        assert_eq!(distribution.buckets[0], (Some(1.0), 7));
        assert_eq!(distribution.buckets[6], (Some(64.0), 1));
    }
}
