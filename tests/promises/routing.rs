//! Who answers: by URL on the HTTP port, by server name on the HTTPS port, hit and miss.
use anyhow::{Context, Result, ensure};
use tests::{
    Stack, Verdicts,
    hello::Hello,
    probe::{Manner, Outcome, Port, probe},
    stack::Plan,
    tls::alert,
};

in_both_modes!(
    urls_that_hit,
    urls_that_miss,
    names_that_hit,
    names_that_miss,
    other_functions_requests,
    hosts_of_ones_own,
    ipv6
);

fn urls_that_hit(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for (target, function) in [
        ("/function/echo", "echo"),
        ("/function/hello", "hello"),
        ("/function/hello?name=x", "hello"),
        ("/function/echo/", "echo"),
        ("/function/echo/hello", "echo"),
        ("/function/echo/../hello", "echo"),
        ("/function/echo#hello", "echo"),
        ("http://hello.faas.local/function/echo", "echo"),
        ("HTTP://whatever:80/function/hello", "hello"),
        ("https://echo.faas.local/function/hello", "hello"),
    ] {
        // The Host names the other function and must not matter.
        for host in ["echo.faas.local", "hello.faas.local", "localhost:8080", "[::1]:8080"] {
            let head = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let outcome = probe(&stack, Port::Http, head.as_bytes(), &Manner::default()).context(head)?;
            ensure!(outcome == Outcome::Function(function.into()), "{target}: {outcome:?}");
        }
    }
    let mut client = stack.client()?;
    let json = client.request("GET", "/function/echo/a/../b?c=%20", "x", None)?.json();
    let path = json["path"].as_str().unwrap_or_default();
    ensure!(path.starts_with("/a/../b"), "the handler sees the path without the prefix, as it came: {json}");
    Ok(())
}

fn urls_that_miss(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let longest = format!("/function/{}", "a".repeat(63));
    let too_long = format!("/function/{}", "a".repeat(64));
    let absurd = format!("/function/{}", "a".repeat(255));
    for target in [
        "/",
        "*",
        "/function",
        "/function/",
        "/functions/echo",
        "/FUNCTION/echo",
        "/function/Echo",
        "/function/echoevil",
        "/function/ech",
        "/function/%65cho",
        "/function/echo%2f",
        "/function//echo",
        "//function/echo",
        "//function//echo",
        "/function/../echo",
        "/function/..%2f",
        "/function/echo.hello",
        "/function/nobody",
        "/?/function/echo",
        "/x/function/echo",
        "/function?/echo",
        "http://echo.faas.local/",
        "http://echo.faas.local",
        "http://x?/function/echo",
        &longest,
        &too_long,
        &absurd,
    ] {
        let method = if target == "*" { "OPTIONS" } else { "GET" };
        // In the clear the Host decides nothing.
        let head = format!("{method} {target} HTTP/1.1\r\nHost: echo.faas.local\r\n\r\n");
        let outcome = probe(&stack, Port::Http, head.as_bytes(), &Manner::default()).context(head)?;
        ensure!(outcome == Outcome::Status(404), "{target}: {outcome:?}");
    }
    Ok(())
}

fn names_that_hit(verdicts: Verdicts) -> Result<()> {
    let stack = Plan::new(verdicts)
        .function("a", "echo")
        .function(&"b".repeat(63), "echo")
        .configuration("hosts = [\"extra.example\"]\n")
        .start();
    let longest = "b".repeat(63);
    for (name, function) in [
        ("echo.faas.local", "echo"),
        ("hello.faas.local", "hello"),
        ("ECHO.FAAS.LOCAL", "echo"),
        ("eChO.fAaS.lOcAl", "echo"),
        ("echo.localhost", "echo"),
        ("hello.LocalHost", "hello"),
        ("a.localhost", "a"),
        (&format!("{longest}.faas.local"), &longest),
        ("extra.example", &longest),
        ("EXTRA.example", &longest),
    ] {
        let hello = Hello::named(name.as_bytes()).bytes();
        let outcome = probe(&stack, Port::Https, &hello, &Manner::default()).context(name.to_owned())?;
        ensure!(outcome == Outcome::Function(function.into()), "{name}: {outcome:?}");
    }
    for function in ["echo", "hello"] {
        let mut client = stack.tls_client(function)?;
        let answer = client.request("GET", "/", &format!("{function}.faas.local"), None)?;
        ensure!(tests::probe::answerer(&answer) == Some(function), "{answer:?}");
    }
    Ok(())
}

