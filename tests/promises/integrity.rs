//! Whatever the network does to segments, the function reads the bytes that the client wrote.
use std::{net::IpAddr, rc::Rc};

use anyhow::{Context, Result, ensure};
use tests::{
    Stack, Verdicts,
    crowd::{crowd, failures},
    mangle::{Injector, Loss, PerMillion},
    net::Net,
    pattern::{Pattern, Random},
    probe,
    stack::{AddressBook, Plan},
    wire::Framing,
};

in_both_modes!(
    small_connections_under_duplication,
    uploads_under_loss,
    keep_alive_under_loss,
    overlaps,
    requests_that_arrive_backwards,
);

const LOOPBACKS: [&str; 2] = ["127.0.0.1", "::1"];

/// Why the gateway or a function gave a connection up, and what the kernel's programs counted.
const CAUSES: &str = "info,gateway::gateway=debug,gateway::start=debug,base::http=debug";

fn stack_at(verdicts: Verdicts, net: &Rc<Net>, address: &str) -> Stack {
    let address: IpAddr = address.parse().expect("an address");
    Plan::new(verdicts).in_net(net.clone()).clients_use(address).log(CAUSES).start()
}

/// peek reads through native TCP, so a fraction of the numbers is enough for it.
fn share(verdicts: Verdicts, jobs: usize) -> usize {
    let jobs = if tests::long() { jobs * 10 } else { jobs };
    if verdicts == Verdicts::Peek { jobs / 10 } else { jobs }
}

