//! The pool of instances against instances that speak the real wire.
use std::{
    fs,
    io::Read,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use common::{Protocol, Refusal};
use handoff::{
    AllowedUids, Hello, InstanceEnd, InstanceMessage, PoolListener, Purpose, ReceiveBuffer, Received, message,
};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind,
            listen, sendmsg, socket,
        },
    },
    unistd::ftruncate,
};
use tempfile::TempDir;
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    task::{JoinHandle, JoinSet},
    time::timeout,
};

use super::*;

/// Ends a test that waits for what will not come.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

type Batch = Vec<(Connection, OwnedFd)>;

/// What a supervisor keeps while instances come and go.
pub(super) struct Socket {
    listener: OwnedFd,
    path: PathBuf,
}

impl Socket {
    fn new(directory: &Path, name: &str) -> Self {
        let path = directory.join(name);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(16).unwrap()).unwrap();
        Self { listener, path }
    }

    pub(super) fn listener(&self) -> PoolListener {
        PoolListener::new(self.listener.try_clone().unwrap()).unwrap()
    }

    /// Starts an instance that takes as many messages as `messages` has permits for.
    fn start(&self, workers: u16, messages: usize) -> Running {
        let (arrived_to, arrived) = mpsc::unbounded_channel();
        let running = Shared {
            messages: Arc::new(Semaphore::new(messages)),
            stop: Arc::new(Notify::new()),
            arrived: arrived_to,
        };
        let listener = register(self.listener());
        let task = tokio::spawn(accept_all(listener, workers, running.clone()));
        Running { shared: running, arrived, task }
    }
}

#[derive(Clone)]
struct Shared {
    messages: Arc<Semaphore>,
    stop: Arc<Notify>,
    arrived: mpsc::UnboundedSender<Batch>,
}

struct Running {
    shared: Shared,
    arrived: mpsc::UnboundedReceiver<Batch>,
    task: JoinHandle<()>,
}

impl Running {
    async fn batch(&mut self) -> Batch {
        timeout(PATIENCE, self.arrived.recv()).await.unwrap().unwrap()
    }

    async fn arrivals(&mut self, count: usize) -> Batch {
        let mut arrivals = Vec::new();
        while arrivals.len() < count {
            arrivals.extend(self.batch().await);
        }
        arrivals
    }

    /// As a SIGKILL does: what is in the queues goes with it.
    async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

fn register<T: AsRawFd>(end: T) -> AsyncFd<T> {
    // SAFETY: the ends of the wire own their descriptor and never replace it.
    unsafe { AsyncFd::register_with_interest(end, Interest::READABLE) }.map_err(io::Error::from).unwrap()
}

async fn accept_all(listener: AsyncFd<PoolListener>, workers: u16, shared: Shared) {
    let mut ends = JoinSet::new();
    for worker in (0..workers).cycle() {
        let connection = loop {
            let mut guard = listener.readable().await.unwrap();
            match guard.get_inner().accept(&AllowedUids::RootAndOwn).unwrap() {
                Some(connection) => break connection,
                None => guard.clear_ready(),
            }
        };
        let end = InstanceEnd::greet(connection, &Hello { worker, workers, pid: 1, features: 0 }).unwrap();
        ends.spawn(receive_all(register(end), shared.clone()));
    }
}

async fn receive_all(end: AsyncFd<InstanceEnd>, shared: Shared) {
    let mut buffer = ReceiveBuffer::default();
    loop {
        tokio::select! {
            permit = shared.messages.acquire() => permit.unwrap().forget(),
            () = shared.stop.notified() => {
                end.get_ref().stop_receiving().unwrap();
                shared.messages.add_permits(1000);
                continue;
            }
        }
        loop {
            let mut guard = end.readable().await.unwrap();
            match end.get_ref().receive(&mut buffer).unwrap() {
                Received::Connections(arrivals) => break shared.arrived.send(arrivals.collect()).unwrap(),
                Received::WouldBlock => guard.clear_ready(),
                Received::Closed => return,
                _ => panic!("nothing moves here"),
            }
        }
    }
}

pub(super) struct Gateway {
    pub(super) instances: Instances,
    directory: TempDir,
}

impl Gateway {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { instances: Instances::new(directory.path()).unwrap(), directory }
    }

    pub(super) fn socket(&self, name: &str) -> Socket {
        Socket::new(self.directory.path(), name)
    }

