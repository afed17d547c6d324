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
    Connection, DecodeError, Error, FunctionsDirectory, Hello, MAX_BATCH, PoolConnection, StatusReader,
    StatusWriter,
    message::{self, Bytes, are_connections, decode_connections, decode_hello},
    moving::{
        Decoded, GatewayMessage, InstanceMessage, LONGEST_MESSAGE_BYTES, MAX_MOVES, Move,
        decode_gateway_message, decode_instance_message, encode_gateway_message, encode_instance_message,
        encode_moved, encode_return, moves_in_a_message,
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
    Message(InstanceMessage<'a>),
    /// Connections that are given back, each with its socket; those that the caller doesn't take out are closed.
    Return(Vec<Move<'a>>, Drain<'a, OwnedFd>),
    WouldBlock,
    Closed,
}

/// Memory for one message, used again and again.
pub struct MessageBuffer {
    bytes: Box<[u8]>,
    descriptors: Vec<OwnedFd>,
}

impl Default for MessageBuffer {
    fn default() -> Self {
        Self {
            bytes: vec![0; LONGEST_MESSAGE_BYTES].into_boxed_slice(),
            descriptors: Vec::with_capacity(MAX_BATCH),
        }
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
        let mut descriptors = Vec::new();
        let received = receive(self.socket.as_fd(), &mut bytes, |fd| descriptors.push(fd))?;
        let length = match received {
            Datagram::Message { length, complete: true } => length,
            Datagram::Message { complete: false, .. } => return Err(Error::OutOfDescriptors { lost: 0 }),
            Datagram::WouldBlock => return Ok(Greeting::WouldBlock),
            Datagram::Closed => return Ok(Greeting::Closed),
        };
        let hello = decode_hello(&bytes[..length])?;
        let got = descriptors.len();
        match (descriptors.pop(), got) {
            (Some(page), 1) => Ok(Greeting::Hello(hello, StatusReader::open(page)?)),
            _ => Err(Error::Descriptors { expected: 1, got }),
        }
    }

    /// The next message after HELLO, if one is there. After `Error::OutOfDescriptors` the end works on; after any
    /// other error drop it.
    pub fn receive<'a>(&self, buffer: &'a mut MessageBuffer) -> Result<FromInstance<'a>, Error> {
        let MessageBuffer { bytes, descriptors } = buffer;
        descriptors.clear();
        let received = receive(self.socket.as_fd(), bytes, |fd| descriptors.push(fd));
        let Ok(Datagram::Message { length, complete }) = received else {
            // An empty message may have had some.
            descriptors.clear();
            return received.map(|datagram| match datagram {
                Datagram::WouldBlock => FromInstance::WouldBlock,
                _ => FromInstance::Closed,
            });
        };
        Ok(match judge(decode_instance_message(&bytes[..length]), descriptors, complete)? {
            Decoded::Moves(moves) => FromInstance::Return(moves, descriptors.drain(..)),
            Decoded::Said(message) => FromInstance::Message(message),
        })
    }

    /// Says something that carries no descriptor.
    pub fn say(&self, message: &GatewayMessage<'_>) -> Result<(), SendError> {
        let mut fixed = Bytes::new();
        let end = encode_gateway_message(message, &mut fixed);
        send(self.socket.as_fd(), &[&fixed, end], &[]).map_err(SendError::from)
    }

    /// Hands over connections that move, as many as fit into one message, and says how many those are; ownership as in
    /// [`GatewayEnd::send`].
    pub fn send_moved(&self, moves: &[Move<'_>], sockets: &[BorrowedFd<'_>]) -> Result<usize, SendError> {
        send_moves(self.socket.as_fd(), encode_moved, moves, sockets)
    }

    /// Says that nothing more will come, to an instance that knows no DRAINED; what is queued can still be received.
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
    /// Connections that come from other functions, likewise.
    Moved(Vec<Move<'a>>, Drain<'a, OwnedFd>),
    Message(GatewayMessage<'a>),
    WouldBlock,
    Closed,
}

/// The connections of one message.
pub type Arrivals<'a> = Zip<Drain<'a, Connection>, Drain<'a, OwnedFd>>;

