//! The one call that makes a program a function.
use std::{
    fs::File,
    process::ExitCode,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use clap::Parser;
use common::{FunctionName, Protocol};
use handoff::{ListenFds, MAX_BATCH, PoolListener, Purpose};
use rustls::AlertDescription;

use crate::{
    direct::{Listeners, ListenersError},
    http::{self, AccessLog, Hosts, Identity, Service, Shared},
    moves::{Agreements, Luggage, Moving, Origin, State},
    options::Options,
    pool::{self, Assignee},
    process,
    socket::Socket,
    stream::Stream,
    tls::{self, Acceptor, TlsStream},
    worker::{self, Connection, Direct, Held, Plan, Worker},
};

/// Serves a tower service until the process is asked to stop.
///
/// Call it first in `main`, before there are other threads. `make` is called once on each worker thread, and what it
/// returns is cloned for each connection; neither the service nor its futures need be `Send`.
///
/// ```no_run
/// use axum::{Router, extract::Path, routing::get};
///
/// fn main() -> std::process::ExitCode {
///     base::serve(|| Router::new().route("/{name}", get(greet)))
/// }
///
/// async fn greet(Path(name): Path<String>) -> String {
///     format!("Hello, {name}!")
/// }
/// ```
pub fn serve<M, S>(make: M) -> ExitCode
where
    M: Fn() -> S + Send + Sync + 'static,
    S: Service,
{
    start(|options, fds| {
        let name = options.function_name().ok_or(StartError::NoName)?;
        let hosts = Hosts::new(name, &options.domains, &options.hosts, &options.other_hosts);
        let acceptor = acceptor(options, fds)?;
        let moving = moving(name, options, fds, acceptor.as_ref())?;
        let options = options.clone();
        let make = move |worker: &Worker| {
            let shared = Rc::new(Shared {
                identity: Identity { name, hosts: hosts.clone() },
                limits: options.limits(),
                linger: worker.linger.clone(),
                stop: worker.stop.clone(),
                mover: worker.mover.clone(),
                succession: worker.succession.clone(),
                tally: worker.tally.clone(),
                access_log: options.access_log.then(AccessLog::default),
            });
            let service = make();
            let acceptor = acceptor.clone();
            move |connection| {
                serve_connection(connection, Rc::clone(&shared), acceptor.clone(), service.clone())
            }
        };
        Ok(Prepared { make, moving: Some(Arc::new(moving)) })
    })
}

/// Gives each connection to a future of its own, as it was received, until the process is asked to stop.
///
/// For functions that speak no HTTP. The process gives up root's rights before it takes the first connection.
pub fn receive<M, H, F>(make: M) -> ExitCode
where
    M: Fn(&Worker) -> H + Send + Sync + 'static,
    H: Fn(Connection) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    start(|_, _| {
        process::become_nobody().map_err(StartError::Privileges)?;
        Ok(Prepared { make, moving: None })
    })
}

/// What workers are made of.
struct Prepared<M> {
    make: M,
    moving: Option<Arc<Moving>>,
}

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("the sockets that the parent passed: {0}")]
    ListenFds(#[from] handoff::listen_fds::ListenFdsError),
    #[error(
        "no socket named `pool`, `http` or `https` was passed in LISTEN_FDS: functions are started by `pointsman supervise` or by systemd"
    )]
    NoSocket,
    #[error("{0}")]
    Listeners(#[from] ListenersError),
    #[error("the socket named `pool`: {0}")]
    Pool(handoff::Error),
    #[error("the function has no name: give it one with --name")]
    NoName,
    #[error("the certificate: {0}")]
    Certificate(#[from] tls::ConfigError),
    #[error(
        "a certificate needs its key, and a key its certificate: only one of them was passed in LISTEN_FDS"
    )]
    HalfCertificate,
    #[error("giving up root's rights: {0}")]
    Privileges(std::io::Error),
    #[error("hardening the process: {0}")]
    Harden(std::io::Error),
    #[error("the limit of open files: {0}")]
    Descriptors(std::io::Error),
    #[error("the main thread: {0}")]
    Main(std::io::Error),
    #[error("starting a worker thread: {0}")]
    Thread(std::io::Error),
}

fn start<M, H, F>(
    prepare: impl FnOnce(&Options, &mut ListenFds) -> Result<Prepared<M>, StartError>,
) -> ExitCode
where
    M: Fn(&Worker) -> H + Send + Sync + 'static,
    H: Fn(Connection) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let options = Options::parse();
    process::log();
    match run(&options, prepare) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run<M, H, F>(
    options: &Options,
    prepare: impl FnOnce(&Options, &mut ListenFds) -> Result<Prepared<M>, StartError>,
) -> Result<(), StartError>
where
    M: Fn(&Worker) -> H + Send + Sync + 'static,
    H: Fn(Connection) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let mut fds = ListenFds::take()?;
    process::harden().map_err(StartError::Harden)?;
    let connections = process::raise_descriptor_limit().map_err(StartError::Descriptors)?;
    let listener = fds.remove("pool").map(PoolListener::new).transpose().map_err(StartError::Pool)?;
    let listeners = Listeners::take(&mut fds)?;
    if listener.is_none() && listeners.is_empty() {
        return Err(StartError::NoSocket);
    }
    let Prepared { make, moving } = prepare(options, &mut fds)?;
    let make = Arc::new(make);
    drop(fds);

    let workers = options.worker_threads();
    let share = u32::try_from(connections / u64::from(workers)).unwrap_or(u32::MAX);
    let mut assignees = Vec::new();
    let mut threads = Vec::new();
    for index in 0..workers {
        let (assignee, pools) = Assignee::new();
        let plan = Plan {
            moving: moving.clone(),
            index,
            workers,
            connections_max: share.min(options.max_connections).max(MAX_BATCH as u32),
            stop_timeout: options.limits().stop_timeout,
        };
        let make = Arc::clone(&make);
        let direct = match listeners.is_empty() {
            true => None,
            false => Some(Direct {
                listeners: listeners.try_clone().map_err(StartError::Thread)?,
                name: options.function_name().ok_or(StartError::NoName)?,
            }),
        };
        let thread = thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || worker::run(&plan, pools, direct, |worker| make(worker)))
            .map_err(StartError::Thread)?;
        assignees.push(assignee);
        threads.push(thread);
    }
    tracing::info!(workers, "ready");
    pool::accept_until_stopped(listener, &options.allowed_uids(), assignees).map_err(StartError::Main)?;
    for thread in threads {
        match thread.join() {
            Ok(result) => result.map_err(StartError::Thread)?,
            Err(_) => return Err(StartError::Thread(std::io::Error::other("it panicked"))),
        }
    }
    Ok(())
}

