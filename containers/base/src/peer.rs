//! The client's address, asked of its socket when somebody wants to know.
use std::{
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

/// A request's extension: the address of the client that sent it.
///
/// Asking costs a system call unless the gateway knew the address, so it waits until a handler asks.
#[derive(Clone, Debug)]
pub struct PeerAddr(Arc<Mutex<State>>);

#[derive(Clone, Copy, Debug)]
enum State {
    Known(SocketAddr),
    /// The descriptor is open for as long as this state lasts.
    Ask(RawFd),
    Unknown,
}

impl PeerAddr {
    /// The address; `None` when nobody asked before the connection was gone.
    pub fn get(&self) -> Option<SocketAddr> {
        let mut state = self.lock();
        if let State::Ask(fd) = *state {
            // SAFETY: whoever owns the descriptor calls `settle` before it is closed or given away, and settling
            // takes the lock that is held here.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            *state = ask(fd).map_or(State::Unknown, State::Known);
        }
        match *state {
            State::Known(address) => Some(address),
            State::Ask(_) | State::Unknown => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn settle(&mut self) {
        if matches!(self, Self::Ask(_)) {
            *self = Self::Unknown;
        }
    }
}

fn ask(fd: BorrowedFd<'_>) -> Option<SocketAddr> {
    socket2::SockRef::from(&fd).peer_addr().ok()?.as_socket()
}

/// What a socket's owner keeps, so that nobody asks the socket after it is gone.
#[derive(Debug)]
pub(crate) struct Asked {
    address: Option<SocketAddr>,
    /// Made for the first request, because a connection may have none.
    shared: OnceLock<PeerAddr>,
}

impl Asked {
    pub(crate) const fn new(address: Option<SocketAddr>) -> Self {
        Self { address, shared: OnceLock::new() }
    }

    pub(crate) fn known(&self) -> Option<SocketAddr> {
        self.address
    }

    pub(crate) fn share(&self, fd: BorrowedFd<'_>) -> PeerAddr {
        let state = self.address.map_or(State::Ask(fd.as_raw_fd()), State::Known);
        self.shared.get_or_init(|| PeerAddr(Arc::new(Mutex::new(state)))).clone()
    }

    /// The descriptor is about to leave its owner.
    pub(crate) fn settle(&self) {
        if let Some(shared) = self.shared.get() {
            shared.lock().settle();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpStream, os::fd::OwnedFd};

    use crate::socket::Socket;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0, client)
    }

    #[test]
    fn the_socket_is_asked_while_it_is_open_and_never_after() {
        let (server, client) = pair();
        let socket = Socket::from(server);
        let (asked, late) = (socket.peer().unwrap(), socket.peer().unwrap());
        assert_eq!(asked.get(), Some(client.local_addr().unwrap()));
        assert_eq!(late.get(), asked.get());

        let (server, _client) = pair();
        let socket = Socket::from(server);
        let (dropped, clone) = (socket.peer().unwrap(), socket.peer().unwrap());
        drop(socket);
        assert_eq!(dropped.get(), None);
        assert_eq!(clone.get(), None);
    }

    #[test]
    fn a_descriptor_that_was_given_away_is_not_asked() {
        let (server, _client) = pair();
        let socket = Socket::from(server);
        let peer = socket.peer().unwrap();
        let _fd: OwnedFd = socket.leave().unwrap();
        assert_eq!(peer.get(), None);
    }

    #[test]
    fn what_the_gateway_knew_needs_no_socket() {
        let (server, _client) = pair();
        let address = "192.0.2.1:1234".parse().unwrap();
        let socket = Socket::new(server.into(), Some(address));
        let peer = socket.peer().unwrap();
        drop(socket);
        assert_eq!(peer.get(), Some(address));
    }
}
