//! One request and its answer: the handler, both bodies and the socket, driven together.
use std::{
    future::poll_fn,
    io, mem,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version, response::Parts};
use http_body::Frame;

use super::{
    access::{self, Entry},
    body::{Body, BodyError, Demand},
    connection::{Connection, End},
    head::{Head, OriginalUri},
    incoming::{Incoming, Taken},
    limits::NUDGES,
    panics,
    reject::Reject,
    response::{self, Coding, Persistence},
    service::{BoxError, Service},
    tally,
    upgrade::Handover,
};
use crate::timer::Wait;

const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// A request in progress.
pub struct Exchange {
    /// Until the handler takes it.
    request: Option<Request<Body>>,
    method: Method,
    version: Version,
    persistence: Persistence,
    /// The client sends nothing after this request.
    client_closes: bool,
    /// The client can use trailers.
    takes_trailers: bool,
    /// What the handler may still ask for.
    incoming: Option<Incoming>,
    /// The rest of the body isn't worth reading.
    abandoned: bool,
    handover: Option<Handover>,
    answer: Answer,
    /// The client sent more, or ended its side, while it waited; nothing else can be learnt by looking again.
    looked_up: bool,
    begun: Instant,
    /// The answer's, once there is one.
    status: Option<StatusCode>,
    /// Of the answer's body, so far.
    body_bytes: u64,
    /// The path that was asked for, kept only for the access log.
    path: Option<Box<str>>,
}

/// How far the answer has come.
enum Answer {
    Awaited,
    /// Its head is written with the first piece of its body, or when that doesn't come at once.
    Ready(Parts, Coding),
    Begun(Coding),
}

/// What follows a request.
pub(super) enum Next {
    Request,
    End(End),
    Upgrade(Handover),
}

/// Why a request came to no good end.
enum Failure {
    Reject(Reject),
    /// The handler's body failed, and its answer is cut short.
    Cut,
    Lost(io::Error),
}

/// How far a handler got without waiting for the client.
enum Step<T> {
    Done(T),
    /// It goes on when output was sent.
    Full,
    Pending,
}

/// What the request's body did.
enum Fed {
    /// The handler has something to look at.
    Piece,
    /// The client has to send before this demand is met.
    Starved(Demand),
    /// There is nothing to do about this demand.
    Idle(Demand),
}

impl Exchange {
    pub(super) fn new(head: &Head<'_, '_>, incoming: Option<Incoming>, last: bool) -> Self {
        let persistence =
            if head.keep_alive && !last { Persistence::kept(head.version) } else { Persistence::Close };
        Self {
            request: None,
            method: head.method.clone(),
            version: head.version,
            persistence,
            client_closes: !head.keep_alive,
            takes_trailers: head.takes_trailers,
            incoming,
            abandoned: false,
            handover: None,
            answer: Answer::Awaited,
            looked_up: false,
            begun: Instant::now(),
            status: None,
            body_bytes: 0,
            path: None,
        }
    }

    /// The handler may change the protocol.
    pub(super) fn offer(&mut self, handover: Handover) {
        self.handover = Some(handover);
    }

    /// What the access log will say that was asked for.
    pub(super) fn remember_path(&mut self, request: &Request<Body>) {
        self.path = request.extensions().get().map(|OriginalUri(target)| target.path().into());
    }

    /// Counts the request and its answer, when both are over.
    pub(super) fn account(&self, connection: &Connection) {
        let duration = self.begun.elapsed();
        let status = self.status.map(|status| status.as_u16());
        let shared = &connection.shared;
        shared.tally.count(tally::counted(&self.method), status, duration);
        if let Some(log) = &shared.access_log {
            log.write(Entry {
                method: Some(self.method.as_str()),
                path: self.path.as_deref(),
                status,
                bytes: self.body_bytes,
                duration_us: u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
                peer: access::peer(connection.stream.socket()),
            });
        }
    }

    /// The request for the handler.
    pub(super) fn ask(&mut self, request: Request<Body>) {
        self.request = Some(request);
    }

