//! What the gateway's loop tells about itself when it is asked: copies of what it has at hand.
use common::FunctionName;
use tokio::sync::oneshot;

use crate::{
    counters::Counters,
    instances::{Batches, FunctionView, MoveCounts},
};

/// A question to the loop, which answers between two connections.
pub type Inquiry = oneshot::Sender<Snapshot>;

pub struct Snapshot {
    pub counters: Counters,
    /// The functions that the configuration routes to.
    pub routed: Vec<FunctionName>,
    /// Those that have instances or had some, refusal among them.
    pub functions: Vec<FunctionView>,
    pub batches: Batches,
    pub moves: MoveCounts,
    /// Connections without a verdict.
    pub pending: usize,
    /// Connections that found no instance yet.
    pub unplaced: usize,
}
