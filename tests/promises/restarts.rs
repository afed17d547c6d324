//! Processes die and come back: what they had handed over goes on, what is new is served again, nothing stays behind.
use std::fs;

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill as send_signal},
    unistd::Pid,
};
use tests::{
    Stack, Verdicts, bpf, eventually,
    pattern::Pattern,
    probe::{self, Manner, Outcome, Port},
    process::{freeze, thaw},
    stack::{AddressBook, Plan, host},
    wire::Framing,
};

in_both_modes!(
    a_function_is_killed,
    a_function_stops,
    functions_start_after_the_gateway,
    the_gateway_is_killed,
    the_gateway_is_killed_before_the_function_answers,
    the_gateway_is_killed_before_the_function_reads,
    the_gateway_stops,
    the_supervisor_is_killed,
    everything_is_killed,
);

fn is_served(stack: &AddressBook, function: &str) -> Option<()> {
    let answer = stack.client().ok()?.request("GET", &format!("/function/{function}"), "x", None).ok()?;
    (answer.status() == 200).then_some(())
}

/// What was sent before this has left the gateway: the first of these may be accepted in the same turn and sent to its
/// worker before the others are, but the second comes later.
fn all_is_handed_over(stack: &AddressBook, function: &str) -> Result<()> {
    (0..2).try_for_each(|_| is_served(stack, function).with_context(|| format!("{function} serves")))
}

