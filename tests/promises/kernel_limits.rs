//! What becomes of connections when the kernel path has no room for them or loses track of their bytes.
use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
};

use anyhow::{Context, Result, bail, ensure};
use tests::{
    PATIENCE, Stack, Verdicts,
    bpf::Map,
    eventually,
    metrics::Metrics,
    process::{freeze, thaw},
    ring,
    stack::Plan,
};

const BODY: &[u8] = b"a body";

/// The fields of a `pm_connections` entry that are used here, as `bpftool map dump` shows them.
mod entry {
    pub const NEXT_SEQUENCE: std::ops::Range<usize> = 0..4;
    /// 0 until it is known.
    pub const VERDICT: std::ops::Range<usize> = 4..8;
    pub const FLAGS: usize = 9;
    pub const ACCEPTED: u8 = 1;
    pub const REMOTE_PORT: std::ops::Range<usize> = 14..16;
}

/// Waits until the kernel knows a client's connection and its entry is as it should be.
fn entry_of(
    connections: &Map,
    client: &TcpStream,
    is_right: impl Fn(&[u8]) -> bool,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let port = client.local_addr()?.port().to_ne_bytes();
    Ok(eventually("the connection's entry", || {
        let entries =
            connections.keys().into_iter().filter_map(|key| Some((connections.value(&key).ok()?, key)));
        let found =
            entries.into_iter().find(|(value, _)| value[entry::REMOTE_PORT] == port && is_right(value));
        found.map(|(value, key)| (key, value))
    }))
}

fn is_accepted(value: &[u8]) -> bool {
    value[entry::FLAGS] & entry::ACCEPTED != 0
}

fn is_judged(value: &[u8]) -> bool {
    value[entry::VERDICT] != [0; 4]
}

/// Makes the kernel believe that it has passed on one byte less than it has: what follows leaves a gap, which nothing
/// on the wire could bring about.
fn lose_a_byte(connections: &Map, (key, mut value): (Vec<u8>, Vec<u8>)) -> Result<()> {
    let next = u32::from_ne_bytes(value[entry::NEXT_SEQUENCE].try_into()?);
    value[entry::NEXT_SEQUENCE].copy_from_slice(&next.wrapping_sub(1).to_ne_bytes());
    connections.change(&key, &value).context("changing the entry")
}

/// The connection ends, and nobody could take that for an orderly end.
fn ensure_reset(mut client: TcpStream) -> Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    match client.read(&mut [0; 1000]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => bail!("{other:?} instead of a reset"),
    }
}

fn ensure_served(stack: &Stack) -> Result<()> {
    let answer = stack.client()?.request("POST", "/function/echo", "x", Some(BODY))?;
    ensure!(answer.status() == 200 && answer.body == BODY, "{answer:?}");
    let answer =
        stack.tls_client("echo")?.request("POST", "/function/echo", "echo.faas.local", Some(BODY))?;
    ensure!(answer.status() == 200 && answer.body == BODY, "{answer:?}");
    Ok(())
}

fn verdicts_of(stack: &Stack, path: &str) -> Result<f64> {
    Ok(Metrics::scrape(stack)?.sum("pointsman_verdicts_total", &[("path", path)]))
}

#[test]
fn connections_that_find_no_room_are_judged_in_user_space() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let connections = stack.look().map("pm_connections")?;
    ensure!(verdicts_of(&stack, "user_space")? == 0.0);

    let value = vec![0; connections.value_bytes];
    let mut strangers = Vec::new();
    // No socket has these cookies, which the kernel counts from 1.
    for cookie in (0..u64::MAX).rev().take(connections.max_entries + 1) {
        match connections.add(&cookie.to_ne_bytes(), &value) {
            Ok(()) => strangers.push(cookie),
            Err(_) => break,
        }
    }
    ensure!(strangers.len() <= connections.max_entries, "the map takes more than it says");
    ensure_served(&stack)?;
    ensure!(verdicts_of(&stack, "user_space")? == 2.0);

    for cookie in strangers {
        connections.remove(&cookie.to_ne_bytes())?;
    }
    ensure_served(&stack)?;
    ensure!(verdicts_of(&stack, "user_space")? == 2.0, "there is room again");
    Ok(())
}

#[test]
fn a_verdict_whose_event_is_lost_is_found_at_the_deadline() -> Result<()> {
    let mut stack = Plan::new(Verdicts::Sockmap).setting("head_timeout_ms", 3000).start();
    let objects = stack.look();
    let (connections, events) = (objects.map("pm_connections")?, objects.map("pm_events")?);
    let mut client = stack.client()?;
    client.send(b"GET /functi")?;
    entry_of(&connections, client.socket(), is_accepted)?;
    let gateway = [stack.gateway().id()];
    freeze(&gateway);
    let full = ring::Full::new(&events)?;
    client.send(b"on/echo HTTP/1.1\r\nHost: x\r\n\r\n")?;
    entry_of(&connections, client.socket(), is_judged)?;
    drop(full);
    thaw(&gateway);
    ensure!(client.response()?.status() == 200);
    let lost = Metrics::scrape(&stack)?.sum("pointsman_kernel_events_total", &[("event", "events_lost")]);
    ensure!(lost == 1.0, "{lost} lost events");
    Ok(())
}

#[test]
fn a_connection_that_lost_a_byte_before_its_verdict_is_reset() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let connections = stack.look().map("pm_connections")?;
    let mut client = stack.connect_http()?;
    client.write_all(b"GET /functi")?;
    lose_a_byte(&connections, entry_of(&connections, &client, is_accepted)?)?;
    client.write_all(b"on/echo HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure_reset(client)?;
    ensure_poisoned_once(&mut stack)
}

#[test]
fn a_connection_that_lost_a_byte_is_reset_although_a_function_has_it() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let connections = stack.look().map("pm_connections")?;
    // It is in a queue and will not be looked at.
    let functions = stack.function_processes();
    freeze(&functions);
    let mut client = stack.connect_http()?;
    client.write_all(b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nall")?;
    let entry = entry_of(&connections, &client, is_judged)?;
    eventually("the connection to be handed over", || {
        let metrics = Metrics::scrape(&stack).ok()?;
        (metrics.sum("pointsman_in_flight_connections", &[]) == 1.0).then_some(())
    });
    lose_a_byte(&connections, entry)?;
    client.write_all(b" of it")?;
    // So that an end in order would be believed; it may be reset by now.
    let _: io::Result<()> = client.shutdown(Shutdown::Write);
    ensure_reset(client)?;
    thaw(&functions);
    ensure_poisoned_once(&mut stack)
}

fn ensure_poisoned_once(stack: &mut Stack) -> Result<()> {
    eventually("the kernel to forget it", || {
        let entries = stack.look().entries();
        let left: usize = entries.iter().filter(|(map, _)| map != "pm_routes").map(|(_, count)| count).sum();
        (left == 0).then_some(())
    });
    let poisoned = Metrics::scrape(stack)?.sum("pointsman_kernel_events_total", &[("event", "poisoned")]);
    ensure!(poisoned == 1.0, "{poisoned} poisoned");
    ensure_served(stack)
}
