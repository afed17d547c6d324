//! The loop against real sockets: what a client sends, what a handler sees, what comes back.
mod bodies;
mod connections;
mod handlers;
mod malformed;
mod pipelines;
mod routing;
mod tls;

use std::{cell::RefCell, convert::Infallible, future::Future, net::Shutdown, rc::Rc, time::Duration};

use bytes::Bytes;
use common::Protocol;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinHandle, LocalSet, spawn_local},
    time::timeout,
};

use super::{Body, Connection, Hosts, Identity, Limits, Service, Tally, connection::Shared};
use crate::{
    linger::Linger,
    moves::{Mover, Origin, Succession},
    socket::Socket,
    stop::Stop,
    stream::Stream,
};

/// Longer than anything here takes; a hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection of the function `echo` and its client.
struct Site {
    client: TcpStream,
    served: JoinHandle<()>,
    stop: Stop,
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(LocalSet::new().run_until(async { timeout(PATIENCE, test).await.expect("a hang") }))
}

fn shared(limits: Limits) -> Rc<Shared> {
    let name = "echo".parse().unwrap();
    let domains = ["faas.local".to_owned(), "localhost".to_owned()];
    Rc::new(Shared {
        identity: Identity { name, hosts: Hosts::new(name, &domains, &[], &[]) },
        limits,
        linger: Linger::default(),
        stop: Stop::default(),
        mover: Mover::default(),
        succession: Succession::default(),
        tally: Tally::default(),
        access_log: None,
    })
}

fn sockets() -> (std::net::TcpStream, Socket) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_nodelay(true).unwrap();
    (client, Socket::from(listener.accept().unwrap().0))
}

impl Site {
    fn new<S: Service>(service: S) -> Self {
        Self::with(Protocol::Http, Limits::default(), service)
    }

    fn with<S: Service>(protocol: Protocol, limits: Limits, mut service: S) -> Self {
        let (client, socket) = sockets();
        client.set_nonblocking(true).unwrap();
        let client = TcpStream::from_std(client).unwrap();
        let shared = shared(limits);
        let stop = shared.stop.clone();
        let served = spawn_local(async move {
            let mut connection = Connection::new(Stream::Plain(socket), protocol, Origin::default(), shared);
            let finish = connection.serve(&mut service).await;
            connection.finish(finish, ()).await;
        });
        Self { client, served, stop }
    }

    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.client.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Everything until the server ends the connection in order.
    async fn rest(mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.client.read_to_end(&mut bytes).await.unwrap();
        self.served.await.unwrap();
        bytes
    }

    /// Sends all, ends the client's side, and reads all.
    async fn all(mut self, bytes: impl AsRef<[u8]>) -> String {
        self.send(bytes).await;
        self.half_close();
        String::from_utf8(self.rest().await).unwrap()
    }

    fn half_close(&self) {
        socket2::SockRef::from(&self.client).shutdown(Shutdown::Write).unwrap();
    }

    /// The next answer to a request with this method.
    async fn answer_to(&mut self, method: &str) -> Answer {
        let mut bytes = Vec::new();
        loop {
            if let Some((answer, length)) = Answer::parse(&bytes, method, false) {
                assert_eq!(length, bytes.len(), "bytes behind the answer");
                return answer;
            }
            if self.client.read_buf(&mut bytes).await.unwrap() == 0 {
                panic!("the connection ended within an answer: {}", bytes.escape_ascii());
            }
        }
    }

    async fn answer(&mut self) -> Answer {
        self.answer_to("GET").await
    }

    async fn ended(mut self) -> bool {
        self.client.read(&mut [0; 1]).await.unwrap() == 0
    }
}

/// An answer as a client sees it, by a decoder that shares nothing with the server's.
#[derive(Debug)]
struct Answer {
    status: u16,
    fields: Vec<(String, String)>,
    body: Vec<u8>,
    trailers: String,
}

