//! Real clients' hellos and every odd but valid one find their function; broken ones get their alert.
use std::{
    io::Write,
    process::{Command, Output, Stdio},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use rustls::version::{TLS12, TLS13};
use tests::{
    Stack, Verdicts,
    hello::{
        self, EXTENSION_PADDING, EXTENSION_SERVER_NAME, GREASE, Hello, MAX_FRAGMENT_BYTES, server_name,
        server_names,
    },
    net::Net,
    probe::{Manner, Outcome, Port, probe},
    programs,
    stack::Plan,
    tls::{self, alert},
};

in_both_modes!(
    curl,
    openssl,
    gnutls,
    python,
    every_suite_of_rustls,
    a_browser,
    odd_but_valid,
    a_handshake_in_one_byte_records,
    bytes_behind_the_hello,
    no_name,
    contradictory_names,
    broken_lengths,
    too_long,
    other_protocols,
    http_on_this_port,
    alpn,
);

fn run(command: &mut Command, input: &[u8]) -> Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // A client that has ended needs no input.
    let _ = child.stdin.take().context("stdin is piped")?.write_all(input);
    Ok(child.wait_with_output()?)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn curl(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let curl = programs::client("curl", "curl");
    for version in [&["--tlsv1.3"][..], &["--tls-max", "1.2"]] {
        for (function, expected) in [("echo", "\"method\""), ("hello", "Hello, ")] {
            let name = tests::stack::host(function);
            let mut command = Command::new(&curl);
            command.args(["-sS", "--max-time", "60", "--cacert"]).arg(stack.authority.path()).args(version);
            command.arg("--resolve").arg(format!("{name}:{}:127.0.0.1", stack.https.port()));
            let output = run(command.arg(format!("https://{name}:{}/", stack.https.port())), b"")?;
            ensure!(
                output.status.success() && said(&output).contains(expected),
                "{function}: {}",
                said(&output)
            );
        }
    }
    Ok(())
}

fn openssl(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let openssl = programs::client("openssl", "openssl");
    for version in ["-tls1_3", "-tls1_2"] {
        for (function, expected) in [("echo", "\"method\""), ("hello", "Hello, ")] {
            let name = tests::stack::host(function);
            let mut command = Command::new(&openssl);
            command.args(["s_client", "-quiet", "-verify_return_error", version, "-servername", &name]);
            command.args(["-verify_hostname", &name, "-CAfile"]).arg(stack.authority.path());
            command.arg("-connect").arg(stack.https.to_string());
            let request = format!("GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
            let output = run(&mut command, request.as_bytes())?;
            ensure!(said(&output).contains(expected), "{version} {function}: {}", said(&output));
        }
    }
    Ok(())
}

fn gnutls(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let gnutls = programs::client("gnutls-cli", "gnutls-bin");
    for version in ["NORMAL:-VERS-ALL:+VERS-TLS1.3", "NORMAL:-VERS-ALL:+VERS-TLS1.2"] {
        for (function, expected) in [("echo", "\"method\""), ("hello", "Hello, ")] {
            let name = tests::stack::host(function);
            let mut command = Command::new(&gnutls);
            command.args(["--priority", version, "--sni-hostname", &name, "--verify-hostname", &name]);
            command.arg("--x509cafile").arg(stack.authority.path()).args(["--logfile", "/dev/stderr"]);
            command.args(["--port", &stack.https.port().to_string(), "127.0.0.1"]);
            let request = format!("GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
            let output = run(&mut command, request.as_bytes())?;
            ensure!(said(&output).contains(expected), "{version} {function}: {}", said(&output));
        }
    }
    Ok(())
}

fn python(verdicts: Verdicts) -> Result<()> {
    const PROGRAM: &str = "
import http.client, socket, ssl, sys
authority, name, port, version = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
with socket.create_connection(('127.0.0.1', int(port)), 60) as raw:
    with context.wrap_socket(raw, server_hostname=name) as tls:
        for _ in range(3):
            tls.sendall(f'GET / HTTP/1.1\\r\\nHost: {name}\\r\\n\\r\\n'.encode())
            answer = http.client.HTTPResponse(tls); answer.begin(); print(answer.status, answer.read())
";
    let stack = Stack::start(verdicts);
    let python = programs::client("python3", "python3");
    for version in ["TLSv1_3", "TLSv1_2"] {
        for (function, expected) in [("echo", "\"method\""), ("hello", "Hello, ")] {
            let mut command = Command::new(&python);
            command.args(["-c", PROGRAM]).arg(stack.authority.path()).arg(tests::stack::host(function));
            let output = run(command.args([&stack.https.port().to_string(), version]), b"")?;
            let answers = said(&output).matches(expected).count();
            ensure!(output.status.success() && answers == 3, "{version} {function}: {}", said(&output));
        }
    }
    Ok(())
}

fn every_suite_of_rustls(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let mut handshakes = 0;
    for version in [&TLS13, &TLS12] {
        for suite in rustls::crypto::ring::DEFAULT_CIPHER_SUITES {
            // The functions' keys are for ECDSA.
            let fits = suite.version() == version
                && suite.suite().as_str().is_some_and(|name| !name.contains("_RSA_"));
            if !fits {
                continue;
            }
            let config = Arc::new(tls::config_with(&stack.authority, &[version], vec![*suite]));
            for (name, function) in [("echo.faas.local", "echo"), ("hello.localhost", "hello")] {
                let mut client = tls::connect(stack.https, name, config.clone())?;
                let answer = client.request("GET", "/", name, None).with_context(|| format!("{suite:?}"))?;
                ensure!(tests::probe::answerer(&answer) == Some(function), "{suite:?} {answer:?}");
                handshakes += 1;
            }
        }
    }
    ensure!(handshakes == 12, "three suites of each version: {handshakes} handshakes");
    Ok(())
}

fn a_browser(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let outcome = probe(&stack, Port::Https, hello::CHROMIUM, &Manner::default())?;
    ensure!(outcome == Outcome::Tls13, "{outcome:?}");
    expect(&stack, &hello::chromium_for_tls12(), Outcome::Function("hello".into()), "Chromium for TLS 1.2")
}

fn expect(stack: &Stack, bytes: &[u8], expected: Outcome, what: &str) -> Result<()> {
    let outcome = probe(stack, Port::Https, bytes, &Manner::default()).context(what.to_owned())?;
    ensure!(outcome == expected, "{what}: {outcome:?} instead of {expected:?}");
    Ok(())
}

fn odd_but_valid(verdicts: Verdicts) -> Result<()> {
    // In records of a byte the longest takes more than Linux before 6.6 receives by default while nobody reads.
    let stack = Plan::new(verdicts).in_net(Net::private().with_receive_buffers(256 << 10)).start();
    let name = server_name(b"echo.faas.local");
    let echo = Hello::named(b"echo.faas.local");
    // What fits in front of the name and keeps the whole at 16 KiB.
    let fourteen =
        Hello::new().with(EXTENSION_PADDING, vec![0; 14 << 10]).with(EXTENSION_SERVER_NAME, name.clone());
    let many = (0..300).fold(Hello::new(), |hello, number| hello.with(0x4000 + number, [1, 2, 3]));
    let unnamed_session = Hello { session_id: vec![], ..echo.clone() };
    let many_suites = Hello { cipher_suites: (0x5000..0x5600).chain([0xc02b]).collect(), ..echo.clone() };
    for (what, hello) in [
        ("the name last", echo.clone()),
        ("the name first", Hello::new().led_by(EXTENSION_SERVER_NAME, name.clone())),
        ("GREASE first", echo.clone().led_by(GREASE, [0])),
        ("GREASE first and empty", echo.clone().led_by(GREASE, [])),
        ("padding last", echo.clone().with(EXTENSION_PADDING, vec![0; 500])),
        ("14 KiB in front of the name", fourteen.clone()),
        ("300 extensions in front of the name", many.with(EXTENSION_SERVER_NAME, name)),
        ("a post-quantum share", echo.clone().post_quantum()),
        ("no session id", unnamed_session),
        ("1500 suites", many_suites),
    ] {
        let message = hello.message();
        for size in [MAX_FRAGMENT_BYTES, 1000, 77, 1] {
            let what = format!("{what}, in records of {size}");
            expect(&stack, &hello::records(&message, size), Outcome::Function("echo".into()), &what)?;
        }
    }
    Ok(())
}

/// rustls' own hello, cut into as many records as it has bytes, ends in a session.
fn a_handshake_in_one_byte_records(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for version in [&TLS13, &TLS12] {
        for size in [1, 3, 50] {
            let mut session =
                tls::session("hello.faas.local", Arc::new(tls::config(&stack.authority, &[version])))?;
            let flight = tls::first_flight(&mut session)?;
            let mut socket = stack.connect_https()?;
            socket.write_all(&hello::records(&hello::fragments(&flight), size))?;
            let mut client = tls::finish(socket, session)?;
            let answer = client.request("GET", "/?name=you", "hello.faas.local", None)?;
            ensure!(answer.text().contains("Hello, you"), "{answer:?}");
        }
    }
    Ok(())
}

/// Early data and whatever else follows at once is the function's; here it is a record that rustls must refuse
/// because it, too, arrived.
fn bytes_behind_the_hello(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let hello = Hello::named(b"echo.faas.local").bytes();
    // An alert record of a client that changed its mind: the certificate is shown before it is read.
    let mut followed = hello.clone();
    followed.extend([21, 3, 3, 0, 2, 1, 90]);
    let outcome = probe(&stack, Port::Https, &followed, &Manner::default())?;
    let taken = [Outcome::Function("echo".into()), Outcome::Closed];
    ensure!(taken.contains(&outcome), "{outcome:?}");
    Ok(())
}

fn no_name(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let unrecognized = Outcome::Alert(alert::UNRECOGNIZED_NAME);
    let without_extensions = {
        let hello = Hello { extensions: vec![], ..Hello::new() };
        let mut message = hello.message();
        message.truncate(message.len() - 2);
        message[3] -= 2;
        hello::records(&message, MAX_FRAGMENT_BYTES)
    };
    for (what, bytes) in [
        ("no server_name", Hello::new().bytes()),
        ("an empty name", Hello::named(b"").bytes()),
        ("an empty list", Hello::new().with(EXTENSION_SERVER_NAME, [0, 0]).bytes()),
        ("an empty extension", Hello::new().with(EXTENSION_SERVER_NAME, []).bytes()),
        ("no extensions", Hello { extensions: vec![], ..Hello::new() }.bytes()),
        ("not even their length", without_extensions),
    ] {
        // An empty list or name breaks RFC 6066's syntax as well; either way it names nobody.
        let outcome = probe(&stack, Port::Https, &bytes, &Manner::default()).context(what)?;
        let malformed = Outcome::Alert(alert::DECODE_ERROR);
        let may_be_malformed = what.starts_with("an empty");
        ensure!(outcome == unrecognized || may_be_malformed && outcome == malformed, "{what}: {outcome:?}");
    }
    Ok(())
}

fn contradictory_names(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let echo = server_name(b"echo.faas.local");
    let two_extensions = Hello::named(b"echo.faas.local").with(EXTENSION_SERVER_NAME, echo.clone());
    let apart = Hello::new()
        .led_by(EXTENSION_SERVER_NAME, echo)
        .with(EXTENSION_SERVER_NAME, server_name(b"hello.faas.local"));
    let names = |names: &[(u8, &[u8])]| Hello::new().with(EXTENSION_SERVER_NAME, server_names(names)).bytes();
    for (what, bytes) in [
        ("two extensions", two_extensions.bytes()),
        ("two extensions that differ", apart.bytes()),
        ("two names", names(&[(0, b"echo.faas.local"), (0, b"hello.faas.local")])),
        ("a name of another type", names(&[(1, b"echo.faas.local")])),
        ("a name of another type first", names(&[(7, b"x"), (0, b"echo.faas.local")])),
        ("a name of another type last", names(&[(0, b"echo.faas.local"), (7, b"x")])),
    ] {
        let outcome = probe(&stack, Port::Https, &bytes, &Manner::default()).context(what)?;
        let refused = [alert::DECODE_ERROR, alert::ILLEGAL_PARAMETER].map(Outcome::Alert);
        ensure!(refused.contains(&outcome), "{what}: {outcome:?}");
    }
    Ok(())
}

fn broken_lengths(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let valid = Hello::named(b"echo.faas.local");
    let extension = |body: &[u8]| Hello::new().with(EXTENSION_SERVER_NAME, body).bytes();
    let with_byte = |offset: usize, value: u8| {
        let mut bytes = valid.bytes();
        bytes[offset] = value;
        bytes
    };
    // Offsets count the record's and the message's header: 5 + 4, then version and random: 34.
    let session_id_length = 9 + 34;
    let suites_length = session_id_length + 1 + 32;
    let compression_length = suites_length + 2 + 6;
    let extensions_length = compression_length + 2;
    let shortened = {
        let mut message = valid.message();
        // The message claims to end in the middle of the name.
        message[3] -= 4;
        hello::records(&message[..message.len() - 4], MAX_FRAGMENT_BYTES)
    };
    for (what, bytes) in [
        ("a list longer than its extension", extension(b"\x00\x20\x00\x00\x0fecho.faas.local")),
        ("a list shorter than its extension", extension(b"\x00\x05\x00\x00\x0fecho.faas.local")),
        ("a name longer than its list", extension(b"\x00\x12\x00\x00\x7fecho.faas.local")),
        ("a name shorter than its list", extension(b"\x00\x12\x00\x00\x04echo.faas.local")),
        ("an extension longer than the hello", {
            let mut bytes = valid.bytes();
            let length = bytes.len();
            bytes[length - 21] = 0x70;
            bytes
        }),
        ("a session id of 33 bytes", with_byte(session_id_length, 33)),
        ("an odd number of suite bytes", with_byte(suites_length + 1, 5)),
        ("no suites", with_byte(suites_length + 1, 0)),
        ("suites longer than the hello", with_byte(suites_length, 0x3f)),
        ("no compression method", with_byte(compression_length, 0)),
        ("compression methods longer than the hello", with_byte(compression_length, 0xff)),
        ("extensions longer than the hello", with_byte(extensions_length, 0x3f)),
        ("a hello that ends in its name", shortened),
        ("an empty record in front", [&[22, 3, 1, 0, 0][..], &valid.bytes()].concat()),
        ("an empty record in the middle", {
            let message = valid.message();
            [hello::record(&message[..10]), vec![22, 3, 1, 0, 0], hello::record(&message[10..])].concat()
        }),
        ("a record over the limit", [&[22, 3, 1, 0x41, 0x01][..], &vec![1; 0x4101]].concat()),
    ] {
        let outcome = probe(&stack, Port::Https, &bytes, &Manner { half_close: true, ..Manner::default() });
        let outcome = outcome.context(what)?;
        let refused = [
            alert::DECODE_ERROR,
            alert::ILLEGAL_PARAMETER,
            alert::RECORD_OVERFLOW,
            alert::UNEXPECTED_MESSAGE,
        ];
        ensure!(refused.map(Outcome::Alert).contains(&outcome), "{what}: {outcome:?}");
    }
    Ok(())
}

fn too_long(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let hello = Hello::new().with(EXTENSION_PADDING, vec![0; 16 << 10]);
    let hello = hello.with(EXTENSION_SERVER_NAME, server_name(b"echo.faas.local"));
    for size in [MAX_FRAGMENT_BYTES, 100] {
        let outcome =
            probe(&stack, Port::Https, &hello::records(&hello.message(), size), &Manner::default())?;
        ensure!(matches!(outcome, Outcome::Alert(_)), "{outcome:?}");
    }
    Ok(())
}

fn other_protocols(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let mut random = tests::pattern::Random::new(5);
    let mut noise = random.bytes(300);
    noise[0] = 0xf3;
    for (what, bytes) in [
        ("an SSLv2 hello", b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x01\x00\x80\x02\x00\x80".to_vec()),
        ("a change cipher spec", vec![20, 3, 3, 0, 1, 1]),
        ("an alert", vec![21, 3, 1, 0, 2, 1, 0]),
        ("application data", vec![23, 3, 3, 0, 5, 1, 2, 3, 4, 5]),
        ("another handshake message", hello::record(&[2, 0, 0, 2, 3, 3])),
        ("random bytes", noise),
        ("SSL 2 in a TLS record", vec![22, 2, 0, 0, 4, 1, 0, 0, 0]),
        ("a PROXY protocol signature", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c".to_vec()),
    ] {
        let outcome = probe(&stack, Port::Https, &bytes, &Manner { half_close: true, ..Manner::default() });
        let outcome = outcome.context(what)?;
        ensure!(matches!(outcome, Outcome::Alert(_)), "{what}: {outcome:?}");
    }
    Ok(())
}

fn http_on_this_port(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for request in [
        &b"GET / HTTP/1.1\r\nHost: echo.faas.local\r\n\r\n"[..],
        b"POST /function/echo HTTP/1.1\r\nHost: echo.faas.local\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /",
    ] {
        expect(&stack, request, Outcome::Status(400), "a request in the clear")?;
    }
    let outcome = probe(&stack, Port::Https, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &Manner::default())?;
    ensure!(matches!(outcome, Outcome::Alert(_) | Outcome::Status(400)), "HTTP/2 in the clear: {outcome:?}");
    Ok(())
}

/// HTTP/1.1 is all that is spoken; whoever insists on something else must not be left to guess.
fn alpn(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for (offered, works) in [
        (&[][..], true),
        (&[&b"http/1.1"[..]], true),
        (&[&b"h2"[..], b"http/1.1"], true),
        (&[&b"h2"[..]], false),
        (&[&b"http/1.0"[..]], false),
    ] {
        for version in [&TLS13, &TLS12] {
            let mut config = tls::config(&stack.authority, &[version]);
            config.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
            let outcome = tls::connect(stack.https, "echo.faas.local", Arc::new(config));
            match outcome {
                Ok(mut client) if works => {
                    ensure!(client.request("GET", "/", "echo.faas.local", None)?.status() == 200);
                }
                Err(error) if !works => {
                    ensure!(format!("{error:#}").contains("NoApplicationProtocol"), "{offered:?}: {error:#}");
                }
                Ok(_) => anyhow::bail!("{offered:?} was accepted"),
                Err(error) => return Err(error.context(format!("{offered:?}"))),
            }
        }
    }
    Ok(())
}
