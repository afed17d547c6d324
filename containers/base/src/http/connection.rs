//! One connection's life: heads in, answers out, one request after the other until it closes or changes hands.
use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use common::{FunctionName, Protocol, limits::EMPTY_LINES};
use http::{
    HeaderValue, Method, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf},
    time::timeout,
};

use super::{
    access::{self, AccessLog, Entry},
    departure::Leave,
    exchange::{Exchange, Next},
    head::{Fields, Framing, Head, HeadScan},
    incoming::Incoming,
    limits::{COPY_BYTES, Limits, STOP_GRACE},
    output::Output,
    reject::Reject,
    response::{self, Coding, Persistence},
    route::{Identity, Route},
    service::Service,
    tally::{self, Tally},
    upgrade::{Handover, OnUpgrade, Upgraded},
};
use crate::{
    linger::Linger,
    moves::{Mover, Origin, Place, Prospect, Succession},
    stop::{Listener, Stop},
    stream::Stream,
    timer::{Timer, Wait},
};

/// One read on behalf of a head: more than most heads have, and on the stack, so that an idle connection holds none.
const HEAD_READ_BYTES: usize = 8 * 1024;

/// What all connections of a worker have in common.
pub struct Shared {
    pub identity: Identity,
    pub limits: Limits,
    pub linger: Linger,
    pub stop: Stop,
    pub mover: Mover,
    pub succession: Succession,
    pub tally: Tally,
    pub access_log: Option<AccessLog>,
}

/// Between two requests this is a stream, and what was read from it and belongs to no request yet.
pub struct Connection {
    pub(super) stream: Stream,
    pub(super) input: BytesMut,
    pub(super) output: Output,
    pub(super) timer: Timer,
    pub(super) shared: Rc<Shared>,
    pub(super) nudges: u8,
    pub(super) protocol: Protocol,
    pub(super) origin: Origin,
    /// The function that the client came for, if it came for another one.
    pub(super) home: Option<Box<FunctionName>>,
    stop: Listener,
    /// Looks for another instance when this one stops; may hold a turn that others wait for.
    pub(super) successor: Option<Pin<Box<dyn Future<Output = Option<Place>>>>>,
    scan: HeadScan,
    empty_lines: u16,
    pub(super) requests: u64,
}

/// How a connection ends.
#[derive(Debug)]
pub enum End {
    /// The client has ended it, or has said that it would; then it may have sent more all the same.
    Close { unread: bool },
    /// We end it, and the client may still be sending.
    Linger,
    /// There is nobody to talk to any more, or nothing that could be said.
    Lost(io::Error),
}

/// What is left to do with a connection that serves no more.
#[derive(Debug)]
pub enum Finish {
    End(End),
    Upgrade(Handover),
    /// Another instance goes on with it: its own function's, or that of its next request.
    Move(Place),
}

/// A head's consequence.
#[expect(clippy::large_enum_variant, reason = "it lives for one statement")]
pub(super) enum Judged {
    Serve(Exchange),
    /// Answered without a handler, and the connection goes on if it can.
    Refuse(Method, Reject, Persistence, Coding),
    /// Another function's: nothing of it is consumed.
    Leave(Leave),
}

/// What comes of waiting for a request.
enum Asked {
    Serve(Box<Exchange>),
    Leave(Box<Leave>),
    /// Another instance goes on with the connection.
    Go(Place),
}

/// What comes of waiting for a head.
pub(super) enum Heard {
    /// It is so long.
    Head(usize),
    Fault(Reject),
    /// Another instance takes the connection, with what has come of it.
    Successor(Place),
}

impl Connection {
    pub fn new(stream: Stream, protocol: Protocol, origin: Origin, shared: Rc<Shared>) -> Self {
        Self {
            stop: shared.stop.listener(),
            stream,
            input: BytesMut::new(),
            output: Output::default(),
            timer: Timer::default(),
            shared,
            nudges: 0,
            protocol,
            origin,
            home: None,
            successor: None,
            scan: HeadScan::default(),
            empty_lines: 0,
            requests: 0,
        }
    }

