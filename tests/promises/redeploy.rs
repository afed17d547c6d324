//! A function is started anew, with another environment or certificate, and no request fails.
use std::{
    fs,
    io::Write,
    net::Shutdown,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tests::{
    Stack, Verdicts,
    configuration::{Configuration, redeploy, until_gone, with_lines, without},
    crowd::crowd,
    eventually,
    load::Load,
    metrics::Metrics,
    probe::answerer,
    stack::{AddressBook, DOMAINS, Plan, host},
    tls,
    wire::{Client, Wire},
};

in_both_modes!(
    a_redeploy_fails_no_request,
    a_redeploy_fails_no_request_of_those_that_move,
    a_redeploy_ends_no_connection,
    idle_connections_go_on_at_the_new_instance,
    a_request_in_progress_does_not_end_its_connection,
    a_crowd_goes_on_at_the_new_instance,
    a_full_instance_lets_its_connections_go_on,
    a_client_that_always_asks_goes_on_at_the_new_instance,
    without_a_new_instance_there_is_one_more_answer,
    a_session_that_can_not_move_has_one_more_answer,
    an_idle_connection_may_still_leave,
    a_new_certificate_is_shown,
    a_function_that_can_not_start_changes_nothing,
);

fn a_redeploy_fails_no_request(verdicts: Verdicts) -> Result<()> {
    redeploys_under(verdicts, |stack| Load::start(stack, "echo"))
}

/// What is asked of the old instance on a connection that is its now may be for another function.
fn a_redeploy_fails_no_request_of_those_that_move(verdicts: Verdicts) -> Result<()> {
    redeploys_under(verdicts, |stack| Load::moving(stack, &["echo", "hello"]))
}

fn a_redeploy_ends_no_connection(verdicts: Verdicts) -> Result<()> {
    redeploys_under(verdicts, |stack| Load::unbroken(stack, &["echo"]))?;
    redeploys_under(verdicts, |stack| Load::unbroken(stack, &["echo", "hello"]))
}

fn redeploys_under(verdicts: Verdicts, begin: impl FnOnce(&Stack) -> Load) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let configuration = Configuration::of(&stack);
    let first = configuration.text();
    let hello = stack.processes_of("hello");
    let load = begin(&stack);
    for round in 0..4 {
        // From one instance to two, and back.
        let instances = 1 + round % 2;
        let lines = format!("instances = {instances}\nenv = {{ ROUND = \"{round}\" }}");
        configuration.replace(&with_lines(&first, "echo", &lines));
        load.wait_for_more();
        redeploy(&mut stack, "echo");
        load.wait_for_more();
        ensure!(stack.processes_of("echo").len() == instances);
    }
    load.stop()?;
    ensure!(stack.processes_of("hello") == hello, "what did not change was started anew");
    Ok(())
}

/// Clients of each kind, whom echo has answered.
fn answered_clients(stack: &Stack) -> Result<Vec<Client>> {
    let mut clients = vec![stack.client()?];
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = tls::config(&stack.authority, &[version]);
        clients.push(tls::connect(stack.https, &host("echo"), Arc::new(config))?);
    }
    clients.iter_mut().try_for_each(|client| is_answered(client, "echo"))?;
    Ok(clients)
}

/// The function answers, and the connection stays open.
fn is_answered(client: &mut Client, function: &str) -> Result<()> {
    let answer = client.request("GET", &format!("/function/{function}"), &host("echo"), None)?;
    ensure!(answer.status() == 200 && answerer(&answer) == Some(function), "{answer:?}");
    ensure!(answer.head.field("connection").is_none(), "{answer:?}");
    Ok(())
}

/// Asks until the answer says that it is the last one on this connection, and waits for its end.
fn is_answered_to_the_end(client: &mut Client) -> Result<()> {
    loop {
        let answer = client.request("GET", "/function/echo", &host("echo"), None)?;
        ensure!(answer.status() == 200, "{answer:?}");
        if answer.head.field("connection") == Some("close") {
            return client.expect_close();
        }
        // The signal is heard in one of the pauses.
        thread::sleep(Duration::from_millis(100));
    }
}

/// What waits between two requests when the old instance is asked to go is the new one's, whether or not it has been at
/// another function in between.
fn idle_connections_go_on_at_the_new_instance(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let configuration = Configuration::of(&stack);
    let first = configuration.text();
    let mut clients = answered_clients(&stack)?;
    // One that has a session and has not asked yet.
    clients.push(stack.tls_client("echo")?);
    for round in 0..3 {
        configuration.replace(&with_lines(&first, "echo", &format!("env = {{ ROUND = \"{round}\" }}")));
        redeploy(&mut stack, "echo");
        for client in &mut clients {
            is_answered(client, "echo")?;
            is_answered(client, "hello")?;
            is_answered(client, "echo")?;
        }
    }
    Ok(())
}

