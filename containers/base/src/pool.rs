//! The main thread: lets gateways in and spreads their pool connections over the workers, until asked to stop.
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
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
pub(crate) struct Counted(Arc<AtomicUsize>);

/// The main thread's view of a worker.
pub(crate) struct Assignee {
    pool_connections: Arc<AtomicUsize>,
    pools: mpsc::UnboundedSender<Pool>,
}

impl Assignee {
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Pool>) {
        let (pools, receiver) = mpsc::unbounded_channel();
        (Self { pool_connections: Arc::default(), pools }, receiver)
    }

    fn assign(&self, connection: PoolConnection) {
        self.pool_connections.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&self.pool_connections));
        // A worker that is gone has ended the process.
        let _ = self.pools.send(Pool { connection, counted });
    }

    fn load(&self) -> usize {
        self.pool_connections.load(Ordering::Relaxed)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
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
                    if let Some(worker) = workers.iter().min_by_key(|worker| worker.load()) {
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
