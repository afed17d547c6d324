//! One worker's part in moves: reserves places at other instances' workers, and sends connections there.
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    os::fd::OwnedFd,
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use common::{FunctionName, Protocol};
use handoff::{Berth, Connection, Flight, Grant, GrantAnswer, Move, Purpose, WorkerId};
use socket2::SockRef;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::{
    agreement::Agreements,
    keyring::{Destination, Keyring},
    luggage::{Luggage, LuggageError},
    negotiations::Negotiations,
    pairs::{Pairs, Peer},
    policy::Policy,
    post::{Departure, Letter, Post},
    sealing::OpenError,
    wait::Wait,
};
use crate::socket::Socket;

/// How long a request waits for a place: a gateway or a function that is being restarted is back by then.
const PATIENCE: Duration = Duration::from_secs(1);

/// With so few places left, more are asked for: those last until the answer is here.
const FEW_PLACES: u32 = 16;

/// What all workers of an instance share.
pub struct Moving {
    /// The function that this is.
    pub name: FunctionName,
    pub policy: Policy,
    /// Without trust anchors no TLS session moves.
    pub agreements: Option<Agreements>,
    pub pairs: Pairs,
}

/// Connections move by this; the default moves none.
#[derive(Clone, Default)]
pub struct Mover(Option<Rc<Inner>>);

struct Inner {
    moving: Arc<Moving>,
    state: RefCell<State>,
}

struct State {
    keyring: Keyring,
    gateways: Vec<Weak<Post>>,
    met_gateway: bool,
    /// For those who find no gateway.
    gateway: Rc<Wait<Answer>>,
    leases: HashMap<FunctionName, Vec<Rc<Lease>>>,
    asked: HashMap<FunctionName, Asked>,
    negotiations: Negotiations,
}

/// What somebody waits for; an error is what the request gets.
pub(super) type Answer = Result<(), Refused>;

struct Asked {
    gateway: Weak<Post>,
    wait: Rc<Wait<Answer>>,
}

struct Lease {
    gateway: Weak<Post>,
    berth: Berth,
    left: Cell<u32>,
}

/// A place for one connection at a worker of another instance.
pub struct Place {
    function: FunctionName,
    gateway: Rc<Post>,
    lease: Rc<Lease>,
    used: bool,
}

impl Place {
    fn take(mut self) -> (Rc<Post>, WorkerId) {
        self.used = true;
        (Rc::clone(&self.gateway), self.lease.berth.to)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a place at a worker of {}", self.function)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.used {
            self.lease.left.set(self.lease.left.get() + 1);
        }
    }
}

/// Why a connection stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The other function may not have it.
    Misdirected,
    NoFunction,
    /// Nobody can take it now.
    Unavailable,
}

