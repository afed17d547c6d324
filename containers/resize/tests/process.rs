//! The resize function's program, fed as the gateway would: a picture over a real connection, and others served meanwhile.
#[path = "../../base/tests/support/mod.rs"]
mod support;

use std::{
    io::{Cursor, ErrorKind, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
};

use common::Protocol;
use handoff::Purpose;
use image::{GenericImageView, ImageFormat, RgbImage};
use support::{Function, Pool, connection, record};

fn serve(pool: &Pool) -> TcpStream {
    let (client, server) = connection();
    let purpose = Purpose::Serve("resize".parse().unwrap());
    assert_eq!(pool.end.send(&[record(1, Protocol::Http, purpose)], &[server.as_fd()]).unwrap(), 1);
    client
}

fn picture(side: u32) -> Vec<u8> {
    let image = RgbImage::from_fn(side, side, |x, y| image::Rgb([x as u8, y as u8, (x ^ y) as u8]));
    let mut bytes = Vec::new();
    image.write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png).unwrap();
    bytes
}

fn post(query: &str, length: usize, field: &str) -> String {
    format!("POST /function/resize?{query} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{field}\r\n")
}

/// Reads a head, up to its empty line.
fn head(client: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0; 1];
    while !bytes.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

fn body(client: &mut TcpStream, head: &str) -> Vec<u8> {
    let length = head.split("content-length: ").nth(1).unwrap().split('\r').next().unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    client.read_exact(&mut body).unwrap();
    body
}

#[test]
fn a_connection_resizes_one_picture_after_another() {
    let function = Function::start(env!("CARGO_BIN_EXE_resize"), &["--workers", "1"]);
    let pool = function.connect();
    let mut client = serve(&pool);
    let picture = picture(64);
    for format in ["png", "jpeg", "webp"] {
        let query = format!("width=16&format={format}");
        let request = post(&query, picture.len(), "Expect: 100-continue\r\n");
        client.write_all(request.as_bytes()).unwrap();
        assert!(head(&mut client).starts_with("HTTP/1.1 100 "));
        client.write_all(&picture).unwrap();
        let head = head(&mut client);
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains(&format!("content-type: image/{format}\r\n")), "{head}");
        let result = image::load_from_memory(&body(&mut client, &head)).unwrap();
        assert_eq!(result.dimensions(), (16, 16));
    }
    // Refused before the body is asked for.
    client.write_all(post("width=0", 1 << 40, "Expect: 100-continue\r\n").as_bytes()).unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 400 "));
}

#[test]
fn a_worker_serves_others_while_a_picture_is_made() {
    let function = Function::start(env!("CARGO_BIN_EXE_resize"), &["--workers", "1"]);
    let pool = function.connect();
    let picture = picture(1000);
    let mut busy = serve(&pool);
    // Seconds of work without optimisation, and long with it.
    busy.write_all(post("width=2048&height=2048&format=webp", picture.len(), "").as_bytes()).unwrap();
    busy.write_all(&picture).unwrap();
    let mut other = serve(&pool);
    other.write_all(b"GET /function/resize HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let usage = head(&mut other);
    assert!(usage.starts_with("HTTP/1.1 200 OK\r\n"), "{usage}");

    busy.set_nonblocking(true).unwrap();
    let early = busy.peek(&mut [0]);
    assert!(early.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{early:?}");
    busy.set_nonblocking(false).unwrap();
    let head = head(&mut busy);
    let result = image::load_from_memory(&body(&mut busy, &head)).unwrap();
    assert_eq!(result.dimensions(), (2048, 2048));
}

#[test]
fn slow_clients_leave_room_for_others() {
    let function = Function::start(env!("CARGO_BIN_EXE_resize"), &["--workers", "1"]);
    let pool = function.connect();
    // More than fit, if what they may send were set aside for them.
    let mut slow: Vec<_> = (0..20).map(|_| serve(&pool)).collect();
    let unbounded =
        "POST /function/resize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n";
    for (number, client) in slow.iter_mut().enumerate() {
        let announced = post("width=16", 32 << 20, "") + "x";
        client.write_all([unbounded, &announced][number % 2].as_bytes()).unwrap();
    }
    let picture = picture(64);
    let mut other = serve(&pool);
    other.write_all(post("width=16", picture.len(), "").as_bytes()).unwrap();
    other.write_all(&picture).unwrap();
    let head = head(&mut other);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
}
