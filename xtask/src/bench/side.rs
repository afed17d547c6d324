//! The sides that are compared, and what each of them can do.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::work::Port;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The function listens itself: the limit.
    Direct,
    /// Pointsman, the kernel judges.
    Sockmap,
    /// Pointsman, the gateway judges by peeking.
    Peek,
    Nginx,
    Haproxy,
    Envoy,
    Sniproxy,
}

/// A program that a user would pick instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Nginx,
    Haproxy,
    Envoy,
    Sniproxy,
}

impl Side {
    pub const ALL: [Self; 7] =
        [Self::Direct, Self::Sockmap, Self::Peek, Self::Nginx, Self::Haproxy, Self::Envoy, Self::Sniproxy];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Sockmap => "sockmap",
            Self::Peek => "peek",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::Sniproxy => "sniproxy",
        }
    }

    pub const fn peer(self) -> Option<Peer> {
        match self {
            Self::Direct | Self::Sockmap | Self::Peek => None,
            Self::Nginx => Some(Peer::Nginx),
            Self::Haproxy => Some(Peer::Haproxy),
            Self::Envoy => Some(Peer::Envoy),
            Self::Sniproxy => Some(Peer::Sniproxy),
        }
    }

    /// Why it has no such listener.
    pub const fn lacks(self, port: Port) -> Option<&'static str> {
        match (self, port) {
            (Self::Sniproxy, Port::Http) => Some("it routes HTTP by Host, not by path"),
            (Self::Sniproxy, Port::HttpsByRequest) => Some("it does not end TLS"),
            _ => None,
        }
    }

    /// The side's listener; its functions' own ones for the direct side.
    pub fn port(self, port: Port, function: usize) -> u16 {
        let side = Self::ALL.iter().position(|&side| side == self).unwrap_or(0) as u16;
        let own = match (self, port) {
            (Self::Direct, Port::Http) => 2 * function as u16,
            (Self::Direct, Port::Https | Port::HttpsByRequest) => 2 * function as u16 + 1,
            (_, Port::Http) => 0,
            // Pointsman's functions end TLS and route by the request, all on one port.
            (Self::Sockmap | Self::Peek, Port::Https | Port::HttpsByRequest) | (_, Port::Https) => 1,
            (_, Port::HttpsByRequest) => 2,
        };
        FIRST_PORT + PORTS_OF_A_SIDE * side + own
    }
}

impl Peer {
    /// The program's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::Sniproxy => "sniproxy",
        }
    }
}

/// Below the clients' ports.
const FIRST_PORT: u16 = 10_000;
const PORTS_OF_A_SIDE: u16 = 10;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_listeners_share_a_port() {
        let mut ports = BTreeSet::new();
        for side in Side::ALL {
            let functions = if side == Side::Direct { 3 } else { 1 };
            for function in 0..functions {
                assert!(ports.insert(side.port(Port::Http, function)));
                assert!(ports.insert(side.port(Port::Https, function)));
            }
            if side.peer().is_some() {
                assert!(ports.insert(side.port(Port::HttpsByRequest, 0)));
            }
        }
        assert!(ports.iter().all(|&port| port < 12_000));
    }
}
