//! Puts a gateway together from its configuration, and takes it apart at the end.
use std::{io, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    libc,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{self as signals, SigHandler, Signal},
    },
};
use socket2::Socket;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};

use crate::{
    gateway::{Gateway, Parts},
    instances::Instances,
    kernel, listener,
    mode::{self, Sockmap},
    reload::{Following, Source},
    routes::{FIRST_GENERATION, Routes},
};

/// A silent client comes out of `accept` after this; more would fill the queue of half-open connections instead.
const DEFER_ACCEPT: Duration = Duration::from_secs(1);

/// Descriptors that connections without a verdict leave to the rest: pool connections, batches, maps.
const RESERVED_DESCRIPTORS: u64 = 1024;

/// How long connections that the kernel still follows may take to finish when the gateway stops.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// How often a stopping gateway looks whether they have.
const STOP_POLL: Duration = Duration::from_millis(20);

/// Runs the gateway until SIGTERM or SIGINT. Without `trim` the kernel path corrupts data: for tests that show it.
pub fn run(source: Source, trim: bool) -> Result<()> {
    ignore_hangups()?;
    let config = source.read()?;
    let descriptors = raise_descriptor_limit().context("can't read the limit of open files")?;
    let routes = Routes::of(&config, FIRST_GENERATION)?;
    let cgroup = mode::prepare(config.gateway.verdict).context("the kernel path is not fit on this host")?;
    let http = bind(config.gateway.http)?;
    let https = bind(config.gateway.https)?;
    let options = kernel::Options { http_port: port(&http)?, https_port: port(&https)?, trim };
    // Before the first connection can come, so that the kernel follows every one.
    let sockmap = cgroup.map(|cgroup| Sockmap::load(&options, cgroup, &routes)).transpose()?;
    for (socket, address) in [(&http, config.gateway.http), (&https, config.gateway.https)] {
        listener::listen(socket, DEFER_ACCEPT).map_err(|error| cant_listen(address, &error))?;
    }
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let mut instances = Instances::new(&config.gateway.functions_dir)?;
        instances.set_weights(config.weights());
        instances.set_known(config.functions.keys().copied());
        let following = Following::new(source, config.gateway.clone())?;
        let verdict = if sockmap.is_some() { "sockmap" } else { "peek" };
        let (http_address, https_address) = (local_address(&http)?, local_address(&https)?);
        let gateway = Gateway::new(Parts {
            http,
            https,
            routes,
            following,
            instances,
            sockmap,
            head_timeout: config.gateway.head_timeout,
            pending_capacity: pending_capacity(descriptors),
        })?;
        tracing::info!(http = %http_address, https = %https_address, verdict, "ready");
        if let Some(sockmap) = gateway.run(stop).await {
            release(sockmap).await;
        }
        tracing::info!("stopped");
        Ok(())
    })
}

/// A reload that is asked for before there is anything to reload must not end the process.
fn ignore_hangups() -> Result<()> {
    // SAFETY: ignoring a signal installs no code.
    unsafe { signals::signal(Signal::SIGHUP, SigHandler::SigIgn) }.context("can't ignore SIGHUP")?;
    Ok(())
}

fn bind(address: SocketAddr) -> Result<Socket> {
    listener::bind(address).map_err(|error| cant_listen(address, &error))
}

fn cant_listen(address: SocketAddr, error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("can't listen on {address}: another program uses this port")
        }
        _ => anyhow::anyhow!("can't listen on {address}: {error}"),
    }
}

fn local_address(listener: &Socket) -> Result<SocketAddr> {
    listener.local_addr()?.as_socket().context("a listener has no Internet address")
}

fn port(listener: &Socket) -> Result<u16> {
    Ok(local_address(listener)?.port())
}

/// Lets connections that depend on the programs finish, and ends the rest: without the programs they would hang.
async fn release(sockmap: Sockmap) {
    let deadline = Instant::now() + STOP_PATIENCE;
    let mut enrolled = sockmap.kernel.enrolled();
    while !enrolled.is_empty() && Instant::now() < deadline {
        sleep(STOP_POLL).await;
        enrolled = sockmap.kernel.enrolled();
    }
    for cookie in enrolled {
        if let Err(error) = sockmap.kernel.destroy(cookie) {
            tracing::warn!(%error, "can't end a connection that depends on the BPF programs");
        }
    }
    for counter in common::map_values::Counter::ALL {
        tracing::debug!(counter = counter.as_str(), value = sockmap.kernel.counter(counter), "kernel path");
    }
}

/// Every held connection is a descriptor, so the limit is raised as far as it may be.
fn raise_descriptor_limit() -> nix::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard.min(libc::c_int::MAX as u64))
}

fn pending_capacity(descriptors: u64) -> usize {
    let share = descriptors.saturating_sub(RESERVED_DESCRIPTORS).max(descriptors / 4) / 2;
    usize::try_from(share).unwrap_or(usize::MAX)
}
