//! A function's program, started as its parent would and fed as the gateway would.
#[path = "../../base/tests/support/mod.rs"]
mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use common::Protocol;
use handoff::{
    Berth, FromInstance, GatewayMessage, Grant, GrantAnswer, Greeting, InstanceMessage, MessageBuffer,
    Purpose, SendError, WorkerId,
};
use nix::sys::signal::Signal;
use support::{Function, PATIENCE, Pool, client, connection, read_to_end, record, wait_readable};

const GET: &[u8] = b"GET /function/echo/x HTTP/1.1\r\nHost: a\r\n\r\n";

fn start(arguments: &[&str]) -> Function {
    Function::start(env!("CARGO_BIN_EXE_echo"), arguments)
}

fn serve(pool: &Pool, protocol: Protocol, function: &str) -> TcpStream {
    let (client, server) = connection();
    let purpose = Purpose::Serve(function.parse().unwrap());
    assert_eq!(pool.end.send(&[record(1, protocol, purpose)], &[server.as_fd()]).unwrap(), 1);
    client
}

/// Waits for what the status page will say.
fn until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it did not come to that");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Reads one answer with a Content-Length.
fn answer(client: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0; 1];
    while !bytes.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).unwrap();
    let length = head.split("content-length: ").nth(1).unwrap().split('\r').next().unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    client.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

#[test]
fn each_worker_says_hello_once_and_serves() {
    let function = start(&["--workers", "3"]);
    let pools: Vec<_> = (0..3).map(|_| function.connect()).collect();
    let mut workers: Vec<_> = pools.iter().map(|pool| pool.hello.worker).collect();
    workers.sort_unstable();
    assert_eq!(workers, [0, 1, 2]);
    for pool in &pools {
        assert_eq!((pool.hello.workers, pool.hello.pid), (3, function.id()));
        let mut client = serve(pool, Protocol::Http, "echo");
        for path in ["/x", "/y?z"] {
            let request = GET.escape_ascii().to_string().replace("\\r\\n", "\r\n").replace("/x", path);
            client.write_all(request.as_bytes()).unwrap();
            let answer = answer(&mut client);
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(
                answer.contains(&format!("\"path\":\"{}\"", path.split('?').next().unwrap())),
                "{answer}"
            );
        }
        assert_eq!(pool.status.taken(), 1);
        assert_eq!(pool.status.open_connections(), 1);
    }
    // A second gateway's connections are spread as evenly.
    let second: Vec<_> = (0..3).map(|_| function.connect()).collect();
    let mut again: Vec<_> = second.iter().map(|pool| pool.hello.worker).collect();
    again.sort_unstable();
    assert_eq!(again, [0, 1, 2]);
}

#[test]
fn stopping_serves_what_was_taken_and_what_is_queued_and_nothing_more() {
    let function = start(&["--workers", "1"]);
    let pool = function.connect();
    let mut idle = serve(&pool, Protocol::Http, "echo");
    idle.write_all(GET).unwrap();
    answer(&mut idle);
    let mut busy = serve(&pool, Protocol::Http, "echo");
    busy.write_all(b"POST /function/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\none").unwrap();
    let mut first = [0; 15];
    busy.read_exact(&mut first).unwrap();
    let mut queued = serve(&pool, Protocol::Http, "echo");
    queued.write_all(GET).unwrap();
    function.signal(Signal::SIGTERM);

    let mut buffer = MessageBuffer::default();
    wait_readable(pool.end.as_fd());
    let drain = pool.end.receive(&mut buffer).unwrap();
    assert!(matches!(drain, FromInstance::Message(InstanceMessage::Drain)));
    assert!(pool.status.draining());
    pool.end.say(&GatewayMessage::Drained).unwrap();
    assert_eq!(read_to_end(&mut idle).unwrap(), b"", "idle connections end");
    let answer = String::from_utf8(read_to_end(&mut queued).unwrap()).unwrap();
    assert!(answer.contains("\"method\":\"GET\""), "{answer}");
    busy.write_all(b"two").unwrap();
    let answer = String::from_utf8(read_to_end(&mut busy).unwrap()).unwrap();
    assert!(answer.ends_with("onetwo"), "{answer}");
    assert_eq!(pool.status.taken(), 3);
    assert!(function.wait().success());
}

