//! What becomes of connections that workers give back, against workers that speak the real wire.
use std::{io::Read, os::unix::net::UnixStream, time::Duration};

use handoff::{AllowedUids, InstanceEnd, ReceiveBuffer, Received};

use tokio::time::timeout;

use super::{
    super::{
        WINDOW,
        tests::{Gateway, PATIENCE},
    },
    *,
};

impl Gateway {
    fn with_functions() -> Self {
        let mut gateway = Self::new();
        gateway.instances.set_known(["a", "b", "c"].map(name));
        gateway
    }

    /// A function of one instance with one worker.
    async fn worker(&mut self, function: &str) -> InstanceEnd {
        self.worker_with(function, Hello::MOVES | Hello::DRAINED).await
    }

    async fn worker_with(&mut self, function: &str, features: u64) -> InstanceEnd {
        let [end] = self.instance(function, features).await;
        end
    }

    /// The workers of a new instance; `socket` is its name without `.sock`.
    async fn instance<const WORKERS: usize>(
        &mut self,
        socket: &str,
        features: u64,
    ) -> [InstanceEnd; WORKERS] {
        let function = socket.split('@').next().unwrap();
        let before = self.instances.workers(&name(function));
        let listener = self.socket(&format!("{socket}.sock")).listener();
        let mut ends = Vec::new();
        for worker in 0..WORKERS as u16 {
            let accept = |_: &Instances| listener.accept(&AllowedUids::RootAndOwn).unwrap();
            let connection = self.find("a pool connection", accept).await;
            let hello = Hello { worker, workers: WORKERS as u16, pid: 1, features };
            ends.push(InstanceEnd::greet(connection, &hello).unwrap());
        }
        self.until_workers(function, before + WORKERS).await;
        ends.try_into().unwrap_or_else(|_| unreachable!())
    }

    /// Asks where connections for a function may go.
    async fn berth(&mut self, source: &InstanceEnd, function: &str) -> Berth {
        source.say(&InstanceMessage::Ask(name(function))).unwrap();
        match self.grant(source).await {
            GrantAnswer::Granted(berth) => berth,
            refused => panic!("{refused:?}"),
        }
    }

    async fn grant(&mut self, source: &InstanceEnd) -> GrantAnswer {
        let mut buffer = ReceiveBuffer::default();
        self.find("a grant", |_| match source.receive(&mut buffer).unwrap() {
            Received::Message(GatewayMessage::Grant(grant)) => Some(grant.answer),
            Received::WouldBlock => None,
            _ => panic!("something else came"),
        })
        .await
    }

    /// Says that it stops, and waits until nothing comes any more.
    async fn drain(&mut self, worker: &InstanceEnd) {
        worker.say(&InstanceMessage::Drain).unwrap();
        let mut buffer = ReceiveBuffer::default();
        self.find("DRAINED", |_| match worker.receive(&mut buffer).unwrap() {
            Received::Message(GatewayMessage::Drained) => Some(()),
            Received::WouldBlock => None,
            _ => panic!("something else came"),
        })
        .await
    }

    /// The next message of connections: their numbers and what came with them.
    async fn arrival(&mut self, target: &InstanceEnd) -> Vec<(u64, Vec<u8>)> {
        let mut buffer = ReceiveBuffer::default();
        self.find("an arrival", |_| match target.receive(&mut buffer).unwrap() {
            Received::Moved(moves, sockets) => {
                assert_eq!(moves.len(), sockets.len());
                Some(moves.iter().map(|moved| (moved.connection.id, moved.payload.to_vec())).collect())
            }
            Received::WouldBlock => None,
            _ => panic!("something else came"),
        })
        .await
    }

    /// Waits until so many connections are in workers' queues, or wait for room there.
    async fn passed_on(&mut self, count: u64) {
        self.find("all to be passed on", |instances| {
            let workers = instances.slots.iter().flatten().flat_map(|instance| &instance.workers);
            let waiting: u64 = workers.map(Worker::waiting).sum();
            (instances.in_flight() + waiting == count).then_some(())
        })
        .await;
    }

