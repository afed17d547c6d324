//! The two ends of a pool connection, and the only place where descriptors are passed.
use std::{
    io::{self, IoSlice, IoSliceMut},
    iter::Zip,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
    vec::Drain,
};

use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
    },
};

use crate::{
    Connection, Error, FunctionsDirectory, Hello, MAX_BATCH, PoolConnection, StatusReader, StatusWriter,
    message::{self, Bytes, MAX_MESSAGE_BYTES, decode_connections, decode_hello},
};

const CONTROL_BYTES: usize = cmsg_space!(ScmRights(MAX_BATCH));

const SEND: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);
const RECEIVE: RecvFlags = RecvFlags::DONTWAIT.union(RecvFlags::CMSG_CLOEXEC);

/// Why connections could not be handed over; they are still the caller's.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("the pool connection's queue is full")]
    WouldBlock,
    #[error("too many descriptors of this user are in flight (RLIMIT_NOFILE)")]
    TooManyReferences,
    /// The instance takes nothing more; what it has in its queue it may still take, until the pool connection ends.
    #[error("the instance takes nothing more")]
    Closed,
    #[error("sending on a pool connection: {0}")]
    Io(#[source] io::Error),
}

/// The gateway's end of a pool connection.
pub struct GatewayEnd {
    socket: OwnedFd,
}

/// What the gateway receives.
pub enum FromInstance {
    Hello(Hello, StatusReader),
    WouldBlock,
    Closed,
}

impl GatewayEnd {
    /// Begins a pool connection; `FunctionsDirectory::connect` is the same for a directory that is used often.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let no_socket = || Error::NoSocketPath { path: path.to_owned() };
        let directory = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => return Err(no_socket()),
        };
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(no_socket)?;
        FunctionsDirectory::open(directory)?.connect(name)
    }

    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The next message, if one is there. Any error means that the instance doesn't speak this protocol: drop the end.
    pub fn receive(&self) -> Result<FromInstance, Error> {
        let mut bytes = [0; message::HELLO_BYTES];
        let mut page = None;
        let mut descriptors = 0;
        let received = receive(self.socket.as_fd(), &mut bytes, |fd| {
            descriptors += 1;
            page = Some(fd);
        });
        let length = match received? {
            Datagram::Message { length, complete: true } => length,
            Datagram::Message { complete: false, .. } => return Err(Error::OutOfDescriptors { lost: 0 }),
            Datagram::WouldBlock => return Ok(FromInstance::WouldBlock),
            Datagram::Closed => return Ok(FromInstance::Closed),
        };
        let hello = decode_hello(&bytes[..length])?;
        match page {
            Some(page) if descriptors == 1 => Ok(FromInstance::Hello(hello, StatusReader::open(page)?)),
            _ => Err(Error::Descriptors { expected: 1, got: descriptors }),
        }
    }

    /// Hands over the first [`MAX_BATCH`] of `connections` with one system call and says how many those are: all of
    /// them or, on an error, none.
    ///
    /// `descriptors[i]` belongs to `connections[i]`. Once this returned `Ok` the instance owns them, also while they
    /// wait in its queue: the caller closes its copies and must not use the sockets any more.
    pub fn send(
        &self,
        connections: &[Connection],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<usize, SendError> {
        debug_assert_eq!(connections.len(), descriptors.len());
        let sent = connections.len().min(descriptors.len()).min(MAX_BATCH);
        if sent == 0 {
            return Ok(0);
        }
        let mut bytes = Bytes::new();
        message::encode_connections(&connections[..sent], &mut bytes);
        match send(self.socket.as_fd(), &bytes, &descriptors[..sent]) {
            Ok(()) => Ok(sent),
            Err(Errno::AGAIN) => Err(SendError::WouldBlock),
            Err(Errno::TOOMANYREFS) => Err(SendError::TooManyReferences),
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::CONNREFUSED) => {
                Err(SendError::Closed)
            }
            Err(errno) => Err(SendError::Io(errno.into())),
        }
    }
}

impl AsFd for GatewayEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// For `tokio::io::unix::AsyncFd`: the number stays the same for life.
impl AsRawFd for GatewayEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The instance's end of a pool connection, and its status page.
pub struct InstanceEnd {
    socket: OwnedFd,
    status: StatusWriter,
}

/// What the instance receives.
pub enum Received<'a> {
    /// Connections with their sockets; those that the caller doesn't take out are closed.
    Connections(Arrivals<'a>),
    WouldBlock,
    Closed,
}

/// The connections of one message.
pub type Arrivals<'a> = Zip<Drain<'a, Connection>, Drain<'a, OwnedFd>>;

/// Memory that receiving uses again and again; one for each thread that receives.
pub struct ReceiveBuffer {
    bytes: Box<[u8; MAX_MESSAGE_BYTES]>,
    connections: Vec<Connection>,
    descriptors: Vec<OwnedFd>,
}