    /// Goes on until the instances are as they should be.
    async fn until(&mut self, what: &str, done: impl Fn(&Instances) -> bool) {
        self.find(what, |instances| done(instances).then_some(())).await;
    }

    /// Goes on until something is there.
    pub(super) async fn find<T>(&mut self, what: &str, mut find: impl FnMut(&Instances) -> Option<T>) -> T {
        let search = async {
            loop {
                match find(&self.instances) {
                    Some(found) => break found,
                    // `changed` completes for what is useful to connections; everything else needs turns of its own.
                    None => {
                        let _ = timeout(Duration::from_millis(5), self.instances.changed()).await;
                    }
                }
            }
        };
        timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("{what} did not happen"))
    }

    pub(super) async fn until_workers(&mut self, function: &str, workers: usize) {
        let function = function.parse().unwrap();
        self.until(&format!("{workers} workers"), |instances| instances.workers(&function) == workers).await;
    }

    async fn changed(&mut self) {
        timeout(PATIENCE, self.instances.changed()).await.unwrap();
    }

    fn load_of_first(&mut self) -> worker::Load {
        self.instances.begin_round();
        let round = self.instances.round;
        let first = self.instances.slots[0].as_mut().unwrap();
        first.refresh(round);
        first.least_loaded().unwrap().1
    }

    fn hand_over(&mut self, ready: &mut Vec<Ready>) -> usize {
        let mut count = 0;
        self.instances.hand_over(ready, |_| count += 1);
        count
    }
}

fn ready(purpose: Purpose, ids: std::ops::Range<u64>) -> (Vec<UnixStream>, Vec<Ready>) {
    ids.map(|id| {
        let (client, socket) = UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let connection =
            Connection { id, accepted_at_ns: 0, protocol: Protocol::Http, purpose, peer: None, local: None };
        (client, Ready { connection, socket: socket.into(), wait_until: None })
    })
    .unzip()
}

fn for_echo(ids: std::ops::Range<u64>) -> (Vec<UnixStream>, Vec<Ready>) {
    ready(Purpose::Serve("echo".parse().unwrap()), ids)
}

fn ids<'a>(connections: impl IntoIterator<Item = &'a Connection>) -> Vec<u64> {
    connections.into_iter().map(|connection| connection.id).collect()
}

fn closed(clients: &mut [UnixStream]) -> usize {
    clients.iter_mut().map(|client| usize::from(matches!(client.read(&mut [0]), Ok(0)))).sum()
}

#[tokio::test]
async fn an_instance_that_comes_gets_connections() {
    let mut gateway = Gateway::new();
    let (_clients, mut waiting) = for_echo(0..1);
    assert_eq!(gateway.hand_over(&mut waiting), 0);
    let socket = gateway.socket("echo.sock");
    let mut echo = socket.start(3, 1000);
    gateway.changed().await;
    assert_eq!(gateway.hand_over(&mut waiting), 1);
    assert_eq!(echo.batch().await[0].0.id, 0);
    gateway.until_workers("echo", 3).await;
}

#[tokio::test]
async fn an_instance_that_was_there_before_gets_connections() {
    let directory = tempfile::tempdir().unwrap();
    let socket = Socket::new(directory.path(), "echo@1.sock");
    let mut gateway = Gateway { instances: Instances::new(directory.path()).unwrap(), directory };
    let mut echo = socket.start(1, 1000);
    gateway.changed().await;
    let (_clients, mut waiting) = for_echo(0..1);
    assert_eq!(gateway.hand_over(&mut waiting), 1);
    echo.batch().await;
}

#[tokio::test]
async fn a_batch_is_one_message_to_each_worker() {
    let mut gateway = Gateway::new();
    let mut echo = gateway.socket("echo.sock").start(2, 0);
    gateway.until_workers("echo", 2).await;
    let (mut clients, mut batch) = for_echo(0..64);
    assert_eq!(gateway.hand_over(&mut batch), 64);
    assert_eq!(gateway.instances.in_flight(), 64);
    echo.shared.messages.add_permits(2);
    let (one, other) = (echo.batch().await, echo.batch().await);
    assert_eq!((one.len(), other.len()), (32, 32));
    let mut arrived = ids(one.iter().chain(&other).map(|(connection, _)| connection));
    arrived.sort_unstable();
    assert!(arrived.into_iter().eq(0..64));
    assert_eq!(gateway.instances.in_flight(), 0);
    assert_eq!(closed(&mut clients), 0);
    drop((one, other));
    assert_eq!(closed(&mut clients), 64, "the gateway keeps no copy");
}