#[test]
fn a_gateway_that_does_not_answer_is_not_waited_for() {
    let function = start(&["--workers", "1"]);
    let pool = function.connect();
    function.signal(Signal::SIGTERM);
    wait_readable(pool.end.as_fd());
    // It goes on sending until that fails, and what it could send is served.
    let purpose = Purpose::Serve("echo".parse().unwrap());
    let mut sent = Vec::new();
    loop {
        let (mut client, server) = connection();
        client.write_all(b"GET /function/echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        match pool.end.send(&[record(1, Protocol::Http, purpose)], &[server.as_fd()]) {
            Ok(_) => sent.push(client),
            Err(SendError::WouldBlock) => {}
            Err(error) => break assert!(matches!(error, SendError::Closed), "{error}"),
        }
        if sent.len() == 100 {
            read_to_end(&mut sent.remove(0)).unwrap();
        }
    }
    for mut client in sent {
        assert!(read_to_end(&mut client).unwrap().starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
    assert!(function.wait().success());
}

#[test]
fn what_leaves_is_not_lost_when_the_function_stops_and_the_gateway_is_behind() {
    /// All together more than a queue holds.
    const CONNECTIONS: u64 = 40;
    const HEAD_BYTES: usize = 20_000;
    let function = start(&["--name", "echo", "--workers", "1"]);
    let pool = function.connect();
    let filler = "x".repeat(HEAD_BYTES);
    let request = format!("GET /function/hello HTTP/1.1\r\nHost: a\r\nX: {filler}\r\n\r\n");
    let purpose = Purpose::Serve("echo".parse().unwrap());
    let mut clients = Vec::new();
    for id in 0..CONNECTIONS {
        let (mut client, server) = connection();
        client.write_all(request.as_bytes()).unwrap();
        pool.end.send(&[record(id, Protocol::Http, purpose)], &[server.as_fd()]).unwrap();
        clients.push(client);
    }
    let mut buffer = MessageBuffer::default();
    wait_readable(pool.end.as_fd());
    let FromInstance::Message(InstanceMessage::Ask(asked)) = pool.end.receive(&mut buffer).unwrap() else {
        panic!("something else came");
    };
    let berth = Berth { to: WorkerId(1), instance: 1, worker: 0, places: 64 };
    let grant = Grant { function: asked, answer: GrantAnswer::Granted(berth) };
    pool.end.say(&GatewayMessage::Grant(grant)).unwrap();
    until(|| pool.status.taken() == CONNECTIONS && pool.status.open_connections() == 0);
    function.signal(Signal::SIGTERM);
    until(|| pool.status.draining());
    pool.end.say(&GatewayMessage::Drained).unwrap();

    let mut returned = Vec::new();
    let mut drained = false;
    loop {
        wait_readable(pool.end.as_fd());
        match pool.end.receive(&mut buffer).unwrap() {
            FromInstance::Return(moves, sockets) => {
                for (moved, socket) in moves.iter().zip(sockets) {
                    assert!(moved.payload.len() > HEAD_BYTES, "its request comes along");
                    returned.push((moved.connection.id, socket));
                }
            }
            FromInstance::Message(InstanceMessage::Drain) => drained = true,
            FromInstance::Closed => break,
            FromInstance::WouldBlock => {}
            FromInstance::Message(other) => panic!("{other:?}"),
        }
    }
    returned.sort_unstable_by_key(|(id, _)| *id);
    let returned: Vec<u64> = returned.iter().map(|(id, _)| *id).collect();
    assert_eq!(returned, Vec::from_iter(0..CONNECTIONS));
    assert!(drained);
    assert!(function.wait().success());
}

#[test]
fn a_request_that_never_ends_doesnt_hold_the_stop() {
    let function = start(&["--workers", "1", "--stop-timeout-ms", "50"]);
    let pool = function.connect();
    let mut busy = serve(&pool, Protocol::Http, "echo");
    busy.write_all(b"POST /function/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\none").unwrap();
    busy.read_exact(&mut [0; 15]).unwrap();
    function.signal(Signal::SIGTERM);
    assert!(function.wait().success());
}

#[test]
fn connections_outlive_the_gateway_that_brought_them() {
    let function = start(&["--workers", "1"]);
    let pool = function.connect();
    let mut client = serve(&pool, Protocol::Http, "echo");
    client.write_all(GET).unwrap();
    answer(&mut client);
    drop(pool);
    let pool = function.connect();
    client.write_all(GET).unwrap();
    assert!(answer(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
    let mut other = serve(&pool, Protocol::Http, "echo");
    other.write_all(GET).unwrap();
    assert!(answer(&mut other).starts_with("HTTP/1.1 200 OK\r\n"));
}

#[test]
fn without_a_certificate_an_https_client_is_told() {
    let function = start(&["--workers", "1"]);
    let pool = function.connect();
    let mut client = serve(&pool, Protocol::Https, "echo");
    client.write_all(&[b'x'; 1000]).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut client).unwrap(), [21, 3, 3, 0, 2, 2, 80]);
}

#[test]
fn a_connection_of_another_function_is_closed() {
    let function = start(&["--workers", "1"]);
    let pool = function.connect();
    let mut client = serve(&pool, Protocol::Http, "hello");
    // Closing it with an unread request may well be a reset.
    let _ = client.write_all(GET);
    assert!(!matches!(client.read(&mut [0; 1]), Ok(1..)));
    let mut client = serve(&pool, Protocol::Http, "echo");
    client.write_all(GET).unwrap();
    assert!(answer(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
}

#[test]
fn a_function_that_listens_itself_needs_no_gateway() {
    let (function, address) =
        Function::listen(env!("CARGO_BIN_EXE_echo"), &["--name", "echo", "--workers", "2"], "http");
    let mut clients: Vec<_> = (0..8).map(|_| client(address)).collect();
    for client in clients.iter_mut().chain(&mut [support::client(address)]) {
        for _ in 0..2 {
            client.write_all(GET).unwrap();
            assert!(answer(client).starts_with("HTTP/1.1 200 OK\r\n"));
        }
    }
    // Nobody else is there whose it could be.
    let mut other = client(address);
    other.write_all(b"GET /function/hello HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert!(answer(&mut other).starts_with("HTTP/1.1 421 "));
    function.signal(Signal::SIGTERM);
    assert_eq!(read_to_end(&mut clients[0]).unwrap(), b"");
    assert!(function.wait().success());
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_listening_function_without_a_certificate_tells_its_https_clients() {
    let (_function, address) =
        Function::listen(env!("CARGO_BIN_EXE_echo"), &["--name", "echo", "--workers", "1"], "https");
    let mut client = client(address);
    client.write_all(GET).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut client).unwrap(), [21, 3, 3, 0, 2, 2, 80]);
}

#[test]
fn nonsense_on_a_pool_connection_ends_only_that() {
    let function = start(&["--workers", "1"]);
    let broken = function.connect();
    nix::sys::socket::send(
        std::os::fd::AsRawFd::as_raw_fd(&broken.end.as_fd()),
        b"nonsense",
        nix::sys::socket::MsgFlags::empty(),
    )
    .unwrap();
    wait_readable(broken.end.as_fd());
    assert!(matches!(broken.end.receive_hello(), Ok(Greeting::Closed)));
    let pool = function.connect();
    let mut client = serve(&pool, Protocol::Http, "echo");
    client.write_all(GET).unwrap();
    assert!(answer(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
}

#[test]
fn a_worker_takes_no_more_connections_than_it_may() {
    // A message may carry 64 connections, so none is taken when there is less room.
    const TAKEN: usize = 100 - 64 + 1;
    let function = start(&["--workers", "1", "--max-connections", "100"]);
    let pool = function.connect();
    let mut clients: Vec<_> = (0..=TAKEN).map(|_| serve(&pool, Protocol::Http, "echo")).collect();
    for client in &mut clients {
        client.write_all(GET).unwrap();
    }
    let mut last = clients.pop().unwrap();
    for client in &mut clients {
        assert!(answer(client).starts_with("HTTP/1.1 200 OK\r\n"));
    }
    assert_eq!((pool.status.taken(), pool.status.open_connections()), (TAKEN as u64, TAKEN as u32));
    drop(clients.pop());
    assert!(answer(&mut last).starts_with("HTTP/1.1 200 OK\r\n"));
    assert_eq!(pool.status.taken(), 1 + TAKEN as u64);
}