fn small_connections_under_duplication(verdicts: Verdicts) -> Result<()> {
    let net = Rc::new(Net::private().retransmit_fast());
    for address in LOOPBACKS {
        let stack = stack_at(verdicts, &net, address);
        let clients: &AddressBook = &stack;
        let loss = Loss::on_loopback(&net, PerMillion::percent(1), PerMillion::percent(30));
        crowd(48, share(verdicts, 10_000), |number| {
            // About 300 bytes in three writes, the last one within the body.
            let body = Pattern::new(number as u64).bytes(200);
            let head =
                format!("POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
            let mut client = clients.client()?;
            let (first, second) = head.as_bytes().split_at(1 + number % (head.len() - 1));
            for piece in [first, &[second, &body[..100]].concat(), &body[100..]] {
                client.send(piece).context("sending")?;
            }
            let answer = client.response()?;
            ensure!(answer.body == body, "WRONG BYTES: {} {:?}", answer.status(), answer.text());
            Ok(())
        });
        ensure!(loss.dropped() > 0 && loss.duplicated() > 0);
    }
    Ok(())
}

fn uploads_under_loss(verdicts: Verdicts) -> Result<()> {
    let net = Rc::new(Net::private().retransmit_fast());
    for address in LOOPBACKS {
        let stack = stack_at(verdicts, &net, address);
        let clients: &AddressBook = &stack;
        let loss = Loss::on_loopback(&net, PerMillion::percent(1), PerMillion::percent(2));
        crowd(16, share(verdicts, 1000), |number| {
            let mut random = Random::new(number as u64);
            let length = match random.below(50) {
                0..25 => random.within(1, 1 << 16),
                25..45 => random.within(1 << 16, 1 << 19),
                45..49 => random.within(1 << 19, 1 << 21),
                _ => random.within(1 << 21, 1 << 23),
            };
            let framing = if random.below(2) == 0 {
                Framing::Length
            } else {
                Framing::Chunks(random.within(10, 40_000))
            };
            let tls = random.below(4) == 0;
            let mut client = if tls { clients.tls_client("echo")? } else { clients.client()? };
            let body = Pattern::new(random.number());
            let outcome = client.echo("/function/echo", "echo.faas.local", body, length as u64, framing);
            outcome.with_context(|| format!("{length} bytes, {framing:?}, TLS: {tls}"))
        });
        ensure!(loss.dropped() > 0 && loss.duplicated() > 0);
    }
    Ok(())
}

fn keep_alive_under_loss(verdicts: Verdicts) -> Result<()> {
    let net = Rc::new(Net::private().retransmit_fast());
    for address in LOOPBACKS {
        let stack = stack_at(verdicts, &net, address);
        let clients: &AddressBook = &stack;
        let _loss = Loss::on_loopback(&net, PerMillion::percent(1), PerMillion::percent(5));
        crowd(16, share(verdicts, 160), |number| {
            let mut random = Random::new(number as u64);
            let mut client = if number % 4 == 0 { clients.tls_client("echo")? } else { clients.client()? };
            for request in 0..20 {
                let length = *random.choose(&[1, 50, 700, 5000, 40_000]);
                let framing = if random.below(2) == 0 { Framing::Length } else { Framing::Chunks(333) };
                let body = Pattern::new(random.number());
                let outcome = client.echo("/function/echo", "echo.faas.local", body, length, framing);
                outcome.with_context(|| format!("request {request}, {length} bytes"))?;
            }
            Ok(())
        });
    }
    Ok(())
}

fn overlaps(verdicts: Verdicts) -> Result<()> {
    let net = Rc::new(Net::private().retransmit_late());
    for address in LOOPBACKS {
        let stack = stack_at(verdicts, &net, address);
        let clients: &AddressBook = &stack;
        crowd(4, share(verdicts, 600), |number| overlapped_connection(clients, number));
    }
    Ok(())
}

/// The kernel acknowledges each piece at once, also while the gateway accepts the connection: it is not a function's
/// send that lets go of the socket.
fn requests_that_arrive_backwards(verdicts: Verdicts) -> Result<()> {
    let net = Rc::new(Net::private().retransmit_late());
    for address in LOOPBACKS {
        let stack = stack_at(verdicts, &net, address);
        let clients: &AddressBook = &stack;
        crowd(2, share(verdicts, 2000), |_| {
            let request = b"GET /function/hello HTTP/1.1\r\nHost: x\r\n\r\n";
            let mut client = clients.client()?;
            Injector::new(client.socket())?.backwards(client.socket(), request)?;
            client.send(request).context("sending")?;
            let answer = client.response()?;
            ensure!(probe::answerer(&answer) == Some("hello"), "{} {}", answer.status(), answer.text());
            Ok(())
        });
    }
    Ok(())
}

/// The same overlaps with the fix switched off: if they did no harm, the tests above would show nothing.
#[test]
fn overlaps_do_harm_where_they_are_not_trimmed() {
    let net = Rc::new(Net::private().retransmit_late());
    for address in LOOPBACKS {
        let stack = Plan::new(Verdicts::Sockmap)
            .in_net(net.clone())
            .clients_use(address.parse::<IpAddr>().expect("an address"))
            .gateway_argument("--unsafe-no-trim")
            .start();
        let clients: &AddressBook = &stack;
        let wrong = failures(4, 100, |number| overlapped_connection(clients, number));
        let example = wrong.first().map(|(_, error)| error.as_str()).unwrap_or_default();
        // How many depends on who is faster, and none shows it without the defect.
        assert!(
            wrong.len() > 20,
            "{address}: only {} of 100 connections show the defect: {example}",
            wrong.len()
        );
    }
}

/// A request in pieces, each of them partly delivered by somebody else first; the function says what it read.
fn overlapped_connection(stack: &AddressBook, number: usize) -> Result<()> {
    let mut random = Random::new(number as u64);
    let field = |random: &mut Random, bytes: usize| -> String {
        random.bytes(bytes).iter().map(|byte| char::from(b'!' + byte % 93)).collect()
    };
    let fields = [field(&mut random, 300), field(&mut random, 900)];
    let head = format!(
        "GET /function/echo HTTP/1.1\r\nHost: x\r\nX-First: {}\r\nX-Second: {}\r\n\r\n",
        fields[0], fields[1]
    );
    let mut client = stack.client()?;
    let injector = Injector::new(client.socket())?;
    injector.write_with_overlaps(client.socket(), &mut random, head.as_bytes())?;
    let answer = client.response().context("the fields' answer")?;
    ensure!(answer.status() == 200, "status {}", answer.status());
    let json = answer.json();
    for (name, value) in ["x-first", "x-second"].into_iter().zip(&fields) {
        let got = &json["headers"][name];
        ensure!(got == value.as_str(), "WRONG BYTES in {name}: {got}, sent {value}");
    }
    // The next request on the same connection, whether the kernel has let go of the socket or not.
    let body = random.bytes(random.clone().within(1, 1000));
    let head = format!("POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    let request = [head.as_bytes(), &body].concat();
    injector.write_with_overlaps(client.socket(), &mut random, &request)?;
    let answer = client.response().context("the body's answer")?;
    ensure!(answer.body == body, "WRONG BYTES in a body of {}", body.len());
    Ok(())
}
