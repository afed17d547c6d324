//! A client's end of a connection, plain or TLS, that gives up a hang with an error.
use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rustls::ClientConnection;

use crate::{
    PATIENCE,
    http::{Decoder, Event, Head, Response},
    pattern::Pattern,
};

/// What lies under HTTP.
pub enum Wire {
    Plain(TcpStream),
    Tls(TcpStream, Box<ClientConnection>),
}

impl Wire {
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) | Self::Tls(socket, _) => socket,
        }
    }

    /// Reads without waiting; 0 is the peer's orderly end.
    fn try_read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(bytes),
            Self::Tls(socket, session) => loop {
                match session.reader().read(bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    known => return known,
                }
                // After the end of the stream, the reader tells an orderly one from a cut.
                session.read_tls(socket)?;
                if let Err(error) = session.process_new_packets() {
                    // The alert that says so should reach the peer.
                    let _ = session.write_tls(socket);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            },
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(socket, session) => {
                // One record at a time: what rustls buffers is not yet sent.
                while session.wants_write() {
                    session.write_tls(socket)?;
                }
                session.writer().write(&bytes[..bytes.len().min(1 << 14)])
            }
        }
    }

    fn try_flush(&mut self) -> io::Result<()> {
        if let Self::Tls(socket, session) = self {
            while session.wants_write() {
                session.write_tls(socket)?;
            }
        }
        Ok(())
    }

    fn wait(&self, interest: PollFlags) -> io::Result<()> {
        let mut ready = [PollFd::new(self.socket().as_fd(), interest)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, timeout) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::TimedOut, "the peer hangs")),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// An HTTP client on one connection.
pub struct Client {
    pub wire: Wire,
    decoder: Decoder,
}

/// How a request's body is framed.
#[derive(Clone, Copy, Debug)]
pub enum Framing {
    Length,
    Chunks(usize),
}

impl Client {
    pub fn new(wire: Wire) -> Self {
        wire.socket().set_nonblocking(true).expect("setting O_NONBLOCK");
        wire.socket().set_nodelay(true).expect("setting TCP_NODELAY");
        Self { wire, decoder: Decoder::default() }
    }

    pub fn socket(&self) -> &TcpStream {
        self.wire.socket()
    }

