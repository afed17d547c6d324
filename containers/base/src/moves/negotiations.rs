//! The key agreements of one worker: those that it has begun, and those that others have begun with it.
use std::{
    collections::{HashMap, VecDeque},
    rc::{Rc, Weak},
    time::Duration,
};

use common::FunctionName;
use handoff::{Flight, Role, WorkerId};
use rustls::AlertDescription;
use tokio::time::Instant;

use super::{
    agreement::{Agreements, Failure, Initiator, Responder, Step},
    mover::{Answer, Moving, Refused},
    pairs::Peer,
    post::{Letter, Post},
    wait::Wait,
};
use crate::tls::plaintext_alert;

/// Agreements that others have begun; the oldest give way, and are begun again if they are wanted.
const RESPONDERS_MAX: usize = 64;

/// How long an instance that could not prove who it is isn't asked again.
const DISTRUST: Duration = Duration::from_secs(10);

/// Instances that are remembered for that.
const DISTRUSTED_MAX: usize = 1024;

#[derive(Default)]
pub struct Negotiations {
    begun: HashMap<Peer, Begun>,
    /// Numbers those that this worker begins.
    count: u64,
    responders: VecDeque<(WorkerId, u64, Responder)>,
    distrusted: HashMap<Peer, Instant>,
}

/// An agreement that this worker has begun.
struct Begun {
    initiator: Initiator,
    number: u64,
    gateway: Weak<Post>,
    to: WorkerId,
    wait: Rc<Wait<Answer>>,
}

impl Negotiations {
    /// Begins to agree on a secret with an instance, at one of its workers, unless that is going on.
    pub fn begin(
        &mut self,
        moving: &Moving,
        peer: Peer,
        to: WorkerId,
        gateway: &Rc<Post>,
    ) -> Result<Rc<Wait<Answer>>, Refused> {
        let agreements = moving.agreements.as_ref().ok_or(Refused::Misdirected)?;
        if let Some(begun) = self.begun.get(&peer) {
            return Ok(Rc::clone(&begun.wait));
        }
        if self.distrusted.get(&peer).is_some_and(|until| Instant::now() < *until) {
            return Err(Refused::Misdirected);
        }
        let (initiator, first) = agreements.initiate(&peer.function).map_err(|error| {
            tracing::error!(%error, "no key agreement can be begun");
            Refused::Misdirected
        })?;
        self.count += 1;
        let (number, function) = (self.count, peer.function);
        gateway.send(Letter::Flight {
            peer: to,
            function,
            agreement: number,
            from: Role::Initiator,
            bytes: first,
        });
        let wait = Rc::new(Wait::new());
        let gateway = Rc::downgrade(gateway);
        self.begun.insert(peer, Begun { initiator, number, gateway, to, wait: Rc::clone(&wait) });
        Ok(wait)
    }

    /// Takes a flight of one that this worker has begun, or that another begins or has begun.
    pub fn hear(&mut self, moving: &Moving, gateway: &Rc<Post>, flight: &Flight<'_>) {
        match (flight.from, &moving.agreements) {
            (Role::Responder, _) => self.go_on(moving, flight),
            (Role::Initiator, Some(agreements)) => self.respond(moving, agreements, gateway, flight),
            // Who has no certificate, or knows nobody's, says so instead of nothing.
            (Role::Initiator, None) => {
                let Flight { peer, function, agreement, .. } = *flight;
                let bytes = plaintext_alert(AlertDescription::HandshakeFailure).to_vec();
                gateway.send(Letter::Flight { peer, function, agreement, from: Role::Responder, bytes });
            }
        }
    }

    /// Nobody waits for it any more; the next who wants it begins anew.
    pub fn give_up(&mut self, function: &FunctionName, wait: &Rc<Wait<Answer>>) {
        self.begun.retain(|peer, of| peer.function != *function || !Rc::ptr_eq(&of.wait, wait));
    }

    /// Ends those whose gateway or whose worker is gone; whoever waits for them looks for another.
    pub fn end_where(&mut self, is_gone: impl Fn(&Weak<Post>, WorkerId) -> bool) {
        self.begun
            .extract_if(|_, begun| is_gone(&begun.gateway, begun.to))
            .for_each(|(_, begun)| begun.wait.finish(Ok(())));
    }

    fn go_on(&mut self, moving: &Moving, flight: &Flight<'_>) {
        let is_it = |begun: &Begun| begun.number == flight.agreement && begun.to == flight.peer;
        let Some((&peer, begun)) = self.begun.iter_mut().find(|(_, begun)| is_it(begun)) else { return };
        let gateway = begun.gateway.upgrade();
        let (to, function, agreement) = (flight.peer, peer.function, flight.agreement);
        let answer = |bytes: Vec<u8>| {
            if let (Some(gateway), false) = (&gateway, bytes.is_empty()) {
                gateway.send(Letter::Flight { peer: to, function, agreement, from: Role::Initiator, bytes });
            }
        };
        let outcome = match begun.initiator.take(flight.bytes) {
            Ok(Step { reply, agreed }) => {
                answer(reply);
                let Some(secret) = agreed else { return };
                moving.pairs.add_outgoing(peer, secret);
                Ok(())
            }
            Err(Failure { reply, error }) => {
                answer(reply);
                tracing::warn!(function = %peer.function, %error, "an instance could not prove who it is: no session moves to it");
                if self.distrusted.len() >= DISTRUSTED_MAX {
                    self.distrusted.clear();
                }
                self.distrusted.insert(peer, Instant::now() + DISTRUST);
                Err(Refused::Misdirected)
            }
        };
        if let Some(begun) = self.begun.remove(&peer) {
            begun.wait.finish(outcome);
        }
    }

    fn respond(&mut self, moving: &Moving, agreements: &Agreements, gateway: &Rc<Post>, flight: &Flight<'_>) {
        let found = self
            .responders
            .iter()
            .position(|(peer, number, _)| (*peer, *number) == (flight.peer, flight.agreement));
        let responder =
            found.and_then(|index| self.responders.remove(index)).map(|(_, _, responder)| responder);
        let mut responder = match responder.map_or_else(|| agreements.respond(&flight.function), Ok) {
            Ok(responder) => responder,
            Err(error) => return tracing::error!(%error, "no key agreement can be answered"),
        };
        let (reply, done) = match responder.take(flight.bytes) {
            Ok(Step { reply, agreed }) => {
                let done = agreed.is_some();
                // Before the other end hears that it may seal.
                agreed.into_iter().for_each(|secret| moving.pairs.add_incoming(secret));
                (reply, done)
            }
            Err(Failure { reply, error }) => {
                tracing::warn!(function = %flight.function, %error, "an instance could not prove who it is: no session is taken from it");
                (reply, true)
            }
        };
        if !reply.is_empty() {
            let Flight { peer, function, agreement, .. } = *flight;
            gateway.send(Letter::Flight { peer, function, agreement, from: Role::Responder, bytes: reply });
        }
        if !done {
            self.responders.push_back((flight.peer, flight.agreement, responder));
            if self.responders.len() > RESPONDERS_MAX {
                self.responders.pop_front();
            }
        }
    }
}
