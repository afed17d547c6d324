//! TLS for functions: rustls makes the handshake, the record layer here goes on, so that a session can change process.

mod config;
mod fault;
mod handshake;
mod message;
mod record;
mod secrets;
mod state;
mod stream;
mod tickets;

pub use config::{Acceptor, ConfigError, anchors_from_file, anchors_from_path};
pub use fault::Fault;
pub use handshake::{HandshakeError, HandshakeFailure, plaintext_alert};
pub(crate) use secrets::CipherKey;
pub use secrets::{Aead, Version};
pub use state::{SessionState, StateError};
pub use stream::{NotMovable, TlsStream};

#[cfg(test)]
mod tests;
