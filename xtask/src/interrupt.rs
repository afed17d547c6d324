//! Ctrl-C during long work: what waits ends, and everything that was started is ended in order.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

static REQUESTED: AtomicBool = AtomicBool::new(false);
/// The process that is waited for now, or 0.
static AWAITED: AtomicI32 = AtomicI32::new(0);

/// To be called before there are other threads: they inherit that these signals go to one thread.
pub fn catch() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            REQUESTED.store(true, Ordering::SeqCst);
            let awaited = AWAITED.load(Ordering::SeqCst);
            if awaited != 0 {
                // Its pipe ends, and with it the waiting.
                let _ = kill(Pid::from_raw(awaited), Signal::SIGKILL);
            }
        }
    });
    Ok(())
}

pub fn check() -> Result<()> {
    if REQUESTED.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    Ok(())
}

/// While it lives, a request to stop ends this process.
pub struct Awaited;

impl Awaited {
    pub fn new(pid: i32) -> Self {
        AWAITED.store(pid, Ordering::SeqCst);
        Self
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        AWAITED.store(0, Ordering::SeqCst);
    }
}
