//! What can go wrong between a gateway and an instance, other than a send.
use std::{io, path::PathBuf};

use crate::message::DecodeError;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("opening the functions' directory {path}: {source}")]
    OpenDirectory { path: PathBuf, source: io::Error },

    #[error("the functions' directory {path} can't be trusted: {reason}")]
    UntrustedDirectory { path: PathBuf, reason: String },

    #[error("{path} is not the path of a socket in a directory")]
    NoSocketPath { path: PathBuf },

    #[error("connecting to the instance at {path}: {source}")]
    Connect { path: PathBuf, source: io::Error },

    #[error("receiving on a pool connection: {0}")]
    Receive(io::Error),

    #[error("a message on a pool connection: {0}")]
    Decode(#[from] DecodeError),

    /// All of the message's descriptors were closed; the pool connection itself is still in step.
    #[error(
        "{lost} connections were lost on receipt, because this process has no free file descriptor (RLIMIT_NOFILE)"
    )]
    OutOfDescriptors { lost: usize },

    #[error("a message on a pool connection is longer than any that this version knows")]
    Oversized,

    #[error("a message on a pool connection carries {got} descriptors where {expected} belong")]
    Descriptors { expected: usize, got: usize },

    #[error("an instance says HELLO twice")]
    RepeatedHello,

    #[error("the status page is not usable: {reason}")]
    StatusPage { reason: String },

    #[error("creating a status page: {0}")]
    CreateStatusPage(io::Error),

    #[error("sending HELLO on a pool connection: {0}")]
    SendHello(io::Error),

    #[error("the descriptor given as the pool's listening socket is not one: {reason}")]
    NoListener { reason: String },

    #[error("accepting a pool connection: {0}")]
    Accept(io::Error),

    #[error("user {uid} (pid {pid}) is not the gateway's and may not hand connections over")]
    ForeignPeer { uid: u32, pid: i32 },

    #[error("shutting a pool connection down: {0}")]
    Shutdown(io::Error),
}
