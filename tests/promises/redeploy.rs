//! A function is started anew, with another environment or certificate, and no request fails.
use std::{fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tests::{
    Stack, Verdicts,
    configuration::Configuration,
    eventually,
    load::Load,
    stack::{DOMAINS, Plan},
    wire::{Client, Wire},
};

in_both_modes!(
    a_redeploy_fails_no_request,
    a_redeploy_fails_no_request_of_those_that_move,
    an_idle_connection_gets_one_more_answer,
    an_idle_connection_may_still_leave,
    a_new_certificate_is_shown,
    a_function_that_can_not_start_changes_nothing,
);

/// Has the supervisor follow the configuration, and waits until other processes serve echo.
fn redeployed(stack: &mut Stack) {
    let before = stack.processes_of("echo");
    stack.supervisor().signal(Signal::SIGHUP);
    until_gone(stack, &before);
}

fn until_gone(stack: &mut Stack, before: &[i32]) {
    eventually("the old instances to be gone", || {
        let now = stack.processes_of("echo");
        (!now.is_empty() && before.iter().all(|pid| !now.contains(pid))).then_some(())
    });
}

fn a_redeploy_fails_no_request(verdicts: Verdicts) -> Result<()> {
    redeploys_under(verdicts, |stack| Load::start(stack, "echo"))
}

/// What is asked of the old instance on a connection that is its now may be for another function.
fn a_redeploy_fails_no_request_of_those_that_move(verdicts: Verdicts) -> Result<()> {
    redeploys_under(verdicts, |stack| Load::moving(stack, &["echo", "hello"]))
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
        configuration.replace(&tests::configuration::with_lines(&first, "echo", &lines));
        load.wait_for_more();
        redeployed(&mut stack);
        load.wait_for_more();
        ensure!(stack.processes_of("echo").len() == instances);
    }
    load.stop()?;
    ensure!(stack.processes_of("hello") == hello, "what did not change was started anew");
    Ok(())
}

/// What stands between two requests when the old instance is asked to go is answered, and then ends in order.
fn an_idle_connection_gets_one_more_answer(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut clients = [stack.client()?, stack.tls_client("echo")?];
    for client in &mut clients {
        ensure!(client.request("GET", "/function/echo", "echo.faas.local", None)?.status() == 200);
    }
    Configuration::of(&stack).add_to("echo", "env = { ROUND = \"1\" }");
    let before = stack.processes_of("echo");
    stack.supervisor().signal(Signal::SIGHUP);
    // Said with the signal that asks them to go.
    stack.supervisor().wait_for_line("have taken over").context("it took over")?;
    for client in &mut clients {
        // The signal is heard in one of the pauses.
        loop {
            let answer = client.request("GET", "/function/echo", "echo.faas.local", None)?;
            ensure!(answer.status() == 200, "{answer:?}");
            if answer.head.field("connection") == Some("close") {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        client.expect_close()?;
    }
    until_gone(&mut stack, &before);
    Ok(())
}

/// The one more request is for another function, which answers it.
fn an_idle_connection_may_still_leave(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut clients = [stack.client()?, stack.tls_client("echo")?];
    for client in &mut clients {
        ensure!(client.request("GET", "/function/echo", "echo.faas.local", None)?.status() == 200);
    }
    let before = stack.processes_of("echo");
    Configuration::of(&stack).add_to("echo", "env = { ROUND = \"1\" }");
    stack.supervisor().signal(Signal::SIGHUP);
    stack.supervisor().wait_for_line("have taken over").context("it took over")?;
    // The old instance has heard the signal by then, or the test shows less.
    thread::sleep(Duration::from_millis(100));
    for client in &mut clients {
        let answer = client.request("GET", "/function/hello", "echo.faas.local", None)?;
        ensure!(answer.status() == 200 && answer.text().starts_with("Hello"), "{answer:?}");
    }
    until_gone(&mut stack, &before);
    for client in &mut clients {
        let answer = client.request("GET", "/function/echo", "echo.faas.local", None)?;
        ensure!(answer.status() == 200, "{answer:?}");
    }
    Ok(())
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
    redeployed(&mut stack);
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