/// A request that is in progress is answered by the old instance, which then lets the connection go on.
fn a_request_in_progress_does_not_end_its_connection(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let before = stack.processes_of("echo");
    let mut clients = answered_clients(&stack)?;
    let head = format!("POST /function/echo HTTP/1.1\r\nHost: {}\r\nContent-Length: 4\r\n\r\n", host("echo"));
    for client in &mut clients {
        client.send(head.as_bytes())?;
        client.send(b"ha")?;
    }
    Configuration::of(&stack).add_to("echo", "env = { ROUND = \"1\" }");
    stack.supervisor().signal(Signal::SIGHUP);
    stack.supervisor().wait_for_line("have taken over").context("it took over")?;
    ensure!(stack.processes_of("echo").iter().any(|pid| before.contains(pid)), "nobody waits for the rest");
    for client in &mut clients {
        client.send(b"lf")?;
        let answer = client.response()?;
        ensure!(answer.text() == "half" && answer.head.field("connection").is_none(), "{answer:?}");
    }
    until_gone(&mut stack, "echo", &before);
    clients.iter_mut().try_for_each(|client| is_answered(client, "echo"))
}

/// Many at once, which all the old instance's workers want to be rid of.
fn a_crowd_goes_on_at_the_new_instance(verdicts: Verdicts) -> Result<()> {
    const EACH: usize = 600;
    let mut stack = Stack::start(verdicts);
    let book = AddressBook::clone(&stack);
    let clients = Mutex::new(Vec::new());
    crowd(8, 2 * EACH, |number| {
        let mut client = if number % 2 == 0 { book.client()? } else { book.tls_client("echo")? };
        is_answered(&mut client, "echo")?;
        clients.lock().unwrap().push(client);
        Ok(())
    });
    Configuration::of(&stack).add_to("echo", "env = { ROUND = \"1\" }");
    redeploy(&mut stack, "echo");
    let metrics = Metrics::scrape(&stack)?;
    let moves = |outcome| {
        let labels = [("source", "echo"), ("target", "echo"), ("outcome", outcome)];
        metrics.sum("pointsman_moves_total", &labels)
    };
    ensure!(moves("moved") == 2.0 * EACH as f64, "{} moved", moves("moved"));
    for client in clients.into_inner().unwrap().iter_mut() {
        is_answered(client, "echo")?;
    }
    Ok(())
}

/// An instance that takes nothing more still hears where its connections can go.
fn a_full_instance_lets_its_connections_go_on(verdicts: Verdicts) -> Result<()> {
    // A worker is full when less than a message's connections would fit.
    const ROOM: usize = 192;
    const OPEN: usize = ROOM - 64 + 1;
    let mut stack = Stack::start(verdicts);
    let configuration = Configuration::of(&stack);
    let arguments = format!("/echo\", \"--workers\", \"1\", \"--max-connections\", \"{ROOM}\"]");
    let small = configuration.text().replace("/echo\"]", &arguments);
    configuration.replace(&small);
    redeploy(&mut stack, "echo");
    let mut clients = Vec::new();
    for number in 0..OPEN {
        let mut client = if number % 8 == 0 { stack.tls_client("echo")? } else { stack.client()? };
        is_answered(&mut client, "echo")?;
        clients.push(client);
    }
    // Two, so that all have room.
    configuration.replace(&with_lines(&small, "echo", "instances = 2\nenv = { ROUND = \"1\" }"));
    redeploy(&mut stack, "echo");
    clients.iter_mut().try_for_each(|client| is_answered(client, "echo"))
}

/// The next request is always there before the last one is answered.
fn a_client_that_always_asks_goes_on_at_the_new_instance(verdicts: Verdicts) -> Result<()> {
    const BURST: usize = 100;
    let mut stack = Stack::start(verdicts);
    let before = stack.processes_of("echo");
    let mut writer = stack.connect_http()?;
    let ending = writer.try_clone()?;
    let mut client = Client::new(Wire::Plain(writer.try_clone()?));
    writer.set_nonblocking(false)?;
    let stop = Arc::new(AtomicBool::new(false));
    let asking = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || -> Result<usize> {
            // Fields that echo repeats, so that it is slower than who asks.
            let fields: String = (0..80).map(|number| format!("x-field-{number}: {number}\r\n")).collect();
            let request = format!("GET /function/echo HTTP/1.1\r\nHost: {}\r\n{fields}\r\n", host("echo"));
            let burst = request.repeat(BURST);
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                writer.write_all(burst.as_bytes())?;
                asked += BURST;
            }
            Ok(asked)
        })
    };
    let answering = thread::spawn(move || -> Result<(Client, usize)> {
        let mut answered = 0;
        while !(answered > 0 && asking.is_finished()) {
            let answer = client.response()?;
            ensure!(answer.status() == 200 && answer.head.field("connection").is_none(), "{answer:?}");
            answered += 1;
        }
        let asked = asking.join().expect("the asking thread panicked")?;
        for _ in answered..asked {
            let answer = client.response()?;
            ensure!(answer.status() == 200 && answer.head.field("connection").is_none(), "{answer:?}");
        }
        Ok((client, asked))
    });
    Configuration::of(&stack).add_to("echo", "env = { ROUND = \"1\" }");
    stack.supervisor().signal(Signal::SIGHUP);
    until_gone(&mut stack, "echo", &before);
    stop.store(true, Ordering::Relaxed);
    let answered = answering.join().expect("the answering thread panicked");
    if answered.is_err() {
        // Whoever asks waits for a reader who is gone.
        let _ = ending.shutdown(Shutdown::Both);
    }
    let (mut client, asked) = answered?;
    ensure!(asked > BURST, "too few requests to tell");
    is_answered(&mut client, "echo")
}

