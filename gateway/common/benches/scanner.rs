//! The scanner of first flights: the cost of a verdict before its route is looked up.
use std::{hint::black_box, iter};

use common::{
    Protocol,
    first_flight::{FirstFlight, Step},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// A hello that Chromium 156 on Debian sent, with a post-quantum key share.
const HELLO: &[u8] = include_bytes!("../../../tests/fixtures/chromium-156-client-hello.bin");
const REQUEST: &[u8] = b"GET /function/hello?name=you HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";

fn scan<'a>(protocol: Protocol, pieces: impl IntoIterator<Item = &'a [u8]>) -> Step {
    let mut flight = FirstFlight::new(1, protocol);
    let known = pieces.into_iter().map(|piece| flight.feed(piece)).find(|step| *step != Step::More);
    known.unwrap_or(Step::More)
}

fn scanner(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scanner");
    for (name, protocol, flight) in [("request", Protocol::Http, REQUEST), ("hello", Protocol::Https, HELLO)]
    {
        assert_eq!(scan(protocol, [flight]), Step::Name, "{name}");
        group.throughput(Throughput::Bytes(flight.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| scan(protocol, iter::once(black_box(flight))));
        });
        group.bench_function(format!("{name}, byte by byte"), |bencher| {
            bencher.iter(|| scan(protocol, black_box(flight).chunks(1)));
        });
    }
}

criterion_group!(benches, scanner);
criterion_main!(benches);
