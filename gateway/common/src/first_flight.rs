//! The step by which both scanners of a connection's first bytes advance.
use crate::{Protocol, Refusal, client_hello::HelloScan, request_line::RequestScan, route::RouteKey};

/// What one more byte told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next byte is needed.
    More,
    /// The key holds the whole name that routes.
    Name,
    Refuse(Refusal),
}

/// A scanner of either protocol and the key that it fills: constant in size, resumable after any byte.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct FirstFlight {
    pub key: RouteKey,
    pub request: RequestScan,
    pub hello: HelloScan,
}

impl FirstFlight {
    pub const fn new(generation: u16, protocol: Protocol) -> Self {
        Self {
            key: RouteKey::empty(generation, protocol),
            request: RequestScan::new(),
            hello: HelloScan::new(),
        }
    }

    /// How many of the next bytes can't change the verdict, of `available`.
    #[inline(always)]
    pub fn skip(&mut self, available: u32) -> u32 {
        if self.key.protocol == Protocol::Https.code() { self.hello.skip(available) } else { 0 }
    }

    #[inline(always)]
    pub fn step(&mut self, byte: u8) -> Step {
        if self.key.protocol == Protocol::Https.code() {
            self.hello.step(&mut self.key, byte)
        } else {
            self.request.step(&mut self.key, byte)
        }
    }

    /// Feeds bytes until something is known or they end.
    pub fn feed(&mut self, bytes: &[u8]) -> Step {
        let mut offset = 0;
        while offset < bytes.len() {
            offset += self.skip((bytes.len() - offset) as u32) as usize;
            let Some(&byte) = bytes.get(offset) else { break };
            match self.step(byte) {
                Step::More => offset += 1,
                known => return known,
            }
        }
        Step::More
    }
}
