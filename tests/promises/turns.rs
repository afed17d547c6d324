//! A gateway that connections keep waking interrupts nobody else for them; one with little to do waits for nobody.
use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::libc;
use tests::{PATIENCE, Stack, Verdicts, stack::AddressBook};

in_both_modes!(its_turns_are_rare_and_full);

const CLIENTS: usize = 4;

/// Longer than the gateway watches its turns before it changes how it takes them.
const QUIET: Duration = Duration::from_millis(150);

fn its_turns_are_rare_and_full(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let gateway = stack.gateway().id();
    ensure!(policy(gateway)? == libc::SCHED_OTHER, "it does not begin as others do");

    let (stop, addresses) = (AtomicBool::new(false), stack.address_book());
    let gave_way = thread::scope(|scope| -> Result<bool> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| come_and_go(&addresses, &stop))).collect();
        let gave_way =
            until(PATIENCE, Duration::from_millis(2), || Ok(policy(gateway)? == libc::SCHED_BATCH));
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("a client panicked")?;
        }
        gave_way
    })?;
    ensure!(gave_way, "however often it was woken, it went on interrupting others");

    let prompt = until(PATIENCE, QUIET, || {
        stack.client()?.request("GET", "/function/echo", "x", None)?;
        Ok(policy(gateway)? == libc::SCHED_OTHER)
    })?;
    ensure!(prompt, "it waits for others although it has little to do");
    Ok(())
}

fn come_and_go(stack: &AddressBook, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        stack.client()?.request("GET", "/function/echo", "x", None)?;
    }
    Ok(())
}

fn until(patience: Duration, pause: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    let end = Instant::now() + patience;
    while Instant::now() < end {
        if done()? {
            return Ok(true);
        }
        thread::sleep(pause);
    }
    Ok(false)
}

/// How a process's first thread, the gateway's loop, is scheduled.
fn policy(process: i32) -> Result<i32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // proc_pid_stat(5): field 41; the third is the first behind the name, which is in parentheses.
    let (_, fields) = stat.rsplit_once(") ").context("a process without a name")?;
    let policy = fields.split_ascii_whitespace().nth(41 - 3).context("a kernel that tells no policy")?;
    Ok(policy.parse()?)
}
