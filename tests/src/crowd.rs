//! Many clients at once, and an account of all that went wrong instead of the first.
use std::{
    fmt::Write as _,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::Result;

/// Runs `job` for each number below `jobs` on `workers` threads and panics with every failure's number and cause.
pub fn crowd(workers: usize, jobs: usize, job: impl Fn(usize) -> Result<()> + Sync) {
    let failures = failures(workers, jobs, job);
    assert!(failures.is_empty(), "{}", account(&failures, jobs));
}

/// The same, for tests that expect failures.
pub fn failures(
    workers: usize,
    jobs: usize,
    job: impl Fn(usize) -> Result<()> + Sync,
) -> Vec<(usize, String)> {
    const STACK_BYTES: usize = 512 << 10;
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= jobs {
                return;
            }
            if let Err(error) = job(number) {
                failures.lock().unwrap().push((number, format!("{error:#}")));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..workers {
            thread::Builder::new()
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, work)
                .expect("starting a thread");
        }
    });
    failures.into_inner().unwrap()
}

fn account(failures: &[(usize, String)], jobs: usize) -> String {
    const SHOWN: usize = 20;
    let mut text = format!("{} of {jobs} failed", failures.len());
    for (number, error) in failures.iter().take(SHOWN) {
        write!(text, "\n  {number}: {error}").expect("a String takes all");
    }
    text
}
