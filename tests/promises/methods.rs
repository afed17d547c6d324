//! Every method reaches the function on both ports, with a body and without.
use anyhow::{Context, Result, ensure};
use tests::{Stack, Verdicts, wire::Client};

in_both_modes!(every_method, a_head_has_no_body, expectations_are_met, old_versions, upgrades_of_the_port);

/// The registered ones that mean something to an origin server, and tokens that nobody registered.
const METHODS: [&str; 10] =
    ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "x-1~", "!#$%&'*+-.^_`|~", "g"];

fn every_method(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for method in METHODS {
        // On a connection of its own the method decides where the kernel finds the target.
        for mut client in [stack.client()?, stack.tls_client("echo")?] {
            without_body(&mut client, method)?;
            with_body(&mut client, method)?;
        }
    }
    // And all of them on one.
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        for method in METHODS {
            with_body(&mut client, method)?;
            without_body(&mut client, method)?;
        }
    }
    Ok(())
}

fn without_body(client: &mut Client, method: &str) -> Result<()> {
    let answer = client.request(method, "/function/echo/a?b=c", "echo.faas.local", None);
    let answer = answer.with_context(|| format!("{method} without a body"))?;
    ensure!(answer.status() == 200, "{method}: {} {}", answer.status(), answer.text());
    let json = answer.json();
    ensure!(json["method"] == method, "{method}: {json}");
    ensure!(json["path"].as_str().is_some_and(|path| path.starts_with("/a")), "{method}: {json}");
    Ok(())
}

fn with_body(client: &mut Client, method: &str) -> Result<()> {
    let answer = client.request(method, "/function/echo", "echo.faas.local", Some(b"some body"));
    let answer = answer.with_context(|| format!("{method} with a body"))?;
    ensure!(
        answer.status() == 200 && answer.body == b"some body",
        "{method}: {} {}",
        answer.status(),
        answer.text()
    );
    Ok(())
}

fn a_head_has_no_body(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("hello")?] {
        let got = client.request("GET", "/function/hello", "hello.faas.local", None)?;
        let head = client.request("HEAD", "/function/hello", "hello.faas.local", None)?;
        ensure!(head.status() == 200 && head.body.is_empty(), "{head:?}");
        // What a client would be told of a GET's body must not differ (RFC 9110 §9.3.2).
        ensure!(head.head.field("content-type") == got.head.field("content-type"), "{head:?} {got:?}");
        // The connection is where it should be: the next answer is an answer.
        let again = client.request("GET", "/function/hello", "hello.faas.local", None)?;
        ensure!(again.body == got.body, "{again:?}");
    }
    Ok(())
}

fn expectations_are_met(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        let head = "POST /function/echo HTTP/1.1\r\nHost: echo.faas.local\r\nContent-Length: 4\r\n";
        client.send(format!("{head}Expect: 100-continue\r\n\r\n").as_bytes())?;
        let interim = client.any_response_to("POST")?;
        ensure!(interim.status() == 100, "{interim:?}");
        client.send(b"body")?;
        let answer = client.response()?;
        ensure!(answer.status() == 200 && answer.body == b"body", "{answer:?}");

        client.send(format!("{head}Expect: the-unexpected\r\n\r\n").as_bytes())?;
        let answer = client.response()?;
        ensure!(answer.status() == 417, "{answer:?}");
    }
    Ok(())
}

fn old_versions(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        // HTTP/1.0 needs no Host, and its connection ends with the answer unless the client asks otherwise.
        client.send(b"GET /function/echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")?;
        ensure!(client.response()?.status() == 200, "keep-alive asked for");
        client.send(b"GET /function/echo HTTP/1.0\r\n\r\n")?;
        let answer = client.response()?;
        ensure!(answer.status() == 200 && answer.head.field("transfer-encoding").is_none(), "{answer:?}");
        client.expect_close()?;
    }
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        client.send(b"GET /function/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let answer = client.response()?;
        ensure!(answer.status() == 200 && answer.head.field("connection") == Some("close"), "{answer:?}");
        client.expect_close()?;
    }
    Ok(())
}

/// `CONNECT` and `Upgrade: h2c` ask for what a function is not; neither may be taken for something else.
fn upgrades_of_the_port(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let mut client = stack.client()?;
    client.send(b"CONNECT echo.faas.local:80 HTTP/1.1\r\nHost: echo.faas.local:80\r\n\r\n")?;
    ensure!(client.response()?.status() == 400);
    let mut client = stack.client()?;
    client.send(
        b"GET /function/echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
        HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
    )?;
    let answer = client.any_response_to("GET")?;
    ensure!(answer.status() == 200, "an upgrade that is not known is ignored (RFC 9110 §7.8): {answer:?}");
    Ok(())
}