    pub(super) async fn run<S: Service>(&mut self, connection: &mut Connection, service: &mut S) -> Next {
        let failure = match self.serve(connection, service).await {
            Ok(next) => return next,
            Err(failure) => failure,
        };
        match (failure, &self.answer) {
            (Failure::Lost(error), _) => Next::End(End::Lost(error)),
            (Failure::Reject(reject), Answer::Awaited | Answer::Ready(..)) => {
                self.reject(connection, reject);
                Next::End(End::Linger)
            }
            (_, Answer::Begun(coding)) => {
                if *coding == Coding::UntilClose {
                    // An orderly end would make what was sent look complete.
                    connection.stream.socket().reset_on_close();
                }
                Next::End(End::Lost(io::Error::other("the answer was cut short")))
            }
            (Failure::Cut, _) => {
                self.reject(connection, Reject::FAILED);
                Next::End(End::Linger)
            }
        }
    }

    fn reject(&mut self, connection: &mut Connection, reject: Reject) {
        let coding = Coding::for_reject(&self.method, reject);
        (self.status, self.body_bytes) = (Some(reject.status), reject.text_bytes());
        connection.answer(reject, Persistence::Close, coding);
    }

    async fn serve<S: Service>(
        &mut self,
        connection: &mut Connection,
        service: &mut S,
    ) -> Result<Next, Failure> {
        let body = {
            let (head, body) = self.call(connection, service).await?.into_parts();
            if let Some(handover) = self.accept(connection, head, &body)? {
                return Ok(Next::Upgrade(handover));
            }
            body
        };
        {
            let mut body = pin!(body);
            poll_fn(|cx| {
                self.poll_drive(connection, cx, |exchange, connection, cx| {
                    exchange.step_body(connection, body.as_mut(), cx)
                })
            })
            .await??;
        }
        self.finish(connection).await
    }

    /// The handler's answer.
    async fn call<S: Service>(
        &mut self,
        connection: &mut Connection,
        service: &mut S,
    ) -> Result<Response<S::Body>, Failure> {
        poll_fn(|cx| {
            self.poll_drive(connection, cx, |_, _, cx| Step::from(guard(|| service.poll_ready(cx))))
        })
        .await??
        .map_err(failed)?;
        let request = self.request.take().unwrap_or_default();
        let mut answer = pin!(guard(|| service.call(request))?);
        poll_fn(|cx| {
            self.poll_drive(connection, cx, |_, _, cx| Step::from(guard(|| answer.as_mut().poll(cx))))
        })
        .await??
        .map_err(failed)
    }

    /// Decides how the answer is sent; its head is written when something of its body is known.
    fn accept<B>(
        &mut self,
        connection: &mut Connection,
        head: Parts,
        body: &B,
    ) -> Result<Option<Handover>, Failure>
    where
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>>,
    {
        if head.status == StatusCode::SWITCHING_PROTOCOLS
            && let Some(handover) = self.handover.take()
        {
            self.status = Some(head.status);
            let flat = connection.output.flat();
            response::write_head(flat, &head, Coding::None { length: None }, Persistence::Upgrade);
            return Ok(Some(handover));
        }
        if head.status.is_informational() {
            return Err(failed("it answered with an interim status"));
        }
        let exact_bytes = if body.is_end_stream() { Some(0) } else { body.size_hint().exact() };
        let coding = Coding::of(&self.method, self.version, &head, exact_bytes);
        if response::asks_to_close(&head.headers) || coding == Coding::UntilClose {
            self.persistence = Persistence::Close;
        }
        self.status = Some(head.status);
        self.answer = Answer::Ready(head, coding);
        Ok(None)
    }

    fn step_body<B>(
        &mut self,
        connection: &mut Connection,
        mut body: Pin<&mut B>,
        cx: &mut Context<'_>,
    ) -> Step<Result<(), Failure>>
    where
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>>,
    {
        if let Answer::Ready(_, Coding::None { .. } | Coding::Length(0)) = self.answer {
            self.begin(connection);
            return Step::Done(Ok(()));
        }
        loop {
            if connection.output.is_full() {
                return Step::Full;
            }
            let frame = match guard(|| body.as_mut().poll_frame(cx)) {
                Ok(Poll::Ready(frame)) => frame,
                Ok(Poll::Pending) => return Step::Pending,
                Err(failure) => return Step::Done(Err(failure)),
            };
            let written = match frame.transpose() {
                Ok(Some(frame)) => self.write_frame(connection, frame, body.is_end_stream()),
                Ok(None) => self.write_end(connection, None).map(|()| true),
                Err(error) => {
                    let _ = failed(error);
                    Err(Failure::Cut)
                }
            };
            match written {
                Ok(false) => {}
                Ok(true) => return Step::Done(Ok(())),
                Err(failure) => return Step::Done(Err(failure)),
            }
        }
    }