#[tokio::test]
async fn what_finds_a_full_queue_stays_in_order_and_goes_when_there_is_room() {
    let mut gateway = Gateway::new();
    let mut echo = gateway.socket("echo.sock").start(1, 0);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = for_echo(0..300);
    assert_eq!(gateway.hand_over(&mut batch), WINDOW as usize);
    assert!(ids(batch.iter().map(|ready| &ready.connection)).into_iter().eq(WINDOW..300));
    assert_eq!(gateway.hand_over(&mut batch), 0);

    echo.shared.messages.add_permits(1);
    echo.batch().await;
    gateway.changed().await;
    assert_eq!(gateway.hand_over(&mut batch), 44);
    echo.shared.messages.add_permits(100);
    assert_eq!(echo.arrivals(300 - 64).await.len(), 300 - 64);
}

#[tokio::test]
async fn a_full_instance_does_not_hold_up_another() {
    let mut gateway = Gateway::new();
    let stalled = gateway.socket("echo@stalled.sock").start(1, 0);
    let mut well = gateway.socket("echo@well.sock").start(1, 1000);
    gateway.until_workers("echo", 2).await;
    let mut clients = Vec::new();
    for round in 0..20 {
        let (some, mut batch) = for_echo(64 * round..64 * (round + 1));
        clients.extend(some);
        while !batch.is_empty() {
            if gateway.hand_over(&mut batch) == 0 {
                gateway.changed().await;
            }
            // The instance takes before the next round, so that the stalled one is the more loaded.
            tokio::task::yield_now().await;
        }
    }
    let in_flight = gateway.instances.in_flight();
    assert!(in_flight <= 2 * WINDOW, "{in_flight}");
    well.arrivals(20 * 64 - WINDOW as usize).await;
    drop(stalled);
}

#[tokio::test]
async fn what_waits_for_room_is_not_forgotten_when_others_are_served() {
    let mut gateway = Gateway::new();
    let mut echo = gateway.socket("echo.sock").start(1, 0);
    let _hello = gateway.socket("hello.sock").start(1, 1000);
    gateway.until_workers("echo", 1).await;
    gateway.until_workers("hello", 1).await;
    let (_clients, mut waiting) = for_echo(0..WINDOW + 1);
    gateway.hand_over(&mut waiting);
    let (_client, mut other) = ready(Purpose::Serve("hello".parse().unwrap()), 0..1);
    assert_eq!((waiting.len(), gateway.hand_over(&mut other)), (1, 1));
    echo.shared.messages.add_permits(1);
    echo.batch().await;
    gateway.changed().await;
    assert_eq!(gateway.hand_over(&mut waiting), 1);
}

#[tokio::test]
async fn a_worker_that_does_not_run_gets_only_what_nobody_else_can_take() {
    let mut gateway = Gateway::new();
    let stalled = gateway.socket("echo@stalled.sock").start(1, 0);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = for_echo(0..1);
    assert_eq!(gateway.hand_over(&mut batch), 1);
    while !gateway.load_of_first().stalled {
        let _ = timeout(Duration::from_millis(5), gateway.instances.changed()).await;
    }
    let mut well = gateway.socket("echo@well.sock").start(1, 0);
    gateway.until_workers("echo", 2).await;
    // More than the stalled one has, so that load alone would choose that.
    let (_more, mut batch) = for_echo(1..WINDOW + 1);
    assert_eq!(gateway.hand_over(&mut batch), WINDOW as usize);
    well.shared.messages.add_permits(1000);
    well.arrivals(WINDOW as usize).await;
    assert_eq!(gateway.instances.in_flight(), 1);
    drop(stalled);
}

#[tokio::test]
async fn what_a_killed_instance_had_not_taken_is_counted() {
    let mut gateway = Gateway::new();
    let socket = gateway.socket("echo.sock");
    let mut echo = socket.start(1, 1);
    gateway.until_workers("echo", 1).await;
    let (mut clients, mut first) = for_echo(0..10);
    let (more_clients, mut second) = for_echo(10..30);
    clients.extend(more_clients);
    assert_eq!(gateway.hand_over(&mut first), 10);
    let taken = echo.batch().await;
    assert_eq!(gateway.hand_over(&mut second), 20);
    assert_eq!(gateway.instances.in_flight(), 20);
    echo.kill().await;
    gateway.until("the loss", |instances| instances.lost() == 20).await;
    assert_eq!(closed(&mut clients), 20);
    assert_eq!(taken.len(), 10);
}

