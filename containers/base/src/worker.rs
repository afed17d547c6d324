//! A worker thread: takes connections from its pool connections and gives each to a task.
use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::OwnedFd,
    pin::Pin,
    rc::{Rc, Weak},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use common::{FunctionName, Protocol};
use handoff::{GatewayMessage, Hello, InstanceEnd, MAX_BATCH, Move, Purpose, ReceiveBuffer, Received};
use pin_project_lite::pin_project;
use tokio::{
    sync::{Notify, mpsc},
    task::{LocalSet, spawn_local},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    direct::Listeners,
    http::Tally,
    linger::Linger,
    memory::Crowd,
    moves::{Letter, Luggage, Mover, Moving, Post, Succession, succession},
    pool::Pool,
    readable::Readable,
    socket::Socket,
    stop::Stop,
};

/// Sooner than any deadline of a connection by default.
const TICK: Duration = Duration::from_secs(1);

/// How long gateways have to end by themselves when the function stops; through them its connections find where to go.
const DRAIN_PATIENCE: Duration = succession::PATIENCE;

/// A client's connection, which now belongs to this process alone.
pub struct Connection {
    /// The gateway's name for it, for logs.
    pub id: u64,
    pub(crate) accepted_at_ns: u64,
    pub protocol: Protocol,
    pub purpose: Purpose,
    pub socket: Socket,
    /// What it takes along from another instance.
    pub(crate) luggage: Option<Box<Luggage>>,
    /// Drop this last: until then the connection counts as open.
    pub held: Held,
}

/// What the connections of one worker share.
#[derive(Default)]
pub struct Worker {
    pub linger: Linger,
    pub stop: Stop,
    pub(crate) mover: Mover,
    pub(crate) succession: Succession,
    pub(crate) tally: Tally,
    open: Arc<Open>,
    ticking: Cell<bool>,
    /// Somebody looks for a successor, or has.
    looked: Cell<bool>,
    /// Each gateway sees how busy this worker is.
    posts: RefCell<Vec<Weak<Post>>>,
}

/// How a worker is run.
#[derive(Clone)]
pub(crate) struct Plan {
    /// How connections move, if they do.
    pub moving: Option<Arc<Moving>>,
    pub index: u16,
    pub workers: u16,
    /// More open connections than this are not taken.
    pub connections_max: u32,
    pub stop_timeout: Duration,
}

/// What a worker listens at besides its pool connections.
pub(crate) struct Direct {
    pub listeners: Listeners,
    pub name: FunctionName,
}

#[derive(Default)]
struct Open {
    connections: AtomicU32,
    changed: Notify,
}

/// Counts a connection as open until it is dropped.
pub struct Held(Arc<Open>);

impl Held {
    fn new(open: &Arc<Open>) -> Self {
        open.connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_waiters();
    }
}

/// Serves until `pools` is closed and what was taken is done, or the time for that is over.
pub(crate) fn run<H, F>(
    plan: &Plan,
    pools: mpsc::UnboundedReceiver<Pool>,
    direct: Option<Direct>,
    make: impl FnOnce(&Worker) -> H,
) -> io::Result<()>
where
    H: Fn(Connection) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = LocalSet::new();
    runtime.block_on(tasks.run_until(work(plan, pools, direct, make)));
    drop(tasks);
    // A handler's blocking call has had its time, like every other request in progress.
    runtime.shutdown_background();
    Ok(())
}

async fn work<H, F>(
    plan: &Plan,
    mut pools: mpsc::UnboundedReceiver<Pool>,
    direct: Option<Direct>,
    make: impl FnOnce(&Worker) -> H,
) where
    H: Fn(Connection) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let mover = plan.moving.as_ref().map(|moving| Mover::new(Arc::clone(moving), plan.index));
    let features = if mover.is_some() { Hello::MOVES | Hello::DRAINED } else { 0 };
    let mover = mover.unwrap_or_default();
    let succession = Succession::new(mover.clone());
    let worker = Rc::new(Worker { mover, succession, ..Worker::default() });
    let handler = Rc::new(make(&worker));
    if let Some(Direct { listeners, name }) = direct {
        listeners.serve(name, &worker, plan.connections_max, &handler);
    }
    let buffer = Rc::new(RefCell::new(ReceiveBuffer::default()));
    let mut met = 0;
    while let Some(pool) = pools.recv().await {
        let hello = Hello { worker: plan.index, workers: plan.workers, pid: std::process::id(), features };
        let Pool { connection, counted } = pool;
        let end = InstanceEnd::greet(connection, &hello)
            .map_err(|error| error.to_string())
            .and_then(|end| Readable::new(end).map_err(|error| error.to_string()));
        let post = match end {
            Ok(end) => Rc::new(Post::new(met, end)),
            Err(error) => {
                tracing::warn!(error, "a gateway's connection failed");
                continue;
            }
        };
        met = met.wrapping_add(1);
        worker.posts.borrow_mut().push(Rc::downgrade(&post));
        worker.tally.report_to(post.status());
        // There may be connections already, by another gateway or another of this one's pool connections.
        worker.publish();
        worker.mover.gateway_came(&post);
        let receiver = Receiver {
            post,
            worker: Rc::clone(&worker),
            handler: Rc::clone(&handler),
            buffer: Rc::clone(&buffer),
            connections_max: plan.connections_max,
        };
        spawn_local(async move {
            if let Err(error) = receiver.receive().await {
                tracing::warn!(%error, "a gateway's connection failed");
            }
            receiver.part().await;
            drop(counted);
        });
    }
    let deadline = Instant::now() + plan.stop_timeout;
    worker.stop.request();
    // Who waits for room waits no more.
    worker.open.changed.notify_waiters();
    let moves = features & Hello::MOVES != 0;
    let is_drained = moves && timeout_at(patience(deadline), worker.drain()).await.is_ok();
    // While connections are leaving, gateways are heard: somebody else may be slow to say that nothing more comes.
    if !is_drained && !worker.succession.goes_on() {
        worker.stop_receiving();
    }
    if timeout_at(deadline, worker.finish(deadline)).await.is_err() {
        let cut = worker.open.connections.load(Ordering::Relaxed);
        tracing::warn!(connections = cut, "connections that took too long are cut");
    }
}