    pub fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.wire.try_write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wire.wait(PollFlags::POLLOUT)?
                }
                Err(error) => return Err(error),
            }
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        loop {
            match self.wire.try_flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wire.wait(PollFlags::POLLOUT)?
                }
                known => return known,
            }
        }
    }

    pub fn receive(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.wire.try_read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wire.wait(PollFlags::POLLIN)?
                }
                known => return known,
            }
        }
    }

    /// Ends the sending side only.
    pub fn half_close(&mut self) -> io::Result<()> {
        if let Wire::Tls(_, session) = &mut self.wire {
            session.send_close_notify();
        }
        self.flush()?;
        self.socket().shutdown(Shutdown::Write)
    }

    /// Reads until the peer ends the connection; what comes before that is an error.
    pub fn expect_close(&mut self) -> Result<()> {
        ensure!(self.decoder.is_idle(), "bytes are left of an answer");
        let mut bytes = [0; 1024];
        match self.receive(&mut bytes) {
            Ok(0) => Ok(()),
            Ok(length) => bail!("{:?} instead of the end", String::from_utf8_lossy(&bytes[..length])),
            Err(error) => Err(error).context("reading the connection's end"),
        }
    }

    pub fn response(&mut self) -> Result<Response> {
        self.response_to("GET")
    }

    /// The next final answer; interim ones (1xx) are passed over.
    pub fn response_to(&mut self, method: &str) -> Result<Response> {
        loop {
            let response = self.any_response_to(method)?;
            if response.status() >= 200 {
                return Ok(response);
            }
        }
    }

    pub fn any_response_to(&mut self, method: &str) -> Result<Response> {
        self.decoder.to_head = method == "HEAD";
        let mut head = None;
        let mut body = Vec::new();
        loop {
            match self.next_event()? {
                Event::Head(next) => head = Some(next),
                Event::Data(data) => body.extend(data),
                Event::End => {
                    return Ok(Response { head: head.context("an answer without a head")?, body });
                }
            }
        }
    }

    fn next_event(&mut self) -> Result<Event> {
        let mut bytes = [0; 1 << 14];
        loop {
            if let Some(event) = self.decoder.next_event()? {
                return Ok(event);
            }
            match self.receive(&mut bytes).context("reading an answer")? {
                0 if self.decoder.is_idle() => bail!("the connection was closed instead of an answer"),
                0 => self.decoder.close()?,
                length => self.decoder.feed(&bytes[..length]),
            }
        }
    }

    /// One request with a small or no body, and its answer.
    pub fn request(
        &mut self,
        method: &str,
        target: &str,
        host: &str,
        body: Option<&[u8]>,
    ) -> Result<Response> {
        let mut request = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n").into_bytes();
        if let Some(body) = body {
            request.extend(format!("Content-Length: {}\r\n\r\n", body.len()).bytes());
            request.extend(body);
        } else {
            request.extend(b"\r\n");
        }
        self.send(&request).context("sending a request")?;
        self.response_to(method)
    }

    /// Posts `length` bytes of `pattern` to a function that sends them back, and compares each byte on the way.
    pub fn echo(
        &mut self,
        target: &str,
        host: &str,
        pattern: Pattern,
        length: u64,
        framing: Framing,
    ) -> Result<()> {
        let head = match framing {
            Framing::Length => format!("Content-Length: {length}"),
            Framing::Chunks(_) => "Transfer-Encoding: chunked".into(),
        };
        let head = format!(
            "POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-test\r\n{head}\r\n\r\n"
        );
        let mut upload =
            Upload { pattern, length, framing, offset: 0, ready: head.into_bytes(), ended: false };
        let answer = self.exchange(&mut upload)?;
        ensure!(answer.status == 200, "status {} to an upload", answer.status);
        ensure!(
            answer.field("content-type") == Some("application/x-test"),
            "another content type: {answer:?}"
        );
        Ok(())
    }

    /// Sends and receives at the same time, because an echo under back-pressure needs its reader.
    fn exchange(&mut self, upload: &mut Upload) -> Result<Head> {
        self.decoder.to_head = false;
        let mut bytes = [0; 1 << 14];
        let mut head = None;
        let mut received = 0;
        loop {
            let mut idle = true;
            upload.prepare();
            if !upload.ready.is_empty() {
                match self.wire.try_write(&upload.ready) {
                    Ok(length) => {
                        upload.ready.drain(..length);
                        idle = false;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).with_context(|| format!("sending at {}", upload.offset)),
                }
            }
            let unflushed = match self.wire.try_flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
                known => known.map(|()| false).context("sending")?,
            };
            match self.wire.try_read(&mut bytes) {
                Ok(0) => {
                    ensure!(!self.decoder.is_idle(), "closed without an answer");
                    self.decoder.close()?;
                    idle = false;
                }
                Ok(length) => {
                    self.decoder.feed(&bytes[..length]);
                    idle = false;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    let at = format!("receiving at {received} of {} ({} sent)", upload.length, upload.offset);
                    return Err(error).context(at);
                }
            }
            while let Some(event) = self.decoder.next_event()? {
                match event {
                    Event::Head(next) if next.status < 200 => {
                        let end = self.decoder.next_event()?;
                        ensure!(end == Some(Event::End), "an interim answer with a body");
                    }
                    Event::Head(next) => head = Some(next),
                    Event::Data(data) => {
                        if head.as_ref().is_some_and(|head| head.status != 200) {
                            continue;
                        }
                        if let Some(offset) = upload.pattern.first_difference(received, &data) {
                            bail!("WRONG BYTE at {offset} of {}", upload.length);
                        }
                        received += data.len() as u64;
                    }
                    Event::End => {
                        let head = head.context("an answer without a head")?;
                        let all = received == upload.length;
                        ensure!(all || head.status != 200, "{received} bytes back of {}", upload.length);
                        return Ok(head);
                    }
                }
            }
            if idle {
                let sending = !upload.ready.is_empty() || unflushed;
                let interest =
                    if sending { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
                let at = || format!("{} sent, {received} received of {}", upload.offset, upload.length);
                self.wire.wait(interest).with_context(at)?;
            }
        }
    }
}

struct Upload {
    pattern: Pattern,
    length: u64,
    framing: Framing,
    offset: u64,
    ready: Vec<u8>,
    ended: bool,
}

impl Upload {
    /// Keeps some bytes ready to be sent until the body has ended.
    fn prepare(&mut self) {
        const READY_BYTES: usize = 1 << 15;
        while self.ready.len() < READY_BYTES && !self.ended {
            let left = self.length - self.offset;
            let wanted = match self.framing {
                Framing::Length => READY_BYTES,
                Framing::Chunks(size) => size,
            };
            let mut part = vec![0; left.min(wanted as u64) as usize];
            self.pattern.fill(self.offset, &mut part);
            self.offset += part.len() as u64;
            self.ended = part.is_empty();
            match self.framing {
                Framing::Length => self.ready.extend(part),
                // The empty chunk that this makes of the end is the one that ends a body.
                Framing::Chunks(_) => {
                    self.ready.extend(format!("{:x}\r\n", part.len()).bytes());
                    self.ready.extend(part);
                    self.ready.extend(b"\r\n");
                }
            }
        }
    }
}
