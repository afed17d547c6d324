//! A function's instances share its connections: who can't take one leaves it to the others.
use std::{
    fs,
    io::Write,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{
    Stack, Verdicts,
    configuration::Configuration,
    eventually,
    hello::Hello,
    probe::{self, Manner, Outcome, Port},
    process::{freeze, thaw},
    stack::{AddressBook, Plan},
    tls::alert,
    wire::{Client, Wire},
};

in_both_modes!(
    each_instance_serves,
    a_stalled_instance_gets_nothing_new,
    a_full_instance_leaves_connections_to_the_next,
    a_killed_instance_is_no_loss_to_the_others,
);

const GET: &[u8] = b"GET /function/echo HTTP/1.1\r\nHost: echo.faas.local\r\nConnection: close\r\n\r\n";

/// What a worker's queue holds; more goes to the next instance.
const WINDOW: usize = 256;

/// A stack whose echo has instances of one worker each.
fn stack(verdicts: Verdicts, instances: usize) -> Stack {
    let mut stack = Plan::new(verdicts).prepare();
    let configuration = Configuration::of(&stack);
    let alone = configuration.text();
    let several =
        alone.replace("/echo\"]", &format!("/echo\", \"--workers\", \"1\"]\ninstances = {instances}"));
    assert_ne!(alone, several);
    configuration.replace(&several);
    stack.start_supervisor();
    stack.start_gateway();
    stack.wait_until_ready();
    for instance in 1..=instances {
        let line = format!("echo@{instance}.sock");
        eventually("the instance to be up", || {
            let said = stack.gateway().said();
            let found = said.iter().any(|said| said.contains("instance is up") && said.contains(&line));
            found.then_some(())
        });
    }
    stack
}

fn ask(stack: &AddressBook) -> Result<TcpStream> {
    let mut socket = stack.connect_http()?;
    socket.write_all(GET)?;
    Ok(socket)
}

/// Connections that are open with a process, by what the kernel says of its descriptors.
fn sockets_of(pid: i32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
}

fn each_instance_serves(verdicts: Verdicts) -> Result<()> {
    const CONNECTIONS: usize = 60;
    let mut stack = stack(verdicts, 3);
    let processes = stack.processes_of("echo");
    ensure!(processes.len() == 3, "{processes:?}");
    let before: Vec<_> = processes.iter().map(|&pid| sockets_of(pid)).collect();
    let mut kept = Vec::new();
    for number in 0..CONNECTIONS {
        let mut client = if number % 2 == 0 { stack.client()? } else { stack.tls_client("echo")? };
        let answer = client.request("GET", "/function/echo", "echo.faas.local", None)?;
        ensure!(answer.status() == 200 || number % 2 == 1, "{answer:?}");
        kept.push(client);
    }
    let shares: Vec<_> =
        processes.iter().zip(&before).map(|(&pid, before)| sockets_of(pid).saturating_sub(*before)).collect();
    // A connection of the start may have been closing when it was counted.
    ensure!(shares.iter().sum::<usize>().abs_diff(CONNECTIONS) <= processes.len(), "{shares:?}");
    // The less loaded of two keeps them nearly even.
    let even = CONNECTIONS / processes.len();
    ensure!(shares.iter().all(|share| share.abs_diff(even) <= 4), "{shares:?}");
    Ok(())
}

fn a_stalled_instance_gets_nothing_new(verdicts: Verdicts) -> Result<()> {
    let mut stack = stack(verdicts, 2);
    let stalled = stack.processes_of("echo")[0];
    freeze(&[stalled]);
    // Some of these find out that it is stalled, and wait for it.
    let mut first = Vec::new();
    for _ in 0..20 {
        first.push(ask(&stack)?);
    }
    // What a worker has had for so long is no hiccup (the gateway's bound is 50 ms).
    thread::sleep(Duration::from_millis(200));
    for number in 0..50 {
        let mut client = stack.client()?;
        client.socket().set_read_timeout(Some(tests::PATIENCE))?;
        let begin = Instant::now();
        let answer =
            client.request("GET", "/function/echo", "x", None).with_context(|| format!("{number}"))?;
        ensure!(answer.status() == 200 && begin.elapsed() < tests::PATIENCE, "{answer:?}");
    }
    thaw(&[stalled]);
    for mut socket in first {
        let outcome = probe::outcome(&stack, Port::Http, &mut socket)?;
        ensure!(outcome == Outcome::Function("echo".into()), "{outcome:?}");
    }
    Ok(())
}

fn a_full_instance_leaves_connections_to_the_next(verdicts: Verdicts) -> Result<()> {
    const MORE: usize = 40;
    const FILLING: usize = 2 * WINDOW + MORE;
    let mut stack = stack(verdicts, 2);
    let processes = stack.processes_of("echo");
    freeze(&processes);
    let waiting: Result<Vec<_>> = (0..FILLING).map(|_| ask(&stack)).collect();
    let mut waiting = waiting?;
    // Both are full: whoever comes now is told to come back.
    for _ in 0..MORE {
        let mut client = Client::new(Wire::Plain(ask(&stack)?));
        let answer = client.response()?;
        ensure!(answer.status() == 503 && answer.head.field("retry-after").is_some(), "{answer:?}");
        let hello = Hello::named(b"echo.faas.local").bytes();
        let outcome = probe::probe(&stack, Port::Https, &hello, &Manner::default())?;
        ensure!(outcome == Outcome::Alert(alert::INTERNAL_ERROR), "{outcome:?}");
    }
    // Nobody else suffers.
    let answer = stack.client()?.request("GET", "/function/hello", "x", None)?;
    ensure!(answer.status() == 200, "{answer:?}");
    thaw(&processes);
    let mut served = 0;
    for socket in &mut waiting {
        match probe::outcome(&stack, Port::Http, socket)? {
            Outcome::Function(function) if function == "echo" => served += 1,
            Outcome::Status(503) => {}
            other => anyhow::bail!("{other:?} after {served}"),
        }
    }
    ensure!((WINDOW + 1..=2 * WINDOW).contains(&served), "{served} of {FILLING} were kept for two instances");
    Ok(())
}

fn a_killed_instance_is_no_loss_to_the_others(verdicts: Verdicts) -> Result<()> {
    let mut stack = stack(verdicts, 2);
    let processes = stack.processes_of("echo");
    let mut kept = Vec::new();
    for _ in 0..10 {
        let mut client = stack.client()?;
        ensure!(client.request("GET", "/function/echo", "x", None)?.status() == 200);
        kept.push(client);
    }
    kill(Pid::from_raw(processes[0]), Signal::SIGKILL)?;
    let served = kept
        .iter_mut()
        .map(|client| client.request("GET", "/function/echo", "x", None))
        .filter(|answer| answer.as_ref().is_ok_and(|answer| answer.status() == 200))
        .count();
    ensure!((1..10).contains(&served), "{served} of 10 go on");
    eventually("the instance to be restarted", || (stack.processes_of("echo").len() == 2).then_some(()));
    let answer = stack.client()?.request("GET", "/function/echo", "x", None)?;
    ensure!(answer.status() == 200, "{answer:?}");
    Ok(())
}

/// Bounded by a cgroup, and told apart from any other death.
#[test]
fn who_needs_more_than_memory_max_is_killed_alone() -> Result<()> {
    let hog = "hoard=$(head -c 200000000 /dev/zero | tr '\\\\0' x); exec sleep 1000";
    let table =
        format!("\n[functions.hog]\ncommand = [\"/bin/sh\", \"-c\", \"{hog}\"]\nmemory_max = \"32M\"\n");
    let mut stack = Plan::new(Verdicts::Auto).configuration(&table).start();
    let said = stack.supervisor().wait_for_line("more than its memory_max").context("it is said")?;
    ensure!(said.contains("hog"), "{said}");
    stack.supervisor().wait_for_line("runs again").context("it is started again")?;
    let answer = stack.client()?.request("GET", "/function/echo", "x", None)?;
    ensure!(answer.status() == 200, "{answer:?}");
    Ok(())
}