#[tokio::test]
async fn a_restarted_instance_is_found_again() {
    let mut gateway = Gateway::new();
    let socket = gateway.socket("echo.sock");
    let mut clients = Vec::new();
    for round in 0..5 {
        let mut echo = socket.start(2, 1000);
        gateway.until_workers("echo", 2).await;
        let (client, mut batch) = for_echo(round..round + 1);
        clients.extend(client);
        assert_eq!(gateway.hand_over(&mut batch), 1);
        assert_eq!(echo.batch().await[0].0.id, round);
        echo.kill().await;
        // A send that meets the end first gives the connection back.
        let (client, mut batch) = for_echo(100..101);
        clients.extend(client);
        assert_eq!(gateway.hand_over(&mut batch), 0);
        assert_eq!(batch.len(), 1);
        gateway.until_workers("echo", 0).await;
    }
    assert_eq!(gateway.instances.lost(), 0);
}

#[tokio::test]
async fn an_instance_that_ends_before_its_hello_is_tried_again() {
    let mut gateway = Gateway::new();
    let socket = gateway.socket("echo.sock");
    for _ in 0..8 {
        let accepted = async {
            loop {
                if let Some(connection) = socket.listener().accept(&AllowedUids::RootAndOwn).unwrap() {
                    break connection;
                }
                let _ = timeout(Duration::from_millis(5), gateway.instances.changed()).await;
            }
        };
        drop(timeout(PATIENCE, accepted).await.unwrap());
    }
    let _echo = socket.start(1, 0);
    gateway.until_workers("echo", 1).await;
}

#[tokio::test]
async fn a_pool_connection_that_waits_for_its_hello_is_not_asked_for_again() {
    let mut gateway = Gateway::new();
    let listener = gateway.socket("echo.sock").listener();
    let accept = |_: &Instances| listener.accept(&AllowedUids::RootAndOwn).unwrap();
    let first = gateway.find("a pool connection", accept).await;
    let hello = Hello { worker: 0, workers: 2, pid: 1, features: 0 };
    let first = InstanceEnd::greet(first, &hello).unwrap();
    gateway.until_workers("echo", 1).await;
    // The other worker's, on which nothing is said.
    let _second = gateway.find("another pool connection", accept).await;
    drop(first);
    gateway.until_workers("echo", 0).await;
    assert_eq!(gateway.instances.retry_at, None, "a deadline that nothing ends keeps the loop busy");
}

#[tokio::test]
async fn an_instance_that_drains_again_and_again_gets_no_more_pool_connections() {
    let mut gateway = Gateway::new();
    let listener = gateway.socket("echo.sock").listener();
    let accept = |_: &Instances| listener.accept(&AllowedUids::RootAndOwn).unwrap();
    let hello = Hello { worker: 0, workers: 1, pid: 1, features: Hello::MOVES };
    let mut kept = Vec::new();
    // Each connection for it shows the gateway that nobody takes one.
    let come_by = |gateway: &mut Gateway| gateway.hand_over(&mut for_echo(0..1).1);
    for _ in 0..4 {
        let end = InstanceEnd::greet(gateway.find("a pool connection", accept).await, &hello).unwrap();
        gateway.until_workers("echo", 1).await;
        end.status().set_draining();
        kept.push(end);
        assert_eq!(come_by(&mut gateway), 0);
    }
    for _ in 0..20 {
        let _ = timeout(Duration::from_millis(5), gateway.instances.changed()).await;
        assert_eq!(come_by(&mut gateway), 0);
    }
    assert!(accept(&gateway.instances).is_none());
    kept.pop();
    gateway.find("another one in its place", accept).await;
}