    /// Goes on with a connection that comes from another instance.
    pub fn resume(&mut self, home: FunctionName, requests: u64, input: &[u8]) {
        self.home = (home != self.shared.identity.name).then(|| Box::new(home));
        self.requests = requests;
        self.input.extend_from_slice(input);
    }

    /// Serves requests until the connection is over, and says how it is to end.
    ///
    /// What is needed for a request only is on the heap meanwhile: most connections wait for their next one.
    pub async fn serve<S: Service>(&mut self, service: &mut S) -> Finish {
        loop {
            let mut exchange = match poll_fn(|cx| self.poll_exchange(cx)).await {
                Ok(Asked::Serve(exchange)) => exchange,
                Ok(Asked::Leave(leave)) => match Box::pin(self.leave(*leave)).await {
                    Ok(Some(place)) => return Finish::Move(place),
                    Ok(None) => continue,
                    Err(end) => return Finish::End(end),
                },
                Ok(Asked::Go(place)) => return Finish::Move(place),
                Err(end) => return Finish::End(end),
            };
            let next = Box::pin(exchange.run(self, service)).await;
            exchange.account(self);
            match next {
                Next::Request => {}
                Next::End(end) => return Finish::End(end),
                Next::Upgrade(handover) => return Finish::Upgrade(handover),
            }
        }
    }

    /// Ends the connection; `held` goes with the stream if the protocol changes.
    pub async fn finish(mut self, finish: Finish, held: impl Send + Sync + 'static) {
        self.successor = None;
        let end = match finish {
            Finish::End(end) => end,
            Finish::Upgrade(handover) => match self.flush().await {
                Ok(()) => {
                    let (stream, unread) = self.into_parts();
                    // A handler that doesn't wait for its stream has ended the connection.
                    let _ = handover.send(Upgraded::new(stream, unread, Box::new(held)));
                    return;
                }
                Err(error) => End::Lost(error),
            },
            Finish::Move(place) => return self.depart(place).await,
        };
        if self.end(end).await {
            let Self { shared, stream, .. } = self;
            shared.linger.close(stream.into_socket()).await;
        }
    }

    /// Waits for a request that a handler is to see, and answers the others.
    fn poll_exchange(&mut self, cx: &mut Context<'_>) -> Poll<Result<Asked, End>> {
        loop {
            let judged = match ready!(self.poll_head(cx))? {
                Heard::Head(length) => self.judge(length),
                Heard::Fault(reject) => Err(reject),
                Heard::Successor(place) => return Poll::Ready(Ok(Asked::Go(place))),
            };
            match judged {
                Ok(Judged::Serve(exchange)) => return Poll::Ready(Ok(Asked::Serve(Box::new(exchange)))),
                Ok(Judged::Leave(leave)) => return Poll::Ready(Ok(Asked::Leave(Box::new(leave)))),
                Ok(Judged::Refuse(method, reject, persistence, coding)) => {
                    self.account(Some(&method), reject);
                    self.answer(reject, persistence, coding);
                    if persistence == Persistence::Close {
                        return Poll::Ready(Err(End::Linger));
                    }
                }
                Err(reject) => {
                    self.account(None, reject);
                    self.refuse(reject);
                    return Poll::Ready(Err(End::Linger));
                }
            }
        }
    }

