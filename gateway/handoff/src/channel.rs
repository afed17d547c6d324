//! The two ends of a pool connection, and the only place where descriptors are passed.
use std::{
    io::{self, IoSlice, IoSliceMut},
    iter::Zip,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
    sync::Arc,
    time::Duration,
    vec::Drain,
};

use arrayvec::ArrayVec;
use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
    },
    time::{ClockId, clock_gettime},
};

use crate::{
    Connection, Error, FunctionsDirectory, Hello, MAX_BATCH, PoolConnection, StatusReader, StatusWriter,
    message::{self, Bytes, are_connections, decode_connections, decode_hello},
    moving::{
        Flight, GatewayMessage, Grant, InstanceMessage, LONGEST_MESSAGE_BYTES, Move, WorkerId,
        decode_gateway_message, decode_instance_message, encode_gateway_message, encode_instance_message,
    },
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

impl From<Errno> for SendError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::WouldBlock,
            Errno::TOOMANYREFS => Self::TooManyReferences,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::CONNREFUSED => Self::Closed,
            errno => Self::Io(errno.into()),
        }
    }
}

/// The gateway's end of a pool connection.
pub struct GatewayEnd {
    socket: OwnedFd,
}

/// What the gateway receives first.
pub enum Greeting {
    Hello(Hello, StatusReader),
    WouldBlock,
    Closed,
}

/// What the gateway receives after HELLO.
pub enum FromInstance<'a> {
    /// Everything but RETURN, which is below with its socket.
    Message(InstanceMessage<'a>),
    Return(Move<'a>, OwnedFd),
    WouldBlock,
    Closed,
}

/// Memory for one message, used again and again.
pub struct MessageBuffer(Box<[u8]>);

impl Default for MessageBuffer {
    fn default() -> Self {
        Self(vec![0; LONGEST_MESSAGE_BYTES].into_boxed_slice())
    }
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

    /// The first message, if it is there. Any error means that the instance doesn't speak this protocol: drop the end.
    pub fn receive_hello(&self) -> Result<Greeting, Error> {
        let mut bytes = [0; message::HELLO_BYTES];
        let (datagram, mut descriptors) = self.receive_into(&mut bytes)?;
        let length = match datagram {
            Datagram::Message { length, complete: true } => length,
            Datagram::Message { complete: false, .. } => return Err(Error::OutOfDescriptors { lost: 0 }),
            Datagram::WouldBlock => return Ok(Greeting::WouldBlock),
            Datagram::Closed => return Ok(Greeting::Closed),
        };
        let hello = decode_hello(&bytes[..length])?;
        let page = descriptors.only(1)?.ok_or(Error::Descriptors { expected: 1, got: 0 })?;
        Ok(Greeting::Hello(hello, StatusReader::open(page)?))
    }

    /// The next message after HELLO, if one is there. After `Error::OutOfDescriptors` the end works on; after any
    /// other error drop it.
    pub fn receive<'a>(&self, buffer: &'a mut MessageBuffer) -> Result<FromInstance<'a>, Error> {
        let (datagram, mut descriptors) = self.receive_into(&mut buffer.0)?;
        let (length, complete) = match datagram {
            Datagram::Message { length, complete } => (length, complete),
            Datagram::WouldBlock => return Ok(FromInstance::WouldBlock),
            Datagram::Closed => return Ok(FromInstance::Closed),
        };
        match decode_instance_message(&buffer.0[..length])? {
            InstanceMessage::Return(_) if !complete => Err(Error::OutOfDescriptors { lost: 1 }),
            InstanceMessage::Return(moved) => match descriptors.only(1)? {
                Some(socket) => Ok(FromInstance::Return(moved, socket)),
                None => Err(Error::Descriptors { expected: 1, got: 0 }),
            },
            message => descriptors.only(0).map(|_| FromInstance::Message(message)),
        }
    }

    fn receive_into(&self, bytes: &mut [u8]) -> Result<(Datagram, Taken), Error> {
        let mut taken = Taken::default();
        let datagram = receive(self.socket.as_fd(), bytes, |fd| taken.take(fd))?;
        Ok((datagram, taken))
    }

    /// Says something that carries no descriptor.
    pub fn say(&self, message: &GatewayMessage<'_>) -> Result<(), SendError> {
        debug_assert!(!matches!(message, GatewayMessage::Moved(_)));
        let mut fixed = Bytes::new();
        let end = encode_gateway_message(message, &mut fixed);
        send(self.socket.as_fd(), &[&fixed, end], &[]).map_err(SendError::from)
    }

    /// Hands a connection over that moves; ownership as in [`GatewayEnd::send`].
    pub fn send_moved(&self, moved: &Move<'_>, socket: BorrowedFd<'_>) -> Result<(), SendError> {
        let mut fixed = Bytes::new();
        let end = encode_gateway_message(&GatewayMessage::Moved(*moved), &mut fixed);
        send(self.socket.as_fd(), &[&fixed, end], &[socket]).map_err(SendError::from)
    }

    /// Says that nothing more will come; what is queued can still be received.
    pub fn stop_sending(&self) -> Result<(), Error> {
        shutdown(&self.socket, Shutdown::Write).map_err(|errno| Error::Shutdown(errno.into()))
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
        send(self.socket.as_fd(), &[&bytes], &descriptors[..sent])?;
        Ok(sent)
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
    status: Arc<StatusWriter>,
}