/// What the gateway told of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Origin {
    pub id: u64,
    pub accepted_at_ns: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    #[error(transparent)]
    Luggage(#[from] LuggageError),
    #[error(transparent)]
    Sealed(#[from] OpenError),
    #[error("asking a socket for its cookie: {0}")]
    Cookie(std::io::Error),
    #[error("nothing can move here")]
    NotMoving,
}

enum Found {
    Place(Place),
    Wait(Rc<Wait<Answer>>),
}

impl Mover {
    pub fn new(moving: Arc<Moving>, worker: u16) -> Self {
        let state = State {
            keyring: Keyring::new(Arc::clone(&moving), worker),
            gateways: Vec::new(),
            met_gateway: false,
            gateway: Rc::new(Wait::new()),
            leases: HashMap::new(),
            asked: HashMap::new(),
            negotiations: Negotiations::default(),
        };
        Self(Some(Rc::new(Inner { moving, state: RefCell::new(state) })))
    }

    /// Whether connections move at all.
    pub fn moves(&self) -> bool {
        self.0.is_some()
    }

    /// A place for a connection at a worker of another function.
    pub async fn reserve(&self, function: FunctionName, protocol: Protocol) -> Result<Place, Refused> {
        let Some(inner) = self.0.as_ref().filter(|inner| inner.moving.policy.allows(&function)) else {
            return Err(Refused::Misdirected);
        };
        inner.place_at(function, protocol, PATIENCE).await
    }

    /// A place for a connection at another instance of this function, which needs nobody's leave. This instance stops, so no
    /// other gateway will come to it than those that it has.
    pub async fn reserve_successor(&self, protocol: Protocol, patience: Duration) -> Result<Place, Refused> {
        let inner = self.0.as_ref().ok_or(Refused::Unavailable)?;
        inner.place_at(inner.moving.name, protocol, patience).await
    }

    /// Sends a connection to its place. It is gone afterwards, whatever happens.
    pub async fn send(
        &self,
        place: Place,
        origin: Origin,
        protocol: Protocol,
        luggage: Luggage,
        socket: Socket,
    ) {
        let peer = socket.known_peer();
        let packed = socket.leave().map_err(|error| error.to_string()).and_then(|socket| {
            let mut payload = luggage.encode().map_err(|error| error.to_string())?;
            if protocol == Protocol::Https {
                *payload = self.seal(&place, &mut payload, &socket).ok_or("it can't be sealed")?;
            }
            Ok((payload, socket))
        });
        // A session's keys are not kept in the clear while the message waits.
        drop(luggage);
        let Origin { id, accepted_at_ns } = origin;
        let (payload, socket) = match packed {
            Ok(packed) => packed,
            Err(error) => {
                return tracing::warn!(id, error, "a connection could not move, and was closed");
            }
        };
        let purpose = Purpose::Serve(place.function);
        let connection = Connection { id, accepted_at_ns, protocol, purpose, peer, local: None };
        let (gateway, peer) = place.take();
        gateway.depart(Departure { connection, peer, payload, socket }).await;
    }

    fn seal(&self, place: &Place, luggage: &mut Zeroizing<Vec<u8>>, socket: &OwnedFd) -> Option<Vec<u8>> {
        let inner = self.0.as_ref()?;
        let cookie = SockRef::from(socket).cookie().ok()?;
        let to = destination(place.function, &place.lease, &place.gateway);
        inner.state.borrow_mut().keyring.seal(to, luggage, cookie)
    }

    /// Unpacks what came with a connection. To be called in the order in which connections come.
    pub fn unpack(&self, moved: &Move<'_>, socket: &OwnedFd) -> Result<Luggage, ArrivalError> {
        let inner = self.0.as_ref().ok_or(ArrivalError::NotMoving)?;
        let protocol = moved.connection.protocol;
        match protocol {
            Protocol::Http => Ok(Luggage::decode(protocol, moved.payload)?),
            Protocol::Https => {
                let cookie = SockRef::from(socket).cookie().map_err(ArrivalError::Cookie)?;
                let mut sealed = Zeroizing::new(moved.payload.to_vec());
                let mut state = inner.state.borrow_mut();
                let opened = state.keyring.open(&mut sealed, cookie)?;
                Ok(Luggage::decode(protocol, opened)?)
            }
        }
    }

    pub(crate) fn gateway_came(&self, gateway: &Rc<Post>) {
        let Some(inner) = &self.0 else { return };
        let mut state = inner.state.borrow_mut();
        state.met_gateway = true;
        state.gateways.push(Rc::downgrade(gateway));
        std::mem::replace(&mut state.gateway, Rc::new(Wait::new())).finish(Ok(()));
    }

    /// Forgets what a gateway has promised; whoever waits for it looks for another one.
    pub(crate) fn gateway_left(&self, gateway: &Rc<Post>) {
        let Some(inner) = &self.0 else { return };
        let mut state = inner.state.borrow_mut();
        let is_it = |other: &Weak<_>| std::ptr::eq(other.as_ptr(), Rc::as_ptr(gateway));
        state.gateways.retain(|other| !is_it(other));
        for leases in state.leases.values_mut() {
            leases.retain(|lease| !is_it(&lease.gateway));
        }
        state.leases.retain(|_, leases| !leases.is_empty());
        state
            .asked
            .extract_if(|_, asked| is_it(&asked.gateway))
            .for_each(|(_, asked)| asked.wait.finish(Ok(())));
        state.negotiations.end_where(|gateway, _| is_it(gateway));
    }

    pub(crate) fn granted(&self, gateway: &Rc<Post>, grant: &Grant) {
        let Some(inner) = &self.0 else { return };
        let mut state = inner.state.borrow_mut();
        let answer = match grant.answer {
            GrantAnswer::Granted(berth) => {
                let lease = Lease { gateway: Rc::downgrade(gateway), berth, left: Cell::new(berth.places) };
                state.leases.entry(grant.function).or_default().push(Rc::new(lease));
                Ok(())
            }
            GrantAnswer::Unknown => Err(Refused::NoFunction),
            GrantAnswer::Unavailable => Err(Refused::Unavailable),
        };
        if let Some(asked) = state.asked.remove(&grant.function) {
            asked.wait.finish(answer);
        }
    }

    /// A worker takes nothing more.
    pub(crate) fn revoked(&self, gateway: &Rc<Post>, worker: WorkerId) {
        if let Some(inner) = &self.0 {
            let mut state = inner.state.borrow_mut();
            let is_it =
                |at: &Weak<_>, to: WorkerId| to == worker && std::ptr::eq(at.as_ptr(), Rc::as_ptr(gateway));
            for leases in state.leases.values_mut() {
                leases.retain(|lease| !is_it(&lease.gateway, lease.berth.to));
            }
            state.negotiations.end_where(is_it);
        }
        // A place is taken and used without a pause between, so nothing for that worker comes after this.
        gateway.send(Letter::Revoked(worker));
    }

    /// Takes a flight of a key agreement.
    pub(crate) fn flight(&self, gateway: &Rc<Post>, flight: &Flight<'_>) {
        let Some(inner) = &self.0 else { return };
        inner.state.borrow_mut().negotiations.hear(&inner.moving, gateway, flight);
    }
}

impl Inner {
    /// No place is taken while the future waits.
    async fn place_at(
        &self,
        function: FunctionName,
        protocol: Protocol,
        patience: Duration,
    ) -> Result<Place, Refused> {
        let mut deadline = None;
        loop {
            let found = self.state.borrow_mut().find(&self.moving, function, protocol)?;
            let wait = match found {
                Found::Place(place) => return Ok(place),
                Found::Wait(wait) => wait,
            };
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + patience);
            match timeout_at(deadline, wait.outcome()).await {
                Ok(outcome) => outcome?,
                Err(_) => {
                    self.state.borrow_mut().give_up(&function, &wait);
                    return Err(Refused::Unavailable);
                }
            }
        }
    }
}

