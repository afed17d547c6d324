//! Puts a gateway together from its configuration, and takes it apart at the end.
use std::{
    io,
    net::SocketAddr,
    os::fd::RawFd,
    pin::{Pin, pin},
    time::{Duration, SystemTime},
};

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
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    admin::{
        Server,
        report::{About, Listeners, VerdictPath},
    },
    gateway::{Gateway, Parts},
    instances::Instances,
    kernel::{self, pins::Leftovers},
    listener,
    mode::{self, SelfTest, Sockmap, Wanted},
    reload::{Following, Source},
    routes::{FIRST_GENERATION, Routes},
    signals::Signals,
};

/// A silent client comes out of `accept` after this; more would fill the queue of half-open connections instead.
const DEFER_ACCEPT: Duration = Duration::from_secs(1);

/// Descriptors that connections without a verdict leave to the rest: pool connections, batches, maps.
const RESERVED_DESCRIPTORS: u64 = 1024;

/// Descriptors that clients leave to whoever inspects the gateway, and to instances that come up, if there are many.
const CLIENTLESS_DESCRIPTORS: u64 = 64;

/// Whoever inspects waits for an answer before the next question; more than these wait, too.
const INQUIRIES: usize = 4;

/// How long connections that the kernel still follows may take to finish when the gateway stops.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// How often a stopping gateway looks whether they have.
const STOP_POLL: Duration = Duration::from_millis(20);

/// How often a gateway looks whether what a killed one left is needed still.
const LEFTOVERS_POLL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Without it the kernel path corrupts data: for tests that show it.
    pub trim: bool,
    pub self_test: SelfTest,
}

/// Runs the gateway until SIGTERM or SIGINT.
pub fn run(source: Source, options: Options) -> Result<()> {
    let started = SystemTime::now();
    ignore_hangups()?;
    let config = source.read()?;
    let descriptors = raise_descriptor_limit().context("can't read the limit of open files")?;
    let routes = Routes::of(&config, FIRST_GENERATION)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    // Before there is anything to leave behind: who is told to stop while starting, starts and stops.
    let mut signals = {
        let _runtime = runtime.enter();
        Signals::catch()?
    };
    // Before there is a cgroup, to which it does not belong.
    let admin = config.gateway.admin.map(bind_admin).transpose()?;
    let wanted = Wanted {
        mode: config.gateway.verdict,
        http: config.gateway.http,
        https: config.gateway.https,
        trim: options.trim,
        self_test: options.self_test,
    };
    let unfit = "the kernel path is not fit on this host";
    let (choice, mut leftovers) = mode::prepare(&wanted).context(unfit)?;
    let http = bind(config.gateway.http)?;
    let https = bind(config.gateway.https)?;
    let options = kernel::Options { http_port: port(&http)?, https_port: port(&https)?, trim: options.trim };
    // Before the first connection can come, so that the kernel follows every one.
    let mode::Choice { kernel: mut sockmap, reason } =
        mode::load(&wanted, choice, &options, &routes).context(unfit)?;
    for (socket, address) in [(&http, config.gateway.http), (&https, config.gateway.https)] {
        listener::listen(socket, DEFER_ACCEPT).map_err(|error| cant_listen(address, &error))?;
    }
    runtime.block_on(async {
        let mut instances = Instances::new(&config.gateway.functions_dir)?;
        instances.set_weights(config.weights());
        instances.set_known(config.functions.keys().copied());
        let following = Following::new(source, config.gateway.clone())?;
        let verdict = if sockmap.is_some() { "sockmap" } else { "peek" };
        let (http_address, https_address) = (local_address(&http)?, local_address(&https)?);
        let (inquirer, inquiries) = mpsc::channel(INQUIRIES);
        let inspection = sockmap.as_mut().and_then(|sockmap| sockmap.kernel.take_inspection());
        let gateway = Gateway::new(Parts {
            http,
            https,
            routes,
            following,
            instances,
            sockmap,
            head_timeout: config.gateway.head_timeout,
            pending_capacity: pending_capacity(descriptors),
            descriptor_ceiling: descriptor_ceiling(descriptors),
            inquiries,
        })?;
        let admin_address = admin.as_ref().map(Server::address).transpose()?;
        if let (Some(server), Some(address)) = (admin, admin_address) {
            let about = About {
                started,
                listeners: Listeners { http: http_address, https: https_address, admin: address },
                verdict: VerdictPath {
                    configured: config.gateway.verdict.as_str().to_owned(),
                    path: verdict.to_owned(),
                    reason,
                },
            };
            server.start(about, inquirer, inspection)?;
        }
        let admin = admin_address.map_or("off".to_owned(), |address| address.to_string());
        tracing::info!(http = %http_address, https = %https_address, admin, verdict, "ready");
        let sockmap = {
            let serving = pin!(gateway.run(&mut signals));
            beside(serving, &mut leftovers).await
        };
        release(sockmap, leftovers, &mut signals).await;
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

/// Removes what a killed gateway left, as soon as no connection needs it, while something else is done.
async fn beside<T>(mut work: Pin<&mut impl Future<Output = T>>, leftovers: &mut Leftovers) -> T {
    loop {
        tokio::select! {
            done = work.as_mut() => return done,
            () = sleep(LEFTOVERS_POLL), if !leftovers.is_empty() => leftovers.sweep(),
        }
    }
}

fn bind(address: SocketAddr) -> Result<Socket> {
    listener::bind(address).map_err(|error| cant_listen(address, &error))
}

fn bind_admin(address: SocketAddr) -> Result<Server> {
    Server::bind(address).map_err(|error| {
        let refusal = cant_listen(address, &error);
        anyhow::anyhow!("{refusal} (the admin listener; `admin` in [gateway] or --admin puts it elsewhere)")
    })
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
async fn release(sockmap: Option<Sockmap>, mut leftovers: Leftovers, signals: &mut Signals) {
    let deadline = Instant::now() + STOP_PATIENCE;
    let mut waits = false;
    loop {
        leftovers.sweep();
        let enrolled = sockmap.as_ref().map_or(0, |sockmap| sockmap.kernel.enrolled().len());
        if enrolled == 0 && leftovers.own().next().is_none() {
            break;
        }
        if signals.hurry() {
            tracing::info!("told again: ends connections that depend on the BPF programs");
            break;
        }
        if !waits {
            waits = true;
            tracing::info!(enrolled, patience = ?STOP_PATIENCE, "waits for connections that depend on the BPF programs");
        }
        tokio::select! {
            () = signals.next() => {}
            () = sleep_until(deadline) => break,
            () = sleep(STOP_POLL) => {}
        }
    }
    leftovers.end();
    let Some(sockmap) = sockmap else { return };
    for counter in common::map_values::Counter::ALL {
        tracing::debug!(counter = counter.as_str(), value = sockmap.kernel.counter(counter), "kernel path");
    }
    sockmap.end();
}

/// Every held connection is a descriptor, so the limit is raised as far as it may be.
fn raise_descriptor_limit() -> nix::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard.min(libc::c_int::MAX as u64))
}

fn descriptor_ceiling(descriptors: u64) -> RawFd {
    let left = CLIENTLESS_DESCRIPTORS.min(descriptors / 4);
    RawFd::try_from(descriptors - left).unwrap_or(RawFd::MAX)
}

fn pending_capacity(descriptors: u64) -> usize {
    let share = descriptors.saturating_sub(RESERVED_DESCRIPTORS).max(descriptors / 4) / 2;
    usize::try_from(share).unwrap_or(usize::MAX)
}
