//! Bodies of every size come back as they were sent, byte for byte, in both framings on both ports.
use anyhow::{Context, Result, ensure};
use tests::{
    Stack, Verdicts,
    crowd::crowd,
    pattern::{Pattern, Random},
    probe, programs,
    stack::AddressBook,
    wire::Framing,
};

in_both_modes!(
    from_one_byte_to_64_mib,
    many_on_one_connection,
    chunks_of_every_size,
    curl_uploads,
    unread_bodies
);

const MIB: u64 = 1 << 20;

fn from_one_byte_to_64_mib(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let clients: &AddressBook = &stack;
    let mut lengths = vec![1, 2, 100, 1459, 1460, 1461, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537];
    lengths.extend([MIB - 1, MIB, 5 * MIB + 3, 64 * MIB]);
    crowd(4, lengths.len() * 4, |job| {
        let length = lengths[lengths.len() - 1 - job / 4];
        let framing = if job % 2 == 0 { Framing::Length } else { Framing::Chunks(10_007) };
        let tls = job % 4 < 2;
        let mut client = if tls { clients.tls_client("echo")? } else { clients.client()? };
        let body = Pattern::new(job as u64);
        let outcome = client.echo("/function/echo", "echo.faas.local", body, length, framing);
        outcome.with_context(|| format!("{length} bytes, {framing:?}, TLS: {tls}"))
    });
    Ok(())
}

fn many_on_one_connection(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let clients: &AddressBook = &stack;
    crowd(4, 8, |job| {
        let mut random = Random::new(job as u64);
        let mut client = if job % 2 == 0 { clients.client()? } else { clients.tls_client("echo")? };
        for number in 0..50 {
            let length = *random.choose(&[1, 3, 500, 4096, 20_000, 300_000]);
            let framing =
                if random.below(2) == 0 { Framing::Length } else { Framing::Chunks(random.within(1, 5000)) };
            let body = Pattern::new(random.number());
            let outcome = client.echo("/function/echo", "echo.faas.local", body, length, framing);
            outcome.with_context(|| format!("request {number}, {length} bytes, {framing:?}"))?;
        }
        Ok(())
    });
    Ok(())
}

fn chunks_of_every_size(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        for size in (1..=64).chain([255, 256, 4095, 4096, 65_536]) {
            let outcome =
                client.echo("/function/echo", "x.example", Pattern::new(7), 5000, Framing::Chunks(size));
            outcome.with_context(|| format!("chunks of {size}"))?;
        }
        // Extensions and trailers are legal and mean nothing to this function.
        client.send(
            b"POST /function/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: sum\r\n\r\n\
            3;name=value\r\nabc\r\n00002;\"q\"\r\nde\r\n0\r\nSum: 5\r\n\r\n",
        )?;
        let answer = client.response()?;
        ensure!(answer.body == b"abcde", "{answer:?}");
    }
    Ok(())
}

/// A client that nobody here wrote sends a file and gets the same file.
fn curl_uploads(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let curl = programs::client("curl", "curl");
    let sent = stack.folder().join("sent");
    std::fs::write(&sent, Pattern::new(11).bytes(9 << 20))?;
    let name = tests::stack::host("echo");
    let secure = format!("https://{name}:{}/", stack.https.port());
    let plain = format!("http://{}/function/echo", stack.http);
    for url in [&plain, &secure] {
        for framing in [&[][..], &["-H", "Transfer-Encoding: chunked"], &["-H", "Expect:"]] {
            let received = stack.folder().join("received");
            let output = std::process::Command::new(&curl)
                .args(["-sS", "--fail", "--max-time", "60", "--cacert"])
                .arg(stack.authority.path())
                .args(["--resolve", &format!("{name}:{}:127.0.0.1", stack.https.port())])
                .args(framing)
                .arg("--data-binary")
                .arg(format!("@{}", sent.display()))
                .arg("-o")
                .arg(&received)
                .arg(url)
                .output()?;
            ensure!(output.status.success(), "{url}: {}", String::from_utf8_lossy(&output.stderr));
            ensure!(
                std::fs::read(&received)? == std::fs::read(&sent)?,
                "{url} {framing:?}: another file came back"
            );
        }
    }
    Ok(())
}

/// hello doesn't read bodies: a short one is passed over, a long one ends the connection after the answer.
fn unread_bodies(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("hello")?] {
        for _ in 0..3 {
            let answer =
                client.request("POST", "/function/hello", "hello.faas.local", Some(&[b'x'; 10_000]))?;
            ensure!(probe::answerer(&answer) == Some("hello") || answer.status() == 405, "{answer:?}");
        }
    }
    for mut client in [stack.client()?, stack.tls_client("hello")?] {
        let head =
            "POST /function/hello HTTP/1.1\r\nHost: hello.faas.local\r\nContent-Length: 50000000\r\n\r\n";
        client.send(head.as_bytes())?;
        // The answer comes although most of the body never does.
        client.send(&[b'x'; 100_000])?;
        let answer = client.response()?;
        ensure!(probe::answerer(&answer) == Some("hello") || answer.status() == 405, "{answer:?}");
    }
    Ok(())
}
