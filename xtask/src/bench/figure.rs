//! What is measured: names, units, and which direction is better.

use serde::{Deserialize, Serialize};

use super::statistics::Spread;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    RequestsPerSecond,
    MibPerSecond,
    P50Us,
    P99Us,
    P999Us,
    /// Seconds for 10 000 requests, or for a GiB: between clients and functions.
    CpuFront,
    CpuFunctions,
    CpuClients,
    /// The kernel's own threads, which finish what connections leave behind.
    CpuKernel,
    CpuTotal,
    /// The share of one core that the front uses for connections that don't complete their first flight.
    FrontShare,
    /// MiB for 10 000 connections.
    MemoryFront,
    MemoryFunctions,
    MemoryTotal,
    MemorySlab,
    Errors,
    /// What else the machine did meanwhile, as a share of all its cores.
    Foreign,
}

impl Figure {
    pub const fn label(self) -> &'static str {
        match self {
            Self::RequestsPerSecond => "requests/s",
            Self::MibPerSecond => "MiB/s",
            Self::P50Us => "p50 µs",
            Self::P99Us => "p99 µs",
            Self::P999Us => "p99.9 µs",
            Self::CpuFront => "CPU gateway",
            Self::CpuFunctions => "CPU functions",
            Self::CpuClients => "CPU clients",
            Self::CpuKernel => "CPU kernel threads",
            Self::CpuTotal => "CPU total",
            Self::FrontShare => "gateway's core",
            Self::MemoryFront => "MiB gateway",
            Self::MemoryFunctions => "MiB functions",
            Self::MemoryTotal => "MiB both",
            Self::MemorySlab => "MiB kernel slab",
            Self::Errors => "errors",
            Self::Foreign => "other load",
        }
    }

    pub const fn more_is_better(self) -> bool {
        matches!(self, Self::RequestsPerSecond | Self::MibPerSecond)
    }

    /// How near values come to others, round by round: 1 is as good, more is better.
    pub fn ratio(self, values: &[f64], others: &[f64]) -> Option<Spread> {
        if self.more_is_better() {
            Spread::of_ratios(values, others)
        } else {
            Spread::of_ratios(others, values)
        }
    }
}