fn a_function_is_killed(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    for _ in 0..3 {
        let mut waiting = stack.client()?;
        waiting.send(b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf ")?;
        let mut other = stack.client()?;
        ensure!(other.request("GET", "/function/hello", "x", None)?.status() == 200);
        ensure!(stack.client()?.request("GET", "/function/echo", "x", None)?.status() == 200);
        let processes = stack.processes_of("echo");
        ensure!(!processes.is_empty());
        for process in processes {
            send_signal(Pid::from_raw(process), Signal::SIGKILL)?;
        }
        // Its connections end, and don't hang.
        ensure!(waiting.response().is_err(), "nobody can have answered this");
        // Others don't notice.
        ensure!(other.request("GET", "/function/hello", "x", None)?.status() == 200);
        // New ones wait for the restart or are told to come back; they are never dropped in silence.
        eventually("echo to be restarted", || {
            let answer =
                stack.client().and_then(|mut client| client.request("GET", "/function/echo", "x", None));
            match answer {
                Ok(answer) => {
                    assert!([200, 503].contains(&answer.status()), "{answer:?}");
                    (answer.status() == 200).then_some(())
                }
                // It was in the queue of the killed process.
                Err(_) => None,
            }
        });
    }
    Ok(())
}

/// A function that is told to stop finishes what it has begun.
fn a_function_stops(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut client = stack.client()?;
    client.send(b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf ")?;
    all_is_handed_over(&stack, "echo")?;
    let before = stack.processes_of("echo");
    for &process in &before {
        send_signal(Pid::from_raw(process), Signal::SIGTERM)?;
    }
    client.send(b"done.")?;
    let answer = client.response().context("the request was begun before the signal")?;
    ensure!(answer.body == b"half done.", "{answer:?}");
    client.expect_close()?;
    eventually("echo to be restarted", || is_served(&stack, "echo"));
    eventually("the old process to be gone", || {
        let now = stack.processes_of("echo");
        before.iter().all(|process| !now.contains(process)).then_some(())
    });
    Ok(())
}

fn functions_start_after_the_gateway(verdicts: Verdicts) -> Result<()> {
    let mut stack = Plan::new(verdicts).prepare();
    stack.start_gateway();
    // It listens before anybody can serve: every client is told so, once the port is open.
    let early = eventually("the gateway to listen", || stack.client().ok());
    drop(early);
    stack.start_supervisor();
    stack.wait_until_ready();
    Ok(())
}

fn the_gateway_is_killed(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    for round in 0..3 {
        let mut plain = stack.client()?;
        let mut secure = stack.tls_client("echo")?;
        for client in [&mut plain, &mut secure] {
            // In the middle of a body: some is read, some is still to come.
            client.send(
                b"POST /function/echo HTTP/1.1\r\nHost: echo.faas.local\r\nContent-Length: 400000\r\n\r\n",
            )?;
            client.send(&[b'a'; 1000])?;
        }
        if verdicts == Verdicts::Sockmap {
            // What is still enrolled loses its programs with the gateway.
            eventually("the kernel path to let go of both", || {
                let entries = stack.look().entries();
                entries.iter().any(|(map, entries)| map == "pm_connections" && *entries == 0).then_some(())
            });
        }
        // A fourth connection: still on its way when the gateway dies, so it may be lost, and only it.
        let mut undecided = stack.client()?;
        undecided.send(b"GET /func")?;
        all_is_handed_over(&stack, "echo")?;
        stack.look();
        let status = stack.gateway().kill();
        ensure!(!status.success());
        for client in [&mut plain, &mut secure] {
            client.send(&[b'b'; 399_000]).with_context(|| format!("round {round}"))?;
            let answer = client.response().with_context(|| format!("round {round}"))?;
            let expected = [vec![b'a'; 1000], vec![b'b'; 399_000]].concat();
            ensure!(answer.body == expected, "round {round}: {} bytes", answer.body.len());
            client.echo(
                "/function/echo",
                "echo.faas.local",
                Pattern::new(round),
                100_000,
                Framing::Chunks(999),
            )?;
        }
        drop(undecided);
        stack.start_gateway();
        stack.wait_until_ready();
        for client in [&mut plain, &mut secure] {
            client.echo(
                "/function/echo",
                "echo.faas.local",
                Pattern::new(round),
                100_000,
                Framing::Length,
            )?;
        }
    }
    Ok(())
}

/// Kills the gateway, and shows that what its connections depend on outlives it.
fn kill_while_needed(stack: &mut Stack) -> Result<()> {
    stack.look();
    let before = stack.kernel_objects();
    stack.gateway().kill();
    let lost: Vec<_> = before.into_iter().filter(|object| !stack.kernel_objects().contains(object)).collect();
    ensure!(lost.is_empty(), "{lost:?}");
    Ok(())
}

/// The function waits for the rest of a head, and has not sent a byte yet.
fn the_gateway_is_killed_before_the_function_answers(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut waiting = stack.client()?;
    waiting.send(b"GET /function/echo HTTP/1.1\r\nHost: x\r\nX-Field: first ")?;
    all_is_handed_over(&stack, "echo")?;
    // The wait for more has retired it: it needs nothing of the kernel's, which any other gateway may remove.
    stack.look();
    stack.gateway().kill();
    waiting.send(b"second\r\n\r\n")?;
    let answer = waiting.response().context("a connection that was handed over")?;
    ensure!(answer.json()["headers"]["x-field"] == "first second", "{answer:?}");
    stack.start_gateway();
    stack.wait_until_ready();
    Ok(())
}

/// The request lies unread in the socket that the function has got, or is about to take.
fn the_gateway_is_killed_before_the_function_reads(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let hung = stack.processes_of("echo");
    freeze(&hung);
    let mut waiting = stack.client()?;
    waiting.send(b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\nthe body is")?;
    all_is_handed_over(&stack, "hello")?;
    kill_while_needed(&mut stack)?;
    thaw(&hung);
    let answer = waiting.response().context("a connection that was handed over")?;
    ensure!(answer.body == b"the body is", "{answer:?}");
    stack.start_gateway();
    stack.wait_until_ready();
    Ok(())
}

/// As under systemd, which removes the cgroup of a unit whose process has ended.
#[test]
fn the_gateway_is_killed_and_its_cgroup_removed() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let hung = stack.processes_of("echo");
    freeze(&hung);
    let mut clients = [stack.client()?, stack.client()?];
    for client in &mut clients {
        client.send(b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\nthe ")?;
    }
    all_is_handed_over(&stack, "hello")?;
    kill_while_needed(&mut stack)?;
    // A killed process leaves it a moment after it was reaped.
    eventually("the gateway's cgroup to be empty", || stack.remove_gateways_cgroup().ok());
    let [early, late] = &mut clients;
    early.send(b"body is")?;
    stack.start_gateway();
    eventually("the new gateway to serve", || is_served(&stack, "hello"));
    late.send(b"body is")?;
    thaw(&hung);
    for client in &mut clients {
        let answer = client.response().context("a connection that was handed over")?;
        ensure!(answer.body == b"the body is", "{answer:?}");
    }
    let sets = eventually("what the first gateway left to go", || {
        let sets = stack.pins();
        (sets.len() == 1).then_some(sets)
    });
    ensure!(sets[0].join("layout").is_symlink(), "{sets:?}");
    Ok(())
}

fn the_gateway_stops(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut client = stack.client()?;
    client.echo("/function/echo", "x.example", Pattern::new(1), 1000, Framing::Length)?;
    stack.look();
    let status = stack.gateway().terminate();
    ensure!(status.success(), "{status}");
    ensure!(stack.client().is_err(), "nobody listens any more");
    client.echo("/function/echo", "x.example", Pattern::new(2), 1_000_000, Framing::Length)?;
    stack.start_gateway();
    stack.wait_until_ready();
    Ok(())
}

fn the_supervisor_is_killed(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    stack.supervisor().kill();
    eventually("the functions to end with their parent", || {
        stack.function_processes().is_empty().then_some(())
    });
    // Refusal is a function, too: without it there is only the end of the connection, but that at once.
    for _ in 0..5 {
        let head = b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n";
        let outcome = probe::probe(&stack, Port::Http, head, &Manner::default())?;
        ensure!(matches!(outcome, Outcome::Closed | Outcome::Reset), "{outcome:?}");
    }
    stack.start_supervisor();
    stack.wait_until_ready();
    Ok(())
}

/// Nobody could clean up, and the next start works all the same, twice, and leaves nothing.
fn everything_is_killed(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    for _ in 0..2 {
        stack.look();
        stack.gateway().kill();
        stack.supervisor().kill();
        eventually("the functions to end with their parent", || {
            stack.function_processes().is_empty().then_some(())
        });
        stack.start_supervisor();
        stack.start_gateway();
        stack.wait_until_ready();
    }
    let sockets = fs::read_dir(stack.sockets())?.count();
    ensure!(sockets == 3, "echo, hello and refusal: {sockets}");
    stack.stop();
    Ok(())
}

/// Somebody takes the programs off their hooks: connections are judged in user space, as if the kernel couldn't.
#[test]
fn programs_are_detached() -> Result<()> {
    let verdicts = Verdicts::Sockmap;
    let links = Stack::start(verdicts).look().links.len();
    for first in 0..links {
        // Each program alone, and all behind it: the rest must do without.
        let mut stack = Stack::start(verdicts);
        for &link in &stack.look().links[first..] {
            bpf::detach_link(link).with_context(|| format!("link {link}"))?;
        }
        for function in ["echo", "hello"].repeat(5) {
            let answer = stack.client()?.request("GET", &format!("/function/{function}"), "x", None)?;
            ensure!(probe::answerer(&answer) == Some(function), "{answer:?}");
            let answer = stack.tls_client(function)?.request("GET", "/", &host(function), None)?;
            ensure!(probe::answerer(&answer) == Some(function), "{answer:?}");
        }
    }
    ensure!(links > 0, "sockmap mode holds links");
    Ok(())
}
