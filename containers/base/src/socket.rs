//! A client's TCP socket that joins epoll only when a call would block.
use std::{
    io::{self, IoSlice},
    mem::{self, MaybeUninit},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::sys::socket::MsgFlags;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    task::coop,
};

use crate::peer::{Asked, PeerAddr};

const NO_WAIT: i32 = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL).bits();

const PEEK: i32 = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_PEEK).bits();

/// The receiver of a handed-over connection owns it through this; dropping it closes the connection.
///
/// A connection that carries one request ends without ever being registered, because its request is there when it
/// is received and its answer fits into the socket's buffer.
#[derive(Debug)]
pub struct Socket {
    state: State,
    peer: Asked,
    /// A second write waits for the first one's acknowledgement unless Nagle's algorithm is off, a first never does.
    wrote: bool,
    no_delay: bool,
    /// Something was sent after all had been read, which lets the gateway's kernel program let go.
    let_go: bool,
}

#[derive(Debug)]
enum State {
    /// Not known to epoll; `drained` when the last read took all there was.
    Bare { stream: TcpStream, drained: bool },
    /// Known to epoll; for writing only once a write had to wait, because room is an event that nearly always is there.
    Watched { stream: AsyncFd<TcpStream>, writes: bool },
    /// Only while it passes from one state to the other.
    Passing,
}

impl Socket {
    /// `peer` is the client's address where it is known already.
    pub fn new(fd: OwnedFd, peer: Option<SocketAddr>) -> Self {
        Self {
            state: State::Bare { stream: TcpStream::from(fd), drained: false },
            peer: Asked::new(peer),
            wrote: false,
            no_delay: false,
            let_go: false,
        }
    }

    /// What `leave` made of another's socket: its input came along, so there is hardly more.
    pub fn arrived(fd: OwnedFd, peer: Option<SocketAddr>) -> Self {
        let mut socket = Self::new(fd, peer);
        if let State::Bare { drained, .. } = &mut socket.state {
            *drained = true;
        }
        socket.no_delay = true;
        socket
    }

    /// Takes the descriptor out of epoll, so that whoever gets it next is the only one to hear of its events.
    pub fn leave(mut self) -> io::Result<OwnedFd> {
        // Said once, and not by everybody that it comes to.
        self.send_small_segments_at_once()?;
        self.peer.settle();
        match mem::replace(&mut self.state, State::Passing) {
            State::Bare { stream, .. } => Ok(stream.into()),
            State::Watched { stream, .. } => Ok(stream.into_inner().into()),
            State::Passing => Err(astray()),
        }
    }

    /// The client's address, for handlers; it may be kept longer than the socket.
    pub fn peer(&self) -> io::Result<PeerAddr> {
        Ok(self.peer.share(self.fd()?))
    }

    /// The client's address if the gateway knew it.
    pub fn known_peer(&self) -> Option<SocketAddr> {
        self.peer.known()
    }

