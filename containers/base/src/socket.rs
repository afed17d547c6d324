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
    io::{AsyncRead, AsyncWrite, ReadBuf},
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
}

#[derive(Debug)]
enum State {
    /// Not known to epoll; `drained` when the last read took all there was.
    Bare { stream: TcpStream, drained: bool },
    /// Known to epoll.
    Watched(tokio::net::TcpStream),
    /// The registration failed and took the socket with it.
    Lost,
}

impl Socket {
    /// `peer` is the client's address where it is known already.
    pub fn new(fd: OwnedFd, peer: Option<SocketAddr>) -> Self {
        Self {
            state: State::Bare { stream: TcpStream::from(fd), drained: false },
            peer: Asked::new(peer),
            wrote: false,
            no_delay: false,
        }
    }

    /// Takes the descriptor out of epoll, so that whoever gets it next is the only one to hear of its events.
    pub fn into_fd(mut self) -> io::Result<OwnedFd> {
        self.peer.settle();
        match mem::replace(&mut self.state, State::Lost) {
            State::Bare { stream, .. } => Ok(stream.into()),
            State::Watched(stream) => Ok(stream.into_std()?.into()),
            State::Lost => Err(lost()),
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

    /// The descriptor, unless it was lost.
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.state {
            State::Bare { stream, .. } => Ok(stream.as_fd()),
            State::Watched(stream) => Ok(stream.as_fd()),
            State::Lost => Err(lost()),
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
        ready!(self.watch()?.poll_read_ready(cx))?;
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

    fn watch(&mut self) -> io::Result<&mut tokio::net::TcpStream> {
        if let State::Bare { .. } = &self.state {
            self.register()?;
        }
        match &mut self.state {
            State::Watched(stream) => Ok(stream),
            _ => Err(lost()),
        }
    }

    #[cold]
    fn register(&mut self) -> io::Result<()> {
        // A connection that outlives its first answer sends small segments that must not wait for each other.
        self.send_small_segments_at_once()?;
        // It may wait for long, and then it shall not depend on the gateway's programs.
        match self.nudge() {
            // Our side has ended; the client's may go on.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            result => result?,
        }
        self.state = match mem::replace(&mut self.state, State::Lost) {
            State::Bare { stream, .. } => self.peer.settle_on_error(|| {
                stream.set_nonblocking(true)?;
                tokio::net::TcpStream::from_std(stream).map(State::Watched)
            })?,
            state => state,
        };
        Ok(())
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
        bare: impl FnOnce(&SockRef<'_>) -> io::Result<usize>,
        watched: impl FnOnce(Pin<&mut tokio::net::TcpStream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if mem::replace(&mut self.wrote, true) {
            self.send_small_segments_at_once()?;
        }
        if let State::Bare { stream, .. } = &self.state {
            let budget = ready!(coop::poll_proceed(cx));
            match bare(&SockRef::from(stream)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => {
                    budget.made_progress();
                    return Poll::Ready(result);
                }
            }
        }
        watched(Pin::new(self.watch()?), cx)
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
            // SAFETY: recv only writes initialised bytes, so nothing in the buffer becomes uninitialised.
            let room = unsafe { buf.unfilled_mut() };
            let room_bytes = room.len();
            match SockRef::from(&*stream).recv_with_flags(room, NO_WAIT) {
                Ok(received) => {
                    // SAFETY: the kernel wrote the first `received` bytes of the unfilled part.
                    unsafe { buf.assume_init(received) };
                    buf.advance(received);
                    // Less than asked for is all there is; the end of the stream is found by the next call.
                    budget.made_progress();
                    *drained = 0 < received && received < room_bytes;
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            drop(budget);
        }
        Pin::new(self.watch()?).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(
            cx,
            |socket| socket.send_with_flags(bytes, NO_WAIT),
            |stream, cx| stream.poll_write(cx, bytes),
        )
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(
            cx,
            |socket| socket.send_vectored_with_flags(slices, NO_WAIT),
            |stream, cx| stream.poll_write_vectored(cx, slices),
        )
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

fn lost() -> io::Error {
    io::Error::other("the socket could not be registered for events")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn pair() -> (Socket, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        (Socket::from(server), client)
    }

    fn is_watched(socket: &Socket) -> bool {
        matches!(socket.state, State::Watched(_))
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
        let error = socket.watch().unwrap_err();
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
    async fn the_descriptor_can_be_given_away_with_its_unread_input() {
        let (mut socket, mut client) = pair();
        client.write_all(b"ab").unwrap();
        let mut byte = [0; 1];
        socket.read_exact(&mut byte).await.unwrap();
        socket.watch().unwrap();
        assert!(socket.has_unread());
        socket.nudge().unwrap();
        let mut taken = TcpStream::from(socket.into_fd().unwrap());
        taken.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"b");
    }
}