    /// Writes a piece of the body, and says whether it was the last one.
    fn write_frame(
        &mut self,
        connection: &mut Connection,
        frame: Frame<Bytes>,
        last: bool,
    ) -> Result<bool, Failure> {
        self.begin(connection);
        let data = match frame.into_data() {
            Ok(data) => data,
            Err(frame) => {
                self.write_end(connection, frame.into_trailers().ok())?;
                return Ok(true);
            }
        };
        self.body_bytes += data.len() as u64;
        match &mut self.answer {
            Answer::Begun(Coding::Length(left)) => {
                let Some(rest) = left.checked_sub(data.len() as u64) else {
                    let _ = failed("its body is longer than its Content-Length");
                    return Err(Failure::Cut);
                };
                *left = rest;
                connection.output.push(data, b"");
                Ok(rest == 0)
            }
            // An empty chunk would be the last one.
            Answer::Begun(Coding::Chunked) if data.is_empty() => Ok(false),
            Answer::Begun(Coding::Chunked) => {
                response::write_chunk_size(connection.output.flat(), data.len());
                connection.output.push(data, if last { b"\r\n0\r\n\r\n" } else { b"\r\n" });
                Ok(last)
            }
            _ => {
                connection.output.push(data, b"");
                Ok(false)
            }
        }
    }