    /// Waits until so many moves have ended, and says how.
    async fn outcomes(&mut self, from: &str, to: &str, count: u64) -> Vec<(MoveOutcome, u64)> {
        let (from, to) = (name(from), name(to));
        self.find("the moves' end", |instances| {
            let counts = instances.moves().iter();
            let outcomes: Vec<_> = counts
                .filter(|((source, target, _), _)| (*source, *target) == (from, to))
                .map(|((_, _, outcome), count)| (*outcome, *count))
                .collect();
            (outcomes.iter().map(|(_, count)| count).sum::<u64>() == count).then_some(outcomes)
        })
        .await
    }
}

fn name(function: &str) -> FunctionName {
    function.parse().unwrap()
}

/// Gives connections back, each for a function and a worker, numbered from 0; says who their clients are.
fn give_back(source: &InstanceEnd, protocol: Protocol, targets: &[(&str, Berth)]) -> Vec<UnixStream> {
    let (clients, sockets): (Vec<_>, Vec<_>) = targets.iter().map(|_| UnixStream::pair().unwrap()).unzip();
    let payloads: Vec<_> = (0..targets.len()).map(|id| vec![id as u8; id]).collect();
    let moves: Vec<_> = (0u64..)
        .zip(targets)
        .zip(&payloads)
        .map(|((id, (function, berth)), payload)| {
            let purpose = Purpose::Serve(name(function));
            let connection = Connection { id, accepted_at_ns: 0, protocol, purpose, peer: None, local: None };
            Move { connection, peer: berth.to, payload }
        })
        .collect();
    let descriptors: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    assert_eq!(source.give_back(&moves, &descriptors).unwrap(), targets.len());
    clients
}

fn is_closed(client: &mut UnixStream) -> bool {
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    matches!(client.read(&mut [0]), Ok(0))
}

#[tokio::test]
async fn what_came_with_one_message_goes_on_with_one_to_each_worker() {
    let mut gateway = Gateway::with_functions();
    let (a, b, c) = (gateway.worker("a").await, gateway.worker("b").await, gateway.worker("c").await);
    let to_b = ("b", gateway.berth(&a, "b").await);
    let to_c = ("c", gateway.berth(&a, "c").await);
    let _clients = give_back(&a, Protocol::Https, &[to_b, to_b, to_c, to_b]);
    assert_eq!(gateway.arrival(&b).await, [(0, vec![]), (1, vec![1])]);
    assert_eq!(gateway.arrival(&c).await, [(2, vec![2, 2])]);
    assert_eq!(gateway.arrival(&b).await, [(3, vec![3, 3, 3])]);
    assert_eq!(gateway.outcomes("a", "b", 3).await, [(MoveOutcome::Moved, 3)]);
    assert_eq!(gateway.instances.in_flight(), 0);
}

#[tokio::test]
async fn of_one_message_what_has_a_place_goes_on_and_the_rest_is_closed() {
    let mut gateway = Gateway::with_functions();
    let (a, b) = (gateway.worker("a").await, gateway.worker("b").await);
    let berth = gateway.berth(&a, "b").await;
    let mut left = berth.places as usize;
    let mut clients = Vec::new();
    while left > MAX_MOVES / 2 {
        let count = MAX_MOVES.min(left - 1);
        clients.extend(give_back(&a, Protocol::Http, &vec![("b", berth); count]));
        assert_eq!(gateway.arrival(&b).await.len(), count);
        left -= count;
    }
    let mut last = give_back(&a, Protocol::Http, &vec![("b", berth); left + 2]);
    assert_eq!(gateway.arrival(&b).await.len(), left);
    let moved = u64::from(berth.places);
    let outcomes = gateway.outcomes("a", "b", moved + 2).await;
    assert_eq!(outcomes, [(MoveOutcome::Moved, moved), (MoveOutcome::Unreserved, 2)]);
    assert!(last[left..].iter_mut().all(is_closed));
}

