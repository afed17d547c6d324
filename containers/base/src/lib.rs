//! What every function stands on.
pub mod tls;
