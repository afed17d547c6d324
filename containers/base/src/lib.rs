//! What every function stands on: receiving connections, TLS, HTTP/1.1, one call to serve.
mod http;
mod linger;
mod peer;
pub mod socket;
mod stop;
mod stream;
mod timer;
pub mod tls;

pub use self::{
    http::{Body, BodyError, BoxError, NotUpgraded, OnUpgrade, OriginalUri, Upgraded},
    peer::PeerAddr,
};