/// Memory that receiving uses again and again; one for each thread that receives.
#[derive(Default)]
pub struct ReceiveBuffer {
    message: MessageBuffer,
    connections: Vec<Connection>,
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
        let mut fixed = Bytes::new();
        let end = encode_instance_message(message, &mut fixed);
        send(self.socket.as_fd(), &[&fixed, end], &[]).map_err(SendError::from)
    }

    /// Gives connections back that belong to other functions, as many as fit into one message, and says how many those
    /// are. Once this returned `Ok` they are the gateway's: the caller closes its copies. After an error nobody has seen
    /// the payloads, and they may be sent again.
    pub fn give_back(&self, moves: &[Move<'_>], sockets: &[BorrowedFd<'_>]) -> Result<usize, SendError> {
        send_moves(self.socket.as_fd(), encode_return, moves, sockets)
    }

    /// The next message, if one is there. What came out of the queue is counted as taken on the status page, also when
    /// it turns out to be unusable. After `Error::OutOfDescriptors` the end works on; after any other error drop it.
    pub fn receive<'a>(&self, buffer: &'a mut ReceiveBuffer) -> Result<Received<'a>, Error> {
        let ReceiveBuffer { message: MessageBuffer { bytes, descriptors }, connections } = buffer;
        connections.clear();
        descriptors.clear();
        let received = receive(self.socket.as_fd(), bytes, |fd| descriptors.push(fd));
        let (length, complete) = match received {
            Ok(Datagram::Message { length, complete }) => (length, complete),
            Ok(Datagram::WouldBlock) => return Ok(Received::WouldBlock),
            unusable => {
                self.status.add_taken(descriptors.len());
                descriptors.clear();
                return unusable.map(|_| Received::Closed);
            }
        };
        let message = &bytes[..length];
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
        let records = decoded.as_ref().map_or(0, Decoded::descriptors);
        self.status.add_taken(records.max(descriptors.len()));
        Ok(match judge(decoded, descriptors, complete)? {
            Decoded::Moves(moves) => Received::Moved(moves, descriptors.drain(..)),
            Decoded::Said(message) => Received::Message(message),
        })
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

enum Datagram {
    /// `complete` is false when the kernel could not install all of the message's descriptors.
    Message {
        length: usize,
        complete: bool,
    },
    WouldBlock,
    Closed,
}

/// A message's records, and what ends each of them.
const PARTS_MAX: usize = 1 + MAX_MOVES;

fn send_moves(
    socket: BorrowedFd,
    encode: fn(&[Move<'_>], &mut Bytes),
    moves: &[Move<'_>],
    sockets: &[BorrowedFd<'_>],
) -> Result<usize, SendError> {
    debug_assert_eq!(moves.len(), sockets.len());
    let sent = moves_in_a_message(moves).min(sockets.len());
    if sent == 0 {
        return Ok(0);
    }
    let moves = &moves[..sent];
    let mut fixed = Bytes::new();
    encode(moves, &mut fixed);
    let mut parts = ArrayVec::<&[u8], PARTS_MAX>::new();
    parts.push(&fixed);
    parts.extend(moves.iter().map(|moved| moved.payload));
    send(socket, &parts, &sockets[..sent])?;
    Ok(sent)
}

/// Holds a message against the descriptors that came with it. Those of an unusable one are closed at once, so that their
/// clients learn of it now.
fn judge<'a, M>(
    decoded: Result<Decoded<'a, M>, DecodeError>,
    descriptors: &mut Vec<OwnedFd>,
    complete: bool,
) -> Result<Decoded<'a, M>, Error> {
    let got = descriptors.len();
    let judged = decoded.map_err(Error::from).and_then(|decoded| match decoded.descriptors() {
        lost if !complete && lost > 0 => Err(Error::OutOfDescriptors { lost }),
        expected if expected != got => Err(Error::Descriptors { expected, got }),
        _ => Ok(decoded),
    });
    if judged.is_err() {
        descriptors.clear();
    }
    judged
}

fn send(socket: BorrowedFd, parts: &[&[u8]], descriptors: &[BorrowedFd]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors));
    debug_assert!(fits, "callers pass at most MAX_BATCH descriptors");
    let parts: ArrayVec<IoSlice, PARTS_MAX> = parts.iter().map(|part| IoSlice::new(part)).collect();
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
