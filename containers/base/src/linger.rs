//! Closing a connection whose client may still be sending, so that the answer isn't lost to a reset.
use std::{cell::Cell, future::poll_fn, mem::MaybeUninit, pin::Pin, rc::Rc, task::Poll, time::Duration};

use tokio::{
    io::{AsyncRead, ReadBuf},
    time::timeout,
};

use crate::socket::Socket;

/// A client that hasn't seen the end after this is not looking.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);

/// What a client may send into the void; more than any socket buffer of its side holds.
const LINGER_BYTES: usize = 8 << 20;

/// Sockets that one worker keeps only to let their clients read the answer.
const LINGERERS: usize = 1024;

/// Bounds how many connections linger: a flood must not hold descriptors.
#[derive(Clone, Default)]
pub struct Linger(Rc<Cell<usize>>);

impl Linger {
    /// Ends our side, and reads what comes until the client ends its own or a bound is reached.
    pub async fn close(&self, mut socket: Socket) {
        if socket.shutdown_write().is_err() || self.0.get() >= LINGERERS {
            return;
        }
        let _counted = Counted::new(&self.0);
        // However it ends, the socket is closed now.
        let _ = timeout(LINGER_TIMEOUT, drain(&mut socket)).await;
    }
}

async fn drain(socket: &mut Socket) {
    let mut drained_bytes = 0;
    poll_fn(|cx| {
        while drained_bytes < LINGER_BYTES {
            let mut bytes = [MaybeUninit::uninit(); 16 * 1024];
            let mut buffer = ReadBuf::uninit(&mut bytes);
            match Pin::new(&mut *socket).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => drained_bytes += buffer.filled().len(),
                Poll::Ready(_) => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    })
    .await;
}

struct Counted<'a>(&'a Cell<usize>);

impl<'a> Counted<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpStream,
    };

    use super::*;

    fn pair() -> (Socket, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Socket::from(listener.accept().unwrap().0), client)
    }

    #[tokio::test]
    async fn an_answer_survives_what_nobody_read() {
        let (socket, mut client) = pair();
        let writer = std::thread::spawn(move || {
            client.write_all(&vec![b'x'; 4 << 20]).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).map(|_| answer)
        });
        socket.send_now(b"the answer").unwrap();
        Linger::default().close(socket).await;
        assert_eq!(writer.join().unwrap().unwrap(), "the answer");
    }

    #[tokio::test]
    async fn a_client_that_never_ends_is_cut_in_bytes() {
        let (socket, mut client) = pair();
        let writer = std::thread::spawn(move || {
            let block = vec![b'x'; 1 << 20];
            (0..64).find_map(|_| client.write_all(&block).err())
        });
        Linger::default().close(socket).await;
        assert!(writer.join().unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_cut_in_time() {
        let (socket, client) = pair();
        let begin = tokio::time::Instant::now();
        Linger::default().close(socket).await;
        assert_eq!(begin.elapsed(), LINGER_TIMEOUT);
        drop(client);
    }

    #[tokio::test]
    async fn a_flood_is_not_waited_for() {
        let linger = Linger(Rc::new(Cell::new(LINGERERS)));
        let (socket, mut client) = pair();
        linger.close(socket).await;
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    }
}