/// What is served under TLS, if anything is.
fn acceptor(options: &Options, fds: &mut ListenFds) -> Result<Option<Acceptor>, StartError> {
    let passed = (fds.remove("certificate"), fds.remove("key"));
    match (passed, &options.certificate, &options.key) {
        ((Some(certificate), Some(key)), _, _) => {
            let ticket_keys = fds.remove("tickets");
            Ok(Some(Acceptor::from_files(&File::from(certificate), &File::from(key), ticket_keys)?))
        }
        ((None, None), Some(certificate), Some(key)) => Ok(Some(Acceptor::from_paths(certificate, key)?)),
        ((None, None), None, None) => Ok(None),
        _ => Err(StartError::HalfCertificate),
    }
}

/// How this function's connections move to others.
fn moving(
    name: FunctionName,
    options: &Options,
    fds: &mut ListenFds,
    acceptor: Option<&Acceptor>,
) -> Result<Moving, StartError> {
    let anchors = match (fds.remove("anchors"), &options.anchors) {
        (Some(file), _) => Some(tls::anchors_from_file(&File::from(file))?),
        (None, Some(path)) => Some(tls::anchors_from_path(path)?),
        (None, None) => None,
    };
    let agreements = acceptor.zip(anchors).map(|(acceptor, anchors)| {
        Agreements::new(Arc::clone(acceptor.identity()), anchors, options.domains.clone())
    });
    Ok(Moving { name, policy: options.moves_to.clone(), agreements, pairs: Default::default() })
}

fn serve_connection<S: Service>(
    connection: Connection,
    shared: Rc<Shared>,
    acceptor: Option<Acceptor>,
    mut service: S,
) -> impl Future<Output = ()> {
    // A connection is mostly in between: its beginning and its end are on the heap, so that it has no room for them.
    let opening = Box::pin(open(connection, shared, acceptor));
    async move {
        let Some((held, mut connection)) = opening.await else { return };
        let finish = connection.serve(&mut service).await;
        Box::pin(connection.finish(finish, held)).await;
    }
}

/// A connection that can be asked something, unless it came to nothing.
async fn open(
    connection: Connection,
    shared: Rc<Shared>,
    acceptor: Option<Acceptor>,
) -> Option<(Held, http::Connection)> {
    let Connection { id, accepted_at_ns, protocol, purpose, socket, luggage, held } = connection;
    let origin = Origin { id, accepted_at_ns };
    if !is_for(&shared.identity.name, &purpose) {
        // Serving it would answer one function's clients by another function.
        tracing::warn!(id, ?purpose, "the gateway sent a connection that isn't this function's");
        return None;
    }
    let Some(luggage) = luggage else {
        let stream = greet(id, protocol, socket, acceptor, &shared).await?;
        return Some((held, http::Connection::new(stream, protocol, origin, shared)));
    };
    let Luggage { home, requests, state } = *luggage;
    let (stream, input) = match state {
        State::Plain(input) => (Stream::Plain(socket), input),
        State::Tls(state) => (Stream::Tls(TlsStream::from_parts(socket, *state)), Vec::new()),
    };
    let mut connection = http::Connection::new(stream, protocol, origin, shared);
    connection.resume(home, requests, &input);
    Some((held, connection))
}

/// The stream of a new connection, unless its handshake fails.
async fn greet(
    id: u64,
    protocol: Protocol,
    socket: Socket,
    acceptor: Option<Acceptor>,
    shared: &Shared,
) -> Option<Stream> {
    match (protocol, acceptor) {
        (Protocol::Http, _) => Some(Stream::Plain(socket)),
        (Protocol::Https, Some(acceptor)) => {
            // On the heap, because a connection in the clear needs nothing of it.
            match Box::pin(acceptor.accept(socket, shared.limits.head_timeout)).await {
                Ok(stream) => Some(Stream::Tls(stream)),
                Err(failure) => {
                    tracing::debug!(id, error = %failure.error, "no TLS session");
                    Box::pin(shared.linger.close(failure.socket)).await;
                    None
                }
            }
        }
        (Protocol::Https, None) => {
            static WARNED: AtomicBool = AtomicBool::new(false);
            if !WARNED.swap(true, Ordering::Relaxed) {
                tracing::warn!("HTTPS connections are closed, because this function has no certificate");
            }
            // A client that can't take seven bytes goes without them.
            let _ = socket.send_now(&tls::plaintext_alert(AlertDescription::InternalError));
            Box::pin(shared.linger.close(socket)).await;
            None
        }
    }
}

fn is_for(name: &FunctionName, purpose: &Purpose) -> bool {
    matches!(purpose, Purpose::Serve(function) if function == name)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors say what their cause is, some leave it to their source.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
