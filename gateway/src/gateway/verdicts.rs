//! From accept to verdict: what came is judged at once, or held until it can be.
use std::{io, net::SocketAddr, os::fd::AsRawFd};

use common::{Protocol, Refusal, Verdict};
use handoff::{Connection, Purpose};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::{io::Interest, time::Instant};

use super::{ACCEPT_BATCH, ACCEPT_PAUSE, Gateway, monotonic_ns};
use crate::{counters::Source, instances::Ready, listener, peek::Look, pending::Accepted};

impl Gateway {
    /// Accepts in every turn, whatever it was for, and from both listeners, so that no event and no flood of one port
    /// keeps the other waiting. A listener that isn't ready costs nothing. True when there may be more.
    pub(super) fn accept_from_both(&mut self, now: Instant) -> bool {
        let (first, second) = match self.first {
            Protocol::Http => (Protocol::Http, Protocol::Https),
            Protocol::Https => (Protocol::Https, Protocol::Http),
        };
        self.first = second;
        let more = self.accept(first, now);
        self.accept(second, now) || more
    }

    /// True when it took a whole batch.
    fn accept(&mut self, protocol: Protocol, now: Instant) -> bool {
        if self.paused_until.is_some() {
            return false;
        }
        let now_ns = monotonic_ns();
        for _ in 0..ACCEPT_BATCH {
            let listener = match protocol {
                Protocol::Http => &self.http,
                Protocol::Https => &self.https,
            };
            match listener.try_io(Interest::READABLE, listener::accept) {
                Ok((socket, name)) => {
                    self.counters.accepted += 1;
                    if self.closes_at.is_some() {
                        listener::forget_filter(&socket);
                    }
                    let last = socket.as_raw_fd() >= self.descriptor_ceiling;
                    let accepted = Accepted {
                        socket,
                        protocol,
                        accepted_at: now,
                        accepted_at_ns: now_ns,
                        peeked: false,
                    };
                    self.judge(accepted, name);
                    if last {
                        self.pause(now, "descriptors run out");
                        return false;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if is_shortage(&error) => {
                    self.pause(now, &error.to_string());
                    return false;
                }
                // The connection's own error (accept(2)): it is gone, the next one may be well.
                Err(error) => tracing::debug!(%error, "a connection failed before it was accepted"),
            }
        }
        true
    }

    fn pause(&mut self, now: Instant, reason: &str) {
        tracing::warn!(reason, pause = ?ACCEPT_PAUSE, "accepting pauses");
        self.counters.pauses += 1;
        self.paused_until = Some(now + ACCEPT_PAUSE);
    }

    /// Descriptors are given out from the lowest number on, so the next one's says how many there are.
    pub(super) fn has_descriptors(&self) -> bool {
        let next = self.http.get_ref().try_clone();
        next.is_ok_and(|next| next.as_raw_fd() < self.descriptor_ceiling)
    }

    /// Reads the verdict that came with `accept`, or looks for one.
    fn judge(&mut self, accepted: Accepted, name: SocketAddr) {
        let Some(events) = &self.sockmap else { return self.look(accepted, Some(name)) };
        match events.get_ref().0.kernel.verdict_at_accept(name) {
            Some(Verdict::Pending) => self.hold(accepted),
            Some(verdict) => {
                self.counters.verdicts.add(Source::AtAccept, verdict);
                self.settle(accepted, verdict, None);
            }
            // The kernel does not follow this one. It may just be gone, which needs no look at its bytes to find out.
            None => match getsockopt(&accepted.socket, sockopt::SocketError) {
                Ok(0) => {
                    if !self.not_enrolled_was_said {
                        self.not_enrolled_was_said = true;
                        tracing::warn!(
                            "the kernel path does not follow every connection: some are judged in user space"
                        );
                    }
                    self.look(accepted, Some(name));
                }
                _ => self.counters.closed += 1,
            },
        }
    }

    fn look(&mut self, mut accepted: Accepted, peer: Option<SocketAddr>) {
        match self.peek.look(&accepted.socket, accepted.protocol, self.routes.current()) {
            Ok(Look::Verdict(verdict)) => {
                self.counters.verdicts.add(Source::UserSpace, verdict);
                self.settle(accepted, verdict, peer);
            }
            Ok(Look::Needs { bytes }) => {
                accepted.peeked = true;
                match listener::cookie(&accepted.socket) {
                    Ok(cookie) if self.waiting.get_ref().wait(&accepted.socket, cookie, bytes).is_ok() => {
                        self.hold_as(cookie, accepted);
                    }
                    _ => self.settle(accepted, Verdict::Refused(Refusal::Unavailable), peer),
                }
            }
            Err(error) => {
                tracing::debug!(%error, "a connection ended before its verdict");
                self.counters.closed += 1;
            }
        }
    }

    fn hold(&mut self, accepted: Accepted) {
        match listener::cookie(&accepted.socket) {
            Ok(cookie) => self.hold_as(cookie, accepted),
            Err(_) => self.settle(accepted, Verdict::Refused(Refusal::Unavailable), None),
        }
    }

    fn hold_as(&mut self, cookie: u64, accepted: Accepted) {
        if let Some((_, evicted)) = self.pending.hold(cookie, accepted) {
            self.release(evicted, Verdict::Refused(Refusal::Timeout));
        }
    }

    /// Takes the kernel's late verdicts.
    pub(super) fn take_events(&mut self) {
        let Some(events) = &mut self.sockmap else { return };
        let mut verdicts = Vec::new();
        let drained: io::Result<()> = events.try_io_mut(Interest::READABLE, |events| {
            let kernel = &mut events.0.kernel;
            kernel.drain_events(|cookie, verdict| verdicts.push((cookie, verdict)));
            Err(io::ErrorKind::WouldBlock.into())
        });
        debug_assert!(drained.is_err());
        for (cookie, verdict) in verdicts {
            if verdict == Verdict::Poisoned {
                self.destroy(cookie);
            }
            if let Some(accepted) = self.pending.take(cookie) {
                self.counters.verdicts.add(Source::Late, verdict);
                self.settle(accepted, verdict, None);
            }
        }
    }

    /// Ends a connection, wherever it is by now, that would else be truncated and look whole.
    fn destroy(&self, cookie: u64) {
        let Some(events) = &self.sockmap else { return };
        if let Err(error) = events.get_ref().0.kernel.destroy(cookie) {
            tracing::error!(%error, "can't destroy a connection whose bytes could not be kept exact");
        }
    }

    /// Looks again at connections that may have become complete.
    pub(super) fn look_again(&mut self) {
        let mut keys = Vec::new();
        let result = self.waiting.try_io(Interest::READABLE, |waiting| {
            if waiting.ready(&mut keys)? { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
        });
        match result {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::error!(%error, "can't read which connections became ready");
            }
            _ => {}
        }
        for (cookie, ended) in keys {
            let Some(accepted) = self.pending.get(cookie) else { continue };
            let verdict = match self.peek.look(&accepted.socket, accepted.protocol, self.routes.current()) {
                Ok(Look::Verdict(verdict)) => verdict,
                Ok(Look::Needs { .. }) if ended => Verdict::Refused(Refusal::Incomplete),
                Ok(Look::Needs { bytes }) => {
                    if self.waiting.get_ref().wait_on(&accepted.socket, cookie, bytes).is_ok() {
                        continue;
                    }
                    Verdict::Refused(Refusal::Unavailable)
                }
                Err(_) => Verdict::Closed,
            };
            if let Some(accepted) = self.pending.take(cookie) {
                self.counters.verdicts.add(Source::UserSpace, verdict);
                self.release(accepted, verdict);
            }
        }
    }

    /// Settles what was held, after user space has stopped waiting for it.
    pub(super) fn release(&mut self, accepted: Accepted, verdict: Verdict) {
        if accepted.peeked
            && let Err(error) = self.waiting.get_ref().forget(&accepted.socket)
        {
            tracing::debug!(%error, "a connection could not leave the epoll");
        }
        self.settle(accepted, verdict, None);
    }

    fn settle(&mut self, accepted: Accepted, verdict: Verdict, peer: Option<SocketAddr>) {
        let purpose = match verdict {
            Verdict::Route { generation, index } => match self.routes.function(generation, index) {
                Some(name) => Purpose::Serve(name),
                None => Purpose::Refuse(Refusal::NoFunction),
            },
            Verdict::Refused(refusal) => Purpose::Refuse(refusal),
            // Not complete after all is what its deadline would say.
            Verdict::Pending => Purpose::Refuse(Refusal::Timeout),
            Verdict::Poisoned => return self.counters.poisoned += 1,
            Verdict::Closed => return self.counters.closed += 1,
        };
        self.next_id += 1;
        let connection = Connection {
            id: self.next_id,
            accepted_at_ns: accepted.accepted_at_ns,
            protocol: accepted.protocol,
            purpose,
            peer,
            local: None,
        };
        self.ready.push(Ready { connection, socket: accepted.socket, wait_until: None });
    }

    /// A verdict whose event was lost stands in the kernel's map still.
    pub(super) fn last_word(&self, cookie: u64, accepted: &Accepted) -> Verdict {
        match &self.sockmap {
            Some(events) if !accepted.peeked => {
                events.get_ref().0.kernel.verdict_of(cookie).unwrap_or(Verdict::Closed)
            }
            _ => Verdict::Pending,
        }
    }
}

/// Descriptors or memory have run out: the listener stays readable, so only a pause helps.
fn is_shortage(error: &io::Error) -> bool {
    use nix::libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOBUFS | ENOMEM))
}
