//! A session ticket is good at every instance of its function, and as long as the certificate that its client has seen.
use std::{collections::HashMap, sync::Arc};

use anyhow::{Context, Result, ensure};
use rustls::{ClientConfig, HandshakeKind, SupportedProtocolVersion, version};
use tests::{
    Stack, Verdicts,
    configuration::{Configuration, redeploy},
    eventually,
    metrics::Metrics,
    stack::{DOMAINS, Plan, count_fds, host},
    tls,
    wire::{Client, Wire},
};

in_both_modes!(
    every_instance_knows_the_tickets_of_the_others,
    a_new_instance_knows_the_tickets_of_the_old_one,
    a_new_certificate_is_seen_by_everybody,
);

const VERSIONS: [&SupportedProtocolVersion; 2] = [&version::TLS12, &version::TLS13];

/// A client that remembers its sessions.
fn config(stack: &Stack, version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
    Arc::new(tls::config(&stack.authority, &[version]))
}

/// A connection whose handshake was of this kind, and that has got an answer and the tickets before it.
fn connect(stack: &Stack, config: &Arc<ClientConfig>, expected: HandshakeKind) -> Result<Client> {
    let mut client = tls::connect(stack.https, &host("echo"), Arc::clone(config))?;
    ensure!(client.request("GET", "/", &host("echo"), None)?.status() == 200);
    let Wire::Tls(_, session) = &client.wire else { unreachable!("it is a TLS client") };
    let kind = session.handshake_kind().context("a handshake")?;
    ensure!(kind == expected, "{kind:?} instead of {expected:?}");
    Ok(client)
}

fn every_instance_knows_the_tickets_of_the_others(verdicts: Verdicts) -> Result<()> {
    const INSTANCES: usize = 3;
    let mut stack = Plan::new(verdicts).function_setting("echo", &format!("instances = {INSTANCES}")).start();
    eventually("all instances to take connections", || {
        let up = Metrics::scrape(&stack).ok()?.sum("pointsman_instances_up", &[("function", "echo")]);
        (up == INSTANCES as f64).then_some(())
    });
    let processes = stack.processes_of("echo");
    ensure!(processes.len() == INSTANCES, "{processes:?}");
    let before: HashMap<_, _> = processes.iter().map(|&pid| (pid, count_fds(pid))).collect();
    let mut held = Vec::new();
    for version in VERSIONS {
        let config = config(&stack, version);
        held.push(connect(&stack, &config, HandshakeKind::Full)?);
        // The more an instance has, the less it is chosen: after so many, everybody has some.
        for _ in 0..4 * INSTANCES {
            held.push(connect(&stack, &config, HandshakeKind::Resumed)?);
        }
    }
    // One more may be a pool connection that was late.
    ensure!(processes.iter().all(|&pid| count_fds(pid) > before[&pid] + 1), "not all were asked");
    Ok(())
}

fn a_new_instance_knows_the_tickets_of_the_old_one(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let configs = VERSIONS.map(|version| config(&stack, version));
    for config in &configs {
        connect(&stack, config, HandshakeKind::Full)?;
    }
    Configuration::of(&stack).add_to("echo", "env = { ROUND = \"1\" }");
    redeploy(&mut stack, "echo");
    for config in &configs {
        connect(&stack, config, HandshakeKind::Resumed)?;
    }
    Ok(())
}

fn a_new_certificate_is_seen_by_everybody(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let configs = VERSIONS.map(|version| config(&stack, version));
    for config in &configs {
        connect(&stack, config, HandshakeKind::Full)?;
    }
    // Into the same files, as a renewal does it.
    stack.authority.issue("echo", &DOMAINS);
    redeploy(&mut stack, "echo");
    for config in &configs {
        connect(&stack, config, HandshakeKind::Full)?;
        connect(&stack, config, HandshakeKind::Resumed)?;
    }
    Ok(())
}