#[tokio::test]
async fn an_instance_with_much_to_say_does_not_keep_the_loop() {
    let mut gateway = Gateway::new();
    let listener = gateway.socket("echo.sock").listener();
    let accept = |_: &Instances| listener.accept(&AllowedUids::RootAndOwn).unwrap();
    let connection = gateway.find("a pool connection", accept).await;
    let hello = Hello { worker: 0, workers: 1, pid: 1, features: Hello::MOVES };
    let echo = InstanceEnd::greet(connection, &hello).unwrap();
    gateway.until_workers("echo", 1).await;
    for _ in 0..200 {
        echo.say(&InstanceMessage::Ask("nobody".parse().unwrap())).unwrap();
    }
    let (sender, mut other) = mpsc::unbounded_channel();
    sender.send(()).unwrap();
    tokio::select! {
        biased;
        () = gateway.instances.changed() => panic!("nothing came that is of use"),
        Some(()) = other.recv() => {}
    }
    assert!(gateway.instances.unread, "the other one waited for all that the instance had to say");
}

#[tokio::test]
async fn a_draining_instance_takes_what_it_was_given_and_nothing_new() {
    let mut gateway = Gateway::new();
    let (old_socket, new_socket) = (gateway.socket("echo@old.sock"), gateway.socket("echo@new.sock"));
    let mut old = old_socket.start(1, 0);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = for_echo(0..5);
    assert_eq!(gateway.hand_over(&mut batch), 5);

    let mut new = new_socket.start(1, 1000);
    gateway.until_workers("echo", 2).await;
    old.shared.stop.notify_one();
    assert_eq!(old.batch().await.len(), 5);
    for id in 5..25 {
        let (_clients, mut batch) = for_echo(id..id + 1);
        assert_eq!(gateway.hand_over(&mut batch), 1);
        assert_eq!(new.batch().await[0].0.id, id);
    }
    assert_eq!(gateway.instances.lost(), 0);
}

#[tokio::test]
async fn a_socket_taken_out_of_the_directory_gets_nothing_new() {
    let mut gateway = Gateway::new();
    let socket = gateway.socket("echo.sock");
    let mut echo = socket.start(1, 0);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = for_echo(0..2);
    assert_eq!(gateway.hand_over(&mut batch), 2);
    fs::remove_file(&socket.path).unwrap();
    gateway.until_workers("echo", 0).await;
    let (_more, mut batch) = for_echo(2..3);
    assert_eq!(gateway.hand_over(&mut batch), 0);
    echo.shared.messages.add_permits(1);
    assert_eq!(echo.batch().await.len(), 2);

    let mut again = gateway.socket("echo.sock").start(1, 1000);
    gateway.changed().await;
    assert_eq!(gateway.hand_over(&mut batch), 1);
    assert_eq!(again.batch().await[0].0.id, 2);
}

#[tokio::test]
async fn refusals_go_to_the_refusal_function() {
    let mut gateway = Gateway::new();
    let _echo = gateway.socket("echo.sock").start(1, 1000);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = ready(Purpose::Refuse(Refusal::NoFunction), 0..1);
    assert_eq!(gateway.hand_over(&mut batch), 0);
    let mut refusal = gateway.socket("refusal.sock").start(1, 1000);
    gateway.until_workers(REFUSAL, 1).await;
    assert_eq!(gateway.hand_over(&mut batch), 1);
    assert_eq!(refusal.batch().await[0].0.purpose, Purpose::Refuse(Refusal::NoFunction));
}

#[tokio::test]
async fn what_is_in_flight_in_all_is_bounded() {
    let mut gateway = Gateway::new();
    let mut echo = gateway.socket("echo.sock").start(2, 0);
    gateway.until_workers("echo", 2).await;
    gateway.instances.in_flight_bound = 10;
    let (_clients, mut batch) = for_echo(0..15);
    assert_eq!(gateway.hand_over(&mut batch), 10);
    assert_eq!(gateway.hand_over(&mut batch), 0);
    echo.shared.messages.add_permits(2);
    echo.arrivals(10).await;
    gateway.changed().await;
    assert_eq!(gateway.hand_over(&mut batch), 5);
}

#[tokio::test]
async fn a_directory_that_vanishes_is_watched_again_when_it_is_back() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("functions");
    let mut gateway = Gateway { instances: Instances::new(&path).unwrap(), directory: root };
    let old = Socket::new(&path, "echo.sock");
    let _old = old.start(1, 1000);
    gateway.until_workers("echo", 1).await;
    fs::remove_dir_all(&path).unwrap();
    gateway.until_workers("echo", 0).await;
    gateway.until("the directory", |_| path.is_dir()).await;
    let mut echo = Socket::new(&path, "echo.sock").start(1, 1000);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = for_echo(0..1);
    assert_eq!(gateway.hand_over(&mut batch), 1);
    echo.batch().await;
}

