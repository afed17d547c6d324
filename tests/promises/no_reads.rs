//! In sockmap mode the gateway makes no read-type system call on a client's socket.
use std::{io::Write, process::Command};

use anyhow::{Context, Result, ensure};
use tests::{
    Stack, Verdicts,
    hello::Hello,
    probe::{self, Manner, Outcome, Port, probe},
    process::Process,
    programs,
    stack::Plan,
    trace::{self, Report},
};

#[test]
fn the_kernel_judges_and_the_gateway_never_looks() -> Result<()> {
    let report = traced(Verdicts::Sockmap)?;
    ensure!(report.accepted >= CLIENTS, "strace saw {} connections", report.accepted);
    ensure!(
        report.reads.is_empty(),
        "{} reads of client sockets:\n{}",
        report.reads.len(),
        report.reads.join("\n")
    );
    Ok(())
}

/// The same clients and the same eyes on a gateway that does look: the test above would have seen it.
#[test]
fn a_gateway_that_peeks_is_seen_to() -> Result<()> {
    let report = traced(Verdicts::Peek)?;
    ensure!(report.accepted >= CLIENTS, "strace saw {} connections", report.accepted);
    ensure!(
        report.reads.len() >= CLIENTS,
        "only {} reads of {} sockets",
        report.reads.len(),
        report.accepted
    );
    Ok(())
}

const ROUNDS: usize = 20;
/// Those of a round whose connection is accepted for sure.
const CLIENTS: usize = ROUNDS * 6;

fn traced(verdicts: Verdicts) -> Result<Report> {
    let mut stack = Plan::new(verdicts).absent_function("absent").setting("head_timeout_ms", 5000).start();
    let file = stack.folder().join("trace");
    let mut command = Command::new(programs::client("strace", "strace"));
    command.args(["-f", "-e", &trace::filter(), "-o"]).arg(&file);
    command.args(["-p", &stack.gateway().id().to_string()]);
    let mut strace = Process::spawn("strace", &mut command, None);
    let attached = strace.wait_for_line("attached").context("strace must be allowed to attach (ptrace)")?;
    ensure!(!attached.contains("not permitted"), "{attached}");
    clients(&stack)?;
    strace.signal(nix::sys::signal::Signal::SIGINT);
    strace.wait();
    trace::report(&std::fs::read_to_string(&file)?)
}

fn clients(stack: &Stack) -> Result<()> {
    let hello = Hello::named(b"echo.faas.local").post_quantum().bytes();
    for round in 0..ROUNDS {
        ensure!(stack.client()?.request("GET", "/function/hello", "x", None)?.status() == 200);
        ensure!(stack.tls_client("hello")?.request("GET", "/", "hello.faas.local", None)?.status() == 200);
        ensure!(stack.client()?.request("GET", "/function/absent", "x", None)?.status() == 503);
        ensure!(stack.client()?.request("GET", "/nobody", "x", None)?.status() == 404);
        // Late verdicts: the rest comes when somebody else has been served.
        let head = b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n";
        for (port, bytes) in [(Port::Http, &head[..]), (Port::Https, &hello)] {
            let mut socket =
                if port == Port::Http { stack.connect_http()? } else { stack.connect_https()? };
            let cut = 1 + round % 14;
            socket.write_all(&bytes[..cut])?;
            ensure!(stack.client()?.request("GET", "/function/hello", "x", None)?.status() == 200);
            socket.write_all(&bytes[cut..])?;
            let outcome = probe::outcome(stack, port, &mut socket)?;
            ensure!(outcome == Outcome::Function("echo".into()), "{outcome:?}");
        }
        // Ends of every kind: an incomplete flight, a malformed one, one that is never finished.
        let half_close = Manner { half_close: true, ..Manner::default() };
        ensure!(probe(stack, Port::Http, &head[..10], &half_close)? == Outcome::Status(400));
        ensure!(probe(stack, Port::Http, b"\x01", &half_close)? == Outcome::Status(400));
        if round == 0 {
            ensure!(probe(stack, Port::Http, &head[..10], &Manner::default())? == Outcome::Status(408));
        }
    }
    Ok(())
}
