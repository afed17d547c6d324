//! A connection that waits in a function is an ordinary socket: the gateway's programs have let go of it.
use std::io::{Cursor, ErrorKind, Write};

use anyhow::{Context, Result, ensure};
use image::{GrayImage, ImageFormat};
use tests::{
    Stack, Verdicts, eventually,
    hello::{EXTENSION_PADDING, Hello},
    probe::{self, Outcome, Port},
    stack::{Plan, host},
};

/// Waits until the kernel follows no connection any more, by its state or as a socket of the SOCKHASH.
fn wait_for_retirement(stack: &mut Stack, waits: &str) {
    let mut entries = Vec::new();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        eventually(&format!("{waits} to leave the maps"), || {
            entries = stack.look().entries();
            let count = |map: &str| {
                let found = entries.iter().find(|(name, _)| name == map);
                found.unwrap_or_else(|| panic!("there is no {map}")).1
            };
            (count("pm_connections") == 0 && count("pm_sockets") == 0).then_some(())
        });
    }));
    assert!(outcome.is_ok(), "{waits}: {entries:?}");
}

#[test]
fn half_a_head() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let mut client = stack.client()?;
    client.send(b"GET /function/echo HTTP/1.1\r\nHost: x\r\nX-Field: first ")?;
    wait_for_retirement(&mut stack, "half a head");
    client.send(b"second\r\n\r\n")?;
    let answer = client.response()?;
    ensure!(answer.json()["headers"]["x-field"] == "first second", "{answer:?}");
    Ok(())
}

#[test]
fn half_a_body() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let mut client = stack.client()?;
    client.send(b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf ")?;
    wait_for_retirement(&mut stack, "half a body");
    client.send(b"done.")?;
    ensure!(client.response()?.body == b"half done.");
    Ok(())
}

#[test]
fn a_handler_at_work() -> Result<()> {
    let mut stack = Plan::new(Verdicts::Sockmap).function("resize", "resize").start();
    // Long work on few bytes: all of the request comes in one segment.
    let mut picture = Vec::new();
    GrayImage::new(3000, 3000).write_to(&mut Cursor::new(&mut picture), ImageFormat::WebP)?;
    ensure!(picture.len() < 4_000, "{} bytes", picture.len());
    let target = "/function/resize?width=2900&format=webp";
    let head = format!("POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", picture.len());
    let mut client = stack.client()?;
    client.send(&[head.as_bytes(), &picture].concat())?;
    wait_for_retirement(&mut stack, "a handler at work");
    let early = client.socket().peek(&mut [0]);
    ensure!(early.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "the handler was done before");
    let answer = client.response()?;
    ensure!(answer.status() == 200, "{answer:?}");
    Ok(())
}

#[test]
fn half_a_hello() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let hello = Hello::named(b"echo.faas.local").with(EXTENSION_PADDING, [0; 300]).bytes();
    let (first, second) = hello.split_at(hello.len() - 100);
    let mut socket = stack.connect_https()?;
    socket.write_all(first)?;
    wait_for_retirement(&mut stack, "half a hello");
    socket.write_all(second)?;
    let outcome = probe::outcome(&stack, Port::Https, &mut socket)?;
    ensure!(outcome == Outcome::Function("echo".into()), "{outcome:?}");
    Ok(())
}

#[test]
fn a_session_without_a_request() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let mut client = stack.tls_client("echo")?;
    wait_for_retirement(&mut stack, "a session without a request");
    let answer = client.request("GET", "/", &host("echo"), None).context("on the session that waited")?;
    ensure!(answer.status() == 200, "{answer:?}");
    Ok(())
}