#[tokio::test]
async fn when_the_worker_is_gone_each_connection_of_a_message_has_its_own_end() {
    for (protocol, outcome) in [(Protocol::Http, MoveOutcome::Refused), (Protocol::Https, MoveOutcome::Lost)]
    {
        let mut gateway = Gateway::with_functions();
        let (a, b) = (gateway.worker("a").await, gateway.worker("b").await);
        let berth = gateway.berth(&a, "b").await;
        drop(b);
        let mut clients = give_back(&a, protocol, &[("b", berth); 3]);
        assert_eq!(gateway.outcomes("a", "b", 3).await, [(outcome, 3)]);
        let orphans: Vec<_> = gateway.instances.take_orphans().collect();
        if protocol == Protocol::Http {
            assert_eq!(orphans.len(), 3);
            for orphan in &orphans {
                assert_eq!(orphan.connection.purpose, Purpose::Refuse(Refusal::Unavailable));
            }
        } else {
            assert!(orphans.is_empty() && clients.iter_mut().all(is_closed));
        }
    }
}

#[tokio::test]
async fn what_a_drained_worker_has_may_leave_it() {
    let mut gateway = Gateway::with_functions();
    let (a, b) = (gateway.worker("a").await, gateway.worker("b").await);
    gateway.drain(&a).await;
    gateway.until_workers("a", 0).await;
    let berth = gateway.berth(&a, "b").await;
    give_back(&a, Protocol::Http, &[("b", berth)]);
    assert_eq!(gateway.arrival(&b).await.len(), 1);
}

#[tokio::test]
async fn a_worker_that_knows_no_drained_gets_the_end_of_file() {
    let mut gateway = Gateway::with_functions();
    let a = gateway.worker_with("a", Hello::MOVES).await;
    a.say(&InstanceMessage::Drain).unwrap();
    let mut buffer = ReceiveBuffer::default();
    gateway
        .find("the end of file", |_| match a.receive(&mut buffer).unwrap() {
            Received::Closed => Some(()),
            Received::WouldBlock => None,
            _ => panic!("something else came"),
        })
        .await;
}

#[tokio::test]
async fn who_asks_for_a_place_waits_until_somebody_has_room() {
    let mut gateway = Gateway::with_functions();
    let (a, b, c) = (gateway.worker("a").await, gateway.worker("b").await, gateway.worker("c").await);
    let mut clients = Vec::new();
    let mut sent = 0;
    while sent < WINDOW {
        let berth = gateway.berth(&a, "b").await;
        for _ in 0..berth.places as usize / MAX_MOVES {
            clients.extend(give_back(&a, Protocol::Http, &[("b", berth); MAX_MOVES]));
        }
        sent += u64::from(berth.places);
        gateway.outcomes("a", "b", sent).await;
    }
    a.say(&InstanceMessage::Ask(name("b"))).unwrap();
    let answer = timeout(Duration::from_millis(100), gateway.grant(&a)).await;
    assert!(answer.is_err(), "{answer:?}");
    gateway.arrival(&b).await;
    let GrantAnswer::Granted(berth) = gateway.grant(&a).await else { panic!("there is room") };

    // Nobody asks for longer than so long.
    clients.extend(give_back(&a, Protocol::Http, &[("b", berth); MAX_MOVES]));
    gateway.outcomes("a", "b", sent + MAX_MOVES as u64).await;
    let asked_at = Instant::now();
    c.say(&InstanceMessage::Ask(name("b"))).unwrap();
    assert_eq!(gateway.grant(&c).await, GrantAnswer::Unavailable);
    assert!(asked_at.elapsed() >= ASK_PATIENCE);
    gateway.arrival(&b).await;

    // Who is gone has no room to wait for.
    clients.extend(give_back(&a, Protocol::Http, &[("b", berth); MAX_MOVES]));
    gateway.outcomes("a", "b", sent + 2 * MAX_MOVES as u64).await;
    c.say(&InstanceMessage::Ask(name("b"))).unwrap();
    let answer = timeout(Duration::from_millis(100), gateway.grant(&c)).await;
    assert!(answer.is_err(), "{answer:?}");
    drop(b);
    assert_eq!(gateway.grant(&c).await, GrantAnswer::Unavailable);
}