impl State {
    fn find(
        &mut self,
        moving: &Moving,
        function: FunctionName,
        protocol: Protocol,
    ) -> Result<Found, Refused> {
        let leases = self.leases.entry(function).or_default();
        leases.retain(|lease| lease.left.get() > 0 && lease.gateway.strong_count() > 0);
        let left: u32 = leases.iter().map(|lease| lease.left.get()).sum();
        let usable = leases.first().and_then(|lease| Some((Rc::clone(lease), lease.gateway.upgrade()?)));
        if leases.is_empty() {
            self.leases.remove(&function);
        }
        let Some((lease, gateway)) = usable else { return self.ask(moving, function).map(Found::Wait) };
        if protocol == Protocol::Https {
            let to = destination(function, &lease, &gateway);
            if !self.keyring.can_seal(to) {
                return self.negotiations.begin(moving, to.peer, lease.berth.to, &gateway).map(Found::Wait);
            }
        }
        lease.left.set(lease.left.get() - 1);
        if left <= FEW_PLACES {
            let _ = self.ask(moving, function);
        }
        Ok(Found::Place(Place { function, gateway, lease, used: false }))
    }

    /// Nobody answers: the next request asks anew. An answer that comes late is still of use.
    fn give_up(&mut self, function: &FunctionName, wait: &Rc<Wait<Answer>>) {
        self.asked.retain(|asked, of| asked != function || !Rc::ptr_eq(&of.wait, wait));
        self.negotiations.give_up(function, wait);
    }

    fn ask(&mut self, moving: &Moving, function: FunctionName) -> Result<Rc<Wait<Answer>>, Refused> {
        if let Some(asked) = self.asked.get(&function) {
            return Ok(Rc::clone(&asked.wait));
        }
        let Some(gateway) = self.gateways.iter().find_map(Weak::upgrade) else {
            // One that was here comes back; a function that listens itself has none, and who looks for a successor stops
            // and will have no other.
            let waits = self.met_gateway && function != moving.name;
            return if waits { Ok(Rc::clone(&self.gateway)) } else { Err(Refused::Misdirected) };
        };
        gateway.send(Letter::Ask(function));
        let wait = Rc::new(Wait::new());
        let asked = Asked { gateway: Rc::downgrade(&gateway), wait: Rc::clone(&wait) };
        self.asked.insert(function, asked);
        Ok(wait)
    }
}

fn destination(function: FunctionName, lease: &Lease, gateway: &Post) -> Destination {
    let Berth { instance, worker, to, .. } = lease.berth;
    Destination { peer: Peer { function, instance }, worker, by: (gateway.number(), to) }
}
