//! What is to be sent: one flat buffer, and one piece of a body that is sent from where it lies.
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;

use super::limits::{COPY_BYTES, OUTPUT_BYTES};

/// Sent in the order flat, piece, after.
#[derive(Default)]
pub struct Output {
    flat: BytesMut,
    piece: Bytes,
    /// What closes a chunk.
    after: &'static [u8],
}

impl Output {
    /// Nothing more should be added before some of it is sent.
    pub fn is_full(&self) -> bool {
        !self.piece.is_empty() || self.flat.len() >= OUTPUT_BYTES
    }

    pub fn is_empty(&self) -> bool {
        self.flat.is_empty() && self.piece.is_empty() && self.after.is_empty()
    }

    pub fn len(&self) -> usize {
        self.flat.len() + self.piece.len() + self.after.len()
    }

    /// Where heads and framing are written to. A piece that waits to be sent must be sent first.
    pub fn flat(&mut self) -> &mut BytesMut {
        debug_assert!(self.piece.is_empty(), "bytes would overtake a piece");
        self.flat.extend_from_slice(self.after);
        self.after = &[];
        &mut self.flat
    }

    /// Adds a body's bytes and the framing behind them.
    pub fn push(&mut self, data: Bytes, after: &'static [u8]) {
        if data.len() <= COPY_BYTES {
            let flat = self.flat();
            flat.reserve(data.len() + after.len());
            flat.extend_from_slice(&data);
            flat.extend_from_slice(after);
        } else {
            self.flat();
            self.piece = data;
            self.after = after;
        }
    }

    /// Sends everything.
    pub fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let sent = ready!(self.poll_write(stream, cx))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(sent);
        }
        Pin::new(stream).poll_flush(cx)
    }

    /// Gives its memory back while the connection has nothing to say.
    pub fn release(&mut self) {
        if self.flat.is_empty() {
            self.flat = BytesMut::new();
        }
    }

    fn poll_write<W: AsyncWrite + Unpin>(
        &self,
        stream: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match (self.flat.as_ref(), self.piece.as_ref(), self.after) {
            (flat, [], []) => Pin::new(stream).poll_write(cx, flat),
            ([], piece, []) => Pin::new(stream).poll_write(cx, piece),
            (flat, piece, after) => {
                let slices = [IoSlice::new(flat), IoSlice::new(piece), IoSlice::new(after)];
                let first = usize::from(flat.is_empty());
                Pin::new(stream).poll_write_vectored(cx, &slices[first..])
            }
        }
    }

    fn advance(&mut self, mut sent: usize) {
        let from_flat = sent.min(self.flat.len());
        self.flat.advance(from_flat);
        sent -= from_flat;
        let from_piece = sent.min(self.piece.len());
        self.piece.advance(from_piece);
        self.after = &self.after[sent - from_piece..];
        if self.piece.is_empty() {
            // The body's owner may be waiting for this memory.
            self.piece = Bytes::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    proptest! {
        #[test]
        fn whatever_is_pushed_comes_out_in_order(
            sizes in proptest::collection::vec(0usize..3 * COPY_BYTES, 1..12),
            room in 1usize..9000,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (expected, received) = runtime.block_on(async {
                let (mut near, mut far) = tokio::io::duplex(room);
                let mut expected = Vec::new();
                let reader = tokio::spawn(async move {
                    let mut received = Vec::new();
                    far.read_to_end(&mut received).await.unwrap();
                    received
                });
                let mut output = Output::default();
                for (index, size) in sizes.into_iter().enumerate() {
                    if output.is_full() {
                        poll_fn(|cx| output.poll_flush(&mut near, cx)).await.unwrap();
                        assert!(output.is_empty());
                    }
                    let head = format!("{size:x}\r\n");
                    let data = vec![index as u8; size];
                    output.flat().extend_from_slice(head.as_bytes());
                    expected.extend_from_slice(head.as_bytes());
                    expected.extend_from_slice(&data);
                    expected.extend_from_slice(b"\r\n");
                    output.push(data.into(), b"\r\n");
                }
                poll_fn(|cx| output.poll_flush(&mut near, cx)).await.unwrap();
                drop(near);
                (expected, reader.await.unwrap())
            });
            prop_assert!(expected == received);
        }
    }
}
