//! The gateway, as a library for its binary and for tests.
pub mod config;
pub mod counters;
pub mod doctor;
pub mod gateway;
pub mod instances;
pub mod kernel;
pub mod listener;
pub mod logs;
pub mod mode;
pub mod peek;
pub mod pending;
pub mod readable;
pub mod routes;
pub mod start;
pub mod supervise;
