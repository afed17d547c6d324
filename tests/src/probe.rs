//! One connection with raw bytes in, and who answered what.
use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

use anyhow::{Context, Result, bail};

use crate::{
    PATIENCE,
    http::{Decoder, Event, Response},
    segments,
    stack::AddressBook,
    tls::{self, Answer},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Http,
    Https,
}

/// What a stranger can tell of a connection's fate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This function took it.
    Function(String),
    /// An HTTP answer that is no function's success.
    Status(u16),
    Alert(u8),
    /// A TLS 1.3 server took it and hides its name.
    Tls13,
    /// Closed in an orderly way, without a word.
    Closed,
    Reset,
}

/// How the bytes go out.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// Offsets where a segment ends.
    pub cuts: Vec<usize>,
    /// The client sends no more and says so.
    pub half_close: bool,
}

pub fn probe(stack: &AddressBook, port: Port, bytes: &[u8], manner: &Manner) -> Result<Outcome> {
    let address = match port {
        Port::Http => stack.http,
        Port::Https => stack.https,
    };
    let mut socket = connect(address)?;
    match segments::send_cut_at(&socket, bytes, &manner.cuts) {
        // A refusal may come while the rest is still being sent.
        Err(error) if is_end(&error) => {}
        sent => sent.context("sending")?,
    }
    if manner.half_close {
        // The peer may have ended it already.
        let _ = socket.shutdown(Shutdown::Write);
    }
    outcome(stack, port, &mut socket)
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let socket = TcpStream::connect(address).context("connecting")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

pub fn outcome(stack: &AddressBook, port: Port, socket: &mut TcpStream) -> Result<Outcome> {
    match port {
        Port::Http => http_outcome(socket),
        Port::Https => Ok(match tls::answer(socket)? {
            Answer::Certificate(certificate) => {
                let owner = stack.owner_of(&certificate).context("a certificate that nobody has")?;
                Outcome::Function(owner.to_owned())
            }
            Answer::ServerHello13 | Answer::HelloRetryRequest => Outcome::Tls13,
            Answer::Alert(description) => Outcome::Alert(description),
            Answer::Http(status) => Outcome::Status(status),
            Answer::Closed => Outcome::Closed,
            Answer::Reset => Outcome::Reset,
        }),
    }
}

fn http_outcome(socket: &mut TcpStream) -> Result<Outcome> {
    match first_response(socket)? {
        Ended::Response(response) => Ok(of_response(&response)),
        Ended::Closed => Ok(Outcome::Closed),
        Ended::Reset => Ok(Outcome::Reset),
    }
}

pub fn of_response(response: &Response) -> Outcome {
    match response.status() {
        200 => match answerer(response) {
            Some(function) => Outcome::Function(function.into()),
            None => Outcome::Status(200),
        },
        status => Outcome::Status(status),
    }
}

/// Which of the functions speaks like this.
pub fn answerer(response: &Response) -> Option<&'static str> {
    if response.body.starts_with(b"Hello, ") {
        return Some("hello");
    }
    let json = serde_json::from_slice::<serde_json::Value>(&response.body).ok()?;
    json.get("method").map(|_| "echo")
}

enum Ended {
    Response(Response),
    Closed,
    Reset,
}

fn first_response(socket: &mut TcpStream) -> Result<Ended> {
    let mut decoder = Decoder::default();
    let (mut head, mut body) = (None, Vec::new());
    let mut bytes = [0; 1 << 14];
    loop {
        while let Some(event) = decoder.next_event()? {
            match event {
                Event::Head(next) => head = Some(next),
                Event::Data(data) => body.extend(data),
                Event::End => match head.take().context("an end without a head")? {
                    head if head.status < 200 => {}
                    head => return Ok(Ended::Response(Response { head, body })),
                },
            }
        }
        match socket.read(&mut bytes) {
            Ok(0) if decoder.is_idle() => return Ok(Ended::Closed),
            Ok(0) => decoder.close()?,
            Ok(length) => decoder.feed(&bytes[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                // A reset that swallows an answer is a fault of its own.
                if !decoder.is_idle() || head.is_some() {
                    bail!("reset in the middle of an answer: {head:?}");
                }
                return Ok(Ended::Reset);
            }
            Err(error) => return Err(error).context("waiting for an answer"),
        }
    }
}

/// Writes without caring for segments.
pub fn send(socket: &mut TcpStream, bytes: &[u8]) -> Result<()> {
    socket.write_all(bytes).context("sending")
}