/// Until when gateways are waited for: what they have sent has to be taken and served in the time that is left.
fn patience(deadline: Instant) -> Instant {
    let now = Instant::now();
    now + DRAIN_PATIENCE.min(deadline.saturating_duration_since(now) / 2)
}

impl Worker {
    /// Asks the gateways to send nothing more, and waits until all that they sent is here. Connections may be on their
    /// way that only this worker can go on with, and those that it has may still want to leave.
    async fn drain(&self) {
        for post in self.posts() {
            post.status().set_draining();
            post.send(Letter::Drain);
        }
        if self.open.connections.load(Ordering::Relaxed) > 0 {
            self.look_for_successor();
        }
        self.until(|| self.posts().all(|post| post.is_drained())).await;
    }

    /// Once, and not for nobody: it may take a key agreement.
    fn look_for_successor(&self) {
        if !self.looked.replace(true) {
            let succession = self.succession.clone();
            spawn_local(async move { succession.look().await });
        }
    }

    /// Ends what gateways send; what they have sent is still taken.
    fn stop_receiving(&self) {
        for post in self.posts() {
            if let Err(error) = post.end().get_ref().stop_receiving() {
                tracing::warn!(%error, "a gateway can't be told to stop");
            }
        }
    }

    /// Waits until all connections are over and the gateways have heard all that is to be said to them.
    async fn finish(&self, deadline: Instant) {
        let is_idle = || self.open.connections.load(Ordering::Relaxed) == 0;
        self.until(is_idle).await;
        let is_drained = || is_idle() && self.posts().all(|post| post.is_drained());
        // Whoever isn't by then is told by the end of receiving, and what is in the queue is still taken.
        let _ = timeout_at(patience(deadline), self.until(is_drained)).await;
        self.stop_receiving();
        self.until(|| is_idle() && self.posts().next().is_none()).await;
    }

    fn posts(&self) -> impl Iterator<Item = Rc<Post>> {
        let posts: Vec<_> = self.posts.borrow().iter().filter_map(Weak::upgrade).collect();
        posts.into_iter()
    }

    /// Waits for something that a connection's end or a gateway brings about.
    async fn until(&self, is_so: impl Fn() -> bool) {
        loop {
            let changed = self.open.changed.notified();
            if is_so() {
                return;
            }
            changed.await;
        }
    }

    /// Keeps a timer armed while there are connections: the runtime wakes itself, by a system call, for each timer that
    /// is the earliest one, and a connection's never is when this one exists. What it wakes for is a look at how many are
    /// left.
    pub(crate) fn tick(self: &Rc<Self>) {
        if self.ticking.replace(true) {
            return;
        }
        let worker = Rc::clone(self);
        spawn_local(async move {
            let mut crowd = Crowd::default();
            loop {
                let open = worker.open.connections.load(Ordering::Relaxed);
                crowd.is_now(open);
                if open == 0 {
                    break;
                }
                sleep(TICK).await;
            }
            worker.ticking.set(false);
        });
    }

    pub(crate) fn publish(&self) {
        let open = self.open.connections.load(Ordering::Relaxed);
        self.tally.set_open(open);
        self.posts.borrow_mut().retain(|post| {
            let Some(post) = post.upgrade() else { return false };
            post.status().set_open(open);
            true
        });
    }
}

