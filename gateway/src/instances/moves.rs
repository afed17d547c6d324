//! The way of connections from one instance to another: places are granted, then each is passed on at once.
use std::{
    collections::BTreeMap,
    mem,
    os::fd::{AsFd, OwnedFd},
    slice,
    time::Duration,
    vec::Drain,
};

use arrayvec::ArrayVec;
use common::{FunctionName, Protocol, Refusal};
use handoff::{
    Berth, Connection, Flight, FromInstance, GatewayMessage, Grant, GrantAnswer, Hello, InstanceMessage,
    MAX_MOVES, Move, Purpose, SendError, WorkerId,
};
use tokio::time::Instant;

use super::{
    Instances, Ready, Source,
    backlog::{Waited, Waiting},
    choice,
    worker::{Load, Worker},
};

/// Places in one grant: asking for more is one message for so many moves, and all of them may come at once.
const PLACES: u32 = 64;

/// Places in one grant to a worker that stops, for its own function: what it has is to be spread over all who can take it,
/// which can be told apart only by what they have already.
const PLACES_OF_SUCCESSORS: u32 = 8;

/// Places at one worker that another one may hold: whoever asks before it needs more has far fewer.
const HELD_MAX: u32 = 4 * PLACES;

/// Connections and other messages that are taken from one pool connection in one turn, so that none keeps the others
/// waiting.
const TURN: usize = 64;

/// How long a question waits for somebody to have room: whoever asked asks no longer.
const ASK_PATIENCE: Duration = Duration::from_secs(1);

/// A question for places that waits for somebody to have room.
pub struct Asked {
    from: WorkerId,
    function: FunctionName,
    until: Instant,
}

/// How a move ended, as far as the gateway sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MoveOutcome {
    /// It is in the target's queue.
    Moved,
    /// Its target was gone: another instance of the function got it.
    Rerouted,
    /// Its target was gone, and nobody else could take it: it was refused.
    Refused,
    /// Its target was gone, which alone could have gone on with its TLS session: it was closed.
    Lost,
    /// The source had no place for it: it was closed.
    Unreserved,
}

impl MoveOutcome {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Rerouted => "rerouted",
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::Unreserved => "unreserved",
        }
    }
}

/// From which function to which a connection goes.
#[derive(Clone, Copy)]
pub struct Leg {
    pub source: FunctionName,
    pub target: FunctionName,
}

/// Moves by source, target and outcome.
pub type MoveCounts = BTreeMap<(FunctionName, FunctionName, MoveOutcome), u64>;

/// The sockets of connections that move with one message.
type Sockets = ArrayVec<OwnedFd, MAX_MOVES>;

/// What ended the conversation with a worker in this turn.
pub enum Heard {
    /// It has said all.
    All,
    /// There may be more.
    More,
    Ended,
    Failed(handoff::Error),
}

impl Instances {
    /// Takes what a worker has said.
    pub(super) fn hear(&mut self, id: WorkerId) -> Heard {
        let mut buffer = self.message.take().unwrap_or_default();
        let mut heard = Heard::More;
        let mut taken = 0;
        while taken < TURN {
            let Some(worker) = self.worker(id) else { break };
            match worker.receive(&mut buffer) {
                Ok(FromInstance::Message(message)) => {
                    taken += 1;
                    self.answer(id, message);
                }
                Ok(FromInstance::Return(moves, sockets)) => {
                    taken += moves.len();
                    self.forward(id, moves, sockets);
                }
                Ok(FromInstance::WouldBlock) => {
                    heard = Heard::All;
                    break;
                }
                Ok(FromInstance::Closed) => {
                    heard = Heard::Ended;
                    break;
                }
                // The descriptors of one message are lost, the next one may fit again.
                Err(error @ handoff::Error::OutOfDescriptors { .. }) => {
                    taken += 1;
                    tracing::error!(%error);
                }
                Err(error) => {
                    heard = Heard::Failed(error);
                    break;
                }
            }
        }
        self.message = Some(buffer);
        heard
    }

