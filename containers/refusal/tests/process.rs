//! The refusal program answers connections that it was handed, whatever their clients do.
#[path = "../../base/tests/support/mod.rs"]
mod support;

use std::{
    fs,
    io::Write,
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    thread,
};

use common::{Protocol, Refusal};
use handoff::Purpose;
use nix::sys::signal::Signal;
use support::{Function, connection, read_to_end, record};

fn start() -> Function {
    Function::start(env!("CARGO_BIN_EXE_refusal"), &["--workers", "1"])
}

fn refuse(function: &Function, protocol: Protocol, refusal: Refusal) -> TcpStream {
    let pool = function.connect();
    let (client, server) = connection();
    let sent = pool.end.send(&[record(1, protocol, Purpose::Refuse(refusal))], &[server.as_fd()]);
    assert_eq!(sent.unwrap(), 1);
    client
}

#[test]
fn an_unread_request_never_turns_the_answer_into_a_reset() {
    let function = start();
    for protocol in [Protocol::Http, Protocol::Https] {
        for refusal in Refusal::ALL {
            let mut client = refuse(&function, protocol, refusal);
            let mut writer = client.try_clone().unwrap();
            let writing = thread::spawn(move || {
                // More than any socket buffer holds, so that it is still being sent when the answer comes.
                writer.write_all(&vec![b'x'; 4 << 20]).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let answer = read_to_end(&mut client).unwrap();
            writing.join().unwrap();
            let expected: &[u8] = match (protocol, refusal) {
                (Protocol::Https, Refusal::NoFunction) => &[21, 3, 1, 0, 2, 2, 112],
                (Protocol::Https, Refusal::OtherProtocol) | (Protocol::Http, Refusal::Malformed) => {
                    b"HTTP/1.1 400 Bad Request\r\n"
                }
                (Protocol::Https, _) => &[21, 3, 1, 0, 2, 2],
                (Protocol::Http, Refusal::Unavailable) => {
                    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
                }
                (Protocol::Http, _) => b"HTTP/1.1 ",
            };
            assert!(answer.starts_with(expected), "{protocol:?} {refusal:?}: {}", answer.escape_ascii());
        }
    }
    function.signal(Signal::SIGTERM);
    assert!(function.wait().success());
}

#[test]
fn the_answer_doesnt_wait_for_a_silent_client() {
    let function = start();
    let mut client = refuse(&function, Protocol::Http, Refusal::Timeout);
    assert!(read_to_end(&mut client).unwrap().starts_with(b"HTTP/1.1 408 Request Timeout\r\n"));
}

#[test]
fn a_flood_in_one_message_is_answered_and_counted() {
    let function = start();
    let pool = function.connect();
    let (mut clients, servers): (Vec<_>, Vec<_>) = (0..handoff::MAX_BATCH).map(|_| connection()).unzip();
    let records: Vec<_> = (0..clients.len() as u64)
        .map(|id| record(id, Protocol::Http, Purpose::Refuse(Refusal::NoFunction)))
        .collect();
    let descriptors: Vec<_> = servers.iter().map(AsFd::as_fd).collect();
    assert_eq!(pool.end.send(&records, &descriptors).unwrap(), clients.len());
    drop(servers);
    for client in &mut clients {
        assert!(read_to_end(client).unwrap().starts_with(b"HTTP/1.1 404 Not Found\r\n"));
    }
    assert_eq!(pool.status.taken(), clients.len() as u64);
}

#[test]
fn it_has_none_of_roots_rights() {
    let function = start();
    // Its HELLO comes after it gave them up.
    function.connect();
    let status = fs::read_to_string(format!("/proc/{}/status", function.id())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(field("Uid:").iter().all(|uid| uid != "0"), "{status}");
    assert!(field("Gid:").iter().all(|gid| gid != "0"), "{status}");
    assert!(field("CapEff:").iter().all(|mask| u64::from_str_radix(mask, 16) == Ok(0)), "{status}");
    assert_eq!(field("NoNewPrivs:"), ["1"]);
}
