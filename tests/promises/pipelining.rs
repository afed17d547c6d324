//! Pipelined requests get as many answers, in their order, each its own.
use anyhow::{Context, Result, ensure};
use tests::{Stack, Verdicts, net::Net, pattern::Random, segments::send_cut_at, stack::Plan};

in_both_modes!(
    a_hundred_at_once,
    a_hundred_with_bodies,
    a_hundred_in_random_segments,
    a_malformed_request_behind_good_ones,
);

const REQUESTS: usize = 100;

fn a_hundred_at_once(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("hello")?] {
        let request = |number| {
            format!("GET /function/hello?name=n{number}. HTTP/1.1\r\nHost: hello.faas.local\r\n\r\n")
        };
        let requests: String = (0..REQUESTS).map(request).collect();
        client.send(requests.as_bytes())?;
        for number in 0..REQUESTS {
            let answer = client.response().with_context(|| format!("answer {number}"))?;
            ensure!(
                answer.text().contains(&format!("Hello, n{number}.")),
                "answer {number}: {}",
                answer.text()
            );
        }
    }
    Ok(())
}

fn a_hundred_with_bodies(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        client.send(&requests_with_bodies())?;
        expect_bodies(&mut client)?;
    }
    Ok(())
}

/// Every third body is chunked.
fn requests_with_bodies() -> Vec<u8> {
    let mut requests = Vec::new();
    for number in 0..REQUESTS {
        let body = body(number);
        requests.extend(b"PUT /function/echo HTTP/1.1\r\nHost: echo.faas.local\r\n");
        if number % 3 == 0 {
            requests.extend(b"Transfer-Encoding: chunked\r\n\r\n");
            for chunk in body.as_bytes().chunks(7) {
                requests.extend(format!("{:X}\r\n", chunk.len()).bytes());
                requests.extend([chunk, b"\r\n"].concat());
            }
            requests.extend(b"0\r\n\r\n");
        } else {
            requests.extend(format!("Content-Length: {}\r\n\r\n{body}", body.len()).bytes());
        }
    }
    requests
}

fn body(number: usize) -> String {
    format!("the body of request {number}, {}", "x".repeat(number))
}

fn expect_bodies(client: &mut tests::wire::Client) -> Result<()> {
    for number in 0..REQUESTS {
        let answer = client.response().with_context(|| format!("answer {number}"))?;
        ensure!(answer.text() == body(number), "answer {number}: {} {}", answer.status(), answer.text());
    }
    Ok(())
}

fn a_hundred_in_random_segments(verdicts: Verdicts) -> Result<()> {
    let stack = Plan::new(verdicts).in_net(Net::private().without_slow_start()).start();
    let requests = requests_with_bodies();
    for seed in 0..10 {
        let mut client = stack.client()?;
        let cuts = Random::new(seed).cuts(requests.len(), 200);
        send_cut_at(client.socket(), &requests, &cuts).with_context(|| format!("seed {seed}"))?;
        expect_bodies(&mut client).with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

fn a_malformed_request_behind_good_ones(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        let good = "POST /function/echo HTTP/1.1\r\nHost: echo.faas.local\r\nContent-Length: 2\r\n\r\nok";
        let bad = "GET /function/echo HTTP/1.1\r\nHost : echo.faas.local\r\n\r\n";
        client.send(format!("{good}{good}{bad}{good}").as_bytes())?;
        for _ in 0..2 {
            ensure!(client.response()?.body == b"ok");
        }
        ensure!(client.response()?.status() == 400);
        client.expect_close()?;
    }
    Ok(())
}