    fn answer(&mut self, from: WorkerId, message: InstanceMessage<'_>) {
        match message {
            InstanceMessage::Ask(function) => self.ask(from, function),
            InstanceMessage::Flight(flight) => self.relay(from, &flight),
            InstanceMessage::Revoked(to) => {
                if let Some(worker) = self.worker(from) {
                    worker.leases.end(to);
                }
                self.tell_if_drained(to);
            }
            InstanceMessage::Drain => {
                if let Some(worker) = self.worker(from) {
                    worker.begin_draining();
                }
                self.revoke(from);
                self.tell_if_drained(from);
            }
        }
    }

    /// Answers a question for places, or leaves it until somebody has room.
    fn ask(&mut self, from: WorkerId, function: FunctionName) {
        if !self.known.contains(&function) {
            self.say(from, &GatewayMessage::Grant(Grant { function, answer: GrantAnswer::Unknown }));
            return;
        }
        // Who asks twice gets one answer.
        if !self.asked.iter().any(|asked| (asked.from, asked.function) == (from, function)) {
            self.begin_round();
            let until = self.round.at + ASK_PATIENCE;
            self.answer_or_wait(Asked { from, function, until });
        }
    }

    fn answer_or_wait(&mut self, asked: Asked) {
        let Asked { from, function, until } = asked;
        // What can't be said must not be granted.
        let Some(hears) = self.worker(from).map(|worker| worker.backlog.can_say()) else { return };
        let answer = match hears.then(|| self.grant(from, function)).flatten() {
            None if self.round.at < until => {
                self.asked.push(asked);
                return self.poll_for_room();
            }
            answer => answer.unwrap_or(GrantAnswer::Unavailable),
        };
        self.say(from, &GatewayMessage::Grant(Grant { function, answer }));
    }

    /// Answers those who wait for room.
    pub(super) fn answer_waiting(&mut self) {
        for asked in mem::take(&mut self.asked) {
            self.answer_or_wait(asked);
        }
    }

    /// `None` while all who could take connections are full, or have granted enough.
    fn grant(&mut self, from: WorkerId, function: FunctionName) -> Option<GrantAnswer> {
        let is_successor = self.function_of(from) == Some(function);
        let found = if is_successor { self.pick_successor(from, &function) } else { self.pick(&function) };
        let Some((slot, index)) = found else {
            let is_there =
                self.takers(&function).any(|(slot, worker)| !self.is_of_process(from, slot, worker));
            return (!is_there).then_some(GrantAnswer::Unavailable);
        };
        let instance = self.slots[slot].as_ref()?;
        let target = &instance.workers[index];
        if target.hello.features & Hello::MOVES == 0 {
            return Some(GrantAnswer::Unavailable);
        }
        let to = id_of(slot, target.serial);
        let places = if is_successor { PLACES_OF_SUCCESSORS } else { PLACES };
        let berth = Berth { to, instance: instance.number, worker: target.hello.worker, places };
        let has_room = target.backlog.has_room();
        let source = self.worker(from)?;
        if !has_room || source.leases.places(to) + places > HELD_MAX {
            return None;
        }
        source.leases.add(to, places);
        Some(GrantAnswer::Granted(berth))
    }

    /// The worker of another instance for what a worker that stops has. What its like were granted there counts as if it had
    /// come, because all the workers of an instance that stops ask at once.
    fn pick_successor(&mut self, from: WorkerId, function: &FunctionName) -> Option<(usize, usize)> {
        let (slot, _) = self.pick(function)?;
        let promised = |to: WorkerId| -> u64 {
            let like = self.slots.iter().flatten().filter(|instance| instance.function == *function);
            like.flat_map(|instance| &instance.workers)
                .map(|worker| u64::from(worker.leases.places(to)))
                .sum()
        };
        let workers = self.slots[slot].as_ref()?.workers.iter();
        let loads = workers.map(|worker| {
            let load = worker.load().filter(|_| !self.is_of_process(from, slot, worker))?;
            Some(Load { connections: load.connections + promised(id_of(slot, worker.serial)), ..load })
        });
        choice::of_all(loads).map(|(index, _)| (slot, index))
    }

