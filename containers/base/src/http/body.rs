//! A request's body as its handler sees it, filled by the connection when the handler asks.
use std::{
    io, mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

/// Why a body ended before its end.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the request's body is malformed: {0}")]
    Malformed(&'static str),
    #[error("the request's body is longer than this function takes")]
    TooLong,
    #[error("the request's body stopped arriving")]
    Stalled,
    #[error("the connection ended within the request's body")]
    Incomplete,
    #[error("the connection failed within the request's body: {0}")]
    Connection(io::ErrorKind),
    #[error("the answer was complete before the request's body was read")]
    Answered,
}

/// A stream of bytes that can be sent to other threads; the connection reads no more than is asked for.
#[derive(Debug, Default)]
pub struct Body(Kind);

#[derive(Debug, Default)]
enum Kind {
    #[default]
    Empty,
    Full(Bytes),
    Incoming(Arc<Channel>),
}

impl Body {
    pub const fn empty() -> Self {
        Self(Kind::Empty)
    }

    /// A body that comes piece by piece, and the connection's end of it.
    pub(super) fn incoming(length: Option<u64>) -> (Self, Source) {
        let channel = Arc::new(Channel(Mutex::new(Slot { left: length, ..Slot::default() })));
        (Self(Kind::Incoming(Arc::clone(&channel))), Source(channel))
    }
}

impl<T: Into<Bytes>> From<T> for Body {
    fn from(bytes: T) -> Self {
        let bytes = bytes.into();
        Self(if bytes.is_empty() { Kind::Empty } else { Kind::Full(bytes) })
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.0 {
            Kind::Empty => Poll::Ready(None),
            Kind::Full(bytes) => {
                let bytes = mem::take(bytes);
                self.0 = Kind::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Kind::Incoming(channel) => channel.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Empty => true,
            Kind::Full(_) => false,
            Kind::Incoming(channel) => {
                let slot = channel.lock();
                slot.frame.is_none() && matches!(slot.end, Some(Ok(())))
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Incoming(channel) => channel.lock().left.map_or_else(SizeHint::new, SizeHint::with_exact),
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Kind::Incoming(channel) = &self.0 {
            let waker = {
                let mut slot = channel.lock();
                slot.dropped = true;
                slot.frame = None;
                slot.connection.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

/// The connection's end of a body.
#[derive(Debug)]
pub(super) struct Source(Arc<Channel>);

/// What the handler wants of its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Demand {
    /// Nothing for now.
    None,
    /// The next piece.
    Frame,
    /// Nothing any more.
    Dropped,
}

impl Source {
    pub fn demand(&self) -> Demand {
        self.0.lock().demand()
    }

    /// Hands a piece over; `last` when nothing follows it. The task of `driver` looks by itself.
    pub fn push(&self, frame: Frame<Bytes>, last: bool, driver: &Waker) {
        self.0.change(driver, |slot| {
            slot.frame = (!slot.dropped).then_some(frame);
            if last {
                slot.end = Some(Ok(()));
            }
        });
    }

    /// Ends the body, unless it has ended.
    pub fn end(&self, result: Result<(), BodyError>) {
        self.0.change(Waker::noop(), |slot| {
            slot.end.get_or_insert(result);
        });
    }

    /// Asks to be woken when the demand changes from `known`; false when it has.
    pub fn park(&self, cx: &Context<'_>, known: Demand) -> bool {
        let mut slot = self.0.lock();
        if slot.demand() != known {
            return false;
        }
        match &mut slot.connection {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        true
    }

    /// The connection is awake and will look at the demand by itself.
    pub fn unpark(&self) {
        self.0.lock().connection = None;
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.end(Err(BodyError::Answered));
    }
}

#[derive(Debug)]
struct Channel(Mutex<Slot>);

#[derive(Debug, Default)]
struct Slot {
    frame: Option<Frame<Bytes>>,
    end: Option<Result<(), BodyError>>,
    /// The length of what is still to be taken out by the handler, when it is known.
    left: Option<u64>,
    wanted: bool,
    dropped: bool,
    reader: Option<Waker>,
    connection: Option<Waker>,
}

impl Channel {
    /// A panic elsewhere can't leave a slot half changed.
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll_frame(&self, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut slot = self.lock();
        if let Some(frame) = slot.frame.take() {
            if let (Some(left), Some(data)) = (&mut slot.left, frame.data_ref()) {
                *left = left.saturating_sub(data.len() as u64);
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        if let Some(end) = &mut slot.end {
            // An error is told once, then the body is over.
            return Poll::Ready(mem::replace(end, Ok(())).err().map(Err));
        }
        slot.wanted = true;
        match &mut slot.reader {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        let connection = slot.connection.take();
        drop(slot);
        if let Some(connection) = connection {
            connection.wake();
        }
        Poll::Pending
    }

    fn change(&self, driver: &Waker, change: impl FnOnce(&mut Slot)) {
        let reader = {
            let mut slot = self.lock();
            change(&mut slot);
            slot.wanted = false;
            slot.reader.take()
        };
        if let Some(reader) = reader
            && !reader.will_wake(driver)
        {
            reader.wake();
        }
    }
}

impl Slot {
    fn demand(&self) -> Demand {
        match self {
            Self { dropped: true, .. } => Demand::Dropped,
            Self { wanted: true, frame: None, end: None, .. } => Demand::Frame,
            _ => Demand::None,
        }
    }
}