/// A function that is taken out of the configuration has nobody who could go on: what comes soon is answered, and the end
/// said with it.
fn without_a_new_instance_there_is_one_more_answer(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut clients = answered_clients(&stack)?;
    let before = stack.processes_of("echo");
    let configuration = Configuration::of(&stack);
    configuration.replace(&without(&configuration.text(), "echo"));
    stack.supervisor().signal(Signal::SIGHUP);
    clients.iter_mut().try_for_each(is_answered_to_the_end)?;
    eventually("the instance to be gone", || stack.processes_of("echo").is_empty().then_some(()));
    ensure!(!before.is_empty());
    Ok(())
}

/// Without anchors no session can move.
fn a_session_that_can_not_move_has_one_more_answer(verdicts: Verdicts) -> Result<()> {
    let mut stack = Plan::new(verdicts).without_anchors().start();
    let mut clients = answered_clients(&stack)?;
    let before = stack.processes_of("echo");
    Configuration::of(&stack).add_to("echo", "env = { ROUND = \"1\" }");
    stack.supervisor().signal(Signal::SIGHUP);
    stack.supervisor().wait_for_line("have taken over").context("it took over")?;
    let (plain, sessions) = clients.split_first_mut().context("a client")?;
    sessions.iter_mut().try_for_each(is_answered_to_the_end)?;
    until_gone(&mut stack, "echo", &before);
    is_answered(plain, "echo")
}

/// Where nobody goes on, the one more request may be for another function, which answers it.
fn an_idle_connection_may_still_leave(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut clients = answered_clients(&stack)?;
    let configuration = Configuration::of(&stack);
    configuration.replace(&without(&configuration.text(), "echo"));
    stack.supervisor().signal(Signal::SIGHUP);
    // The instance has heard the signal by then, or the test shows less.
    thread::sleep(Duration::from_millis(100));
    for client in &mut clients {
        let answer = client.request("GET", "/function/hello", &host("echo"), None)?;
        ensure!(answer.status() == 200 && answerer(&answer) == Some("hello"), "{answer:?}");
    }
    eventually("the instance to be gone", || stack.processes_of("echo").is_empty().then_some(()));
    clients.iter_mut().try_for_each(|client| is_answered(client, "hello"))
}

fn a_new_certificate_is_shown(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let shown = |client: &Client| match &client.wire {
        Wire::Tls(_, session) => session.peer_certificates().map(|chain| chain[0].clone().into_owned()),
        Wire::Plain(_) => None,
    };
    let old = shown(&stack.tls_client("echo")?).context("a certificate")?;
    // Into the same files, as a renewal does it.
    let renewed = stack.authority.issue("echo", &DOMAINS);
    ensure!(renewed.der != old);
    let load = Load::start(&stack, "echo");
    redeploy(&mut stack, "echo");
    load.wait_for_more();
    load.stop()?;
    ensure!(shown(&stack.tls_client("echo")?) == Some(renewed.der));
    Ok(())
}

fn a_function_that_can_not_start_changes_nothing(verdicts: Verdicts) -> Result<()> {
    let mut stack = Plan::new(verdicts).start();
    let configuration = Configuration::of(&stack);
    let good = configuration.text();
    let before = stack.processes_of("echo");
    let load = Load::start(&stack, "echo");

    // A file that is none, a program that is not there, one that ends before it is up.
    let absent = good.replace("/echo\"]", "/no-echo\"]");
    let broken = good.replace("/echo\"]", "/echo\", \"--no-such-option\"]");
    for (text, telling) in [
        ("[functions.echo]\ncommand = 1\n", "pointsman.toml:2"),
        (absent.as_str(), "no-echo"),
        (broken.as_str(), "ended before it was up"),
    ] {
        ensure!(text != good);
        configuration.replace(text);
        stack.supervisor().signal(Signal::SIGHUP);
        stack.supervisor().wait_for_line(telling).context(telling)?;
        load.wait_for_more();
        ensure!(stack.processes_of("echo").iter().any(|pid| before.contains(pid)));
    }
    configuration.replace(&good);
    eventually("what could not start to be gone", || {
        let sockets = fs::read_dir(stack.sockets()).ok()?.count();
        (sockets == 3 && stack.processes_of("echo") == before).then_some(())
    });
    load.stop()?;
    Ok(())
}
