//! A function that hangs, a gateway that runs out of descriptors: clients wait or are told so, and nobody else suffers.
use std::{io::Write, net::TcpStream};

use anyhow::{Result, ensure};
use nix::libc;
use tests::{
    Stack, Verdicts, eventually,
    probe::{self, Outcome, Port},
    process::{freeze, thaw},
    wire::{Client, Wire},
};

in_both_modes!(a_function_that_hangs, too_many_open_files);

fn a_function_that_hangs(verdicts: Verdicts) -> Result<()> {
    // More than two workers' windows hold.
    const WAITING: usize = 1500;
    let mut stack = Stack::start(verdicts);
    let hung = stack.processes_of("echo");
    freeze(&hung);
    let mut waiting = Vec::new();
    for number in 0..WAITING {
        let mut socket = stack.connect_http()?;
        socket.write_all(b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n")?;
        waiting.push(socket);
        if number % 100 == 0 {
            let answer = stack.client()?.request("GET", "/function/hello", "x", None)?;
            ensure!(probe::answerer(&answer) == Some("hello"), "{answer:?}");
        }
    }
    thaw(&hung);
    let mut outcomes = [0; 2];
    for socket in &mut waiting {
        match probe::outcome(&stack, Port::Http, socket)? {
            Outcome::Function(function) if function == "echo" => outcomes[0] += 1,
            Outcome::Status(503) => outcomes[1] += 1,
            other => anyhow::bail!("{other:?} after {outcomes:?}"),
        }
    }
    ensure!(outcomes[0] > 0, "none of those that waited was served: {outcomes:?}");
    Ok(())
}

fn too_many_open_files(verdicts: Verdicts) -> Result<()> {
    const ROOM: usize = 40;
    const IDLE: usize = 200;
    let mut stack = Stack::start(verdicts);
    let limit = stack.gateway_fds() + ROOM;
    limit_files(stack.gateway().id(), limit);
    // Half a flight keeps a connection with the gateway.
    let mut idle: Vec<TcpStream> = Vec::new();
    for _ in 0..IDLE {
        let mut socket = stack.connect_http()?;
        socket.write_all(b"GET /function/ec")?;
        idle.push(socket);
    }
    let gateway = stack.gateway().id();
    eventually("the gateway to reach its limit", || {
        (tests::stack::count_fds(gateway) + 4 >= limit).then_some(())
    });
    // These wait behind the idle ones, and are served as soon as those go.
    let mut late = Client::new(Wire::Plain(stack.connect_http()?));
    late.send(b"GET /function/hello HTTP/1.1\r\nHost: x\r\n\r\n")?;
    drop(idle);
    ensure!(probe::answerer(&late.response()?) == Some("hello"));
    for _ in 0..2 * ROOM {
        let answer = stack.client()?.request("GET", "/function/echo", "x", None)?;
        ensure!(probe::answerer(&answer) == Some("echo"), "{answer:?}");
    }
    Ok(())
}

fn limit_files(pid: i32, files: usize) {
    let limit = libc::rlimit { rlim_cur: files as u64, rlim_max: files as u64 };
    // SAFETY: the limit is read before the call returns, and no old one is asked for.
    let result = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(result, 0, "prlimit: {}", std::io::Error::last_os_error());
}
