//! HTTP/1.1 on one connection; the modules stand in the order in which a request passes through them.
mod access;
mod body;
mod chunked;
mod connection;
mod date;
mod departure;
mod exchange;
mod head;
mod hosts;
mod incoming;
mod limits;
mod output;
mod panics;
mod reject;
mod response;
mod route;
mod service;
mod tally;
mod upgrade;

pub use access::AccessLog;
pub use body::{Body, BodyError};
pub use connection::{Connection, Shared};
pub use head::OriginalUri;
pub use hosts::Hosts;
pub use limits::Limits;
pub use route::Identity;
pub use service::{BoxError, Service};
pub use tally::Tally;
pub use upgrade::{NotUpgraded, OnUpgrade, Upgraded};

#[cfg(test)]
mod tests;