impl InstanceEnd {
    /// Says HELLO on a new pool connection, with a status page made for it.
    pub fn greet(connection: PoolConnection, hello: &Hello) -> Result<Self, Error> {
        let status = StatusWriter::create()?;
        let mut bytes = Bytes::new();
        message::encode_hello(hello, &mut bytes);
        send(connection.socket.as_fd(), &bytes, &[status.as_fd()])
            .map_err(|errno| Error::SendHello(errno.into()))?;
        Ok(Self { socket: connection.socket, status })
    }

    pub fn status(&self) -> &StatusWriter {
        &self.status
    }

    /// The next message, if one is there. What came out of the queue is counted as taken on the status page, also when
    /// it turns out to be unusable. After `Error::OutOfDescriptors` the end works on; after any other error drop it.
    pub fn receive<'a>(&self, buffer: &'a mut ReceiveBuffer) -> Result<Received<'a>, Error> {
        let filled = self.fill(buffer);
        let ReceiveBuffer { connections, descriptors, .. } = buffer;
        // A broken message's records can't be counted, a truncated one's descriptors are too few.
        self.status.add_taken(connections.len().max(descriptors.len()));
        match filled {
            Ok(Filled::Connections) => {
                Ok(Received::Connections(connections.drain(..).zip(descriptors.drain(..))))
            }
            Ok(Filled::WouldBlock) => Ok(Received::WouldBlock),
            Ok(Filled::Closed) => Ok(Received::Closed),
            Err(error) => {
                // Their clients learn of it now, not when the buffer is used again.
                descriptors.clear();
                Err(error)
            }
        }
    }

    /// Puts the next message's connections and descriptors into `buffer`, as many of each if it is sound.
    fn fill(&self, buffer: &mut ReceiveBuffer) -> Result<Filled, Error> {
        let ReceiveBuffer { bytes, connections, descriptors } = buffer;
        connections.clear();
        descriptors.clear();
        let (length, complete) =
            match receive(self.socket.as_fd(), &mut bytes[..], |fd| descriptors.push(fd))? {
                Datagram::Message { length, complete } => (length, complete),
                Datagram::WouldBlock => return Ok(Filled::WouldBlock),
                Datagram::Closed => return Ok(Filled::Closed),
            };
        decode_connections(&bytes[..length], connections)?;
        if !complete {
            return Err(Error::OutOfDescriptors { lost: connections.len() });
        }
        if connections.len() != descriptors.len() {
            return Err(Error::Descriptors { expected: connections.len(), got: descriptors.len() });
        }
        Ok(Filled::Connections)
    }

    /// Ends the gateway's sending without losing anything: from now on its sends fail, and what is queued can still be
    /// received; then `receive` says `Closed`.
    pub fn stop_receiving(&self) -> Result<(), Error> {
        self.status.set_draining();
        shutdown(&self.socket, Shutdown::Read).map_err(|errno| Error::Shutdown(errno.into()))
    }
}

impl AsFd for InstanceEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// For `tokio::io::unix::AsyncFd`: the number stays the same for life.
impl AsRawFd for InstanceEnd {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl ReceiveBuffer {
    pub fn new() -> Self {
        Self {
            bytes: Box::new([0; MAX_MESSAGE_BYTES]),
            connections: Vec::with_capacity(MAX_BATCH),
            descriptors: Vec::with_capacity(MAX_BATCH),
        }
    }
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        Self::new()
    }
}

enum Filled {
    Connections,
    WouldBlock,
    Closed,
}

enum Datagram {
    /// `complete` is false when the kernel could not install all of the message's descriptors.
    Message {
        length: usize,
        complete: bool,
    },
    WouldBlock,
    Closed,
}

fn send(socket: BorrowedFd, bytes: &[u8], descriptors: &[BorrowedFd]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
    debug_assert!(fits, "callers pass at most MAX_BATCH descriptors");
    // A SOCK_SEQPACKET message is queued whole or not at all.
    retry_interrupted(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SEND)).map(|_| ())
}

/// Receives one message; each of its descriptors is given to `take`, close-on-exec, before anything is judged.
fn receive(socket: BorrowedFd, bytes: &mut [u8], mut take: impl FnMut(OwnedFd)) -> Result<Datagram, Error> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        retry_interrupted(|| recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RECEIVE));
    let message = match received {
        Ok(message) => message,
        Err(Errno::AGAIN) => return Ok(Datagram::WouldBlock),
        Err(Errno::CONNRESET) => return Ok(Datagram::Closed),
        Err(errno) => return Err(Error::Receive(errno.into())),
    };
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = ancillary {
            descriptors.for_each(&mut take);
        }
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(Error::Oversized);
    }
    if message.bytes == 0 {
        // The end of the stream and an empty message look alike, and neither end sends the latter.
        return Ok(Datagram::Closed);
    }
    Ok(Datagram::Message { length: message.bytes, complete: !message.flags.contains(ReturnFlags::CTRUNC) })
}

fn retry_interrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => continue,
            result => return result,
        }
    }
}
