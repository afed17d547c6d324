//! The main thread: lets gateways in and spreads their pool connections over the workers, until asked to stop.
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use handoff::{AllowedUids, PoolConnection, PoolListener};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::sleep,
};

use crate::readable::Readable;

/// How long accepting rests when it fails for want of something, such as descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A gateway's connection on its way to a worker.
pub(crate) struct Pool {
    pub connection: PoolConnection,
    /// To be dropped with the connection.
    pub counted: Counted,
}

/// Counts a worker's pool connection for as long as it lives.
pub(crate) struct Counted {
    peers: Peers,
    peer: i32,
}

/// The processes at the other ends of one worker's pool connections.
type Peers = Arc<Mutex<Vec<i32>>>;

/// The main thread's view of a worker.
pub(crate) struct Assignee {
    peers: Peers,
    pools: mpsc::UnboundedSender<Pool>,
}

impl Assignee {
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Pool>) {
        let (pools, receiver) = mpsc::unbounded_channel();
        (Self { peers: Arc::default(), pools }, receiver)
    }

    fn assign(&self, connection: PoolConnection) {
        let peer = connection.peer();
        lock(&self.peers).push(peer);
        let counted = Counted { peers: Arc::clone(&self.peers), peer };
        // A worker that is gone has ended the process.
        let _ = self.pools.send(Pool { connection, counted });
    }

    /// How many it has from this process, and in all. The former comes first: a gateway gets each worker once, whoever
    /// else is there, such as a supervisor that looks whether somebody listens.
    fn load(&self, peer: i32) -> (usize, usize) {
        let peers = lock(&self.peers);
        (peers.iter().filter(|&&other| other == peer).count(), peers.len())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut peers = lock(&self.peers);
        if let Some(index) = peers.iter().position(|&peer| peer == self.peer) {
            peers.swap_remove(index);
        }
    }
}

fn lock(peers: &Peers) -> MutexGuard<'_, Vec<i32>> {
    // No holder leaves it half done.
    peers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Accepts until the process is asked to stop. Dropping the workers' ends then is what stops them.
///
/// Without a listener there are no gateways, only clients that connect to the workers.
pub(crate) fn accept_until_stopped(
    listener: Option<PoolListener>,
    allowed: &AllowedUids,
    workers: Vec<Assignee>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            Some(result) = gateways(listener, allowed, &workers) => result,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })
}

async fn gateways(
    listener: Option<PoolListener>,
    allowed: &AllowedUids,
    workers: &[Assignee],
) -> Option<io::Result<()>> {
    Some(accept(listener?, allowed, workers).await)
}

async fn accept(listener: PoolListener, allowed: &AllowedUids, workers: &[Assignee]) -> io::Result<()> {
    let listener = Readable::new(listener)?;
    loop {
        let mut ready = listener.ready().await?;
        loop {
            match listener.get_ref().accept(allowed) {
                Ok(Some(connection)) => {
                    // A gateway that connects once for each worker finds each of them the least loaded in turn.
                    if let Some(worker) = workers.iter().min_by_key(|worker| worker.load(connection.peer())) {
                        worker.assign(connection);
                    }
                }
                Ok(None) => break,
                Err(error @ handoff::Error::ForeignPeer { .. }) => {
                    tracing::warn!(%error, "somebody else than the gateway was turned away");
                }
                Err(error) => {
                    tracing::warn!(%error, "a gateway could not be let in");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        ready.clear_ready();
    }
}
