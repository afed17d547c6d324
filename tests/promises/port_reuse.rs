//! A connection's verdict is its own, also when the one before it came from the same port a moment ago.
use std::{io::Write, net::TcpStream, time::Duration};

use anyhow::{Context, Result, ensure};
use socket2::SockRef;
use tests::{
    Verdicts,
    crowd::crowd,
    hello::Hello,
    net::Net,
    pattern::Random,
    probe::{self, Outcome, Port},
    stack::{AddressBook, Plan},
};

const CONNECTIONS: usize = 20_000;
const CONNECTIONS_LONG: usize = 1_000_000;
/// Few ports make every one of them busy again at once; more clients than ports would wait for each other.
const PORTS: u16 = 64;
const CLIENTS: usize = 12;

#[test]
fn no_verdict_outlives_its_connection() {
    let net = Net::private().with_client_ports(20_000, 20_000 + PORTS - 1);
    let stack = Plan::new(Verdicts::Sockmap).in_net(net).start();
    let clients: &AddressBook = &stack;
    let connections = if tests::long() { CONNECTIONS_LONG } else { CONNECTIONS };
    crowd(CLIENTS, connections, |number| connection(clients, &mut Random::new(number as u64)));
}

fn connection(stack: &AddressBook, random: &mut Random) -> Result<()> {
    let function = *random.choose(&["echo", "hello", "nobody"]);
    let head = format!("GET /function/{function} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes();
    // A handshake costs a hundred times what an accept does.
    let (port, bytes) = match random.below(10) {
        0 => (Port::Https, Hello::named(tests::stack::host(function).as_bytes()).bytes()),
        _ => (Port::Http, head),
    };
    let mut socket = connect(stack, port)?;
    // Many end before they have, or have read, an answer: their state must not be the next one's.
    let sent = match random.below(10) {
        0 => 0,
        1 => random.below(bytes.len()),
        _ => bytes.len(),
    };
    if sent == bytes.len() && random.below(4) == 0 {
        let cut = random.below(bytes.len());
        socket.write_all(&bytes[..cut])?;
        socket.write_all(&bytes[cut..])?;
    } else {
        socket.write_all(&bytes[..sent])?;
    }
    if sent < bytes.len() || random.below(8) == 0 {
        return Ok(());
    }
    let outcome = probe::outcome(stack, port, &mut socket).with_context(|| format!("{port:?} {function}"))?;
    let expected = match (function, port) {
        ("nobody", Port::Http) => Outcome::Status(404),
        ("nobody", Port::Https) => Outcome::Alert(tests::tls::alert::UNRECOGNIZED_NAME),
        _ => Outcome::Function(function.to_owned()),
    };
    ensure!(outcome == expected, "WRONG VERDICT: {port:?} {function}: {outcome:?}");
    Ok(())
}

/// Connections that end by a reset leave no TIME_WAIT, so that their port is free at once.
fn connect(stack: &AddressBook, port: Port) -> Result<TcpStream> {
    let address = if port == Port::Http { stack.http } else { stack.https };
    let socket = TcpStream::connect(address).context("connecting")?;
    SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
    socket.set_nodelay(true)?;
    Ok(socket)
}
