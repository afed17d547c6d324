//! Bad input and absent functions get a defined answer, and everybody else is served on.
use std::io::Write;

use anyhow::{Context, Result, ensure};
use socket2::SockRef;
use tests::{
    Stack, Verdicts,
    hello::Hello,
    probe::{self, Manner, Outcome, Port, probe},
    stack::Plan,
    tls::alert,
};

in_both_modes!(
    absent_functions,
    malformed_requests,
    limits,
    other_protocols,
    half_closed_requests,
    incomplete_flights,
    a_refusal_is_read_although_the_request_is_not,
    resets_disturb_nobody,
);

fn ask(stack: &Stack, request: &[u8]) -> Result<Outcome> {
    probe(stack, Port::Http, request, &Manner::default()).with_context(|| {
        let beginning = &request[..request.len().min(100)];
        format!("{} ({} bytes)", beginning.escape_ascii(), request.len())
    })
}

fn absent_functions(verdicts: Verdicts) -> Result<()> {
    let stack = Plan::new(verdicts).absent_function("absent").start();
    let answer = stack.client()?.request("GET", "/function/absent", "x", None)?;
    ensure!(answer.status() == 503, "{answer:?}");
    let retry = answer.head.field("retry-after").and_then(|seconds| seconds.parse::<u32>().ok());
    ensure!(retry.is_some(), "{answer:?}");
    let hello = Hello::named(b"absent.faas.local").bytes();
    let outcome = probe(&stack, Port::Https, &hello, &Manner::default())?;
    ensure!(outcome == Outcome::Alert(alert::INTERNAL_ERROR), "{outcome:?}");
    // The others never noticed.
    ensure!(stack.client()?.request("GET", "/function/echo", "x", None)?.status() == 200);
    Ok(())
}