    /// The workers of a function that take connections, with their slots.
    fn takers(&self, function: &FunctionName) -> impl Iterator<Item = (usize, &Worker)> {
        let listed = self.functions.get(function).into_iter().flatten();
        let instances = listed.filter_map(|&slot| Some((slot, self.slots[slot].as_ref()?)));
        instances
            .flat_map(|(slot, instance)| instance.workers.iter().map(move |worker| (slot, worker)))
            .filter(|(_, worker)| worker.is_taking())
    }

    /// Whether a worker belongs to the same process as another one.
    fn is_of_process(&self, one: WorkerId, slot: usize, other: &Worker) -> bool {
        let Source::Pool { slot: of_one, serial } = Source::of_key(one.0) else { return false };
        let instance = self.slots.get(of_one as usize).and_then(Option::as_ref);
        let one = instance.and_then(|instance| instance.workers.iter().find(|one| one.serial == serial));
        of_one as usize == slot && one.is_some_and(|one| one.hello.pid == other.hello.pid)
    }

    /// Passes a flight of a key agreement on; who it is from is the gateway's to say, and proven by what is in it.
    fn relay(&mut self, from: WorkerId, flight: &Flight<'_>) {
        let Some(function) = self.function_of(from) else { return };
        let said = self.say(flight.peer, &GatewayMessage::Flight(Flight { peer: from, function, ..*flight }));
        // Once is enough, and who doesn't listen must not fill the gateway's memory by asking for more.
        let is_heard = self.worker(from).is_some_and(|worker| worker.backlog.is_empty());
        if !said && is_heard {
            self.say(from, &GatewayMessage::Revoke(flight.peer));
        }
    }

    /// Passes on what one message gave back: neighbours that go to the same worker with one message again, in their order.
    fn forward(&mut self, from: WorkerId, mut moves: Vec<Move<'_>>, mut sockets: Drain<'_, OwnedFd>) {
        let Some(source) = self.function_of(from) else { return };
        let goes_along = |one: &Move<'_>, next: &Move<'_>| {
            (one.peer, one.connection.purpose) == (next.peer, next.connection.purpose)
        };
        for moves in moves.chunk_by_mut(goes_along) {
            let mut sockets: Sockets = sockets.by_ref().take(moves.len()).collect();
            let (to, purpose) = (moves[0].peer, moves[0].connection.purpose);
            let Purpose::Serve(target) = purpose else {
                tracing::error!("an instance gave a connection back that is for no function");
                continue;
            };
            let leg = Leg { source, target };
            let places =
                self.worker(from).map_or(0, |source| source.leases.spend(to, moves.len() as u32)) as usize;
            sockets.truncate(places);
            let (moves, unreserved) = moves.split_at_mut(places);
            self.count_moves(to, leg, MoveOutcome::Unreserved, unreserved.len());
            moves.iter_mut().for_each(|moved| moved.peer = from);
            self.send_moved(to, leg, moves, &mut sockets, MoveOutcome::Moved);
            for (moved, socket) in moves.iter().zip(sockets) {
                self.move_elsewhere(to, leg, moved, socket);
            }
        }
    }

    fn count_moves(&mut self, to: WorkerId, leg: Leg, outcome: MoveOutcome, count: usize) {
        let Leg { source, target } = leg;
        // What an instance says is a name that counts only where there is such a function: nobody can make up more.
        let exists = self.known.contains(&target) || self.function_of(to) == Some(target);
        if count > 0 && exists {
            *self.moves.entry((source, target, outcome)).or_default() += count as u64;
        }
    }

