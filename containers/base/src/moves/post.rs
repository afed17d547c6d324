//! What a worker says to one gateway, in the order in which it is said.
//!
//! Luggage is opened in the order in which it was sealed, and a lease's end is confirmed after the last connection that
//! used it: when the gateway is behind, everything waits in line.
use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    mem,
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use arrayvec::ArrayVec;
use common::FunctionName;
use handoff::{
    Connection, Flight, InstanceEnd, InstanceMessage, MAX_MOVES, Move, PAYLOAD_BYTES, Role, SendError,
    StatusWriter, WorkerId,
};
use tokio::{task::spawn_local, time::sleep};
use zeroize::Zeroizing;

use crate::readable::Readable;

/// How soon a gateway that is behind is tried again.
const PAUSE: Duration = Duration::from_millis(1);

/// A message with all that it holds.
pub enum Letter {
    Ask(FunctionName),
    Flight {
        peer: WorkerId,
        function: FunctionName,
        agreement: u64,
        from: Role,
        bytes: Vec<u8>,
    },
    /// Connections that are given back with one message; they are closed if nobody takes the letter.
    Return(Vec<Departure>),
    Revoked(WorkerId),
    /// The worker stops.
    Drain,
}

/// A connection that is given back.
pub struct Departure {
    pub connection: Connection,
    pub peer: WorkerId,
    pub payload: Zeroizing<Vec<u8>>,
    pub socket: OwnedFd,
}

impl Departure {
    fn message(&self) -> Move<'_> {
        Move { connection: self.connection, peer: self.peer, payload: &self.payload }
    }
}

pub struct Post {
    /// Tells this pool connection from all others that the worker has had.
    number: u32,
    end: Readable<InstanceEnd>,
    /// What leaves with the next message.
    departing: RefCell<Vec<Departure>>,
    /// The first one is tried again and again.
    waiting: RefCell<VecDeque<Letter>>,
    drained: Cell<bool>,
}

impl Post {
    pub fn new(number: u32, end: Readable<InstanceEnd>) -> Self {
        Self {
            number,
            end,
            departing: RefCell::default(),
            waiting: RefCell::default(),
            drained: Cell::new(false),
        }
    }

    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn end(&self) -> &Readable<InstanceEnd> {
        &self.end
    }

    /// The page that the gateway reads.
    pub fn status(&self) -> &Arc<StatusWriter> {
        self.end.get_ref().status()
    }

    /// No connection comes from this gateway any more.
    pub fn is_drained(&self) -> bool {
        self.drained.get()
    }

    pub fn note_drained(&self) {
        self.drained.set(true);
    }

    pub fn send(self: &Rc<Self>, letter: Letter) {
        self.send_departing();
        self.put(letter);
    }

    /// Gives a connection back. Those that leave in one turn of the worker go with one message: the first one's task sends
    /// it when all who have their turn now have had it.
    pub async fn depart(self: &Rc<Self>, departure: Departure) {
        if self.is_filled_by(&departure) {
            self.send_departing();
        }
        let first = {
            let mut departing = self.departing.borrow_mut();
            departing.push(departure);
            departing.len() == 1
        };
        if first {
            end_of_turn().await;
            self.send_departing();
        }
    }

    /// Waits until nothing is left to be sent, or nobody is there for it.
    pub async fn finished(&self) {
        while !(self.departing.borrow().is_empty() && self.waiting.borrow().is_empty()) {
            sleep(PAUSE).await;
        }
    }

    fn is_filled_by(&self, departure: &Departure) -> bool {
        let departing = self.departing.borrow();
        let payload_bytes: usize = departing.iter().map(|departing| departing.payload.len()).sum();
        departing.len() >= MAX_MOVES || payload_bytes + departure.payload.len() > PAYLOAD_BYTES
    }

    fn send_departing(self: &Rc<Self>) {
        let departing = self.departing.take();
        if !departing.is_empty() {
            self.put(Letter::Return(departing));
        }
    }

    fn put(self: &Rc<Self>, letter: Letter) {
        let mut waiting = self.waiting.borrow_mut();
        let first = waiting.is_empty();
        if first && self.is_done_with(&letter) {
            return;
        }
        waiting.push_back(letter);
        if first {
            spawn_local(deliver(Rc::downgrade(self)));
        }
    }

    /// Sends a letter; false if it has to be tried again.
    fn is_done_with(&self, letter: &Letter) -> bool {
        match letter.post(self.end.get_ref()) {
            Ok(()) => true,
            Err(SendError::WouldBlock | SendError::TooManyReferences) => false,
            Err(error) => {
                if let Letter::Return(departures) = letter {
                    for departure in departures {
                        let id = departure.connection.id;
                        tracing::warn!(id, %error, "a connection could not move, and was closed");
                    }
                }
                true
            }
        }
    }
}

