//! The admin listener: metrics, health and state for whoever operates a gateway.
pub mod client;
mod metrics;
pub mod report;
mod server;
pub mod snapshot;

pub use self::server::Server;