    /// Finds something for a connection whose target takes nothing more.
    fn move_elsewhere(&mut self, gone: WorkerId, leg: Leg, moved: &Move<'_>, socket: OwnedFd) {
        // Its state is sealed for the worker that is gone.
        if moved.connection.protocol == Protocol::Https {
            return self.count_moves(gone, leg, MoveOutcome::Lost, 1);
        }
        // One round for all attempts: who refuses is not chosen again in it.
        self.begin_round();
        let mut sockets = Sockets::from_iter([socket]);
        while !sockets.is_empty()
            && let Some((slot, index)) = self.pick(&leg.target)
            && let Some(worker) = self.slots[slot].as_ref().map(|instance| &instance.workers[index])
            && worker.hello.features & Hello::MOVES != 0
        {
            let other = id_of(slot, worker.serial);
            self.send_moved(other, leg, slice::from_ref(moved), &mut sockets, MoveOutcome::Rerouted);
        }
        for socket in sockets {
            let connection =
                Connection { purpose: Purpose::Refuse(Refusal::Unavailable), ..moved.connection };
            self.orphans.push(Ready { connection, socket, wait_until: None });
            self.count_moves(gone, leg, MoveOutcome::Refused, 1);
        }
    }

    /// Puts connections, no more than a message holds, into a worker's queue, where they are counted as this outcome, or
    /// behind those that wait for room there. The sockets stay where they are if the worker takes nothing more.
    fn send_moved(
        &mut self,
        to: WorkerId,
        leg: Leg,
        moves: &[Move<'_>],
        sockets: &mut Sockets,
        outcome: MoveOutcome,
    ) {
        let Some(worker) = self.worker(to) else { return };
        let sent = if worker.backlog.is_empty() {
            let borrowed: ArrayVec<_, MAX_MOVES> = sockets.iter().map(AsFd::as_fd).collect();
            worker.send_moved(moves, &borrowed)
        } else {
            Err(SendError::WouldBlock)
        };
        match sent {
            Ok(sent) => {
                debug_assert_eq!(sent, moves.len());
                self.in_flight_estimate += sent as u64;
                self.spent.extend(sockets.drain(..));
                self.count_moves(to, leg, outcome, sent);
            }
            Err(SendError::WouldBlock | SendError::TooManyReferences) => {
                for (moved, socket) in moves.iter().zip(sockets.drain(..)) {
                    worker.backlog.push_moved(moved, socket, leg, outcome);
                }
                self.poll_for_room();
            }
            Err(SendError::Closed) => {}
            Err(SendError::Io(error)) => tracing::warn!(%error, "can't pass connections on"),
        }
    }

    /// Sends what waited for room.
    pub(super) fn send_backlogs(&mut self) {
        let mut waiting = false;
        let mut moved = Vec::new();
        let mut stranded = Vec::new();
        let mut done = Vec::new();
        for slot in 0..self.slots.len() {
            let Some(instance) = &mut self.slots[slot] else { continue };
            for worker in &mut instance.workers {
                while let Some(first) = worker.backlog.first() {
                    match first.send(worker.end()) {
                        Ok(()) => {
                            if let Some(Waiting::Moved(waited)) = worker.backlog.pop() {
                                worker.count_sent(1);
                                self.in_flight_estimate += 1;
                                moved.push((id_of(slot, worker.serial), waited.leg, waited.outcome));
                                self.spent.push(waited.socket);
                            }
                        }
                        Err(SendError::Closed) => {
                            let id = id_of(slot, worker.serial);
                            stranded.extend(worker.backlog.take_moved().map(|waited| (id, waited)));
                            break;
                        }
                        Err(_) => {
                            waiting = true;
                            break;
                        }
                    }
                }
                if worker.waits_to_be_drained() && worker.backlog.is_empty() {
                    done.push(id_of(slot, worker.serial));
                }
            }
        }
        for (gone, waited) in stranded {
            self.move_waited_elsewhere(gone, waited);
        }
        for (to, leg, outcome) in moved {
            self.count_moves(to, leg, outcome, 1);
        }
        done.into_iter().for_each(|worker| self.tell_if_drained(worker));
        if waiting {
            self.poll_for_room();
        }
    }

    /// Settles what others had to do with a worker whose pool connection is over.
    pub(super) fn part_with(&mut self, id: WorkerId, mut worker: Worker) {
        for to in worker.leases.end_all() {
            self.tell_if_drained(to);
        }
        self.revoke(id);
        for waited in worker.backlog.take_moved() {
            self.move_waited_elsewhere(id, waited);
        }
    }

    fn move_waited_elsewhere(&mut self, gone: WorkerId, waited: Waited) {
        let Waited { connection, peer, payload, socket, leg, .. } = waited;
        self.move_elsewhere(gone, leg, &Move { connection, peer, payload: &payload }, socket);
    }

    /// Tells all who hold places at this worker that it takes nothing more.
    fn revoke(&mut self, id: WorkerId) {
        let mut holders = Vec::new();
        for (slot, instance) in self.slots.iter_mut().enumerate() {
            for worker in instance.iter_mut().flat_map(|instance| &mut instance.workers) {
                if worker.leases.revoke(id) {
                    holders.push(id_of(slot, worker.serial));
                }
            }
        }
        for holder in holders {
            self.say(holder, &GatewayMessage::Revoke(id));
        }
    }

    /// A worker that drains is told once nobody can send it another connection. What it has may leave it still, unless
    /// the worker is of a kind that knows only the end of file.
    fn tell_if_drained(&mut self, id: WorkerId) {
        let Some(worker) = self.worker(id) else { return };
        if worker.is_taking() || !worker.waits_to_be_drained() || !worker.backlog.is_empty() {
            return;
        }
        let workers = self.slots.iter().flatten().flat_map(|instance| &instance.workers);
        if workers.into_iter().any(|worker| worker.leases.holds(id)) {
            return;
        }
        let Some(worker) = self.worker(id) else { return };
        worker.note_drained();
        if worker.hello.features & Hello::DRAINED != 0 {
            self.say(id, &GatewayMessage::Drained);
        } else if let Err(error) = worker.end().stop_sending() {
            tracing::debug!(%error, "a worker that drains can't be told that nothing more comes");
        }
    }

    /// Says something, now or when there is room; false if the worker is gone.
    fn say(&mut self, to: WorkerId, message: &GatewayMessage<'_>) -> bool {
        let Some(worker) = self.worker(to) else { return false };
        let said =
            if worker.backlog.is_empty() { worker.end().say(message) } else { Err(SendError::WouldBlock) };
        match said {
            Ok(()) => true,
            Err(SendError::WouldBlock | SendError::TooManyReferences) => {
                let waits = worker.backlog.push(message);
                self.poll_for_room();
                waits
            }
            Err(error) => {
                // Whoever waits for it in vain gives up by itself.
                tracing::debug!(%error, "a worker can't be told something");
                false
            }
        }
    }

    pub(super) fn worker(&mut self, id: WorkerId) -> Option<&mut Worker> {
        let Source::Pool { slot, serial } = Source::of_key(id.0) else { return None };
        let instance = self.slots.get_mut(slot as usize)?.as_mut()?;
        instance.workers.iter_mut().find(|worker| worker.serial == serial)
    }

    fn function_of(&self, id: WorkerId) -> Option<FunctionName> {
        let Source::Pool { slot, .. } = Source::of_key(id.0) else { return None };
        Some(self.slots.get(slot as usize)?.as_ref()?.function)
    }
}

pub fn id_of(slot: usize, serial: u32) -> WorkerId {
    WorkerId(Source::Pool { slot: slot as u32, serial }.key())
}

#[cfg(test)]
mod tests;
