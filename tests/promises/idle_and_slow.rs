//! Clients that say nothing, or too slowly, are cut at the deadline and cost the others nothing.
use std::{io::Write, net::TcpStream, os::fd::AsFd};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use tests::{
    Stack, Verdicts,
    hello::Hello,
    probe::{self, Outcome, Port},
    stack::Plan,
};

in_both_modes!(half_a_flight, a_byte_at_a_time, silence, many_idle_clients, a_half_head_behind_the_verdict);

/// Short enough to wait for; how long it really takes is nobody's business here.
fn start(verdicts: Verdicts) -> Stack {
    Plan::new(verdicts).setting("head_timeout_ms", 700).start()
}

fn connect(stack: &Stack, port: Port) -> Result<TcpStream> {
    match port {
        Port::Http => stack.connect_http(),
        Port::Https => stack.connect_https(),
    }
}

fn is_cut(port: Port, outcome: &Outcome) -> bool {
    match port {
        Port::Http => *outcome == Outcome::Status(408),
        Port::Https => matches!(outcome, Outcome::Alert(_)),
    }
}

fn half_a_flight(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let hello = Hello::named(b"echo.faas.local").bytes();
    for (port, bytes) in [
        (Port::Http, &b"GET /function/ec"[..]),
        (Port::Http, b"G"),
        (Port::Http, b"\r\n"),
        (Port::Https, &hello[..1]),
        (Port::Https, &hello[..7]),
        (Port::Https, &hello[..100]),
    ] {
        let mut socket = connect(&stack, port)?;
        socket.write_all(bytes)?;
        let outcome = probe::outcome(&stack, port, &mut socket).with_context(|| format!("{bytes:?}"))?;
        ensure!(is_cut(port, &outcome), "{bytes:?}: {outcome:?}");
    }
    Ok(())
}

/// Each byte is progress, and all of them together are not enough.
fn a_byte_at_a_time(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let mut head = b"GET /function/".to_vec();
    head.extend([b'a'; 60]);
    let hello = Hello::named(&[b'a'; 100]).bytes();
    for (port, bytes) in [(Port::Http, head), (Port::Https, hello)] {
        let mut socket = connect(&stack, port)?;
        let mut sent = 0;
        for byte in bytes.chunks(1) {
            socket.write_all(byte)?;
            sent += 1;
            // The pause is an event that does not come: the answer.
            const PAUSE_MS: u16 = 100;
            let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PAUSE_MS)? > 0 {
                break;
            }
        }
        let outcome = probe::outcome(&stack, port, &mut socket)?;
        ensure!(is_cut(port, &outcome), "{port:?} after {sent} bytes: {outcome:?}");
        ensure!(sent < bytes.len(), "{port:?}: every byte was waited for");
    }
    Ok(())
}

fn silence(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    for port in [Port::Http, Port::Https] {
        let mut socket = connect(&stack, port)?;
        let outcome = probe::outcome(&stack, port, &mut socket)?;
        // Whoever never said a word may be told as little.
        ensure!(
            is_cut(port, &outcome) || matches!(outcome, Outcome::Closed | Outcome::Reset),
            "{port:?}: {outcome:?}"
        );
    }
    Ok(())
}

fn many_idle_clients(verdicts: Verdicts) -> Result<()> {
    const IDLE: usize = 800;
    // Nobody is cut while the test looks.
    let stack = Plan::new(verdicts).setting("head_timeout_ms", 600_000).start();
    let hello = Hello::named(b"echo.faas.local").bytes();
    let mut idle = Vec::new();
    for number in 0..IDLE {
        let mut socket = connect(&stack, if number % 2 == 0 { Port::Http } else { Port::Https })?;
        match number % 4 {
            0 => socket.write_all(b"GET /function/e")?,
            1 => socket.write_all(&hello[..number % 100])?,
            _ => {}
        }
        idle.push(socket);
    }
    for function in ["echo", "hello"].repeat(20) {
        let answer = stack.client()?.request("GET", &format!("/function/{function}"), "x", None)?;
        ensure!(probe::answerer(&answer) == Some(function), "{answer:?}");
        let answer = stack.tls_client(function)?.request("GET", "/", &tests::stack::host(function), None)?;
        ensure!(probe::answerer(&answer) == Some(function), "{answer:?}");
    }
    // Patience pays: the idle ones are served when they go on.
    for socket in idle.iter_mut().step_by(4).take(20) {
        socket.write_all(b"cho HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let outcome = probe::outcome(&stack, Port::Http, socket)?;
        ensure!(outcome == Outcome::Function("echo".into()), "{outcome:?}");
    }
    Ok(())
}

/// The gateway knows enough and has handed the connection over; the rest of the head never comes.
fn a_half_head_behind_the_verdict(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let mut socket = stack.connect_http()?;
    socket.write_all(b"GET /function/echo HTTP/1.1\r\nHost: x\r\n")?;
    let outcome = probe::outcome(&stack, Port::Http, &mut socket)?;
    ensure!(outcome == Outcome::Status(408), "{outcome:?}");
    let mut socket = stack.connect_https()?;
    let hello = Hello::named(b"echo.faas.local").with(tests::hello::EXTENSION_PADDING, [0; 300]).bytes();
    socket.write_all(&hello[..hello.len() - 100])?;
    let outcome = probe::outcome(&stack, Port::Https, &mut socket)?;
    ensure!(matches!(outcome, Outcome::Alert(_) | Outcome::Closed), "{outcome:?}");
    Ok(())
}
