//! A TLS session on its socket, as a byte stream.

use std::fmt;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use crate::socket::Socket;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::fault::Fault;
use super::record::{COPY_BYTES_MAX, FRAGMENT_BYTES_MAX, Opened, RECORD_BYTES_MAX, RecordLayer};
use super::secrets::Version;
use super::state::SessionState;

/// Two records: while one is opened, the kernel needn't be asked for the next one. It also bounds what a session
/// takes along when it moves.
pub(super) const READ_BYTES_MAX: usize = 2 * RECORD_BYTES_MAX;

/// Most requests fit, and an idle connection with half a record holds no more.
const READ_BYTES_MIN: usize = 4096;

/// What one write accepts: enough for a large body to need few system calls, little enough for the cache.
const WRITE_BYTES_MAX: usize = 4 * FRAGMENT_BYTES_MAX;

/// Up to here, what waits to be sent (tickets, an answer to a KeyUpdate) is joined by the next write.
const JOINED_BYTES_MAX: usize = FRAGMENT_BYTES_MAX;

pub struct TlsStream {
    socket: Socket,
    /// On the heap, because futures that hold a stream are moved.
    inner: Box<Inner>,
}

struct Inner {
    record: RecordLayer,
    inbound: Inbound,
    outbound: Outbound,
    /// Nothing is opened or sealed any more; the alert is in `outbound`.
    fault: Option<Fault>,
    /// Our close_notify is in `outbound`, or has been.
    closing: bool,
}

/// Why a session stays; the stream goes on as if nothing had been asked.
#[derive(Error)]
#[error("this session can't move: {reason}")]
pub struct NotMovable {
    pub stream: TlsStream,
    pub reason: &'static str,
}

impl fmt::Debug for NotMovable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

impl TlsStream {
    pub(super) fn new(socket: Socket, record: RecordLayer, received: Vec<u8>, to_send: Vec<u8>) -> Self {
        let inner = Inner {
            record,
            inbound: Inbound::new(Vec::new(), received),
            outbound: Outbound { buffer: to_send, sent: 0 },
            fault: None,
            closing: false,
        };
        Self { socket, inner: Box::new(inner) }
    }

    /// Goes on with a session that was taken apart, here or in another process.
    pub fn from_parts(socket: Socket, state: SessionState) -> Self {
        let SessionState { session, plaintext, ciphertext } = state;
        let inner = Inner {
            record: RecordLayer::new(session),
            inbound: Inbound::new(plaintext, ciphertext),
            outbound: Outbound::default(),
            fault: None,
            closing: false,
        };
        Self { socket, inner: Box::new(inner) }
    }