#[tokio::test]
async fn whatever_has_a_place_arrives_however_much_waits() {
    let mut gateway = Gateway::with_functions();
    let sources: [_; 3] = gateway.instance("a", Hello::MOVES).await;
    let b = gateway.worker("b").await;
    let mut berths = Vec::new();
    for source in &sources {
        for _ in 0..HELD_MAX / PLACES {
            berths.push((source, gateway.berth(source, "b").await));
        }
        source.say(&InstanceMessage::Ask(name("b"))).unwrap();
        let more = timeout(Duration::from_millis(50), gateway.grant(source)).await;
        assert!(more.is_err(), "{more:?}");
    }
    // One at a time, so that b's queue can't hold them all.
    let mut clients = Vec::new();
    let mut count = 0;
    for (source, berth) in berths {
        for _ in 0..berth.places {
            clients.extend(give_back(source, Protocol::Https, &[("b", berth)]));
        }
        count += u64::from(berth.places);
        gateway.passed_on(count).await;
    }
    assert!(gateway.instances.in_flight() < count, "nothing waits");
    for _ in 0..count {
        assert_eq!(gateway.arrival(&b).await.len(), 1);
    }
    assert_eq!(gateway.outcomes("a", "b", count).await, [(MoveOutcome::Moved, count)]);
}

#[tokio::test]
async fn what_waits_for_a_worker_that_dies_goes_elsewhere_if_it_can() {
    for (protocol, outcome) in [(Protocol::Http, MoveOutcome::Rerouted), (Protocol::Https, MoveOutcome::Lost)]
    {
        let mut gateway = Gateway::with_functions();
        let sources: [_; 2] = gateway.instance("a", Hello::MOVES).await;
        // Both end at once, and one of them is heard of first.
        let [b, sibling] = gateway.instance("b@1", Hello::MOVES).await;
        let mut berths = Vec::new();
        for source in &sources {
            for _ in 0..HELD_MAX / PLACES {
                berths.push((source, gateway.berth(source, "b").await));
            }
        }
        let [other] = gateway.instance("b@2", Hello::MOVES).await;
        // One at a time, so that b's queue can't hold them all.
        let mut clients = Vec::new();
        let mut given = 0;
        for (source, berth) in berths {
            for _ in 0..berth.places {
                clients.extend(give_back(source, protocol, &[("b", berth)]));
            }
            given += u64::from(berth.places);
            gateway.passed_on(given).await;
        }
        let queued = gateway.instances.in_flight();
        assert!(queued < given, "nothing waits");
        drop((b, sibling));
        let outcomes = gateway.outcomes("a", "b", given).await;
        assert_eq!(outcomes, [(MoveOutcome::Moved, queued), (outcome, given - queued)]);
        assert_eq!(gateway.instances.lost(), queued);
        if protocol == Protocol::Http {
            let mut arrived = 0;
            while arrived < given - queued {
                arrived += gateway.arrival(&other).await.len() as u64;
            }
        }
    }
}

#[tokio::test]
async fn what_a_stopping_instance_has_is_spread_over_the_other_instances_workers() {
    let mut gateway = Gateway::with_functions();
    let features = Hello::MOVES | Hello::DRAINED;
    let old: [_; 2] = gateway.instance("a@old", features).await;
    let _new: [_; 2] = gateway.instance("a@new", features).await;
    old.iter().for_each(|worker| worker.status().set_draining());
    let mut places = std::collections::HashMap::new();
    for worker in old.iter().cycle().take(8) {
        let berth = gateway.berth(worker, "a").await;
        *places.entry(berth.worker).or_insert(0) += berth.places;
    }
    assert_eq!(places, [(0, 4 * PLACES_OF_SUCCESSORS), (1, 4 * PLACES_OF_SUCCESSORS)].into());
}

#[tokio::test]
async fn a_process_is_not_its_own_successor() {
    let mut gateway = Gateway::with_functions();
    let [stopping, _other] = gateway.instance("a", Hello::MOVES | Hello::DRAINED).await;
    stopping.status().set_draining();
    stopping.say(&InstanceMessage::Ask(name("a"))).unwrap();
    assert_eq!(gateway.grant(&stopping).await, GrantAnswer::Unavailable);
}
