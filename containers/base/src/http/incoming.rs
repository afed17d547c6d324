//! The body of the request in progress: what of it has arrived, and how much more there may be.
use std::task::Waker;

use bytes::{Buf, Bytes, BytesMut};
use http_body::Frame;

use super::{
    body::{Body, BodyError, Demand, Source},
    chunked::{Chunked, Decoded},
    head::Framing,
    limits::{COPY_BYTES, DRAIN_BYTES, UPLOAD_BYTES},
    reject::Reject,
};

/// What a read asks for at first; uploads that fill it get more.
const READ_BYTES_MIN: usize = 16 * 1024;

/// The same for a body that says that it is long.
const READ_BYTES_LARGE: usize = 64 * 1024;

/// Beyond this a larger read saves no more system calls than it costs cache.
const READ_BYTES_MAX: usize = 256 * 1024;

pub struct Incoming {
    coding: Coding,
    pub source: Source,
    limit_bytes: Option<u64>,
    received_bytes: u64,
    discarded_bytes: u64,
    read_bytes: usize,
    /// The client waits for `100 Continue` before it sends anything.
    pub expects_continue: bool,
}

enum Coding {
    Length(u64),
    Chunked(Chunked),
}

/// What became of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// A piece went to where it was wanted.
    Piece,
    /// The body is complete.
    End,
    /// More must be read.
    NeedsInput,
    /// More was thrown away than a connection is worth.
    TooMuch,
}

impl Incoming {
    /// Opens the body behind a head; one that is there already needs no reading.
    pub fn open(
        framing: Framing,
        input: &mut BytesMut,
        limit_bytes: Option<u64>,
        expects_continue: bool,
    ) -> Result<(Body, Option<Self>), Reject> {
        let (coding, length) = match framing {
            Framing::Length(length) if limit_bytes.is_some_and(|limit| length > limit) => {
                return Err(Reject::BODY_TOO_LONG);
            }
            Framing::Length(length) if length <= input.len() as u64 => {
                return Ok((take_whole(input, length as usize), None));
            }
            Framing::Length(length) => (Coding::Length(length), Some(length)),
            Framing::Chunked => (Coding::Chunked(Chunked::default()), None),
        };
        let (body, source) = Body::incoming(length);
        let mut incoming = Self {
            coding,
            source,
            limit_bytes,
            received_bytes: 0,
            discarded_bytes: 0,
            read_bytes: if length > Some(UPLOAD_BYTES) { READ_BYTES_LARGE } else { READ_BYTES_MIN },
            // RFC 9110 §10.1.1: a client that sends already doesn't wait.
            expects_continue: expects_continue && input.is_empty(),
        };
        // A first chunk that is malformed never reaches the handler.
        if !input.is_empty() && incoming.take(input, Waker::noop())? == Taken::End {
            return Ok((Body::empty(), None));
        }
        Ok((body, Some(incoming)))
    }

    /// Moves the next piece of the input to the handler, or to nowhere once the handler dropped its end.
    ///
    /// The task of `driver` polls the handler by itself afterwards.
    pub fn take(&mut self, input: &mut BytesMut, driver: &Waker) -> Result<Taken, Reject> {
        let decoded = match &mut self.coding {
            Coding::Length(0) => Decoded::End,
            Coding::Length(_) if input.is_empty() => Decoded::More,
            Coding::Length(left) => {
                let bytes = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                *left -= bytes as u64;
                Decoded::Data(input.split_to(bytes).freeze())
            }
            Coding::Chunked(chunked) => chunked.decode(input)?,
        };
        match decoded {
            Decoded::Data(data) => self.hand_over(data, driver),
            Decoded::Trailers(trailers) => {
                self.source.push(Frame::trailers(trailers), true, driver);
                Ok(Taken::Piece)
            }
            Decoded::End => {
                self.source.end(Ok(()));
                Ok(Taken::End)
            }
            Decoded::More => Ok(Taken::NeedsInput),
        }
    }

    fn hand_over(&mut self, data: Bytes, driver: &Waker) -> Result<Taken, Reject> {
        let bytes = data.len() as u64;
        self.received_bytes += bytes;
        if self.limit_bytes.is_some_and(|limit| self.received_bytes > limit) {
            self.source.end(Err(BodyError::TooLong));
            return Err(Reject::BODY_TOO_LONG);
        }
        if self.source.demand() == Demand::Dropped {
            self.discarded_bytes += bytes;
            let more = self.discarded_bytes > DRAIN_BYTES;
            return Ok(if more { Taken::TooMuch } else { Taken::Piece });
        }
        self.source.push(Frame::data(data), self.is_end(), driver);
        Ok(Taken::Piece)
    }

    pub fn is_end(&self) -> bool {
        match &self.coding {
            Coding::Length(left) => *left == 0,
            Coding::Chunked(chunked) => chunked.is_end(),
        }
    }

    /// Reading the rest, for nobody, would cost more than a new connection.
    pub fn is_hopeless(&self) -> bool {
        self.expects_continue || self.left_bytes() > DRAIN_BYTES
    }

    /// Enough is still to come for the socket to be worth a system call.
    pub fn is_large(&self) -> bool {
        self.left_bytes() > UPLOAD_BYTES
            || (matches!(self.coding, Coding::Chunked(_)) && self.received_bytes > UPLOAD_BYTES)
    }

    /// What has been announced and not received.
    fn left_bytes(&self) -> u64 {
        match &self.coding {
            Coding::Length(left) => *left,
            Coding::Chunked(chunked) => chunked.announced_bytes(),
        }
    }

    /// How much the next read should have room for.
    pub fn room_bytes(&self) -> usize {
        match &self.coding {
            Coding::Length(left) => usize::try_from(*left).unwrap_or(usize::MAX).clamp(1, self.read_bytes),
            Coding::Chunked(_) => self.read_bytes,
        }
    }

    /// A read that filled its room wasn't given enough.
    pub fn note_read(&mut self, bytes: usize) {
        if bytes >= self.read_bytes {
            self.read_bytes = (2 * self.read_bytes).min(READ_BYTES_MAX);
        }
    }
}

fn take_whole(input: &mut BytesMut, bytes: usize) -> Body {
    // Sharing a large buffer for a small body would hold it for as long as the handler holds the body.
    if bytes <= COPY_BYTES {
        let body = Body::from(Bytes::copy_from_slice(&input[..bytes]));
        input.advance(bytes);
        return body;
    }
    Body::from(input.split_to(bytes).freeze())
}
