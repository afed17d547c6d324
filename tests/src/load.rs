//! Clients that ask without a pause while something is changed, and an account of every request that failed.
use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    probe::answerer,
    stack::{AddressBook, host},
    wire::Client,
};

/// How a client treats its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Each request on a connection of its own.
    New,
    /// As many requests on a connection as the function allows.
    KeepAlive,
    /// All requests on one connection, which must not end.
    Unbroken,
}

/// Clients over HTTP and TLS, at work until they are stopped.
pub struct Load {
    clients: Vec<JoinHandle<Result<()>>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    answers: AtomicUsize,
}

impl Load {
    /// Clients of one function. Must be called in the thread whose network namespace the stack is in.
    pub fn start(stack: &AddressBook, function: &str) -> Self {
        Self::of(stack, &[function], &[Manner::New, Manner::KeepAlive])
    }

    /// Clients that ask these functions in turn, on one connection.
    pub fn moving(stack: &AddressBook, functions: &[&str]) -> Self {
        Self::of(stack, functions, &[Manner::KeepAlive])
    }

    /// Clients that ask these functions in turn, on one connection which nobody else may end.
    pub fn unbroken(stack: &AddressBook, functions: &[&str]) -> Self {
        Self::of(stack, functions, &[Manner::Unbroken])
    }

    fn of(stack: &AddressBook, functions: &[&str], manners: &[Manner]) -> Self {
        let shared = Arc::new(Shared::default());
        let mut clients = Vec::new();
        for &manner in manners {
            for secure in [false, true] {
                let functions: Vec<_> = functions.iter().map(|&name| name.to_owned()).collect();
                let (stack, shared) = (stack.clone(), Arc::clone(&shared));
                clients.push(thread::spawn(move || {
                    ask(&stack, &functions, manner, secure, &shared).with_context(|| {
                        format!("{functions:?}, {manner:?}, {}", if secure { "TLS" } else { "HTTP" })
                    })
                }));
            }
        }
        Self { clients, shared }
    }

    /// The requests that were answered until now.
    pub fn answers(&self) -> usize {
        self.shared.answers.load(Ordering::Relaxed)
    }

    /// Waits until each kind of client had the time for some more requests.
    pub fn wait_for_more(&self) {
        let before = self.answers();
        crate::eventually("requests to be answered", || {
            let failed = self.clients.iter().any(JoinHandle::is_finished);
            (failed || self.answers() >= before + 40).then_some(())
        });
    }

    /// Fails with the first request that did.
    pub fn stop(mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in mem::take(&mut self.clients) {
            client.join().expect("a client panicked")?;
        }
        ensure!(self.shared.answers.load(Ordering::Relaxed) > 0, "nobody asked");
        Ok(())
    }
}

impl Drop for Load {
    /// A test that failed leaves nobody behind who asks on.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn ask(
    stack: &AddressBook,
    functions: &[String],
    manner: Manner,
    secure: bool,
    shared: &Shared,
) -> Result<()> {
    let first = &functions[0];
    let mut kept: Option<(Client, usize)> = None;
    while !shared.stop.load(Ordering::Relaxed) {
        let (mut client, answered) = match kept.take() {
            Some(kept) => kept,
            None if secure => (stack.tls_client(first).context("a new session")?, 0),
            None => (stack.client()?, 0),
        };
        let function = &functions[answered % functions.len()];
        let is_at_home = secure && functions.len() == 1;
        let target = if is_at_home { "/".to_owned() } else { format!("/function/{function}") };
        let answer = client
            .request("GET", &target, &host(first), None)
            .with_context(|| format!("after {answered} answers on this connection"))?;
        ensure!(answer.status() == 200 && answerer(&answer).is_some(), "{answer:?}");
        shared.answers.fetch_add(1, Ordering::Relaxed);
        let closes = answer.head.field("connection") == Some("close");
        match manner {
            Manner::New => {}
            Manner::KeepAlive if closes => client.expect_close()?,
            Manner::Unbroken if closes => bail!("an end after {answered} answers on this connection"),
            Manner::KeepAlive | Manner::Unbroken => kept = Some((client, answered + 1)),
        }
    }
    Ok(())
}
