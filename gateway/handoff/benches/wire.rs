//! The wire: records as bytes, and descriptors through a pool connection.
#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    hint::black_box,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use handoff::{MAX_BATCH, ReceiveBuffer, Received, message};
use rustix::net::{SocketFlags, accept_with, sockopt::set_socket_linger};
use support::{Pool, borrowed, clients, connection};

const BATCHES: [usize; 3] = [1, 8, MAX_BATCH];

fn records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("records");
    for count in BATCHES {
        let connections: Vec<_> = (0..count as u64).map(connection).collect();
        let mut bytes = message::Bytes::new();
        message::encode_connections(&connections, &mut bytes);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("encode {count}"), |bencher| {
            let mut out = message::Bytes::new();
            bencher.iter(|| {
                out.clear();
                message::encode_connections(black_box(&connections), &mut out)
            });
        });
        group.bench_function(format!("decode {count}"), |bencher| {
            let mut out = Vec::with_capacity(MAX_BATCH);
            bencher.iter(|| {
                out.clear();
                message::decode_connections(black_box(&bytes), &mut out).unwrap();
            });
        });
    }
}

/// sendmsg and recvmsg of a batch, and closing what came.
fn handoff(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("handoff");
    let pool = Pool::new();
    let (gateway, _status, instance) = pool.connected();
    let mut buffer = ReceiveBuffer::default();
    for count in BATCHES {
        let connections: Vec<_> = (0..count as u64).map(connection).collect();
        let (_clients, sockets) = clients(count);
        let descriptors = borrowed(&sockets);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("{count}"), |bencher| {
            bencher.iter(|| {
                assert_eq!(gateway.send(&connections, &descriptors).unwrap(), count);
                support::wait_readable(instance.as_fd());
                match instance.receive(&mut buffer).unwrap() {
                    Received::Connections(arrivals) => arrivals.count(),
                    _ => panic!("no connections"),
                }
            });
        });
    }
}

/// accept4, sendmsg and close: what no gateway that hands connections over can do without.
fn least(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("least");
    let pool = Pool::new();
    let (gateway, _status, instance) = pool.connected();
    let mut buffer = ReceiveBuffer::default();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    for count in BATCHES {
        let connections: Vec<_> = (0..count as u64).map(connection).collect();
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("{count}"), |bencher| {
            bencher.iter_custom(|batches| {
                let mut spent = Duration::ZERO;
                for _ in 0..batches {
                    let clients: Vec<_> = (0..count).map(|_| connect(address)).collect();
                    let begun = Instant::now();
                    let accepted: Vec<_> = (0..count).map(|_| accept(&listener)).collect();
                    let descriptors: Vec<_> = accepted.iter().map(AsFd::as_fd).collect();
                    assert_eq!(gateway.send(&connections, &descriptors).unwrap(), count);
                    drop(accepted);
                    spent += begun.elapsed();
                    // The client's reset leaves nothing behind that would keep its port.
                    drop(clients);
                    support::wait_readable(instance.as_fd());
                    assert!(matches!(instance.receive(&mut buffer), Ok(Received::Connections(_))));
                }
                spent
            });
        });
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(address).unwrap();
    set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    client
}

fn accept(listener: &TcpListener) -> OwnedFd {
    accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).unwrap()
}

criterion_group!(benches, records, handoff, least);
criterion_main!(benches);
