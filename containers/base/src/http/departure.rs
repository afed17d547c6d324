//! How a connection changes hands between two requests: for another function, or for another instance of its own.
use std::{
    io,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use common::FunctionName;
use http::Method;

use super::{
    connection::{Connection, End},
    reject::Reject,
    response::{Coding, Persistence},
};
use crate::{
    moves::{Luggage, Place, Prospect, Refused, State},
    stream::Stream,
};

/// What was read beyond the last answered request may go along if it is no more than this, so that all that travels
/// with a connection fits into one message.
const RESIDUE_BYTES: usize = 112 * 1024;

/// A request that another function is to answer.
pub(super) struct Leave {
    pub function: FunctionName,
    pub length: usize,
    /// For an answer in the other function's place.
    pub method: Method,
    pub persistence: Persistence,
}

impl Connection {
    /// Sends what was answered, and reserves a place for what was asked; without one the answer is given here.
    pub(super) async fn leave(&mut self, leave: Leave) -> Result<Option<Place>, End> {
        self.flush().await.map_err(End::Lost)?;
        let reserved = if self.input.len() > RESIDUE_BYTES {
            Err(Refused::Misdirected)
        } else {
            self.shared.mover.reserve(leave.function, self.protocol).await
        };
        let (reject, persistence) = match reserved {
            Ok(place) => return Ok(Some(place)),
            Err(Refused::Misdirected) => (Reject::MISDIRECTED, Persistence::Close),
            Err(Refused::NoFunction) => (Reject::NO_FUNCTION, leave.persistence),
            Err(Refused::Unavailable) => (Reject::NO_INSTANCE, leave.persistence),
        };
        self.input.advance(leave.length);
        self.requests += 1;
        self.account(Some(&leave.method), reject);
        let coding = Coding::for_reject(&leave.method, reject);
        self.answer(reject, persistence, coding);
        if persistence == Persistence::Close { Err(End::Linger) } else { Ok(None) }
    }

    /// Takes the connection apart and sends it to its place.
    pub(super) async fn depart(self, place: Place) {
        let Self { origin, requests, protocol, .. } = self;
        let shared = Rc::clone(&self.shared);
        let home = self.home.as_deref().copied().unwrap_or(shared.identity.name);
        let (stream, input) = self.into_parts();
        let (socket, state) = match stream {
            Stream::Plain(socket) => (socket, State::Plain(input.into())),
            Stream::Tls(stream) => match stream.into_parts() {
                Ok((socket, mut state)) => match state.unread(&input) {
                    Ok(()) => (socket, State::Tls(Box::new(state))),
                    Err(error) => {
                        return tracing::warn!(id = origin.id, %error, "a session could not move");
                    }
                },
                Err(error) => return tracing::warn!(id = origin.id, %error, "a session could not move"),
            },
        };
        shared.mover.send(place, origin, protocol, Luggage { home, requests, state }, socket).await;
    }

    /// Takes the connection apart between two requests, with its answers sent: what is left of it is its stream, and
    /// the input that belongs to the next request.
    pub fn into_parts(self) -> (Stream, Bytes) {
        debug_assert!(self.output.is_empty(), "an answer would be lost");
        (self.stream, self.input.freeze())
    }

    /// Whether another instance goes on with what this one, which stops, has answered.
    pub(super) fn is_succeeded(&self) -> bool {
        self.requests > 0 && self.shared.stop.is_requested() && self.prospect() == Prospect::Successor
    }

    /// Whether no request can follow, because the function stops and no other instance goes on with the connection.
    pub(super) fn is_stopping(&self) -> bool {
        self.shared.stop.is_requested() && self.prospect() == Prospect::Nobody
    }

    pub(super) fn prospect(&self) -> Prospect {
        self.shared.succession.prospect(self.protocol)
    }

    /// Sends what was answered, and takes a place at another instance if one is to be had at once: a client that always
    /// has a next request must not keep the connection here.
    pub(super) fn poll_departure(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Place>>> {
        if self.input.len() > RESIDUE_BYTES {
            return Poll::Ready(Ok(None));
        }
        if self.poll_output(cx)?.is_pending() {
            self.successor = None;
            return Poll::Pending;
        }
        Poll::Ready(Ok(self.poll_successor(cx)))
    }

    /// A place at another instance, once it is this connection's turn.
    pub(super) fn poll_successor(&mut self, cx: &mut Context<'_>) -> Option<Place> {
        if let Stream::Tls(stream) = &self.stream
            && stream.why_it_stays().is_some()
        {
            // Whoever can't go keeps nobody waiting who can.
            self.successor = None;
            return None;
        }
        let successor = self.successor.get_or_insert_with(|| {
            let (succession, protocol) = (self.shared.succession.clone(), self.protocol);
            Box::pin(async move { succession.place(protocol).await })
        });
        let Poll::Ready(place) = successor.as_mut().poll(cx) else { return None };
        self.successor = None;
        place
    }
}
