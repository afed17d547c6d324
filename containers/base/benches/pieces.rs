//! What a function does for each request and each record, over loopback sockets of one thread.
use std::{convert::Infallible, net::TcpListener, rc::Rc};

use base::{
    Body, Linger,
    internals::{
        Connection, Hosts, Identity, Limits, Mover, Origin, Shared, Stop, Stream, Succession, Tally,
    },
    socket::Socket,
    tls::{SessionState, TlsStream},
};
use common::Protocol;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use http::Response;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    task::{LocalSet, spawn_local},
};

/// Enough that system calls are a small part of a request's cost.
const PIPELINED: usize = 64;
const RECORD_BYTES: usize = 16 * 1024;

const REQUEST: &str =
    "GET /function/echo/path?query HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n";
const POST: &str =
    "POST /function/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n0123456789abcdef";

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn sockets() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nodelay(true).unwrap();
    client.set_nonblocking(true).unwrap();
    (client, listener.accept().unwrap().0)
}

async fn answer(request: http::Request<Body>) -> Result<Response<Body>, Infallible> {
    Ok(Response::new(request.into_body()))
}

/// A served connection, and the client's end of it.
fn served() -> TcpStream {
    let (client, socket) = sockets();
    spawn_local(async move {
        let shared = Rc::new(Shared {
            identity: Identity { name: "echo".parse().unwrap(), hosts: Hosts::default() },
            limits: Limits::default(),
            linger: Linger::default(),
            stop: Stop::default(),
            mover: Mover::default(),
            succession: Succession::default(),
            tally: Tally::default(),
            access_log: None,
        });
        let stream = Stream::Plain(Socket::from(socket));
        let mut connection = Connection::new(stream, Protocol::Http, Origin::default(), shared);
        let finish = connection.serve(&mut tower::service_fn(answer)).await;
        connection.finish(finish, ()).await;
    });
    TcpStream::from_std(client).unwrap()
}

fn http(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("http");
    for (name, request) in [("GET", REQUEST), ("POST of 16 bytes", POST)] {
        let (runtime, tasks) = (runtime(), LocalSet::new());
        for pipelined in [1, PIPELINED] {
            let mut client = runtime.block_on(tasks.run_until(async { served() }));
            let requests = request.repeat(pipelined);
            let answer_bytes = runtime.block_on(tasks.run_until(async {
                client.write_all(request.as_bytes()).await.unwrap();
                let mut answer = vec![0; 4096];
                client.read(&mut answer).await.unwrap()
            }));
            let mut answers = vec![0; answer_bytes * pipelined];
            group.throughput(Throughput::Elements(pipelined as u64));
            group.bench_function(format!("{name}, {pipelined} at once"), |bencher| {
                bencher.iter(|| {
                    runtime.block_on(tasks.run_until(async {
                        client.write_all(requests.as_bytes()).await.unwrap();
                        client.read_exact(&mut answers).await.unwrap();
                    }));
                });
            });
        }
    }
}

fn records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("record layer");
    let runtime = runtime();
    for (name, bytes) in [("64 bytes", 64), ("a full record", RECORD_BYTES)] {
        let (client, server) = sockets();
        let (mut client, mut server) = runtime.block_on(async {
            (
                TlsStream::from_parts(Socket::from(client), state(1, 2)),
                TlsStream::from_parts(Socket::from(server), state(2, 1)),
            )
        });
        let (sent, mut received) = (vec![b'x'; bytes], vec![0; bytes]);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(format!("{name}, sealed, sent, received, opened"), |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    server.write_all(&sent).await.unwrap();
                    server.flush().await.unwrap();
                    client.read_exact(&mut received).await.unwrap();
                });
            });
        });
    }
}

/// A TLS 1.3 session with AES-256-GCM whose directions have these keys: format, version, cipher, no flag, three
/// counters, no message, two directions, no residue.
fn state(transmit: u8, receive: u8) -> SessionState {
    let mut bytes = vec![1, 3, 2, 0, 0, 0, 0, 0];
    for key in [transmit, receive] {
        bytes.extend([0; 8]);
        bytes.extend([key; 32 + 12 + 48]);
    }
    bytes.extend([0; 8]);
    SessionState::decode(&bytes).expect("the encoding of a state has changed")
}

criterion_group!(benches, http, records);
criterion_main!(benches);
