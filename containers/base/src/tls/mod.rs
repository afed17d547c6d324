//! TLS for functions.
