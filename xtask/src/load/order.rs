//! What the load generator is asked to do, and what it answers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    pub load: Load,
    /// Where connections go, and what the requests on one connection ask for, in turn.
    pub address: SocketAddr,
    pub requests: Vec<Request>,
    /// Without it the connections are in the clear.
    pub tls: Option<Tls>,
    pub connections: usize,
    pub threads: usize,
    pub warm_up_ms: u64,
    pub duration_ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    pub host: String,
    pub target: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tls {
    pub authority: PathBuf,
    pub version: Version,
    pub resume: bool,
    pub hello: Hello,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    V12,
    V13,
}

/// How a ClientHello leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hello {
    Whole,
    /// In this many segments, with a pause between them.
    Split {
        segments: usize,
    },
    /// As long as one with a post-quantum key share, in segments as Ethernet cuts it, one right after the other.
    Large,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Load {
    /// A connection for each request.
    NewConnections,
    /// All requests of a client on one connection.
    KeepAlive,
    /// Answers of this many bytes, on one connection.
    Download { bytes: u64 },
    /// Bodies of this many bytes, on one connection.
    Upload { bytes: u64 },
    /// Connections that begin with nonsense.
    Garbage,
    /// Opens these and leaves them open.
    Hold { count: usize, what: Held },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// One request was answered.
    Idle,
    /// The first half of the first flight was sent.
    HalfFlight,
}

/// What the load generator saw in the measured time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    pub elapsed_s: f64,
    pub requests: u64,
    /// Of bodies, in the direction that the load is about.
    pub bytes: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    /// What went wrong and how often; a side that can't do the work shows here.
    pub errors: BTreeMap<String, u64>,
}

impl Seen {
    pub fn errors(&self) -> u64 {
        self.errors.values().sum()
    }
}
