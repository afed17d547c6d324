//! What a worker says to one gateway, in the order in which it is said.
//!
//! Luggage is opened in the order in which it was sealed, and a lease's end is confirmed after the last connection that
//! used it: when the gateway is behind, everything waits in line.
use std::{
    cell::RefCell,
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    time::Duration,
};

use common::FunctionName;
use handoff::{Connection, Flight, InstanceEnd, InstanceMessage, Move, Role, SendError, WorkerId};
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
    /// A connection that is given back; it is closed if nobody takes the letter.
    Return {
        connection: Connection,
        peer: WorkerId,
        payload: Zeroizing<Vec<u8>>,
        socket: OwnedFd,
    },
    Revoked(WorkerId),
}

pub struct Post {
    /// Tells this pool connection from all others that the worker has had.
    number: u32,
    end: Rc<Readable<InstanceEnd>>,
    /// The first one is tried again and again.
    waiting: RefCell<VecDeque<Letter>>,
}

impl Post {
    pub fn new(number: u32, end: Rc<Readable<InstanceEnd>>) -> Self {
        Self { number, end, waiting: RefCell::default() }
    }

    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn end(&self) -> &Rc<Readable<InstanceEnd>> {
        &self.end
    }

    pub fn send(self: &Rc<Self>, letter: Letter) {
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
                if let Letter::Return { connection, .. } = letter {
                    tracing::warn!(id = connection.id, %error, "a connection could not move, and was closed");
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
            Self::Return { connection, peer, payload, socket } => {
                let moved = Move { connection: *connection, peer: *peer, payload };
                end.give_back(&moved, socket.as_fd())
            }
            Self::Revoked(worker) => end.say(&InstanceMessage::Revoked(*worker)),
        }
    }
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