impl Letter {
    fn post(&self, end: &InstanceEnd) -> Result<(), SendError> {
        match self {
            Self::Ask(function) => end.say(&InstanceMessage::Ask(*function)),
            Self::Flight { peer, function, agreement, from, bytes } => {
                let (peer, function, agreement, from) = (*peer, *function, *agreement, *from);
                end.say(&InstanceMessage::Flight(Flight { peer, function, agreement, from, bytes }))
            }
            Self::Return(departures) => {
                let moves: ArrayVec<_, MAX_MOVES> = departures.iter().map(Departure::message).collect();
                let sockets: ArrayVec<_, MAX_MOVES> =
                    departures.iter().map(|departure| departure.socket.as_fd()).collect();
                let sent = end.give_back(&moves, &sockets)?;
                debug_assert_eq!(sent, departures.len());
                Ok(())
            }
            Self::Revoked(worker) => end.say(&InstanceMessage::Revoked(*worker)),
            Self::Drain => end.say(&InstanceMessage::Drain),
        }
    }
}

/// Goes on when the tasks that are ready now have run.
async fn end_of_turn() {
    let mut waited = false;
    poll_fn(|cx| {
        if mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Tries until all is sent or the pool connection is gone.
async fn deliver(post: Weak<Post>) {
    loop {
        sleep(PAUSE).await;
        let Some(post) = post.upgrade() else { return };
        let mut waiting = post.waiting.borrow_mut();
        while let Some(first) = waiting.front() {
            if !post.is_done_with(first) {
                break;
            }
            waiting.pop_front();
        }
        if waiting.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, path::Path};

    use common::Protocol;
    use handoff::{
        AllowedUids, FromInstance, GatewayEnd, Greeting, Hello, MessageBuffer, PoolListener, Purpose,
    };
    use socket2::{Domain, SockAddr, Socket, Type};
    use tokio::task::LocalSet;

    use super::*;

    /// What arrived with one message: the connections' numbers, or that something else was said.
    #[derive(Debug, PartialEq, Eq)]
    enum Arrived {
        Returned(Vec<u64>),
        Said,
    }

    fn listener(path: &Path) -> PoolListener {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        socket.bind(&SockAddr::unix(path).unwrap()).unwrap();
        socket.listen(1).unwrap();
        PoolListener::new(socket.into()).unwrap()
    }

    fn departure(id: u64, payload_bytes: usize) -> Departure {
        let connection = Connection {
            id,
            accepted_at_ns: 0,
            protocol: Protocol::Http,
            purpose: Purpose::Serve("hello".parse().unwrap()),
            peer: None,
            local: None,
        };
        let (socket, _client) = UnixStream::pair().unwrap();
        let payload = Zeroizing::new(vec![0; payload_bytes]);
        Departure { connection, peer: WorkerId(1), payload, socket: socket.into() }
    }

    /// What the gateway sees of a worker that does this in one turn.
    fn seen(turn: impl FnOnce(&Rc<Post>)) -> Vec<Arrived> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("echo.sock");
        let listener = listener(&path);
        let gateway = GatewayEnd::connect(&path).unwrap();
        let connection = listener.accept(&AllowedUids::RootAndOwn).unwrap().unwrap();
        let hello = Hello { worker: 0, workers: 1, pid: 1, features: Hello::MOVES };
        let end = InstanceEnd::greet(connection, &hello).unwrap();
        assert!(matches!(gateway.receive_hello(), Ok(Greeting::Hello(..))));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tasks = LocalSet::new();
        runtime.block_on(async {
            let post = Rc::new(Post::new(0, Readable::new(end).unwrap()));
            tasks.run_until(async { turn(&post) }).await;
            tasks.await;
        });
        let mut buffer = MessageBuffer::default();
        let mut arrived = Vec::new();
        loop {
            arrived.push(match gateway.receive(&mut buffer).unwrap() {
                FromInstance::Return(moves, sockets) => {
                    assert_eq!(moves.len(), sockets.len());
                    Arrived::Returned(moves.iter().map(|moved| moved.connection.id).collect())
                }
                FromInstance::Message(_) => Arrived::Said,
                FromInstance::WouldBlock | FromInstance::Closed => return arrived,
            });
        }
    }

    fn leave(post: &Rc<Post>, departure: Departure) {
        let post = Rc::clone(post);
        spawn_local(async move { post.depart(departure).await });
    }

    #[test]
    fn what_leaves_in_one_turn_goes_with_one_message() {
        let seen = seen(|post| (0..5).for_each(|id| leave(post, departure(id, 10))));
        assert_eq!(seen, [Arrived::Returned(vec![0, 1, 2, 3, 4])]);
    }

    #[test]
    fn a_message_that_is_full_goes_at_once() {
        let count = MAX_MOVES as u64 + 2;
        let many = seen(|post| (0..count).for_each(|id| leave(post, departure(id, 0))));
        let full = MAX_MOVES as u64;
        assert_eq!(many, [Arrived::Returned((0..full).collect()), Arrived::Returned(vec![full, full + 1])]);

        let large = seen(|post| (0..3).for_each(|id| leave(post, departure(id, PAYLOAD_BYTES / 2))));
        assert_eq!(large, [Arrived::Returned(vec![0, 1]), Arrived::Returned(vec![2])]);
    }

    #[test]
    fn what_is_said_afterwards_arrives_afterwards() {
        let seen = seen(|post| {
            leave(post, departure(0, 0));
            leave(post, departure(1, 0));
            let post = Rc::clone(post);
            spawn_local(async move { post.send(Letter::Revoked(WorkerId(1))) });
        });
        assert_eq!(seen, [Arrived::Returned(vec![0, 1]), Arrived::Said]);
    }
}