/// What the instance receives.
pub enum Received<'a> {
    /// Connections with their sockets; those that the caller doesn't take out are closed.
    Connections(Arrivals<'a>),
    /// A connection that comes from another function.
    Moved(Move<'a>, OwnedFd),
    Grant(Grant),
    Flight(Flight<'a>),
    /// That worker takes nothing more: say [`InstanceMessage::Revoked`] after the last connection for it.
    Revoke(WorkerId),
    WouldBlock,
    Closed,
}

/// The connections of one message.
pub type Arrivals<'a> = Zip<Drain<'a, Connection>, Drain<'a, OwnedFd>>;

/// Memory that receiving uses again and again; one for each thread that receives.
pub struct ReceiveBuffer {
    bytes: MessageBuffer,
    connections: Vec<Connection>,
    descriptors: Vec<OwnedFd>,
}

impl InstanceEnd {
    /// Says HELLO on a new pool connection, with a status page made for it.
    pub fn greet(connection: PoolConnection, hello: &Hello) -> Result<Self, Error> {
        let status = Arc::new(StatusWriter::create()?);
        let mut bytes = Bytes::new();
        message::encode_hello(hello, &mut bytes);
        send(connection.socket.as_fd(), &[&bytes], &[status.as_fd()])
            .map_err(|errno| Error::SendHello(errno.into()))?;
        Ok(Self { socket: connection.socket, status })
    }

    /// The page may be written to after the end is gone, because the gateway reads it for as long as it counts.
    pub fn status(&self) -> &Arc<StatusWriter> {
        &self.status
    }

    /// Says something that carries no descriptor.
    pub fn say(&self, message: &InstanceMessage<'_>) -> Result<(), SendError> {
        debug_assert!(!matches!(message, InstanceMessage::Return(_)));
        let mut fixed = Bytes::new();
        let end = encode_instance_message(message, &mut fixed);
        send(self.socket.as_fd(), &[&fixed, end], &[]).map_err(SendError::from)
    }

    /// Gives a connection back that belongs to another function. Once this returned `Ok` it is the gateway's: the
    /// caller closes its copy. After an error nobody has seen the payload, and it may be sent again.
    pub fn give_back(&self, moved: &Move<'_>, socket: BorrowedFd<'_>) -> Result<(), SendError> {
        let mut fixed = Bytes::new();
        let end = encode_instance_message(&InstanceMessage::Return(*moved), &mut fixed);
        send(self.socket.as_fd(), &[&fixed, end], &[socket]).map_err(SendError::from)
    }

    /// The next message, if one is there. What came out of the queue is counted as taken on the status page, also when
    /// it turns out to be unusable. After `Error::OutOfDescriptors` the end works on; after any other error drop it.
    pub fn receive<'a>(&self, buffer: &'a mut ReceiveBuffer) -> Result<Received<'a>, Error> {
        let ReceiveBuffer { bytes, connections, descriptors } = buffer;
        connections.clear();
        descriptors.clear();
        let received = receive(self.socket.as_fd(), &mut bytes.0, |fd| descriptors.push(fd));
        let (length, complete) = match received {
            Ok(Datagram::Message { length, complete }) => (length, complete),
            Ok(Datagram::WouldBlock) => return Ok(Received::WouldBlock),
            Ok(Datagram::Closed) => return Ok(Received::Closed),
            Err(error) => {
                self.status.add_taken(descriptors.len());
                descriptors.clear();
                return Err(error);
            }
        };
        let message = &bytes.0[..length];
        if are_connections(message) {
            let decoded = decode_connections(message, connections);
            let judged = match (decoded, connections.len()) {
                (Err(error), _) => Err(Error::from(error)),
                (Ok(()), lost) if !complete => Err(Error::OutOfDescriptors { lost }),
                (Ok(()), expected) if expected != descriptors.len() => {
                    Err(Error::Descriptors { expected, got: descriptors.len() })
                }
                (Ok(()), _) => Ok(()),
            };
            // A broken message's records can't be counted, a truncated one's descriptors are too few.
            self.status.add_taken(connections.len().max(descriptors.len()));
            if let Err(error) = judged {
                // Their clients learn of it now, not when the buffer is used again.
                descriptors.clear();
                return Err(error);
            }
            self.count_waits(connections);
            return Ok(Received::Connections(connections.drain(..).zip(descriptors.drain(..))));
        }
        let decoded = decode_gateway_message(message);
        let expected = usize::from(matches!(decoded, Ok(GatewayMessage::Moved(_))));
        let got = descriptors.len();
        self.status.add_taken(expected.max(got));
        let socket = descriptors.pop();
        descriptors.clear();
        match (decoded?, socket) {
            (GatewayMessage::Moved(_), _) if !complete => Err(Error::OutOfDescriptors { lost: 1 }),
            _ if got != expected => Err(Error::Descriptors { expected, got }),
            (GatewayMessage::Moved(moved), Some(socket)) => Ok(Received::Moved(moved, socket)),
            (GatewayMessage::Moved(_), None) => Err(Error::Descriptors { expected, got }),
            (GatewayMessage::Grant(grant), _) => Ok(Received::Grant(grant)),
            (GatewayMessage::Flight(flight), _) => Ok(Received::Flight(flight)),
            (GatewayMessage::Revoke(worker), _) => Ok(Received::Revoke(worker)),
        }
    }

    fn count_waits(&self, connections: &[Connection]) {
        let now_ns = monotonic_ns();
        for connection in connections {
            let wait_ns = now_ns.saturating_sub(connection.accepted_at_ns);
            self.status.counters().wait(Duration::from_nanos(wait_ns));
        }
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
            bytes: MessageBuffer::default(),
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

enum Datagram {
    /// `complete` is false when the kernel could not install all of the message's descriptors.
    Message {
        length: usize,
        complete: bool,
    },
    WouldBlock,
    Closed,
}

fn send(socket: BorrowedFd, parts: &[&[u8]], descriptors: &[BorrowedFd]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors));
    debug_assert!(fits, "callers pass at most MAX_BATCH descriptors");
    let parts: ArrayVec<IoSlice, 2> = parts.iter().map(|part| IoSlice::new(part)).collect();
    // A SOCK_SEQPACKET message is queued whole or not at all.
    retry(Errno::INTR, || sendmsg(socket, &parts, &mut control, SEND)).map(|_| ())
}

