//! The load generator of `cargo xtask bench`: a process of its own, so that its CPU is told apart from the sides'.
//!
//! It reads one order (JSON) from standard input, says `begin` when the measured time begins, prints what it saw as one
//! line of JSON, and stays until its input ends, so that its processor time can be read.

use std::io::{self, BufRead, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

mod clients;
mod hold;
mod http;
pub mod order;
mod recorder;
mod stream;
mod tls;

use clients::Clients;
use order::{Load, Order, Seen};
use recorder::{Phase, Recorder};

/// Said when the measured time begins, or when everything that is to be held is held.
pub const BEGIN: &str = "begin";

/// What is under way when the time is over is waited for this long.
const FINISH_WITHIN: Duration = Duration::from_secs(6);

pub fn run() -> Result<ExitCode> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).context("cannot read the order")?;
    let order: Order = serde_json::from_str(&line).context("the order")?;
    raise_descriptor_limit()?;
    let seen = match order.load {
        Load::Hold { count, what } => return hold::run(&order, count, what),
        _ => generate(&order)?,
    };
    println!("{}", serde_json::to_string(&seen)?);
    wait_for_the_end_of_input()?;
    Ok(ExitCode::SUCCESS)
}

fn generate(order: &Order) -> Result<Seen> {
    let phase = Arc::new(Phase::default());
    let threads = order.threads.clamp(1, order.connections.max(1));
    let mut workers = Vec::new();
    for index in 0..threads {
        let share = order.connections / threads + usize::from(index < order.connections % threads);
        let (order, phase) = (order.clone(), Arc::clone(&phase));
        workers.push(thread::spawn(move || -> Result<Recorder> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let clients = Clients::new(&order, phase)?;
            runtime.block_on(clients.run(share))
        }));
    }
    thread::sleep(Duration::from_millis(order.warm_up_ms));
    let began = Instant::now();
    phase.measure.store(true, Ordering::Relaxed);
    say(BEGIN)?;
    thread::sleep(Duration::from_millis(order.duration_ms).saturating_sub(began.elapsed()));
    phase.stop.store(true, Ordering::Relaxed);
    let elapsed = began.elapsed();
    let deadline = Instant::now() + FINISH_WITHIN;
    let mut total = Recorder::new();
    for worker in workers {
        while !worker.is_finished() {
            if Instant::now() > deadline {
                bail!("a client does not end: the side answers neither with bytes nor with an end");
            }
            thread::sleep(Duration::from_millis(1));
        }
        let Ok(recorder) = worker.join() else { bail!("a thread of the load generator panicked") };
        total.add(&recorder?)?;
    }
    Ok(total.seen(elapsed))
}

fn say(word: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{word}")?;
    Ok(stdout.flush()?)
}

fn wait_for_the_end_of_input() -> Result<()> {
    io::stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Ten thousand connections are as many descriptors.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}
