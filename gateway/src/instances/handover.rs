//! Gives new connections to instances: chooses a worker for each, and sends what goes to the same one with one message.
use std::os::fd::{AsFd, BorrowedFd};

use arrayvec::ArrayVec;
use common::FunctionName;
use handoff::{Connection, MAX_BATCH, Purpose, SendError};

use super::{Instances, Ready, choice, closing};

/// Ordered so that sorting groups what goes over one pool connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Assignment {
    slot: usize,
    worker: usize,
    ready: usize,
}

impl Instances {
    /// Hands over what it can of `ready` and leaves the rest there, in its order; `handed` is told of each connection
    /// that has gone. One system call for all that goes to one worker, and the sockets are closed here.
    pub fn hand_over(&mut self, ready: &mut Vec<Ready>, mut handed: impl FnMut(&Connection)) {
        self.begin_round();
        self.over_bound = false;
        self.handed.clear();
        self.handed.resize(ready.len(), false);
        // Whoever can't take what it was given looks full from then on, so each pass has fewer to choose from.
        while self.assign(ready) {
            if self.send(ready, &mut handed) {
                break;
            }
        }
        self.note_starved(ready);
        let mut gone = self.handed.iter().copied();
        self.spent.extend(ready.extract_if(.., |_| gone.next() == Some(true)).map(|ready| ready.socket));
        closing::close_all(&mut self.spent);
        self.tend_touched();
    }

    /// Chooses a worker for each connection that has not gone; false when there is none for any.
    fn assign(&mut self, ready: &[Ready]) -> bool {
        self.assignments.clear();
        if self.over_bound {
            return false;
        }
        if self.in_flight_estimate + ready.len() as u64 > self.in_flight_bound {
            self.in_flight_estimate = self.in_flight();
        }
        for (index, ready) in ready.iter().enumerate() {
            if self.handed[index] {
                continue;
            }
            if self.in_flight_estimate + self.assignments.len() as u64 >= self.in_flight_bound {
                self.over_bound = true;
                break;
            }
            let function = self.function_for(&ready.connection);
            if let Some((slot, worker)) = self.choose(&function) {
                self.assignments.push(Assignment { slot, worker, ready: index });
            }
        }
        !self.assignments.is_empty()
    }

    pub(super) fn function_for(&self, connection: &Connection) -> FunctionName {
        match connection.purpose {
            Purpose::Serve(function) => function,
            Purpose::Refuse(_) => self.refusal,
        }
    }

    fn choose(&mut self, function: &FunctionName) -> Option<(usize, usize)> {
        let (slot, worker) = self.pick(function)?;
        self.slots[slot].as_mut()?.workers[worker].assign();
        Some((slot, worker))
    }

    pub(super) fn pick(&mut self, function: &FunctionName) -> Option<(usize, usize)> {
        let Self { functions, slots, draws, touched, round, .. } = self;
        let listed = functions.get(function)?;
        let draw = draws.draw();
        let mut load = |index: usize| {
            let instance = slots[listed[index]].as_mut()?;
            if instance.refresh(*round) {
                touched.push(listed[index]);
            }
            instance.least_loaded().map(|(_, load)| load.for_weight(instance.weight))
        };
        // A stalled worker is better than none, and anything else is better than it.
        let chosen = choice::of_two(listed.len(), draw, |index| load(index).filter(|load| !load.stalled))
            .or_else(|| choice::of_two(listed.len(), draw, load))?;
        let slot = listed[chosen];
        let (worker, _) = slots[slot].as_ref()?.least_loaded()?;
        Some((slot, worker))
    }

    /// Sends what was assigned; true when all of it has gone.
    fn send(&mut self, ready: &[Ready], handed: &mut impl FnMut(&Connection)) -> bool {
        self.assignments.sort_unstable();
        let mut complete = true;
        for group in self.assignments.chunk_by(|a, b| (a.slot, a.worker) == (b.slot, b.worker)) {
            let Assignment { slot, worker, .. } = group[0];
            let Some(instance) = &mut self.slots[slot] else { continue };
            for batch in group.chunks(MAX_BATCH) {
                let batch = batch.iter().map(|assignment| assignment.ready);
                let connections: ArrayVec<Connection, MAX_BATCH> =
                    batch.clone().map(|index| ready[index].connection).collect();
                let sockets: ArrayVec<BorrowedFd, MAX_BATCH> =
                    batch.clone().map(|index| ready[index].socket.as_fd()).collect();
                match instance.workers[worker].send(&connections, &sockets) {
                    Ok(()) => {
                        self.in_flight_estimate += connections.len() as u64;
                        self.batches.add(connections.len());
                        batch.for_each(|index| self.handed[index] = true);
                        connections.iter().for_each(&mut *handed);
                        continue;
                    }
                    Err(SendError::WouldBlock) => {}
                    Err(SendError::TooManyReferences) => self.over_bound = true,
                    Err(SendError::Closed) => self.touched.push(slot),
                    Err(SendError::Io(error)) => {
                        tracing::warn!(function = %instance.function, socket = instance.socket, %error, "can't hand connections over");
                    }
                }
                complete = false;
                break;
            }
        }
        complete
    }

    /// Remembers whose instances are up and full, because nothing but looking tells when they have room again.
    fn note_starved(&mut self, ready: &[Ready]) {
        for (index, ready) in ready.iter().enumerate() {
            let function = self.function_for(&ready.connection);
            if !self.handed[index] && !self.starved.contains(&function) && self.workers(&function) > 0 {
                self.starved.push(function);
                self.poll_for_room();
            }
        }
    }
}