impl Answer {
    /// The first answer in `bytes` and its length, once it is complete; `ended` when nothing follows.
    fn parse(bytes: &[u8], method: &str, ended: bool) -> Option<(Self, usize)> {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
        let head = std::str::from_utf8(&bytes[..end - 4]).unwrap();
        let mut lines = head.split("\r\n");
        let status_line = lines.next().unwrap();
        assert!(status_line.starts_with("HTTP/1.1 "), "{status_line}");
        let status = status_line[9..12].parse().unwrap();
        let fields: Vec<_> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let mut answer = Self { status, fields, body: Vec::new(), trailers: String::new() };
        if method == "HEAD" || status < 200 || status == 204 || status == 304 {
            return Some((answer, end));
        }
        if answer.field("transfer-encoding") == Some("chunked") {
            let mut at = end;
            loop {
                let line = at + bytes[at..].windows(2).position(|window| window == b"\r\n")?;
                let size = usize::from_str_radix(std::str::from_utf8(&bytes[at..line]).unwrap(), 16).unwrap();
                at = line + 2;
                if size == 0 {
                    let trailers = &bytes[line..];
                    let end = trailers.windows(4).position(|window| window == b"\r\n\r\n")?;
                    answer.trailers = String::from_utf8(trailers[..end].to_vec()).unwrap().trim().to_owned();
                    return Some((answer, line + end + 4));
                }
                answer.body.extend_from_slice(bytes.get(at..at + size)?);
                assert_eq!(bytes.get(at + size..at + size + 2)?, b"\r\n");
                at += size + 2;
            }
        }
        let length = match answer.field("content-length") {
            Some(length) => length.parse().unwrap(),
            None if ended => bytes.len() - end,
            None => return None,
        };
        answer.body = bytes.get(end..end + length)?.to_vec();
        Some((answer, end + length))
    }

    /// All answers of a connection that has ended.
    fn parse_all(mut bytes: &[u8], methods: &[&str]) -> Vec<Self> {
        let mut answers = Vec::new();
        for method in methods {
            let Some((answer, length)) = Self::parse(bytes, method, true) else {
                panic!("answer {} is incomplete: {}", answers.len(), bytes.escape_ascii());
            };
            answers.push(answer);
            bytes = &bytes[length..];
        }
        assert!(bytes.is_empty(), "more than was asked for: {}", bytes.escape_ascii());
        answers
    }

    fn field(&self, name: &str) -> Option<&str> {
        let mut values = self.fields.iter().filter(|(field, _)| field == name);
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(values.next().is_none(), "{name} came twice");
        value
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// What a handler was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    method: String,
    uri: String,
    body: Vec<u8>,
}

type Log = Rc<RefCell<Vec<Asked>>>;

/// Answers with the whole request's body, and writes down what it was asked.
fn recorder(
    log: &Log,
) -> impl tower_service::Service<
    Request<Body>,
    Response = Response<Full<Bytes>>,
    Error = super::BodyError,
    Future: 'static,
>
+ Clone
+ 'static
+ use<> {
    let log = Rc::clone(log);
    tower::service_fn(move |request: Request<Body>| {
        let log = Rc::clone(&log);
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await?.to_bytes();
            let (method, uri) = (head.method.to_string(), head.uri.to_string());
            log.borrow_mut().push(Asked { method, uri, body: body.to_vec() });
            Ok(Response::new(Full::new(body)))
        }
    })
}

/// Gives the request's body back while it comes.
async fn echo(request: Request<Body>) -> Result<Response<Body>, Infallible> {
    Ok(Response::new(request.into_body()))
}

/// Gives the request's body back when all of it is there.
async fn echo_whole(request: Request<Body>) -> Result<Response<Body>, super::BodyError> {
    Ok(Response::new(Body::from(request.into_body().collect().await?.to_bytes())))
}

async fn greet(_: Request<Body>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(Response::new(Full::from("hi")))
}

fn get(path: &str) -> String {
    format!("GET /function/echo{path} HTTP/1.1\r\nHost: a\r\n\r\n")
}
