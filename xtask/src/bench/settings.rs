//! How much is measured.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub rounds: usize,
    pub warm_up_ms: u64,
    pub measured_ms: u64,
    pub idle_connections: usize,
    /// Rounds of the works with idle connections, which take long and vary little.
    pub idle_rounds: usize,
}

impl Settings {
    pub const FULL: Self =
        Self { rounds: 5, warm_up_ms: 300, measured_ms: 1500, idle_connections: 10_000, idle_rounds: 2 };
    pub const QUICK: Self =
        Self { rounds: 1, warm_up_ms: 50, measured_ms: 200, idle_connections: 1000, idle_rounds: 1 };
}
