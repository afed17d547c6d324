//! Serving without a gateway: a worker accepts from listening TCP sockets that the function's parent passed.
use std::{future::poll_fn, io, net::TcpListener, os::fd::OwnedFd, rc::Rc, time::Duration};

use common::{FunctionName, Protocol};
use handoff::{ListenFds, MAX_BATCH, Purpose};
use socket2::{Domain, SockRef, Type};
use tokio::{task::spawn_local, time::sleep};

use crate::{
    readable::Readable,
    worker::{Connection, Worker},
};

/// How long accepting rests when it fails for want of something, such as descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The listening sockets, by the names that they have in LISTEN_FDS.
const NAMES: [(&str, Protocol); 2] = [("http", Protocol::Http), ("https", Protocol::Https)];

/// Listening sockets; each worker has clones of its own.
#[derive(Default)]
pub(crate) struct Listeners(Vec<(Protocol, TcpListener)>);

#[derive(Debug, thiserror::Error)]
pub enum ListenersError {
    #[error("the socket named `{name}` is no listening TCP socket")]
    NotListening { name: &'static str },
    #[error("the socket named `{name}`: {source}")]
    Io { name: &'static str, source: io::Error },
}

impl Listeners {
    pub fn take(fds: &mut ListenFds) -> Result<Self, ListenersError> {
        let mut listeners = Vec::new();
        for (name, protocol) in NAMES {
            while let Some(fd) = fds.remove(name) {
                listeners.push((protocol, listener(name, fd)?));
            }
        }
        Ok(Self(listeners))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// For another worker: whichever is idle takes the next connection.
    pub fn try_clone(&self) -> io::Result<Self> {
        let clones = self.0.iter().map(|(protocol, listener)| Ok((*protocol, listener.try_clone()?)));
        Ok(Self(clones.collect::<io::Result<_>>()?))
    }

    /// Accepts until the worker is asked to stop. What is accepted is `name`'s: there is nobody else here.
    pub fn serve<H, F>(self, name: FunctionName, worker: &Rc<Worker>, connections_max: u32, handler: &Rc<H>)
    where
        H: Fn(Connection) -> F + 'static,
        F: Future<Output = ()> + 'static,
    {
        for (protocol, listener) in self.0 {
            let (worker, handler) = (Rc::clone(worker), Rc::clone(handler));
            spawn_local(async move {
                let mut stopped = worker.stop.listener();
                let accepting = accept(listener, protocol, name, &worker, connections_max, &*handler);
                tokio::select! {
                    () = poll_fn(|cx| stopped.poll(cx)) => {}
                    Err(error) = accepting => tracing::error!(%error, "nothing more can be accepted"),
                }
            });
        }
    }
}

fn listener(name: &'static str, fd: OwnedFd) -> Result<TcpListener, ListenersError> {
    let io = |source: io::Error| ListenersError::Io { name, source };
    let socket = SockRef::from(&fd);
    let is_inet = matches!(socket.domain().map_err(io)?, Domain::IPV4 | Domain::IPV6);
    let is_stream = socket.r#type().map_err(io)? == Type::STREAM;
    if !is_inet || !is_stream || !socket.is_listener().map_err(io)? {
        return Err(ListenersError::NotListening { name });
    }
    socket.set_nonblocking(true).map_err(io)?;
    Ok(TcpListener::from(fd))
}

async fn accept<H, F>(
    listener: TcpListener,
    protocol: Protocol,
    name: FunctionName,
    worker: &Rc<Worker>,
    connections_max: u32,
    handler: &H,
) -> io::Result<()>
where
    H: Fn(Connection) -> F,
    F: Future<Output = ()> + 'static,
{
    let listener = Readable::new(listener)?;
    let mut id = 0;
    loop {
        worker.room(connections_max).await;
        let mut ready = listener.ready().await?;
        let mut failed = None;
        for _ in 0..MAX_BATCH {
            match listener.get_ref().accept() {
                Ok((stream, peer)) => {
                    id += 1;
                    let purpose = Purpose::Serve(name);
                    let (peer, accepted_at_ns) = (Some(peer), 0);
                    let record =
                        handoff::Connection { id, accepted_at_ns, protocol, purpose, peer, local: None };
                    worker.serve(&record, stream.into(), None, handler);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    break;
                }
                Err(error) if is_the_clients(&error) => {}
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        worker.publish();
        worker.tick();
        if let Some(error) = failed {
            tracing::warn!(%error, pause = ?ACCEPT_PAUSE, "accepting pauses");
            sleep(ACCEPT_PAUSE).await;
        }
    }
}

/// Errors of the connection that would have been next (accept(2)); the one after it may be well.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_listening_tcp_socket_will_do() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        assert!(matches!(
            listener("http", client.into()),
            Err(ListenersError::NotListening { name: "http" })
        ));
        let unix = std::env::temp_dir().join(format!("direct.{}", std::process::id()));
        let other = UnixListener::bind(&unix).unwrap();
        std::fs::remove_file(unix).unwrap();
        assert!(matches!(listener("https", other.into()), Err(ListenersError::NotListening { .. })));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(listener("http", file.into()), Err(ListenersError::Io { .. })));
        assert!(listener("http", tcp.into()).is_ok());
    }
}
