//! One side at one work, once.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::load::order::{Load, Order, Seen, Tls};

use super::figure::Figure;
use super::loader::Loader;
use super::proc::{self, Family};
use super::results::Syscalls;
use super::settings::Settings;
use super::stage::{Running, Stage};
use super::syscalls::Counting;
use super::work::{Kind, Work};

/// What is left behind for the kernel's threads is done by then, and belongs to the measurement.
const SETTLE: Duration = Duration::from_millis(60);
/// How long unfinished connections are watched without anything else going on.
const WATCH: Duration = Duration::from_millis(1000);
/// How long a side may take to notice that ten thousand connections have ended.
const CLOSE_WITHIN: Duration = Duration::from_secs(10);
const FAILING_ONE_IN: u64 = 20;
const TEN_THOUSAND: f64 = 10_000.0;
const GIB: f64 = (1_u64 << 30) as f64;
const MIB: f64 = (1_u64 << 20) as f64;

pub type Figures = BTreeMap<Figure, f64>;

/// Figures, and what went wrong beside them.
pub struct Measured {
    pub figures: Figures,
    pub trouble: Option<String>,
}

pub struct Bench<'a> {
    pub programs: &'a Path,
    pub settings: &'a Settings,
    pub stage: &'a Stage,
}

impl Bench<'_> {
    pub fn measure(&self, running: &Running, work: &Work) -> Result<Measured> {
        match work.kind {
            Kind::Idle => self.idle(running, work),
            Kind::HalfFlights => self.half_flights(running, work),
            _ => self.under_load(running, work, self.order(running, work)),
        }
    }

    /// Counts system calls while the work is done for a short time.
    pub fn syscalls(&self, running: &Running, work: &Work) -> Result<Syscalls> {
        let directory = self.stage.directory.path();
        let count = |pids: Vec<i32>, name: &str| match pids.is_empty() {
            true => Ok(None),
            false => Counting::begin(&pids, &directory.join(name)).map(Some),
        };
        let front = count(running.front()?, "front.strace")?;
        let functions = count(running.functions()?, "functions.strace")?;
        // Warming up would be counted as well.
        let order = Order { warm_up_ms: 0, duration_ms: 500, ..self.order(running, work) };
        let mut loader = Loader::start(self.programs, &order)?;
        let seen = loader.seen_after_begin()?;
        drop(loader);
        thread::sleep(SETTLE);
        let per_request = |counting: Option<Counting>| -> Result<BTreeMap<String, f64>> {
            let counts = counting.map(Counting::end).transpose()?.unwrap_or_default();
            let requests = seen.requests.max(1) as f64;
            Ok(counts.into_iter().map(|(name, count)| (name, count as f64 / requests)).collect())
        };
        if seen.requests == 0 {
            bail!("{}", trouble(&seen).unwrap_or_default());
        }
        Ok(Syscalls {
            work: work.key.to_owned(),
            side: running.side,
            requests: seen.requests,
            front: per_request(front)?,
            functions: per_request(functions)?,
        })
    }

    fn order(&self, running: &Running, work: &Work) -> Order {
        Order {
            load: work.load(self.settings),
            address: running.address(work),
            requests: running.requests(work),
            tls: work.tls.map(|tls| Tls {
                authority: self.stage.authority.clone(),
                version: tls.version,
                resume: tls.resume,
                hello: tls.hello,
            }),
            connections: work.clients(),
            threads: thread::available_parallelism().map_or(1, usize::from),
            warm_up_ms: self.settings.warm_up_ms,
            duration_ms: self.settings.measured_ms,
        }
    }

    fn under_load(&self, running: &Running, work: &Work, order: Order) -> Result<Measured> {
        let mut loader = Loader::start(self.programs, &order)?;
        let participants = Participants::find(running, &loader)?;
        loader.begin()?;
        let before = participants.account()?;
        let seen = loader.seen()?;
        thread::sleep(SETTLE);
        let cost = participants.account()?.since(&before);
        let mut figures = Figures::new();
        if work.is_bulk() {
            figures.insert(Figure::MibPerSecond, seen.bytes as f64 / MIB / seen.elapsed_s);
            cost.fill(&mut figures, seen.bytes as f64 / GIB);
        } else if seen.requests > 0 {
            figures.insert(Figure::RequestsPerSecond, seen.requests as f64 / seen.elapsed_s);
            figures.insert(Figure::P50Us, seen.p50_us);
            figures.insert(Figure::P99Us, seen.p99_us);
            figures.insert(Figure::P999Us, seen.p999_us);
            cost.fill(&mut figures, seen.requests as f64 / TEN_THOUSAND);
        }
        let nothing = if work.is_bulk() { seen.bytes == 0 } else { seen.requests == 0 };
        // What fails that often is another work than was asked for.
        if nothing || seen.errors() * FAILING_ONE_IN > seen.requests.max(1) && !work.is_bulk() {
            figures.clear();
        } else {
            figures.insert(Figure::Errors, seen.errors() as f64);
        }
        Ok(Measured { figures, trouble: trouble(&seen) })
    }

    fn idle(&self, running: &Running, work: &Work) -> Result<Measured> {
        let slab_before = proc::slab_mib();
        let before = descriptors(running)?;
        let mut loader = Loader::start(self.programs, &self.order(running, work))?;
        let seen = loader.seen()?;
        thread::sleep(SETTLE);
        let (fresh, now) = (running.fresh, running.memory()?);
        let per_10k = |mib: f64| mib * TEN_THOUSAND / seen.requests.max(1) as f64;
        let (front, functions) =
            (per_10k(now.front_mib - fresh.front_mib), per_10k(now.functions_mib - fresh.functions_mib));
        let figures = Figures::from([
            (Figure::MemoryFront, front),
            (Figure::MemoryFunctions, functions),
            (Figure::MemoryTotal, front + functions),
            (Figure::MemorySlab, per_10k(now.slab_mib - slab_before)),
        ]);
        drop(loader);
        await_closing(running, before)?;
        Ok(Measured { figures, trouble: None })
    }

    fn half_flights(&self, running: &Running, work: &Work) -> Result<Measured> {
        let before = descriptors(running)?;
        let mut holder = Loader::start(self.programs, &self.order(running, work))?;
        holder.seen()?;
        thread::sleep(SETTLE);
        let front = running.front()?;
        let (began, cpu) = (Instant::now(), proc::cpu_seconds(&front));
        thread::sleep(WATCH);
        let share = (proc::cpu_seconds(&front) - cpu) / began.elapsed().as_secs_f64();
        let others = Order { load: Load::NewConnections, ..self.order(running, work) };
        let mut measured = self.under_load(running, work, others)?;
        if !measured.figures.is_empty() {
            measured.figures.insert(Figure::FrontShare, share);
        }
        drop(holder);
        await_closing(running, before)?;
        Ok(measured)
    }
}

