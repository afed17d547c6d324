//! The gateway, as a library for its binary and for tests.
pub mod config;
pub mod supervise;
pub mod doctor;
pub mod instances;