/// How connections come in, whichever way.
impl Worker {
    /// Gives a connection to a task of its own.
    pub(crate) fn serve<H, F>(
        self: &Rc<Self>,
        record: &handoff::Connection,
        fd: OwnedFd,
        luggage: Option<Box<Luggage>>,
        handler: &H,
    ) where
        H: Fn(Connection) -> F,
        F: Future<Output = ()> + 'static,
    {
        let serving = handler(Connection {
            id: record.id,
            accepted_at_ns: record.accepted_at_ns,
            protocol: record.protocol,
            purpose: record.purpose,
            socket: if luggage.is_some() { Socket::arrived } else { Socket::new }(fd, record.peer),
            luggage,
            held: Held::new(&self.open),
        });
        spawn_local(Published { serving, worker: Rc::clone(self) });
        if self.stop.is_requested() {
            self.look_for_successor();
        }
    }

    fn is_full(&self, connections_max: u32) -> bool {
        let open = self.open.connections.load(Ordering::Relaxed);
        open.saturating_add(MAX_BATCH as u32) > connections_max
    }

    /// Waits until another message's descriptors fit: what isn't taken stays with the gateway, which notices. Who stops
    /// has to hear where its connections can go, and little more comes than that.
    pub(crate) async fn room(&self, connections_max: u32) {
        self.until(|| !self.is_full(connections_max) || self.stop.is_requested()).await;
    }
}

/// One pool connection's receiving side.
struct Receiver<H> {
    post: Rc<Post>,
    worker: Rc<Worker>,
    handler: Rc<H>,
    buffer: Rc<RefCell<ReceiveBuffer>>,
    connections_max: u32,
}

impl<H, F> Receiver<H>
where
    H: Fn(Connection) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    async fn receive(&self) -> Result<(), handoff::Error> {
        loop {
            self.worker.room(self.connections_max).await;
            let mut ready = self.post.end().ready().await.map_err(handoff::Error::Receive)?;
            loop {
                match self.post.end().get_ref().receive(&mut self.buffer.borrow_mut()) {
                    Ok(Received::Connections(arrivals)) => {
                        arrivals.for_each(|(record, fd)| self.spawn(&record, fd, None));
                        self.worker.publish();
                        self.worker.tick();
                    }
                    Ok(Received::Moved(moves, sockets)) => {
                        moves.iter().zip(sockets).for_each(|(moved, fd)| self.admit(moved, fd));
                        self.worker.publish();
                        self.worker.tick();
                    }
                    Ok(Received::Message(message)) => self.hear(&message),
                    Ok(Received::WouldBlock) => {
                        ready.clear_ready();
                        break;
                    }
                    Ok(Received::Closed) => return Ok(()),
                    // The descriptors of one message are lost, and the next one may fit again.
                    Err(error @ handoff::Error::OutOfDescriptors { .. }) => tracing::error!(%error),
                    Err(error) => return Err(error),
                }
                if self.worker.is_full(self.connections_max) && !self.worker.stop.is_requested() {
                    break;
                }
            }
        }
    }

    fn hear(&self, message: &GatewayMessage<'_>) {
        let Self { post, worker, .. } = self;
        match message {
            GatewayMessage::Grant(grant) => worker.mover.granted(post, grant),
            GatewayMessage::Flight(flight) => worker.mover.flight(post, flight),
            GatewayMessage::Revoke(gone) => worker.mover.revoked(post, *gone),
            GatewayMessage::Drained => {
                post.note_drained();
                worker.open.changed.notify_waiters();
            }
        }
    }

    /// Takes a connection that comes from another instance.
    fn admit(&self, moved: &Move<'_>, fd: OwnedFd) {
        match self.worker.mover.unpack(moved, &fd) {
            Ok(luggage) => self.spawn(&moved.connection, fd, Some(Box::new(luggage))),
            // Nobody can go on with it, and its client must not take its end for an answer's.
            Err(error) => {
                tracing::warn!(id = moved.connection.id, %error, "a connection that came from another instance was closed");
            }
        }
    }

    /// Nothing more comes from the gateway. What was said to it before is still sent if it is there.
    async fn part(&self) {
        let Self { worker, post, .. } = self;
        worker.mover.gateway_left(post);
        // The gateway is gone, unless this worker stops: then it reads on to the end of the last request.
        if !worker.stop.is_requested() {
            worker.tally.forget(post.status());
        }
        post.finished().await;
    }

    fn spawn(&self, record: &handoff::Connection, fd: OwnedFd, luggage: Option<Box<Luggage>>) {
        self.worker.serve(record, fd, luggage, &*self.handler);
    }
}

pin_project! {
    /// Tells the gateways when a connection is over. A future of its own, because an async block would hold the one
    /// that it awaits twice.
    struct Published<F> {
        #[pin]
        serving: F,
        worker: Rc<Worker>,
    }
}

impl<F: Future<Output = ()>> Future for Published<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        ready!(this.serving.poll(cx));
        this.worker.publish();
        Poll::Ready(())
    }
}

impl<H> Drop for Receiver<H> {
    fn drop(&mut self) {
        // Whoever waits for the last pool connection looks again, after this one is gone.
        let worker = &self.worker;
        worker.posts.borrow_mut().retain(|post| !std::ptr::eq(post.as_ptr(), Rc::as_ptr(&self.post)));
        worker.open.changed.notify_waiters();
    }
}