    /// Why it can't be taken apart now, if it can't.
    pub fn why_it_stays(&self) -> Option<&'static str> {
        match &*self.inner {
            Inner { fault: Some(_), .. } => Some("it failed"),
            Inner { closing: true, .. } => Some("it is closed"),
            Inner { outbound, .. } if !outbound.is_empty() => Some("it has output to flush"),
            Inner { record, .. } if record.owes() => Some("it owes an answer"),
            _ => None,
        }
    }

    /// Takes the session apart. All output must have been flushed: it can't be sealed again.
    pub fn into_parts(self) -> Result<(Socket, SessionState), NotMovable> {
        if let Some(reason) = self.why_it_stays() {
            return Err(NotMovable { stream: self, reason });
        }
        let Self { socket, inner } = self;
        let Inner { record, inbound, .. } = *inner;
        let (plaintext, ciphertext) = inbound.into_residue();
        Ok((socket, SessionState { session: record.into_session(), plaintext, ciphertext }))
    }

    pub fn get_ref(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn get_mut(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// For the lingering close, after `shutdown` or a fault.
    pub fn into_socket(self) -> Socket {
        self.socket
    }

    pub fn version(&self) -> Version {
        self.inner.record.session().version
    }

    fn fail(&mut self, fault: Fault) {
        let Inner { record, outbound, fault: failed, .. } = &mut *self.inner;
        record.fail(fault, &mut outbound.buffer);
        *failed = Some(fault);
    }

    /// Reports a fault once its alert is on the way.
    fn poll_fault(&mut self, fault: Fault, context: &mut Context<'_>) -> Poll<io::Error> {
        // That the alert couldn't be sent is less to know than why.
        let _ = ready!(self.poll_send(context));
        Poll::Ready(io::Error::new(io::ErrorKind::InvalidData, fault))
    }

    /// Sends what is sealed.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outbound = &mut self.inner.outbound;
        while !outbound.is_empty() {
            let rest = &outbound.buffer[outbound.sent..];
            match ready!(Pin::new(&mut self.socket).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => outbound.sent += sent,
            }
        }
        outbound.buffer.clear();
        outbound.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Sends what is sealed and what is owed. An answer is sealed only when all before it is sent, so that requests
    /// for answers that aren't fetched don't fill memory.
    fn poll_settle(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(context))?;
        let Inner { record, outbound, fault: None, closing: false, .. } = &mut *self.inner else {
            return Poll::Ready(Ok(()));
        };
        if !record.owes() {
            return Poll::Ready(Ok(()));
        }
        record.settle(&mut outbound.buffer);
        self.poll_send(context)
    }

    fn poll_receive(&mut self, record_bytes: usize, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let inbound = &mut self.inner.inbound;
        inbound.make_room(record_bytes);
        let read = pin!(self.socket.read_buf(&mut inbound.buffer));
        let received = ready!(read.poll(context))?;
        inbound.ciphertext.end += received;
        Poll::Ready(Ok(received))
    }

    fn poll_seal(&mut self, input: &[IoSlice<'_>], context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Some(fault) = self.inner.fault {
            return self.poll_fault(fault, context).map(Err);
        }
        if self.inner.closing {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.inner.outbound.buffer.len() > JOINED_BYTES_MAX {
            ready!(self.poll_send(context))?;
        }
        let Inner { record, outbound, .. } = &mut *self.inner;
        match record.seal(input, WRITE_BYTES_MAX, &mut outbound.buffer) {
            Ok(sealed) => match self.poll_send(context) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                // What the socket doesn't take now is sealed and will be sent first.
                Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(sealed)),
            },
            Err(fault) => {
                self.fail(fault);
                self.poll_fault(fault, context).map(Err)
            }
        }
    }
}

impl AsyncRead for TlsStream {
    /// The end is `close_notify`; a connection that ends without it is an error, since anybody could have cut it.
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        output: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let Inner { record, inbound, fault, .. } = &mut *this.inner;
            if output.remaining() == 0 || inbound.read(output) {
                return Poll::Ready(Ok(()));
            }
            if let Some(fault) = *fault {
                return this.poll_fault(fault, context).map(Err);
            }
            if record.session().peer_closed {
                return Poll::Ready(Ok(()));
            }
            let record_bytes = match record.open(inbound.ciphertext_mut()) {
                Ok(Opened::Data { record_bytes, content }) => {
                    inbound.opened(record_bytes, content);
                    continue;
                }
                Ok(Opened::Control { record_bytes } | Opened::CloseNotify { record_bytes }) => {
                    inbound.opened(record_bytes, 0..0);
                    continue;
                }
                Ok(Opened::Incomplete { record_bytes }) => record_bytes,
                Err(fault) => {
                    this.fail(fault);
                    continue;
                }
            };
            match this.poll_receive(record_bytes, context) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    // The peer may be waiting for this before it sends more. An error shows in the next write.
                    let _ = this.poll_settle(context);
                    this.inner.inbound.release();
                    this.inner.outbound.release();
                    return Poll::Pending;
                }
            }
        }
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, input: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_seal(&[IoSlice::new(input)], context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        input: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_seal(input, context)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_settle(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Inner { record, outbound, fault, closing, .. } = &mut *this.inner;
        if !*closing && fault.is_none() {
            record.close_notify(&mut outbound.buffer);
            *closing = true;
        }
        ready!(this.poll_send(context))?;
        Pin::new(&mut this.socket).poll_shutdown(context)
    }
}