fn names_that_miss(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let long = format!("{}.faas.local", "a".repeat(64));
    let too_long = format!("echo.{}faas.local", "a.".repeat(122));
    for name in [
        &b"nobody.faas.local"[..],
        b"echo.faas.local.",
        b"echo.faas.localx",
        b"xecho.faas.local",
        b"echo.faas.loca",
        b"cho.faas.local",
        b"echo.faas",
        b"echo",
        b"faas.local",
        b".faas.local",
        b"echo..faas.local",
        b"x.echo.faas.local",
        b"echo.faas.local.evil.example",
        b"127.0.0.1",
        b"::1",
        b"echo.faas.local\0",
        b"echo\0.faas.local",
        b"echo.faas.l\xc3\xb6cal",
        b"echo.faas.local:8443",
        b" echo.faas.local",
        b"*.faas.local",
        long.as_bytes(),
        too_long.as_bytes(),
    ] {
        let shown = String::from_utf8_lossy(name).into_owned();
        let outcome = probe(&stack, Port::Https, &Hello::named(name).bytes(), &Manner::default());
        let outcome = outcome.context(shown.clone())?;
        ensure!(outcome == Outcome::Alert(alert::UNRECOGNIZED_NAME), "{shown:?}: {outcome:?}");
    }
    Ok(())
}

/// What is another's by its path moves there, what is another's by its host is 421 and the end, what is nobody's is 404.
fn other_functions_requests(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for (target, host, status, closes) in [
        ("/function/hello", "echo.faas.local", 200, false),
        ("/", "hello.faas.local", 421, true),
        ("/x", "HELLO.localhost:8443", 421, true),
        ("https://hello.faas.local/", "echo.faas.local", 421, true),
        ("https://x:80@hello.faas.local/", "echo.faas.local", 400, true),
        ("/function/Hello", "echo.faas.local", 404, false),
        ("/", "echo.faas.local", 200, false),
        ("/", "localhost", 200, false),
        ("/function/echo", "hello.faas.local", 200, false),
        ("https://echo.faas.local/", "hello.faas.local", 200, false),
    ] {
        let mut client = stack.tls_client("echo")?;
        let answer = client.request("GET", target, host, None).with_context(|| format!("{target} {host}"))?;
        ensure!(answer.status() == status, "{target} {host}: {} {}", answer.status(), answer.text());
        if closes {
            client.expect_close().with_context(|| format!("{target} {host}"))?;
        }
    }
    Ok(())
}

/// Hosts that the configuration gives to a function are its own, under a domain too, and nobody else's.
fn hosts_of_ones_own(verdicts: Verdicts) -> Result<()> {
    let stack = Plan::new(verdicts)
        .function("pictures", "echo")
        .configuration("hosts = [\"pics.faas.local\", \"pictures.example\"]\n")
        .start();
    for (function, host, status) in [
        ("pictures", "pics.faas.local", 200),
        ("pictures", "PICTURES.example:8443", 200),
        ("pictures", "pictures.localhost", 200),
        ("pictures", "nobody.example", 200),
        ("pictures", "echo.faas.local", 421),
        ("echo", "pics.faas.local", 421),
        ("echo", "pictures.example", 421),
        ("echo", "nobody.example", 200),
    ] {
        let answer = stack.tls_client(function)?.request("GET", "/", host, None)?;
        ensure!(answer.status() == status, "{function} {host}: {} {}", answer.status(), answer.text());
    }
    let hello = Hello::named(b"pics.faas.local").bytes();
    let outcome = probe(&stack, Port::Https, &hello, &Manner::default())?;
    ensure!(outcome == Outcome::Function("pictures".into()), "{outcome:?}");
    Ok(())
}

fn ipv6(verdicts: Verdicts) -> Result<()> {
    let stack = Plan::new(verdicts).clients_use(std::net::Ipv6Addr::LOCALHOST).start();
    for function in ["echo", "hello"] {
        let answer = stack.client()?.request("GET", &format!("/function/{function}"), "x", None)?;
        ensure!(tests::probe::answerer(&answer) == Some(function), "{answer:?}");
        let answer =
            stack.tls_client(function)?.request("GET", "/", &format!("{function}.faas.local"), None)?;
        ensure!(tests::probe::answerer(&answer) == Some(function), "{answer:?}");
    }
    Ok(())
}

/// Listeners of one family, as somebody may configure them.
#[test]
fn listeners_of_one_family() -> Result<()> {
    for (listen, client) in [("127.0.0.1", "127.0.0.1"), ("[::1]", "::1")] {
        for verdicts in [Verdicts::Sockmap, Verdicts::Peek] {
            let client: std::net::IpAddr = client.parse()?;
            let stack = Plan::new(verdicts)
                .setting("http", format!("\"{listen}:8080\""))
                .setting("https", format!("\"{listen}:8443\""))
                .clients_use(client)
                .with_ports(8080, 8443)
                .start();
            let answer = stack.client()?.request("GET", "/function/echo", "x", None)?;
            ensure!(answer.status() == 200, "{listen}: {answer:?}");
            let answer = stack.tls_client("hello")?.request("GET", "/", "hello.faas.local", None)?;
            ensure!(answer.status() == 200, "{listen}: {answer:?}");
        }
    }
    Ok(())
}
