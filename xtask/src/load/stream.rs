//! A client's connection, in the clear or under TLS.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::ops::Range;

use anyhow::{Context, Result, bail};
use rustls::{ClientConnection, HandshakeKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::tls::Client;

/// The largest TLS record and its overhead fit; ten thousand idle sessions are not to need a gigabyte.
const BUFFER_BYTES: usize = 18 * 1024;

pub struct Stream {
    socket: TcpStream,
    tls: Option<Box<Session>>,
}

struct Session {
    connection: ClientConnection,
    incoming: Box<[u8]>,
    /// What of it the session has not taken yet.
    untaken: Range<usize>,
    outgoing: Vec<u8>,
}

impl Stream {
    pub async fn connect(address: SocketAddr, host: &str, tls: Option<&Client>) -> Result<Self> {
        let socket = TcpStream::connect(address).await.context("connecting")?;
        let mut stream = Self { socket, tls: None };
        if let Some(client) = tls {
            stream.handshake(host, client).await?;
        }
        Ok(stream)
    }

    pub async fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.tls {
            None => self.socket.write_all(bytes).await.context("writing"),
            Some(session) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    let taken = session.connection.writer().write(rest)?;
                    rest = &rest[taken..];
                    session.flush(&mut self.socket).await?;
                }
                Ok(())
            }
        }
    }

    /// What is there, at least a byte; 0 at the end.
    pub async fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let Some(session) = &mut self.tls else { return self.socket.read(buffer).await.context("reading") };
        loop {
            match session.connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result.context("reading"),
            }
            if session.receive(&mut self.socket).await? == 0 {
                bail!("the connection ended without close_notify");
            }
        }
    }

    pub fn is_resumed(&self) -> bool {
        let kind = self.tls.as_ref().and_then(|session| session.connection.handshake_kind());
        kind == Some(HandshakeKind::Resumed)
    }

    async fn handshake(&mut self, host: &str, client: &Client) -> Result<()> {
        // Finished and the first request are two small segments.
        self.socket.set_nodelay(true)?;
        let mut connection = client.begin(host)?;
        client.send_hello(&mut connection, &mut self.socket).await.context("sending the hello")?;
        let incoming = vec![0; BUFFER_BYTES].into();
        let mut session = Session { connection, incoming, untaken: 0..0, outgoing: Vec::new() };
        while session.connection.is_handshaking() {
            if session.receive(&mut self.socket).await.context("the handshake")? == 0 {
                bail!("the connection ended in the handshake");
            }
            session.flush(&mut self.socket).await?;
        }
        self.tls = Some(Box::new(session));
        Ok(())
    }
}

impl Session {
    /// Gives the session some bytes, and says how many; 0 at the end. It takes no more while its plaintext isn't read.
    async fn receive(&mut self, socket: &mut TcpStream) -> Result<usize> {
        if self.untaken.is_empty() {
            self.untaken = 0..socket.read(&mut self.incoming).await?;
        }
        // An empty slice tells the session of the end.
        let taken = self.connection.read_tls(&mut &self.incoming[self.untaken.clone()])?;
        self.untaken.start += taken;
        self.connection.process_new_packets()?;
        Ok(taken)
    }

    async fn flush(&mut self, socket: &mut TcpStream) -> Result<()> {
        while self.connection.wants_write() {
            self.outgoing.clear();
            while self.connection.wants_write() {
                self.connection.write_tls(&mut self.outgoing)?;
            }
            socket.write_all(&self.outgoing).await.context("writing")?;
        }
        Ok(())
    }
}