impl Loader {
    fn seen_after_begin(&mut self) -> Result<Seen> {
        self.begin()?;
        self.seen()
    }
}

fn descriptors(running: &Running) -> Result<usize> {
    Ok(proc::descriptors(&running.front()?) + proc::descriptors(&running.functions()?))
}

/// The next side is not to be measured while this one tidies up.
fn await_closing(running: &Running, before: usize) -> Result<()> {
    let deadline = Instant::now() + CLOSE_WITHIN;
    // A proxy keeps some connections to functions open on purpose.
    while descriptors(running)? > before + 256 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(SETTLE);
    Ok(())
}

/// The most frequent error, in the load generator's words.
fn trouble(seen: &Seen) -> Option<String> {
    let (words, count) = seen.errors.iter().max_by_key(|(_, count)| **count)?;
    Some(match seen.requests {
        0 => words.clone(),
        _ => format!("{words} ({count} times)"),
    })
}

/// Every process that has a part in what is measured.
struct Participants {
    front: Vec<i32>,
    functions: Vec<i32>,
    clients: Vec<i32>,
}

/// Seconds of processor time that everybody has had at a moment.
struct Account {
    front: f64,
    functions: f64,
    clients: f64,
    /// By thread, because they come and go.
    kernel: BTreeMap<i32, f64>,
    machine: f64,
    at: Instant,
}

/// Seconds between two moments.
struct Cost {
    front: f64,
    functions: f64,
    clients: f64,
    kernel: f64,
    machine: f64,
    wall: f64,
}

impl Participants {
    fn find(running: &Running, loader: &Loader) -> Result<Self> {
        Ok(Self { front: running.front()?, functions: running.functions()?, clients: vec![loader.id()] })
    }

    fn account(&self) -> Result<Account> {
        let kernel = Family::now()?.kernel_threads().into_iter();
        Ok(Account {
            front: proc::cpu_seconds(&self.front),
            functions: proc::cpu_seconds(&self.functions),
            clients: proc::cpu_seconds(&self.clients),
            kernel: kernel.map(|thread| (thread, proc::cpu_seconds(&[thread]))).collect(),
            machine: proc::machine_busy_seconds()?,
            at: Instant::now(),
        })
    }
}

impl Account {
    fn since(&self, before: &Self) -> Cost {
        // What a thread that has ended did is lost; one that is new did all of it since.
        let thread = |(id, now): (&i32, &f64)| now - before.kernel.get(id).copied().unwrap_or(0.0);
        Cost {
            front: self.front - before.front,
            functions: self.functions - before.functions,
            clients: self.clients - before.clients,
            kernel: self.kernel.iter().map(thread).sum(),
            machine: self.machine - before.machine,
            wall: self.at.duration_since(before.at).as_secs_f64(),
        }
    }
}

impl Cost {
    fn fill(&self, figures: &mut Figures, units: f64) {
        let total = self.front + self.functions + self.clients + self.kernel;
        if units > 0.0 {
            figures.insert(Figure::CpuFront, self.front / units);
            figures.insert(Figure::CpuFunctions, self.functions / units);
            figures.insert(Figure::CpuClients, self.clients / units);
            figures.insert(Figure::CpuKernel, self.kernel / units);
            figures.insert(Figure::CpuTotal, total / units);
        }
        let cores = thread::available_parallelism().map_or(1, usize::from) as f64;
        let foreign = (self.machine - total) / (self.wall * cores);
        figures.insert(Figure::Foreign, foreign.max(0.0));
    }
}