    fn write_end(&mut self, connection: &mut Connection, trailers: Option<HeaderMap>) -> Result<(), Failure> {
        self.begin(connection);
        match &self.answer {
            Answer::Begun(Coding::Length(1..)) => {
                let _ = failed("its body is shorter than its Content-Length");
                Err(Failure::Cut)
            }
            Answer::Begun(Coding::Chunked) => {
                let trailers = trailers.filter(|_| self.takes_trailers).unwrap_or_default();
                response::write_last_chunk(connection.output.flat(), &trailers);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Writes the answer's head, unless that is done.
    fn begin(&mut self, connection: &mut Connection) {
        let Answer::Ready(_, coding) = self.answer else { return };
        if self.will_leave_input() || connection.is_stopping() {
            self.persistence = Persistence::Close;
        }
        if let Answer::Ready(head, _) = mem::replace(&mut self.answer, Answer::Begun(coding)) {
            response::write_head(connection.output.flat(), &head, coding, self.persistence);
        }
    }

    /// What is left of the request's body will not be read.
    fn will_leave_input(&self) -> bool {
        self.incoming.as_ref().is_some_and(|incoming| {
            let closes = self.persistence == Persistence::Close;
            let pointless = closes || self.abandoned || incoming.is_hopeless();
            pointless && incoming.source.demand() == Demand::Dropped
        })
    }

    /// Reads what the handler left of the body, if that is worth it.
    async fn finish(&mut self, connection: &mut Connection) -> Result<Next, Failure> {
        poll_fn(|cx| {
            self.poll_drive(connection, cx, |exchange, connection, _| {
                if connection.output.is_full() {
                    return Step::Full;
                }
                let done = exchange.incoming.is_none() || exchange.will_leave_input();
                if done { Step::Done(()) } else { Step::Pending }
            })
        })
        .await?;
        Ok(match self.persistence {
            _ if self.incoming.is_some() => Next::End(End::Linger),
            Persistence::Close if self.client_closes => Next::End(End::Close { unread: true }),
            Persistence::Close => Next::End(End::Linger),
            _ => Next::Request,
        })
    }

    /// Takes the handler's next step, and moves bytes meanwhile, until the step is done or everybody waits.
    fn poll_drive<T>(
        &mut self,
        connection: &mut Connection,
        cx: &mut Context<'_>,
        mut step: impl FnMut(&mut Self, &mut Connection, &mut Context<'_>) -> Step<T>,
    ) -> Poll<Result<T, Failure>> {
        loop {
            if let Some(incoming) = &self.incoming {
                incoming.source.unpark();
            }
            let full = match step(self, connection, cx) {
                Step::Done(value) => return Poll::Ready(Ok(value)),
                Step::Full => true,
                Step::Pending => false,
            };
            let (starved, demand) = match self.poll_feed(connection, cx)? {
                Fed::Piece => continue,
                Fed::Starved(demand) => (true, demand),
                Fed::Idle(demand) => (false, demand),
            };
            // Whoever waits for a body that takes its time gets the head meanwhile.
            if !full {
                self.begin(connection);
            }
            if connection.poll_output(cx).map_err(Failure::Lost)?.is_pending() {
                // The time-out is the output's.
            } else if full {
                continue;
            } else if starved {
                let idle_timeout = connection.shared.limits.idle_timeout;
                if connection.timer.poll(Wait::Body, idle_timeout, cx).is_ready() {
                    self.end_body(BodyError::Stalled);
                    return Poll::Ready(Err(Failure::Reject(Reject::TIMEOUT)));
                }
            } else {
                // A handler may take as long as it likes, unless its client is gone.
                connection.timer.stop();
                self.poll_lost(connection, cx).map_err(Failure::Lost)?;
            }
            if self.incoming.as_ref().is_none_or(|incoming| incoming.source.park(cx, demand)) {
                return Poll::Pending;
            }
        }
    }

    /// Reads what the handler asks for of the request's body.
    fn poll_feed(&mut self, connection: &mut Connection, cx: &mut Context<'_>) -> Result<Fed, Failure> {
        let left = self.will_leave_input();
        let Some(incoming) = &mut self.incoming else { return Ok(Fed::Idle(Demand::None)) };
        let demand = incoming.source.demand();
        if demand == Demand::None || left {
            return Ok(Fed::Idle(demand));
        }
        loop {
            match incoming.take(&mut connection.input, cx.waker()) {
                Ok(Taken::NeedsInput) => {}
                Ok(Taken::TooMuch) => {
                    self.abandoned = true;
                    return Ok(Fed::Piece);
                }
                Ok(Taken::Piece) if !incoming.is_end() => return Ok(Fed::Piece),
                Ok(Taken::Piece | Taken::End) => {
                    self.incoming = None;
                    return Ok(Fed::Piece);
                }
                Err(reject) => {
                    self.end_body(BodyError::Malformed(reject.sentence));
                    return Err(Failure::Reject(reject));
                }
            }
            let interim = !matches!(self.answer, Answer::Begun(_));
            if mem::take(&mut incoming.expects_continue) && interim {
                connection.output.flat().extend_from_slice(CONTINUE);
            }
            match connection.poll_read_body(incoming.room_bytes(), cx) {
                Poll::Ready(Ok(0)) => {
                    self.end_body(BodyError::Incomplete);
                    return Err(Failure::Reject(Reject::INCOMPLETE));
                }
                Poll::Ready(Ok(bytes)) => incoming.note_read(bytes),
                Poll::Ready(Err(error)) => {
                    self.end_body(BodyError::Connection(error.kind()));
                    return Err(Failure::Lost(error));
                }
                Poll::Pending => {
                    // Everything there was has been read, which is when the gateway's kernel program lets go.
                    if incoming.is_large() && connection.nudges < NUDGES {
                        connection.nudges += 1;
                        connection.stream.socket().nudge().map_err(Failure::Lost)?;
                    }
                    return Ok(Fed::Starved(demand));
                }
            }
        }
    }

    fn end_body(&mut self, error: BodyError) {
        if let Some(incoming) = &self.incoming {
            incoming.source.end(Err(error));
        }
    }

    /// Looks whether the client reset the connection while its handler works.
    fn poll_lost(&mut self, connection: &mut Connection, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.looked_up {
            match connection.stream.poll_reset(cx) {
                Poll::Ready(Ok(())) => self.looked_up = true,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {}
            }
        }
        Ok(())
    }
}

impl<T> From<Result<Poll<T>, Failure>> for Step<Result<T, Failure>> {
    fn from(polled: Result<Poll<T>, Failure>) -> Self {
        match polled {
            Ok(Poll::Ready(value)) => Self::Done(Ok(value)),
            Ok(Poll::Pending) => Self::Pending,
            Err(failure) => Self::Done(Err(failure)),
        }
    }
}

/// Runs a handler's code; its panic is its own request's affair.
fn guard<T>(code: impl FnOnce() -> T) -> Result<T, Failure> {
    panics::catch(code).map_err(failed)
}

fn failed(error: impl Into<BoxError>) -> Failure {
    let error: BoxError = error.into();
    tracing::warn!(error, "the function failed");
    Failure::Reject(Reject::FAILED)
}