/// Received bytes: decrypted ones that wait for the reader, then ciphertext up to the buffer's end. The next record
/// is opened in place when no decrypted byte is left.
#[derive(Default)]
struct Inbound {
    buffer: Vec<u8>,
    plaintext: Range<usize>,
    ciphertext: Range<usize>,
    /// Large records or bursts have come: the next buffer is a large one at once.
    busy: bool,
}

impl Inbound {
    fn new(plaintext: Vec<u8>, ciphertext: Vec<u8>) -> Self {
        let plaintext_bytes = plaintext.len();
        let buffer = if plaintext.is_empty() {
            ciphertext
        } else {
            let mut buffer = plaintext;
            buffer.extend_from_slice(&ciphertext);
            buffer
        };
        Self { plaintext: 0..plaintext_bytes, ciphertext: plaintext_bytes..buffer.len(), buffer, busy: false }
    }

    fn into_residue(mut self) -> (Vec<u8>, Vec<u8>) {
        let ciphertext = self.buffer.split_off(self.ciphertext.start);
        self.buffer.truncate(self.plaintext.end);
        self.buffer.drain(..self.plaintext.start);
        (self.buffer, ciphertext)
    }

    fn ciphertext_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.ciphertext.clone()]
    }

    /// Copies decrypted bytes out; false if there is none.
    fn read(&mut self, output: &mut ReadBuf<'_>) -> bool {
        if self.plaintext.is_empty() {
            return false;
        }
        let bytes = self.plaintext.len().min(output.remaining());
        let read = &self.buffer[self.plaintext.start..][..bytes];
        read.chunks(COPY_BYTES_MAX).for_each(|piece| output.put_slice(piece));
        self.plaintext.start += bytes;
        true
    }

    /// The record at the front of the ciphertext has been opened; its content lies within it.
    fn opened(&mut self, record_bytes: usize, content: Range<usize>) {
        let record = self.ciphertext.start;
        self.plaintext = record + content.start..record + content.end;
        self.ciphertext.start += record_bytes;
    }

    /// Room for the rest of the record of this length at the front of the ciphertext, and more if it pays.
    fn make_room(&mut self, record_bytes: usize) {
        let full = !self.buffer.is_empty() && self.buffer.len() == self.buffer.capacity();
        self.busy |= full || record_bytes > READ_BYTES_MIN;
        let wanted = if self.busy { READ_BYTES_MAX } else { READ_BYTES_MIN };
        if self.ciphertext.start > 0 {
            self.buffer.drain(..self.ciphertext.start);
            self.ciphertext = 0..self.buffer.len();
            self.plaintext = 0..0;
        }
        if self.buffer.capacity() < wanted {
            self.buffer.reserve_exact(wanted - self.buffer.len());
        }
    }

    /// An idle connection keeps no buffer.
    fn release(&mut self) {
        if self.plaintext.is_empty() && self.ciphertext.is_empty() {
            *self = Self { busy: self.busy, ..Self::default() };
        }
    }
}

/// Sealed records, of which the first `sent` bytes are on their way.
#[derive(Default)]
struct Outbound {
    buffer: Vec<u8>,
    sent: usize,
}

impl Outbound {
    fn is_empty(&self) -> bool {
        self.sent == self.buffer.len()
    }

    fn release(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

/// What tests need to see and to provoke.
#[cfg(test)]
impl TlsStream {
    pub(super) fn update_keys(&mut self) {
        let Inner { record, outbound, .. } = &mut *self.inner;
        record.update_keys(&mut outbound.buffer);
    }

    pub(super) fn held_bytes(&self) -> usize {
        let Inner { inbound, outbound, .. } = &*self.inner;
        inbound.buffer.capacity() + outbound.buffer.capacity()
    }

    pub(super) fn unsent_bytes(&self) -> usize {
        self.inner.outbound.buffer.len() - self.inner.outbound.sent
    }

    pub(super) const KEPT_BYTES: usize = size_of::<Inner>() + 2 * size_of::<ring::aead::LessSafeKey>();
}
