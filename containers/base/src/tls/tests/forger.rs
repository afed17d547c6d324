//! A peer with made-up secrets, which can say what no real client says.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, ReadBuf};

use super::super::fault::Fault;
use super::super::record::{Opened, RecordLayer};
use super::*;

/// A stream with made-up secrets and its peer, which can say what a real client can't.
pub(super) fn forged(version: Version, aead: Aead, sequence: u64) -> (TlsStream, Forger) {
    forged_behind(1 << 16, version, aead, sequence)
}

/// The same with a peer that has this much room for what it doesn't read.
pub(super) fn forged_behind(
    room_bytes: usize,
    version: Version,
    aead: Aead,
    sequence: u64,
) -> (TlsStream, Forger) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    // Before the window is first announced: one that shrinks makes the kernel drop acknowledgements.
    socket.set_recv_buffer_size(room_bytes).unwrap();
    socket.connect(&listener.local_addr().unwrap().into()).unwrap();
    let socket = TcpStream::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_nodelay(true).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let mut ours = session(version, aead, 1, 2);
    ours.transmit.sequence = sequence;
    let mut theirs = session(version, aead, 2, 1);
    theirs.receive.sequence = sequence;
    let state = SessionState { session: ours, plaintext: Vec::new(), ciphertext: Vec::new() };
    let forger = Forger { socket, record: RecordLayer::new(theirs), received: Vec::new() };
    (TlsStream::from_parts(Socket::from(accepted), state), forger)
}

pub(super) struct Forger {
    pub(super) socket: TcpStream,
    pub(super) record: RecordLayer,
    received: Vec<u8>,
}

impl Forger {
    pub(super) fn send(&mut self, kind: u8, content: &[u8]) {
        let mut record = Vec::new();
        self.record.seal_record(kind, &mut record, |output| output.extend_from_slice(content));
        self.socket.write_all(&record).unwrap();
    }

    /// The content of the next record with any.
    pub(super) fn receive(&mut self) -> Result<Vec<u8>, Fault> {
        loop {
            match self.record.open(&mut self.received)? {
                Opened::Data { record_bytes, content } => {
                    let content = self.received[content].to_vec();
                    self.received.drain(..record_bytes);
                    return Ok(content);
                }
                Opened::Control { record_bytes } => drop(self.received.drain(..record_bytes)),
                Opened::CloseNotify { .. } => return Ok(Vec::new()),
                Opened::Incomplete { .. } => {
                    let mut bytes = [0; 4096];
                    let received = self.socket.read(&mut bytes).unwrap();
                    assert!(received > 0, "closed");
                    self.received.extend_from_slice(&bytes[..received]);
                }
            }
        }
    }
}

/// One poll; `None` while there is nothing to read.
pub(super) fn read_now(stream: &mut TlsStream) -> Option<usize> {
    let mut bytes = [0; 16];
    let mut buffer = ReadBuf::new(&mut bytes);
    let mut context = Context::from_waker(Waker::noop());
    match AsyncRead::poll_read(Pin::new(stream), &mut context, &mut buffer) {
        Poll::Ready(outcome) => {
            outcome.unwrap();
            Some(buffer.filled().len())
        }
        Poll::Pending => None,
    }
}
