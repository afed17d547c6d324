//! The load generator of `cargo xtask bench`: a process of its own, so that its CPU is told apart from the sides'.
//!
//! It reads one order (JSON) from standard input, says `begin` when the measured time begins, prints what it saw as one
//! line of JSON, and stays until its input ends, so that its processor time can be read.

use std::io::{self, BufRead, Read, Write};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
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
    let (finished, recorders) = mpsc::channel();
    for index in 0..threads {
        let share = order.connections / threads + usize::from(index < order.connections % threads);
        let (order, phase, finished) = (order.clone(), Arc::clone(&phase), finished.clone());
        thread::spawn(move || {
            // Nobody waits any more if there is nobody to take it.
            let _ = finished.send(clients(&order, phase, share));
            // A thread that ends takes the account of its processor time with it.
            loop {
                thread::park();
            }
        });
    }
    thread::sleep(Duration::from_millis(order.warm_up_ms));
    let began = Instant::now();
    phase.measure.store(true, Ordering::Relaxed);
    say(BEGIN)?;
    thread::sleep(Duration::from_millis(order.duration_ms).saturating_sub(began.elapsed()));
    phase.stop.store(true, Ordering::Relaxed);
    let elapsed = began.elapsed();
    let mut total = Recorder::new();
    for _ in 0..threads {
        let recorder = recorders.recv_timeout(FINISH_WITHIN);
        total.add(&recorder.context("a client does not end: it gets neither bytes nor an end")??)?;
    }
    Ok(total.seen(elapsed))
}

fn clients(order: &Order, phase: Arc<Phase>, count: usize) -> Result<Recorder> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(Clients::new(order, phase)?.run(count))
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