/// Nothing of these reaches a handler, and the connection ends, because nobody knows where the next request begins.
fn malformed_requests(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for (status, request) in [
        (
            400,
            "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        ),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 4\r\n\r\nabcd"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0x3\r\n\r\nabc"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\rX: y\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost : x\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nX: a\r\n folded\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\n Host: x\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\n: no name\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nX\0: b\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: a b\r\n\r\n"),
        (400, "GET /function/echo HTTP/1.1\r\nHost: a/b\r\n\r\n"),
        (
            400,
            "POST /function/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
        ),
        (400, "POST /function/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n"),
        (400, "POST /function/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n"),
        (501, "POST /function/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        (501, "POST /function/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: x\r\n\r\n"),
        (400, "GET  /function/echo HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET /function/echo  HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, " GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET /function/echo x HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET\t/function/echo HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "G\x01T /function/echo HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET /function/echo\0 HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET /function/echo HTTX/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET echo HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET ftp://x/function/echo HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, "GET http://x:80@y/function/echo HTTP/1.1\r\nHost: x\r\n\r\n"),
    ] {
        let mut client = stack.client()?;
        client.send(request.as_bytes())?;
        client.send(b"GET /function/echo HTTP/1.1\r\nHost: smuggled\r\n\r\n").ok();
        // A body may prove wrong when the answer has begun, and then all that is left is to cut it.
        let answer = client.response();
        let cut = request.contains("chunked\r\n\r\n") && answer.is_err();
        if !cut {
            let answer = answer.with_context(|| request.escape_debug().to_string())?;
            ensure!(answer.status() == status, "{request:?}: {} {}", answer.status(), answer.text());
            client.expect_close().with_context(|| request.escape_debug().to_string())?;
        }
    }
    Ok(())
}

fn limits(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let request = |target: &str, fields: &str| format!("GET {target} HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
    let long_target = format!("/function/echo?{}", "x".repeat(100_000));
    let long_authority = format!("http://{}/function/echo", "x".repeat(261));
    let long_miss = format!("/x?{}", "x".repeat(100_000));
    let long_field = format!("X: {}\r\n", "x".repeat(200_000));
    let many_fields: String = (0..5000).map(|number| format!("X-{number}: y\r\n")).collect();
    for (what, request, expected) in [
        ("a long request line", request(&long_target, ""), &[414][..]),
        ("a long request line of nobody's", request(&long_miss, ""), &[414, 404]),
        ("a long authority", request(&long_authority, ""), &[414]),
        ("a long head", request("/function/echo", &long_field), &[431]),
        ("many fields", request("/function/echo", &many_fields), &[431]),
        ("a long method", format!("{} / HTTP/1.1\r\n\r\n", "A".repeat(100_000)), &[400, 414, 501]),
        ("many empty lines", "\r\n".repeat(50_000), &[400]),
    ] {
        let outcome = ask(&stack, request.as_bytes()).context(what)?;
        ensure!(expected.iter().any(|&status| outcome == Outcome::Status(status)), "{what}: {outcome:?}");
    }
    // What everybody must take (RFC 9112 §3): a request line of 8000 bytes.
    let usual = format!("/function/echo?{}", "x".repeat(7900));
    let outcome = ask(&stack, request(&usual, "").as_bytes())?;
    ensure!(outcome == Outcome::Function("echo".into()), "{outcome:?}");
    Ok(())
}

fn other_protocols(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let hello = Hello::named(b"echo.faas.local").bytes();
    for (what, bytes, expected) in [
        ("a TLS hello", &hello[..], &[400][..]),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", &[400, 426, 505]),
        ("HTTP/0.9", b"GET /function/echo\r\n", &[400, 404, 426, 505]),
        ("HTTP/2.0 by name", b"GET /function/echo HTTP/2.0\r\nHost: x\r\n\r\n", &[400, 426, 505]),
        ("HTTP/1.2", b"GET /function/echo HTTP/1.2\r\nHost: x\r\n\r\n", &[200, 400, 505]),
        ("HTTP/9.9", b"GET /function/echo HTTP/9.9\r\nHost: x\r\n\r\n", &[400, 505]),
        ("random bytes", b"\xf3\x12\x00\xff\x99\x01", &[400]),
        ("SMTP", b"EHLO example.org\r\n", &[400]),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n", &[400]),
    ] {
        let manner = Manner { half_close: true, ..Manner::default() };
        let outcome = probe(&stack, Port::Http, bytes, &manner).context(what)?;
        let status = match &outcome {
            Outcome::Status(status) => *status,
            Outcome::Function(_) => 200,
            _ => 0,
        };
        ensure!(expected.contains(&status), "{what}: {outcome:?}");
    }
    Ok(())
}

/// `printf ... | nc -N`: the client has said all it wants to say, and still listens.
fn half_closed_requests(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for cuts in [vec![], vec![1], vec![20], vec![30, 31]] {
        let manner = Manner { cuts, half_close: true };
        let head = b"GET /function/hello HTTP/1.1\r\nHost: x\r\n\r\n";
        let outcome = probe(&stack, Port::Http, head, &manner)?;
        ensure!(outcome == Outcome::Function("hello".into()), "{manner:?}: {outcome:?}");
        let body =
            b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{\"method\": \"x\"}";
        let outcome = probe(&stack, Port::Http, body, &manner)?;
        ensure!(outcome == Outcome::Function("echo".into()), "{manner:?}: {outcome:?}");
        let outcome = probe(&stack, Port::Http, b"GET /nobody HTTP/1.1\r\nHost: x\r\n\r\n", &manner)?;
        ensure!(outcome == Outcome::Status(404), "{manner:?}: {outcome:?}");
    }
    Ok(())
}

/// The client ends before it has said whom it wants.
fn incomplete_flights(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let head = b"GET /function/hello HTTP/1.1\r\nHost: x\r\n\r\n";
    for length in 1..head.len() {
        let manner = Manner { half_close: true, ..Manner::default() };
        let outcome = probe(&stack, Port::Http, &head[..length], &manner).context(length)?;
        ensure!(outcome == Outcome::Status(400), "a head cut at {length}: {outcome:?}");
    }
    let hello = Hello::named(b"hello.faas.local").bytes();
    for length in (1..hello.len()).step_by(7) {
        let manner = Manner { half_close: true, ..Manner::default() };
        let outcome = probe(&stack, Port::Https, &hello[..length], &manner).context(length)?;
        // Behind the name it is the function that misses the rest.
        let refused = matches!(outcome, Outcome::Alert(_) | Outcome::Closed);
        ensure!(refused, "a hello cut at {length}: {outcome:?}");
    }
    // Nothing at all, and then the end.
    for port in [Port::Http, Port::Https] {
        let outcome = probe(&stack, port, b"", &Manner { half_close: true, ..Manner::default() })?;
        ensure!(!matches!(outcome, Outcome::Function(_)), "{port:?}: {outcome:?}");
    }
    Ok(())
}

/// Closing a socket with unread bytes would reset the connection and swallow the answer.
fn a_refusal_is_read_although_the_request_is_not(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for round in 0..50 {
        let mut client = stack.client()?;
        client.send(b"POST /nobody HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")?;
        for _ in 0..20 {
            if client.send(&[b'x'; 10_000]).is_err() {
                break;
            }
        }
        let answer = client.response().with_context(|| format!("round {round}"))?;
        ensure!(answer.status() == 404, "{answer:?}");
    }
    Ok(())
}

fn resets_disturb_nobody(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let hello = Hello::named(b"echo.faas.local").bytes();
    for round in 0..300 {
        let mut socket = if round % 2 == 0 { stack.connect_http()? } else { stack.connect_https()? };
        let bytes: &[u8] =
            if round % 2 == 0 { b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n" } else { &hello };
        socket.write_all(&bytes[..round % (bytes.len() + 1)])?;
        if round % 3 == 0 {
            // Behind the handoff: somebody has begun to answer.
            let mut other = stack.client()?;
            ensure!(other.request("GET", "/function/hello", "x", None)?.status() == 200);
        }
        SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO))?;
        drop(socket);
    }
    for function in ["echo", "hello"] {
        let answer = stack.client()?.request("GET", &format!("/function/{function}"), "x", None)?;
        ensure!(probe::answerer(&answer) == Some(function), "{answer:?}");
    }
    Ok(())
}
