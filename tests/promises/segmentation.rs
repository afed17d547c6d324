//! However the first flight is cut into segments and records, its function gets it whole.
use anyhow::{Context, Result, ensure};
use tests::{
    Stack, Verdicts,
    crowd::crowd,
    hello::{self, Hello},
    net::Net,
    probe::{self, Manner, Outcome, Port, probe},
    segments::send_segments,
    stack::{AddressBook, Plan},
};

in_both_modes!(
    one_byte_segments,
    one_byte_segments_over_ipv6,
    a_head_cut_at_every_byte,
    a_hello_cut_at_every_byte,
    a_large_hello_cut_at_every_byte,
    records_of_every_size,
    each_segment_judged_alone,
    a_body_behind_the_head_in_one_segment,
);

/// With time enough for thousands of segments on a busy machine, each of which may cost the client its turn.
fn start(verdicts: Verdicts) -> Stack {
    let plan = Plan::new(verdicts).setting("head_timeout_ms", 60_000);
    plan.in_net(Net::private().without_slow_start()).start()
}

fn one_byte_segments(verdicts: Verdicts) -> Result<()> {
    one_byte_segments_in(&start(verdicts))
}

fn one_byte_segments_over_ipv6(verdicts: Verdicts) -> Result<()> {
    let net = Net::private().without_slow_start();
    one_byte_segments_in(&Plan::new(verdicts).in_net(net).clients_use(std::net::Ipv6Addr::LOCALHOST).start())
}

fn one_byte_segments_in(stack: &Stack) -> Result<()> {
    for function in ["echo", "hello"] {
        let head = format!("GET /function/{function}/x?y HTTP/1.1\r\nHost: x\r\nA-Field: a value\r\n\r\n");
        expect(stack, Port::Http, head.as_bytes(), (1..head.len()).collect(), function)?;
        let name = format!("{function}.faas.local");
        for hello in [Hello::named(name.as_bytes()), Hello::named(name.as_bytes()).post_quantum()] {
            let hello = hello.bytes();
            expect(stack, Port::Https, &hello, (1..hello.len()).collect(), function)?;
        }
    }
    let chromium = hello::chromium_for_tls12();
    expect(stack, Port::Https, &chromium, (1..chromium.len()).collect(), "hello")
}

fn expect(stack: &Stack, port: Port, bytes: &[u8], cuts: Vec<usize>, function: &str) -> Result<()> {
    let outcome = probe(stack, port, bytes, &Manner { cuts: cuts.clone(), half_close: false });
    let at =
        || format!("{function}, {} bytes cut at {} places from {:?}", bytes.len(), cuts.len(), cuts.first());
    let outcome = outcome.with_context(at)?;
    ensure!(outcome == Outcome::Function(function.into()), "{}: {outcome:?}", at());
    Ok(())
}

fn a_head_cut_at_every_byte(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let head = b"\r\nPROPFIND http://some.host:8080/function/hello?name=x HTTP/1.1\r\nHost: x\r\n\r\n";
    for cut in 1..head.len() {
        expect(&stack, Port::Http, head, vec![cut], "hello")?;
    }
    Ok(())
}

fn a_hello_cut_at_every_byte(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let hello = Hello::named(b"echo.faas.local").with(hello::GREASE, [0]).bytes();
    for cut in 1..hello.len() {
        expect(&stack, Port::Https, &hello, vec![cut], "echo")?;
    }
    Ok(())
}

fn a_large_hello_cut_at_every_byte(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let hello = hello::chromium_for_tls12();
    for cut in 1..hello.len() {
        expect(&stack, Port::Https, &hello, vec![cut], "hello")?;
    }
    Ok(())
}

/// The message stays the same, so the transcript does, and the handshake must succeed.
fn records_of_every_size(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let message = Hello::named(b"echo.faas.local").message();
    for size in 1..=message.len() {
        expect(&stack, Port::Https, &hello::records(&message, size), vec![], "echo")?;
    }
    let message = Hello::named(b"echo.faas.local").post_quantum().message();
    for size in [1, 2, 3, 5, 100, 699, 700] {
        let flight = hello::records(&message, size);
        expect(&stack, Port::Https, &flight, vec![], "echo")?;
        // Records and segments end at different places.
        expect(&stack, Port::Https, &flight, (1..flight.len()).step_by(3).collect(), "echo")?;
    }
    Ok(())
}

/// A later connection was served, so the earlier one's segment was looked at before the next one came.
fn each_segment_judged_alone(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let head = b"GET /function/hello HTTP/1.1\r\nHost: x\r\n\r\n".to_vec();
    let hello = Hello::named(b"hello.faas.local").bytes();
    for (port, bytes) in [(Port::Http, head), (Port::Https, hello)] {
        for step in [1, 5, 16] {
            let mut socket = match port {
                Port::Http => stack.connect_http()?,
                Port::Https => stack.connect_https()?,
            };
            for piece in bytes.chunks(step) {
                send_segments(&socket, [piece])?;
                let answer = stack.client()?.request("GET", "/function/hello", "x", None)?;
                ensure!(answer.status() == 200, "{answer:?}");
            }
            let outcome = probe::outcome(&stack, port, &mut socket)?;
            ensure!(outcome == Outcome::Function("hello".into()), "{port:?} by {step}: {outcome:?}");
        }
    }
    Ok(())
}

/// What comes with the head belongs to the function, from the first byte to the last.
fn a_body_behind_the_head_in_one_segment(verdicts: Verdicts) -> Result<()> {
    let stack = start(verdicts);
    let body = tests::pattern::Pattern::new(9).bytes(20_000);
    let head = format!("POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    let whole = [head.as_bytes(), &body].concat();
    let clients: &AddressBook = &stack;
    crowd(4, 200, |number| {
        let mut client = clients.client()?;
        let cut = (number * 131) % whole.len();
        client.send(&whole[..cut])?;
        client.send(&whole[cut..])?;
        let answer = client.response()?;
        ensure!(
            answer.body == body,
            "cut at {cut}: {} bytes of status {}",
            answer.body.len(),
            answer.status()
        );
        Ok(())
    });
    Ok(())
}