    /// The descriptor.
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.state {
            State::Bare { stream, .. } => Ok(stream.as_fd()),
            State::Watched { stream, .. } => Ok(stream.get_ref().as_fd()),
            State::Passing => Err(astray()),
        }
    }

    /// Sends nothing, which lets the gateway's kernel program give the socket back to plain TCP.
    ///
    /// It works when everything received was read, so it belongs right after a read that would have blocked. An
    /// error is the connection's error.
    pub fn nudge(&self) -> io::Result<()> {
        match SockRef::from(&self.fd()?).send_with_flags(&[], NO_WAIT) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether input waits that nobody will read, so that closing would send a reset.
    pub fn has_unread(&self) -> bool {
        let mut byte = [MaybeUninit::uninit(); 1];
        self.fd().is_ok_and(|fd| matches!(SockRef::from(&fd).recv_with_flags(&mut byte, PEEK), Ok(1..)))
    }

    /// Ready when the client has reset the connection, which is an error, or when it has sent or ended something.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.watch_reads()?.poll_read_ready(cx))?.retain_ready();
        let mut byte = [MaybeUninit::uninit(); 1];
        match SockRef::from(&self.fd()?).recv_with_flags(&mut byte, PEEK) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }

    /// Lets closing send a reset instead of an orderly end.
    pub fn reset_on_close(&self) {
        // A socket that can't be asked for this is broken, and its client sees that.
        let _ = self.fd().and_then(|fd| SockRef::from(&fd).set_linger(Some(Duration::ZERO)));
    }

    /// Sends what the socket's buffer takes at once, without waiting for more room.
    pub fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        SockRef::from(&self.fd()?).send_with_flags(bytes, NO_WAIT)
    }

    pub fn shutdown_write(&self) -> io::Result<()> {
        match SockRef::from(&self.fd()?).shutdown(Shutdown::Write) {
            // The peer reset the connection, so there is nobody to tell.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => result,
        }
    }

    fn watch_reads(&mut self) -> io::Result<&AsyncFd<TcpStream>> {
        if let State::Bare { .. } = &self.state {
            self.prepare_to_wait()?;
            self.register(false)?;
        }
        self.watched()
    }

    fn watch_writes(&mut self, cx: &Context<'_>) -> io::Result<&AsyncFd<TcpStream>> {
        match &self.state {
            State::Bare { .. } => {
                self.prepare_to_wait()?;
                self.register(true)?;
            }
            State::Watched { writes: false, .. } => {
                self.register(true)?;
                // Whoever waits to read does so at the former registration.
                cx.waker().wake_by_ref();
            }
            _ => {}
        }
        self.watched()
    }

    fn watched(&self) -> io::Result<&AsyncFd<TcpStream>> {
        match &self.state {
            State::Watched { stream, .. } => Ok(stream),
            _ => Err(astray()),
        }
    }

    #[cold]
    fn prepare_to_wait(&mut self) -> io::Result<()> {
        // A connection that outlives its first answer sends small segments that must not wait for each other.
        self.send_small_segments_at_once()?;
        // It may wait for long, and then it shall not depend on the gateway's programs.
        if !self.let_go {
            match self.nudge() {
                // Our side has ended; the client's may go on.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn register(&mut self, writes: bool) -> io::Result<()> {
        let stream = match mem::replace(&mut self.state, State::Passing) {
            State::Bare { stream, .. } => stream,
            State::Watched { stream, .. } => stream.into_inner(),
            State::Passing => return Err(astray()),
        };
        let interest = if writes { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        // SAFETY: the stream is lent out shared only, and keeps its descriptor until it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(stream, interest) };
        let (state, result) = match watched {
            Ok(stream) => (State::Watched { stream, writes }, Ok(())),
            Err(error) => {
                let (stream, error) = error.into_parts();
                (State::Bare { stream, drained: false }, Err(error))
            }
        };
        self.state = state;
        result
    }

    fn send_small_segments_at_once(&mut self) -> io::Result<()> {
        if !mem::replace(&mut self.no_delay, true) {
            SockRef::from(&self.fd()?).set_tcp_nodelay(true)?;
        }
        Ok(())
    }

    /// One attempt without epoll, then epoll's way.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: usize,
        send: impl Fn(&SockRef<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        if mem::replace(&mut self.wrote, true) {
            self.send_small_segments_at_once()?;
        }
        let (stream, drained) = match &self.state {
            State::Bare { stream, drained } => (Some(stream), *drained),
            State::Watched { stream, writes: false } => (Some(stream.get_ref()), false),
            _ => (None, false),
        };
        if let Some(stream) = stream {
            let budget = ready!(coop::poll_proceed(cx));
            match send(&SockRef::from(stream)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => {
                    budget.made_progress();
                    self.let_go |= drained && result.is_ok();
                    return Poll::Ready(result);
                }
            }
        }
        let stream = self.watch_writes(cx)?;
        loop {
            let mut ready = ready!(stream.poll_write_ready(cx))?;
            match send(&SockRef::from(stream.get_ref())) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                result => {
                    // Less than offered has filled the socket's buffer.
                    if result.as_ref().is_ok_and(|&sent| sent < bytes) {
                        ready.clear_ready();
                    }
                    return Poll::Ready(result);
                }
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let State::Bare { stream, drained: drained @ false } = &mut self.state {
            let budget = ready!(coop::poll_proceed(cx));
            let room = buf.remaining();
            match receive(stream, buf) {
                Ok(received) => {
                    budget.made_progress();
                    *drained = is_short(received, room);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            drop(budget);
        }
        let stream = self.watch_reads()?;
        loop {
            let mut ready = ready!(stream.poll_read_ready(cx))?;
            let room = buf.remaining();
            match receive(stream.get_ref(), buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                result => {
                    if result.as_ref().is_ok_and(|&received| is_short(received, room)) {
                        ready.clear_ready();
                    }
                    return Poll::Ready(result.map(|_| ()));
                }
            }
        }
    }
}

/// Receives what there is, which also works where the descriptor's owner before has left it blocking.
fn receive(stream: &TcpStream, buf: &mut ReadBuf<'_>) -> io::Result<usize> {
    // SAFETY: recv only writes initialised bytes, so nothing in the buffer becomes uninitialised.
    let room = unsafe { buf.unfilled_mut() };
    let received = SockRef::from(stream).recv_with_flags(room, NO_WAIT)?;
    // SAFETY: the kernel wrote the first `received` bytes of the unfilled part.
    unsafe { buf.assume_init(received) };
    buf.advance(received);
    Ok(received)
}

/// Less than asked for is all there is; the end of the stream is found by the next call.
fn is_short(received: usize, room: usize) -> bool {
    0 < received && received < room
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, bytes.len(), |socket| socket.send_with_flags(bytes, NO_WAIT))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = slices.iter().map(|slice| slice.len()).sum();
        self.poll_send(cx, bytes, |socket| socket.send_vectored_with_flags(slices, NO_WAIT))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.shutdown_write())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.peer.settle();
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self::new(stream.into(), None)
    }
}

fn astray() -> io::Error {
    io::Error::other("the socket is between two states")
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        io::{Read, Write},
    };

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn pair() -> (Socket, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        (Socket::from(server), client)
    }

    fn is_watched(socket: &Socket) -> bool {
        matches!(socket.state, State::Watched { .. })
    }

    #[tokio::test]
    async fn one_request_and_its_answer_need_no_registration() {
        let (mut socket, mut client) = pair();
        client.write_all(b"ping").unwrap();
        let mut bytes = [0; 16];
        assert_eq!(socket.read(&mut bytes).await.unwrap(), 4);
        socket.write_all(b"pong").await.unwrap();
        assert!(!is_watched(&socket));
        client.read_exact(&mut bytes[..4]).unwrap();
        assert_eq!(&bytes[..4], b"pong");
    }

    #[tokio::test]
    async fn waiting_registers_and_hears_of_what_came_before() {
        let (mut socket, mut client) = pair();
        client.write_all(b"one").unwrap();
        let mut bytes = [0; 16];
        assert_eq!(socket.read(&mut bytes).await.unwrap(), 3);
        client.write_all(b"three").unwrap();
        assert_eq!(socket.read(&mut bytes).await.unwrap(), 5);
        assert!(is_watched(&socket));
        assert!(SockRef::from(&socket.fd().unwrap()).tcp_nodelay().unwrap());
        drop(client);
        assert_eq!(socket.read(&mut bytes).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn waiting_is_possible_on_one_side_and_no_way_to_miss_a_reset() {
        let (mut socket, mut client) = pair();
        socket.shutdown_write().unwrap();
        let sent = tokio::task::spawn_blocking(move || client.write_all(b"late").map(|()| client));
        let mut bytes = [0; 16];
        assert_eq!(socket.read(&mut bytes).await.unwrap(), 4);

        let (mut socket, client) = pair();
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        let error = socket.watch_reads().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        drop(sent.await.unwrap());
    }

    #[tokio::test]
    async fn more_than_the_buffer_holds_waits_for_the_reader() {
        let (mut socket, mut client) = pair();
        let sent: Vec<u8> = (0..8 << 20).map(|index: u32| (index % 251) as u8).collect();
        let expected = sent.clone();
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            client.read_to_end(&mut received).unwrap();
            received
        });
        socket.write_all(&sent).await.unwrap();
        socket.shutdown().await.unwrap();
        assert!(reader.join().unwrap() == expected);
    }

    #[tokio::test]
    async fn who_waits_to_read_is_woken_though_a_write_has_to_wait_meanwhile() {
        let (mut socket, mut client) = pair();
        let mut bytes = [0; 16];
        let sent = vec![b'x'; 8 << 20];
        let mut written = 0;
        let read = poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut bytes);
            let read = Pin::new(&mut socket).poll_read(cx, &mut buf);
            while written < sent.len()
                && let Poll::Ready(count) = Pin::new(&mut socket).poll_write(cx, &sent[written..])
            {
                written += count.unwrap();
            }
            if written < sent.len() {
                client.write_all(b"?").unwrap();
            }
            read
        });
        tokio::time::timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
        assert!(matches!(socket.state, State::Watched { writes: true, .. }) && bytes[0] == b'?');
    }

    #[tokio::test]
    async fn the_descriptor_can_be_given_away_with_its_unread_input() {
        let (mut socket, mut client) = pair();
        client.write_all(b"ab").unwrap();
        let mut byte = [0; 1];
        socket.read_exact(&mut byte).await.unwrap();
        socket.watch_reads().unwrap();
        assert!(socket.has_unread());
        socket.nudge().unwrap();
        let mut taken = TcpStream::from(socket.leave().unwrap());
        assert!(taken.nodelay().unwrap(), "whoever gets it takes this for granted");
        taken.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"b");
    }
}
