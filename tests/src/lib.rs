//! What the tests stand on: a stack of real processes, clients that control each segment, networks that lie.

pub mod authority;
pub mod bpf;
pub mod cgroup;
pub mod configuration;
pub mod corpus;
pub mod crowd;
pub mod hello;
pub mod http;
pub mod leftovers;
pub mod load;
pub mod mangle;
pub mod metrics;
pub mod net;
pub mod oracle;
pub mod pattern;
pub mod pins;
pub mod probe;
pub mod process;
pub mod programs;
pub mod rest;
pub mod ring;
pub mod segments;
pub mod stack;
pub mod tls;
pub mod trace;
pub mod wire;

pub use stack::{Stack, Verdicts};

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long anything may take before a test calls it a hang. No test measures time against it: a loaded machine
/// only gets slower, a hang stays one.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls a condition that no event announces until it holds, and says what was awaited if it never does.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {} s in vain for {what}", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(5));
    }
}

/// True under `cargo xtask test --long`.
pub fn long() -> bool {
    std::env::var_os("POINTSMAN_TEST_LONG").is_some_and(|value| value == "1")
}
