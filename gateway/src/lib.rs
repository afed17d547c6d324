//! The gateway, as a library for its binary and for tests.
pub mod config;
pub mod listener;
pub mod kernel;
pub mod instances;
pub mod supervise;
pub mod doctor;