/// Says HELLO with a page that claims to have taken `taken`; one that is too small stands for all that is unsound.
fn greet_with_page(connection: &OwnedFd, page_bytes: usize, taken: u64) {
    let page = memfd_create("page", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&page, page_bytes as i64).unwrap();
    nix::unistd::write(&page, &taken.to_ne_bytes()).unwrap();
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&page, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    let mut hello = message::Bytes::new();
    message::encode_hello(&Hello { worker: 0, workers: 1, pid: 1, features: 0 }, &mut hello);
    let descriptors = [page.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let parts = [io::IoSlice::new(&hello)];
    sendmsg::<()>(connection.as_raw_fd(), &parts, &control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
}

fn accept_raw(socket: &Socket) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let fd = accept(socket.listener.as_raw_fd()).unwrap();
    // SAFETY: accept has just made it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[tokio::test]
async fn an_instance_that_claims_too_much_is_dropped() {
    let mut gateway = Gateway::new();
    let socket = gateway.socket("echo.sock");
    gateway.until("the directory's change", |instances| !instances.functions.is_empty()).await;
    let liar = accept_raw(&socket);
    greet_with_page(&liar, handoff::STATUS_PAGE_BYTES, 1);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = for_echo(0..1);
    assert_eq!(gateway.hand_over(&mut batch), 0);
    assert_eq!(gateway.instances.workers(&"echo".parse().unwrap()), 0);

    let mut echo = socket.start(1, 1000);
    gateway.until_workers("echo", 1).await;
    assert_eq!(gateway.hand_over(&mut batch), 1);
    echo.batch().await;
}

#[tokio::test]
async fn an_instance_that_breaks_off_behind_its_hello_is_tried_ever_more_slowly() {
    const ATTEMPTS: u32 = 14;
    let mut gateway = Gateway::new();
    let listener = register(gateway.socket("echo.sock").listener());
    let begun = Instant::now();
    let accepting = async {
        for _ in 0..ATTEMPTS {
            let connection = loop {
                let mut guard = listener.readable().await.unwrap();
                match guard.get_inner().accept(&AllowedUids::RootAndOwn).unwrap() {
                    Some(connection) => break connection,
                    None => guard.clear_ready(),
                }
            };
            let hello = Hello { worker: 0, workers: 1, pid: 1, features: 0 };
            drop(InstanceEnd::greet(connection, &hello).unwrap());
        }
    };
    tokio::select! {
        () = accepting => {}
        () = gateway.until("this", |_| false) => {}
    }
    // Pauses of 1, 2, 4 to 64 ms, and of 100 ms from then on.
    assert!(begun.elapsed() > Duration::from_millis(127 + 100 * 4), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_instance_without_a_sound_page_is_dropped_and_tried_again() {
    let mut gateway = Gateway::new();
    let socket = gateway.socket("echo.sock");
    gateway.until("the directory's change", |instances| !instances.functions.is_empty()).await;
    greet_with_page(&accept_raw(&socket), 100, 0);
    let mut echo = socket.start(1, 1000);
    gateway.until_workers("echo", 1).await;
    let (_clients, mut batch) = for_echo(0..1);
    assert_eq!(gateway.hand_over(&mut batch), 1);
    echo.batch().await;
}

#[tokio::test]
async fn instances_get_connections_by_their_weight() {
    let mut gateway = Gateway::new();
    let sockets = ["echo@large.sock", "echo@small.sock"].map(|name| gateway.socket(name));
    let [mut large, mut small] = [&sockets[0], &sockets[1]].map(|socket| socket.start(1, 1000));
    gateway.until_workers("echo", 2).await;
    for (weight, shares) in [(4, [40, 10]), (1, [25, 25])] {
        let weights = BTreeMap::from([("large".to_owned(), weight)]);
        gateway.instances.set_weights([("echo".parse().unwrap(), weights)].into());
        gateway.until_workers("echo", 2).await;
        // Those of one round are compared by what was assigned.
        let (_clients, mut waiting) = for_echo(0..50);
        assert_eq!(gateway.hand_over(&mut waiting), 50);
        let got = [large.arrivals(shares[0] - 1).await.len(), small.arrivals(shares[1] - 1).await.len()];
        assert!(got.iter().zip(shares).all(|(got, share)| got.abs_diff(share) <= 1), "{got:?} {shares:?}");
        gateway.until("all to be taken", |instances| instances.in_flight() == 0).await;
    }
}
