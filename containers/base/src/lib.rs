//! What every function stands on: receiving connections, TLS, HTTP/1.1, one call to serve.
mod direct;
mod function;
mod http;
mod linger;
mod memory;
mod moves;
mod options;
mod peer;
mod pool;
mod process;
mod readable;
pub mod socket;
mod stop;
mod stream;
mod timer;
pub mod tls;
mod worker;

/// What the benchmarks measure alone; nobody else's to use.
#[doc(hidden)]
pub mod internals {
    pub use crate::{
        http::{Connection, Hosts, Identity, Limits, Shared, Tally},
        moves::{Mover, Origin, Succession},
        stop::Stop,
        stream::Stream,
    };
}

pub use self::{
    function::{receive, serve},
    http::{Body, BodyError, BoxError, NotUpgraded, OnUpgrade, OriginalUri, Service, Upgraded},
    linger::Linger,
    options::Options,
    peer::PeerAddr,
    worker::{Connection, Held, Worker},
};
pub use handoff::Purpose;
