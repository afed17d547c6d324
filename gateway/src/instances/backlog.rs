//! What is to be said to one worker when its queue has room again. All waits in one line, because luggage is opened in the
//! order in which it was sealed.
use std::{
    collections::VecDeque,
    mem,
    os::fd::{AsFd, OwnedFd},
};

use common::FunctionName;
use handoff::{Connection, Flight, GatewayEnd, GatewayMessage, Grant, Move, Role, SendError, WorkerId};

use super::moves::{Leg, MoveOutcome};

/// As many connections as the queue itself holds: while more wait, nobody is granted a place. What has a place may wait
/// beyond that.
const MOVED_MAX: usize = 256;

/// Grants and flights, which others cause: who doesn't read them must not fill the gateway's memory.
const SAID_MAX: usize = 256;

#[derive(Default)]
pub struct Backlog {
    waiting: VecDeque<Waiting>,
    moved: usize,
    said: usize,
}

pub enum Waiting {
    Grant(Grant),
    Flight { peer: WorkerId, function: FunctionName, agreement: u64, from: Role, bytes: Box<[u8]> },
    Moved(Box<Waited>),
    Revoke(WorkerId),
    Drained,
}

/// A connection that waits.
pub struct Waited {
    pub connection: Connection,
    pub peer: WorkerId,
    pub payload: Box<[u8]>,
    pub socket: OwnedFd,
    pub leg: Leg,
    /// What it is counted as when it has gone.
    pub outcome: MoveOutcome,
}

impl Backlog {
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Connections that wait.
    pub fn moved(&self) -> usize {
        self.moved
    }

    /// Whether connections may be asked to come.
    pub fn has_room(&self) -> bool {
        self.moved < MOVED_MAX
    }

    /// Whether more can be said that others cause.
    pub fn can_say(&self) -> bool {
        self.said < SAID_MAX
    }

    /// Puts a message at the end; false if it has no room.
    pub fn push(&mut self, message: &GatewayMessage<'_>) -> bool {
        let waiting = Waiting::of(message);
        if waiting.is_said_for_others() {
            if !self.can_say() {
                return false;
            }
            self.said += 1;
        }
        self.waiting.push_back(waiting);
        true
    }

    /// Puts a connection at the end.
    pub fn push_moved(&mut self, moved: &Move<'_>, socket: OwnedFd, leg: Leg, outcome: MoveOutcome) {
        let Move { connection, peer, payload } = *moved;
        self.moved += 1;
        let waited = Waited { connection, peer, payload: payload.into(), socket, leg, outcome };
        self.waiting.push_back(Waiting::Moved(Box::new(waited)));
    }

    pub fn first(&self) -> Option<&Waiting> {
        self.waiting.front()
    }

    /// Takes the connections out, and forgets the rest: the worker is there for neither.
    pub fn take_moved(&mut self) -> impl Iterator<Item = Waited> + use<> {
        let Self { waiting, .. } = mem::take(self);
        waiting.into_iter().filter_map(|waiting| match waiting {
            Waiting::Moved(waited) => Some(*waited),
            _ => None,
        })
    }

    pub fn pop(&mut self) -> Option<Waiting> {
        let first = self.waiting.pop_front()?;
        self.moved -= usize::from(matches!(first, Waiting::Moved(_)));
        self.said -= usize::from(first.is_said_for_others());
        Some(first)
    }
}

impl Waiting {
    fn of(message: &GatewayMessage<'_>) -> Self {
        match message {
            GatewayMessage::Grant(grant) => Self::Grant(*grant),
            GatewayMessage::Flight(flight) => {
                let Flight { peer, function, agreement, from, bytes } = *flight;
                Self::Flight { peer, function, agreement, from, bytes: bytes.into() }
            }
            GatewayMessage::Revoke(worker) => Self::Revoke(*worker),
            GatewayMessage::Drained => Self::Drained,
        }
    }

    pub fn send(&self, end: &GatewayEnd) -> Result<(), SendError> {
        match self {
            Self::Grant(grant) => end.say(&GatewayMessage::Grant(*grant)),
            Self::Flight { peer, function, agreement, from, bytes } => {
                let (peer, function, agreement, from) = (*peer, *function, *agreement, *from);
                end.say(&GatewayMessage::Flight(Flight { peer, function, agreement, from, bytes }))
            }
            Self::Moved(waited) => {
                let Waited { connection, peer, payload, socket, .. } = &**waited;
                let moved = Move { connection: *connection, peer: *peer, payload };
                end.send_moved(&[moved], &[socket.as_fd()]).map(|_| ())
            }
            Self::Revoke(worker) => end.say(&GatewayMessage::Revoke(*worker)),
            Self::Drained => end.say(&GatewayMessage::Drained),
        }
    }

    /// The others are bounded by the places that were granted, and by one for each worker that has granted some.
    fn is_said_for_others(&self) -> bool {
        matches!(self, Self::Grant(_) | Self::Flight { .. })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use common::Protocol;
    use handoff::{GrantAnswer, Purpose};

    use super::*;

    fn push_moved(backlog: &mut Backlog, count: usize) {
        let function = "echo".parse().unwrap();
        let connection = Connection {
            id: 1,
            accepted_at_ns: 0,
            protocol: Protocol::Http,
            purpose: Purpose::Serve(function),
            peer: None,
            local: None,
        };
        for _ in 0..count {
            let socket = UnixStream::pair().unwrap().0.into();
            let moved = Move { connection, peer: WorkerId(1), payload: b"x" };
            let leg = Leg { source: function, target: function };
            backlog.push_moved(&moved, socket, leg, MoveOutcome::Moved);
        }
    }

    #[test]
    fn what_has_a_place_waits_however_much_there_is_and_no_more_are_granted() {
        let mut backlog = Backlog::default();
        push_moved(&mut backlog, MOVED_MAX - 1);
        assert!(backlog.has_room());
        push_moved(&mut backlog, 2);
        assert!(!backlog.has_room());
        assert_eq!(backlog.moved(), MOVED_MAX + 1);
        assert!(backlog.push(&GatewayMessage::Drained));
        (0..2).for_each(|_| assert!(matches!(backlog.pop(), Some(Waiting::Moved(_)))));
        assert!(backlog.has_room());
    }

    #[test]
    fn who_does_not_read_is_said_no_more_than_so_much_and_is_still_told_of_ends() {
        let mut backlog = Backlog::default();
        let grant = Grant { function: "echo".parse().unwrap(), answer: GrantAnswer::Unknown };
        for _ in 0..SAID_MAX {
            assert!(backlog.push(&GatewayMessage::Grant(grant)));
        }
        assert!(!backlog.push(&GatewayMessage::Grant(grant)));
        assert!(backlog.push(&GatewayMessage::Revoke(WorkerId(1))));
        assert!(matches!(backlog.pop(), Some(Waiting::Grant(_))));
        assert!(backlog.push(&GatewayMessage::Grant(grant)));
        while backlog.pop().is_some() {}
        assert!(backlog.is_empty());
    }
}
