//! The admin listener says whether a gateway lives and is ready, also when the gateway is at its limits.
use std::{
    net::TcpListener,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Result, ensure};
use tests::{Stack, Verdicts, eventually, metrics::Metrics, stack::Plan};

#[test]
fn health_is_told() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Auto);
    for path in ["/healthz", "/readyz"] {
        let answer = stack.admin(path)?;
        ensure!(answer.status() == 200, "{path}: {answer:?}");
    }
    ensure!(stack.admin("/elsewhere")?.status() == 404);
    // Its address is where the log says.
    let ready = stack.gateway().wait_for_line("ready").unwrap_or_default();
    ensure!(ready.contains(&stack.admin.to_string()), "{ready}");
    // Without refusal nobody would be answered, and the gateway lives all the same.
    stack.supervisor().kill();
    eventually("the gateway to notice", || {
        let answer = stack.admin("/readyz").ok()?;
        (answer.status() == 503).then(|| assert!(answer.text().contains("refusal"), "{answer:?}"))
    });
    ensure!(stack.admin("/healthz")?.status() == 200);
    stack.start_supervisor();
    eventually("the gateway to be ready again", || {
        (stack.admin("/readyz").ok()?.status() == 200).then_some(())
    });
    Ok(())
}

#[test]
fn a_busy_admin_port_is_named() -> Result<()> {
    let mut stack = Plan::new(Verdicts::Peek).prepare();
    let busy = TcpListener::bind(stack.admin)?;
    stack.start_gateway();
    let status = stack.gateway().wait();
    let said = stack.gateway().said();
    ensure!(!status.success() && said.len() == 1, "{said:?}");
    let address = stack.admin.to_string();
    ensure!(said[0].contains(&address) && said[0].contains("another program") && said[0].contains("--admin"));
    drop(busy);
    // Another test's child may hold a copy until it has become its program.
    eventually("the gateway to find its port free", || {
        stack.start_gateway();
        stack.gateway().wait_for_line("ready").map(drop)
    });
    stack.start_supervisor();
    stack.wait_until_ready();
    Ok(())
}

/// Connections for a function that is not there stay with the gateway for a moment, so many of them fill it.
#[test]
fn admin_answers_when_descriptors_run_out() -> Result<()> {
    const LIMIT: u64 = 160;
    let mut stack = Plan::new(Verdicts::Peek).absent_function("absent").gateway_descriptors(LIMIT).start();
    let book = stack.address_book();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut clients = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    // Those that nobody accepts wait in the listener's queue, or fail: this is an attack.
                    if let Ok(mut client) = book.client() {
                        let _ = client.send(b"GET /function/absent HTTP/1.1\r\nHost: x\r\n\r\n");
                        clients.push(client);
                    }
                    if clients.len() > 400 {
                        clients.drain(..200);
                    }
                }
            });
        }
        let result = (|| {
            let answered = eventually("accepting to pause", || {
                // Each scrape must be answered, also in the middle of it.
                let metrics = Metrics::scrape(&stack).map_err(|error| format!("{error:#}"));
                match metrics {
                    Ok(metrics) if metrics.sum("pointsman_accept_pauses_total", &[]) >= 3.0 => Some(Ok(())),
                    Ok(_) => None,
                    Err(error) => Some(Err(error)),
                }
            });
            answered.map_err(anyhow::Error::msg)?;
            for _ in 0..50 {
                // A quarter is not for clients, so there is room for those who look.
                let open = stack.gateway_fds();
                ensure!(open <= LIMIT as usize * 3 / 4 + 8, "{open} of {LIMIT} descriptors are used");
                ensure!(stack.admin("/healthz")?.status() == 200);
                ensure!(stack.admin("/metrics")?.status() == 200);
            }
            Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        result
    })?;
    eventually("clients to be served again", || {
        let answer = stack.client().ok()?.request("GET", "/function/echo", "x", None).ok()?;
        (answer.status() == 200).then_some(())
    });
    Ok(())
}