    /// Waits for a whole head at the front of the input, and consumes nothing of it.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Heard, End>> {
        loop {
            if self.is_succeeded()
                && let Some(place) = ready!(self.poll_departure(cx)).map_err(End::Lost)?
            {
                return Poll::Ready(Ok(Heard::Successor(place)));
            }
            match self.scan_head() {
                Ok(None) => {}
                Ok(Some(length)) => {
                    // Whoever has a request looks for nobody, and keeps nobody waiting who does.
                    self.successor = None;
                    return Poll::Ready(Ok(Heard::Head(length)));
                }
                Err(reject) => return Poll::Ready(Ok(Heard::Fault(reject))),
            }
            ready!(self.poll_output(cx)).map_err(End::Lost)?;
            let begun = !self.input.is_empty();
            match self.poll_read_head(cx) {
                Poll::Ready(Ok(0)) if begun => return Poll::Ready(Ok(Heard::Fault(Reject::INCOMPLETE))),
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(End::Close { unread: false })),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(lost_between_requests(error))),
                Poll::Pending => return self.poll_wait(begun, cx),
            }
        }
    }

    /// Waits for a request, or for more of it if it has begun.
    fn poll_wait(&mut self, begun: bool, cx: &mut Context<'_>) -> Poll<Result<Heard, End>> {
        let stopping = !begun && self.stop.poll(cx).is_ready();
        if stopping && let Some(place) = self.poll_successor(cx) {
            return Poll::Ready(Ok(Heard::Successor(place)));
        }
        if begun && !self.is_succeeded() {
            self.successor = None;
        }
        let limits = &self.shared.limits;
        if begun || self.requests == 0 {
            ready!(self.timer.poll(Wait::Head, limits.head_timeout, cx));
            return Poll::Ready(Ok(Heard::Fault(Reject::TIMEOUT)));
        }
        if stopping && self.prospect() == Prospect::Nobody {
            ready!(self.timer.poll(Wait::LastRequest, STOP_GRACE, cx));
        } else {
            // An idle connection costs its socket and little else.
            self.input = BytesMut::new();
            self.output.release();
            ready!(self.timer.poll(Wait::Request, limits.idle_timeout, cx));
        }
        Poll::Ready(Err(End::Close { unread: true }))
    }

    fn scan_head(&mut self) -> Result<Option<usize>, Reject> {
        // RFC 9112 §2.2: empty lines before a request line are ignored.
        while self.input.starts_with(b"\r\n") {
            self.input.advance(2);
            self.scan = HeadScan::default();
            self.empty_lines += 1;
            if self.empty_lines > EMPTY_LINES {
                return Err(Reject::bad_request("There are too many empty lines before the request line."));
            }
        }
        if self.input.is_empty() {
            return Ok(None);
        }
        let length = self.scan.next(&self.input)?;
        if length.is_some() {
            self.scan = HeadScan::default();
            self.empty_lines = 0;
            self.timer.stop();
        }
        Ok(length)
    }

    fn poll_read_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut bytes = [MaybeUninit::uninit(); HEAD_READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut bytes);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
        self.input.reserve(buffer.filled().len());
        for piece in buffer.filled().chunks(COPY_BYTES) {
            self.input.extend_from_slice(piece);
        }
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Decides on the head at the front of the input; only a head that is ours, or nobody's, is consumed.
    pub(super) fn judge(&mut self, length: usize) -> Result<Judged, Reject> {
        let bytes = Bytes::copy_from_slice(&self.input[..length]);
        let mut fields = Fields::new();
        let head = Head::parse(&bytes, &mut fields)?;
        let coding = |reject: Reject| Coding::for_reject(&head.method, reject);
        let identity = &self.shared.identity;
        let home = self.home.as_deref().unwrap_or(&identity.name);
        match identity.route(self.protocol, home, head.target, head.host) {
            Route::Own { path } => {
                self.input.advance(length);
                self.requests += 1;
                self.open(head, &bytes, path)
            }
            Route::NotFound if head.keep_alive && head.framing == Framing::Length(0) => {
                self.input.advance(length);
                self.requests += 1;
                let (kept, coding) = (Persistence::kept(head.version), coding(Reject::NO_FUNCTION));
                Ok(Judged::Refuse(head.method, Reject::NO_FUNCTION, kept, coding))
            }
            Route::NotFound => {
                let coding = coding(Reject::NO_FUNCTION);
                Ok(Judged::Refuse(head.method, Reject::NO_FUNCTION, Persistence::Close, coding))
            }
            Route::Foreign(function) => {
                let stays = head.keep_alive && head.framing == Framing::Length(0);
                let persistence = if stays { Persistence::kept(head.version) } else { Persistence::Close };
                Ok(Judged::Leave(Leave { function, length, method: head.method, persistence }))
            }
            Route::Misdirected => {
                let coding = coding(Reject::MISDIRECTED);
                Ok(Judged::Refuse(head.method, Reject::MISDIRECTED, Persistence::Close, coding))
            }
            Route::Malformed => Err(Reject::bad_request("The request target is malformed.")),
        }
    }

    fn open(&mut self, head: Head<'_, '_>, bytes: &Bytes, path: usize) -> Result<Judged, Reject> {
        let limits = &self.shared.limits;
        let (body, incoming) =
            Incoming::open(head.framing, &mut self.input, limits.body_bytes, head.expects_continue)?;
        let last = self.requests >= limits.requests;
        let mut exchange = Exchange::new(&head, incoming, last);
        let may_upgrade = head.may_upgrade;
        let mut request = head.into_request(bytes, path, body)?;
        if let Ok(peer) = self.stream.socket().peer() {
            request.extensions_mut().insert(peer);
        }
        if may_upgrade {
            let (handover, on_upgrade) = OnUpgrade::new();
            request.extensions_mut().insert(on_upgrade);
            exchange.offer(handover);
        }
        if self.shared.access_log.is_some() {
            exchange.remember_path(&request);
        }
        exchange.ask(request);
        Ok(Judged::Serve(exchange))
    }

    /// Counts an answer without a handler; it takes no time that is worth a look at the clock.
    pub(super) fn account(&self, method: Option<&Method>, reject: Reject) {
        let counted = method.map_or(handoff::Method::Other, tally::counted);
        self.shared.tally.count(counted, Some(reject.status.as_u16()), Duration::ZERO);
        if let Some(log) = &self.shared.access_log {
            log.write(Entry {
                method: method.map(Method::as_str),
                path: None,
                status: Some(reject.status.as_u16()),
                bytes: reject.text_bytes(),
                duration_us: 0,
                peer: access::peer(self.stream.socket()),
            });
        }
    }

    /// Answers a request that can't be understood, after which nothing can.
    pub(super) fn refuse(&mut self, reject: Reject) {
        self.answer(reject, Persistence::Close, Coding::Length(reject.text_bytes()));
    }

    pub(super) fn answer(&mut self, reject: Reject, persistence: Persistence, coding: Coding) {
        let mut response = Response::new(());
        *response.status_mut() = reject.status;
        let plain_text = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, plain_text);
        if reject.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        let (head, ()) = response.into_parts();
        let flat = self.output.flat();
        response::write_head(flat, &head, coding, persistence);
        if let Coding::Length(_) = coding {
            flat.extend_from_slice(reject.sentence.as_bytes());
            flat.extend_from_slice(b"\n");
        }
    }

    /// Reads more of a body, with room for `room_bytes`.
    pub(super) fn poll_read_body(
        &mut self,
        room_bytes: usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.input.reserve(room_bytes);
        let read = ready!(pin!(self.stream.read_buf(&mut self.input)).poll(cx))?;
        self.timer.stop();
        Poll::Ready(Ok(read))
    }

    /// Sends what there is; a client that takes nothing for too long is an error.
    pub(super) fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let before = self.output.len();
        let flushed = self.output.poll_flush(&mut self.stream, cx);
        if self.output.len() < before {
            self.timer.stop();
        }
        if flushed.is_pending() {
            ready!(self.timer.poll(Wait::Reader, self.shared.limits.idle_timeout, cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        flushed
    }

    pub(super) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_output(cx)).await
    }

    /// Says what is left to say, and whether the client should have time to read it.
    async fn end(&mut self, end: End) -> bool {
        let (lingers, unread) = match end {
            End::Lost(error) => {
                tracing::debug!(%error, "connection lost");
                return false;
            }
            End::Linger => (true, true),
            End::Close { unread } => (false, unread),
        };
        if self.flush().await.is_err() {
            return false;
        }
        if let Stream::Tls(stream) = &mut self.stream {
            // Whether the farewell arrives changes nothing here.
            let _ = timeout(self.shared.limits.idle_timeout, stream.shutdown()).await;
        }
        lingers || (unread && (!self.input.is_empty() || self.stream.socket().has_unread()))
    }
}

/// A client that is through with a connection may end it in any way.
fn lost_between_requests(error: io::Error) -> End {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => End::Close { unread: false },
        // The TLS session failed and its alert is on the way.
        io::ErrorKind::InvalidData => End::Linger,
        _ => End::Lost(error),
    }
}