/// Receives one message; each of its descriptors is given to `take`, close-on-exec, before anything is judged.
fn receive(socket: BorrowedFd, bytes: &mut [u8], mut take: impl FnMut(OwnedFd)) -> Result<Datagram, Error> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // ECONNRESET says that the other end closed without having read everything. It is said once, and hides neither what
    // that end sent before nor its end of file.
    let received = retry(Errno::CONNRESET, || {
        retry(Errno::INTR, || recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RECEIVE))
    });
    let message = match received {
        Ok(message) => message,
        Err(Errno::AGAIN) => return Ok(Datagram::WouldBlock),
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

/// The clock that a gateway on this host stamps connections with.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn retry<T>(transient: Errno, mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(errno) if errno == transient => continue,
            result => return result,
        }
    }
}

/// The descriptors of one message; more than one is never right here, and what isn't taken out is closed.
#[derive(Default)]
struct Taken {
    first: Option<OwnedFd>,
    count: usize,
}

impl Taken {
    fn take(&mut self, fd: OwnedFd) {
        self.count += 1;
        self.first.get_or_insert(fd);
    }

    fn only(&mut self, expected: usize) -> Result<Option<OwnedFd>, Error> {
        match self.count {
            got if got == expected => Ok(self.first.take()),
            got => Err(Error::Descriptors { expected, got }),
        }
    }
}
