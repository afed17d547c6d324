//! What every function stands on: receiving connections, TLS, HTTP/1.1, one call to serve.
pub mod socket;
pub mod tls;
